# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Data modules of this package."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .auxiliary_transfer import AuxiliaryTransfer
    from .dagm import DAGM
    from .dtd_synthetic import DTDSynthetic
    from .head_ct import HeadCT
    from .labelled_folder import LabelledFolder
    from .magnetic_tile import MagneticTile
    from .picture_folder import PictureFolder
    from .procedural_surfaces import ProceduralSurfaces

__all__ = [
    "AuxiliaryTransfer",
    "DAGM",
    "DTDSynthetic",
    "HeadCT",
    "LabelledFolder",
    "MagneticTile",
    "PictureFolder",
    "ProceduralSurfaces",
]

_MODULES = {
    "AuxiliaryTransfer": "auxiliary_transfer",
    "DAGM": "dagm",
    "DTDSynthetic": "dtd_synthetic",
    "HeadCT": "head_ct",
    "LabelledFolder": "labelled_folder",
    "MagneticTile": "magnetic_tile",
    "PictureFolder": "picture_folder",
    "ProceduralSurfaces": "procedural_surfaces",
}


def __getattr__(name: str) -> object:
    # The generator is used without anomalib, by the recipe of the embedded backbone among others.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
