# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""AnomalyCLIP: zero-shot anomaly detection with prompts that know no object."""

from importlib import import_module
from typing import Any

from anomalib_fbclip.registration import EXPORTS

from .torch_model import AnomalyCLIPModel

__all__ = ["AnomalyCLIP", "AnomalyCLIPModel"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a class
    # The Lightning module imports the whole of anomalib; the torch model needs little of it.
    if name == "AnomalyCLIP":
        return getattr(import_module(EXPORTS[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
