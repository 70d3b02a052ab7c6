# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The one table of this package's public classes, and everything that touches anomalib's tables.

anomalib 2.7 has no plug-in hook. Its CLI and ``get_model`` find a model by name among the attributes of
``anomalib.models`` and the direct subclasses of ``AnomalibModule``, and by path in the modules of ``ALLOWED_MODULES``;
``get_datamodule`` looks among the attributes of ``anomalib.data``; the CLI takes its pipelines from a dictionary. All
functions may be called any number of times. Only the standard library is imported here.
"""

import sys
from importlib import import_module

MODELS = {
    "AFCLIP": "anomalib_fbclip.afclip.lightning_model",
    "AnomalyCLIP": "anomalib_fbclip.anomalyclip.lightning_model",
    "FBCLIP": "anomalib_fbclip.fbclip.lightning_model",
    "FiSeCLIP": "anomalib_fbclip.fiseclip.lightning_model",
    "Student": "anomalib_fbclip.student.lightning_model",
}
"""Models of anomalib: name of the class -> its module."""

DATAMODULES = {
    "AuxiliaryTransfer": "anomalib_fbclip.data.auxiliary_transfer",
    "DAGM": "anomalib_fbclip.data.dagm",
    "DTDSynthetic": "anomalib_fbclip.data.dtd_synthetic",
    "HeadCT": "anomalib_fbclip.data.head_ct",
    "LabelledFolder": "anomalib_fbclip.data.labelled_folder",
    "MagneticTile": "anomalib_fbclip.data.magnetic_tile",
    "ProceduralSurfaces": "anomalib_fbclip.data.procedural_surfaces",
}
"""Data modules of anomalib, likewise."""

EXPORTS = {
    **MODELS,
    **DATAMODULES,
    "AFCLIPModel": "anomalib_fbclip.afclip.torch_model",
    "AdapterCheckpoint": "anomalib_fbclip.adapted.adapter_checkpoint",
    "AnomalyCLIPModel": "anomalib_fbclip.anomalyclip.torch_model",
    "FBCLIPModel": "anomalib_fbclip.fbclip.torch_model",
    "FiSeCLIPModel": "anomalib_fbclip.fiseclip.torch_model",
    "FrozenCLIP": "anomalib_fbclip.clip.frozen",
    "PictureFolder": "anomalib_fbclip.data.picture_folder",
    "PredictionIndex": "anomalib_fbclip.host.prediction_index",
    "PredictionVisualizer": "anomalib_fbclip.host.visualization",
    "Report": "anomalib_fbclip.host.report",
    "StageMaps": "anomalib_fbclip.callbacks.stage_maps",
    "StudentModel": "anomalib_fbclip.student.torch_model",
}
"""Public names of this package, loaded when they are first used."""

PIPELINES = {"table": ("anomalib_fbclip.pipelines.table.pipeline", "Table")}
"""Subcommands of ``anomalib`` -> module and class."""

PUBLISHED_FORMATS = (
    "anomalib_fbclip.afclip.published",
    "anomalib_fbclip.anomalyclip.published",
    "anomalib_fbclip.fbclip.published",
)
"""Modules that register a reader of weights in the form in which their authors publish them."""


def register_models() -> None:
    """Make our models known to ``anomalib.models``, where that module is already imported."""
    host = sys.modules.get("anomalib.models")
    if host is None:
        return
    host.ALLOWED_MODULES.add("anomalib_fbclip")
    _expose(host, MODELS)


def register_datamodules() -> None:
    """Make our data modules known to ``anomalib.data``, where that module is already imported."""
    host = sys.modules.get("anomalib.data")
    if host is not None:
        _expose(host, DATAMODULES)


def register_pipelines() -> None:
    """Make ``anomalib table`` stand beside ``anomalib benchmark``, where the command line is already imported."""
    registry = getattr(sys.modules.get("anomalib.cli.pipelines"), "PIPELINE_REGISTRY", None)
    if registry is not None:
        for name, (module, pipeline) in PIPELINES.items():
            registry.setdefault(name, getattr(import_module(module), pipeline))


def _expose(host: object, table: dict[str, str]) -> None:
    for name, path in table.items():
        try:
            item = getattr(import_module(path), name, None)
        except ImportError as error:
            if "partially initialized module 'anomalib_fbclip" not in str(error):
                raise
            item = None
        # While one of our modules is itself being imported: it calls register_* again as its last line.
        if item is None:
            continue
        setattr(host, name, item)
        if name not in host.__all__:  # type: ignore[attr-defined]
            host.__all__.append(name)  # type: ignore[attr-defined]
