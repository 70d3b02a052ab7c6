# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FB-CLIP: zero-shot anomaly detection by disentangling foreground and background in CLIP."""

from importlib import import_module
from typing import Any

from anomalib_fbclip.registration import EXPORTS

from .torch_model import FBCLIPModel

__all__ = ["FBCLIP", "FBCLIPModel"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a class
    # The Lightning module imports the whole of anomalib; the torch model needs little of it.
    if name == "FBCLIP":
        return getattr(import_module(EXPORTS[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
