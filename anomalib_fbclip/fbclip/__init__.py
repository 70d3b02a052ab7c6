# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FB-CLIP: zero-shot anomaly detection by disentangling foreground and background in CLIP."""

from typing import TYPE_CHECKING

from .torch_model import FBCLIPModel

if TYPE_CHECKING:
    from .lightning_model import FBCLIP

__all__ = ["FBCLIP", "FBCLIPModel"]


def __getattr__(name: str) -> object:
    # The Lightning module imports the whole of anomalib; the torch model needs little of it.
    if name == "FBCLIP":
        from .lightning_model import FBCLIP

        return FBCLIP
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
