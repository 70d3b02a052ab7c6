# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FB-CLIP for anomalib: zero-shot anomaly detection with a foreground-background view of CLIP.

Importing this package costs nothing: every public name below is loaded when it is first used (PEP 562).
The models register themselves with anomalib, see :mod:`anomalib_fbclip.registration`.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "AdapterCheckpoint": "anomalib_fbclip.callbacks",
    "AuxiliaryTransfer": "anomalib_fbclip.data",
    "DAGM": "anomalib_fbclip.data",
    "DTDSynthetic": "anomalib_fbclip.data",
    "FBCLIP": "anomalib_fbclip.fbclip",
    "FBCLIPModel": "anomalib_fbclip.fbclip",
    "FiSeCLIP": "anomalib_fbclip.fiseclip",
    "FiSeCLIPModel": "anomalib_fbclip.fiseclip",
    "FrozenCLIP": "anomalib_fbclip.clip",
    "HeadCT": "anomalib_fbclip.data",
    "LabelledFolder": "anomalib_fbclip.data",
    "MagneticTile": "anomalib_fbclip.data",
    "PictureFolder": "anomalib_fbclip.data",
    "PredictionIndex": "anomalib_fbclip.callbacks",
    "ProceduralSurfaces": "anomalib_fbclip.data",
    "StageMaps": "anomalib_fbclip.callbacks.stage_maps",
}

__all__ = [
    "AdapterCheckpoint",
    "AuxiliaryTransfer",
    "DAGM",
    "DTDSynthetic",
    "FBCLIP",
    "FBCLIPModel",
    "FiSeCLIP",
    "FiSeCLIPModel",
    "FrozenCLIP",
    "HeadCT",
    "LabelledFolder",
    "MagneticTile",
    "PictureFolder",
    "PredictionIndex",
    "ProceduralSurfaces",
    "StageMaps",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
