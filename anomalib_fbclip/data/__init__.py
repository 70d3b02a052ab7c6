# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Data modules of this package."""

from importlib import import_module
from typing import Any

from anomalib_fbclip.registration import EXPORTS

_MODULES = {name: module for name, module in EXPORTS.items() if module.startswith(f"{__name__}.")}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:  # noqa: ANN401  # classes of many kinds
    # The generator is used without anomalib, by the recipe of the embedded backbone among others.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
