# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Data modules of this package."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .procedural_surfaces import ProceduralSurfaces

__all__ = ["ProceduralSurfaces"]


def __getattr__(name: str) -> object:
    # The generator is used without anomalib, by the recipe of the embedded backbone among others.
    if name == "ProceduralSurfaces":
        from .procedural_surfaces import ProceduralSurfaces

        return ProceduralSurfaces
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
