# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FiSeCLIP: training-free anomaly detection by matching within a batch, filtered by text."""

from typing import TYPE_CHECKING

from .torch_model import FiSeCLIPModel

if TYPE_CHECKING:
    from .lightning_model import FiSeCLIP

__all__ = ["FiSeCLIP", "FiSeCLIPModel"]


def __getattr__(name: str) -> object:
    # The Lightning module imports the whole of anomalib; the torch model needs little of it.
    if name == "FiSeCLIP":
        from .lightning_model import FiSeCLIP

        return FiSeCLIP
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
