# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Files of ``torch.save``, read without running any code from them.

Beside tensors and plain values, one thing is let through: a NumPy float, which training code writes without noticing
(``"loss": np.mean(losses)``). Its rebuilding has another name since NumPy 2, and both names load under both versions.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype("float64")),
]


def load(path: str | Path) -> object:
    """Load a file of ``torch.save`` onto the CPU.

    Args:
        path: File to read.

    Returns:
        object: What was saved.

    Raises:
        ValueError: If the file is damaged or holds anything but tensors, plain values and NumPy floats.
        OSError: If the file cannot be opened.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  # damage shows as errors of many kinds
        # Not chained: torch's message advises to load the file without the check.
        raise ValueError(reason(error)) from None


def reason(error: BaseException) -> str:
    """Say in one line why torch did not load a file, without its advice to load it unchecked."""
    text = str(error)
    if found := re.search(r"(?:GLOBAL |got <class ')([\w.]+)", text):
        return f"it holds {found[1]}, which is no tensor and no plain value; code from a file is not run"
    if "weights_only" in text or isinstance(error, (EOFError, LookupError)):
        return "it is damaged, or no file of torch.save"
    return " ".join(text.split()) or type(error).__name__


def without_prefix(named: Mapping[str, Any], prefix: str = "module.") -> dict[str, Any]:
    """Take a prefix off all names that have it, such as the one that ``DataParallel`` sets before them."""
    return {str(name).removeprefix(prefix): value for name, value in named.items()}
