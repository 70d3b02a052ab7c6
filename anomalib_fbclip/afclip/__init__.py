# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""AF-CLIP: zero-shot anomaly detection with an adaptor that makes CLIP look at anomalies."""

from importlib import import_module
from typing import Any

from anomalib_fbclip.registration import EXPORTS

from .torch_model import AFCLIPModel

__all__ = ["AFCLIP", "AFCLIPModel"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a class
    # The Lightning module imports the whole of anomalib; the torch model needs little of it.
    if name == "AFCLIP":
        return getattr(import_module(EXPORTS[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
