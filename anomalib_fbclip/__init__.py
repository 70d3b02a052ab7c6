# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FB-CLIP for anomalib: zero-shot anomaly detection with a foreground-background view of CLIP.

Importing this package costs nothing: every public name of :data:`anomalib_fbclip.registration.EXPORTS` is loaded when
it is first used (PEP 562). The models register themselves with anomalib, see :mod:`anomalib_fbclip.registration`.
"""

from importlib import import_module
from typing import Any

from anomalib_fbclip.registration import EXPORTS

__version__ = "0.1.0"

__all__ = ["__version__", *EXPORTS]  # noqa: PLE0604  # strings all of them


def __getattr__(name: str) -> Any:  # noqa: ANN401  # classes of many kinds
    if name not in EXPORTS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
