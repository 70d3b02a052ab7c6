# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The model of an adapter or line file, with the settings that the file was made for."""

from importlib import import_module
from typing import Any

from anomalib_fbclip.common.arguments import argument_names
from anomalib_fbclip.registration import MODELS

from . import adapter_file
from .lightning_model import AdaptedModule

DEFAULT_BACKBONE = "ViT-L-14-336"
_NOT_SETTINGS = {"backbone", "pretrained", "weights", "thresholds", "source"}


def adapted_models() -> dict[str, type[AdaptedModule]]:
    """The adapted models of this package, and those from outside that have been imported, by name."""
    for module in MODELS.values():
        import_module(module)
    return {model.__name__: model for model in AdaptedModule.__subclasses__()}


def find_model(name: str) -> type[AdaptedModule]:
    """An adapted model by name.

    Raises:
        ValueError: If there is none of that name.
    """
    known = adapted_models()
    if name not in known:
        msg = f"model {name} has no adapter and no memory of normal images: choose one of {sorted(known)}."
        raise ValueError(msg)
    return known[name]


def load_module(
    weights: str,
    backbone: str | None = None,
    pretrained: str | None = None,
    **arguments: Any,  # noqa: ANN401  # of any model
) -> AdaptedModule:
    """Build the model that a file was made for.

    Args:
        weights: Adapter or line file, see :class:`AdaptedModule`.
        backbone: ``None``: the file's, else ViT-L-14-336.
        pretrained: ``None``: the file's, else ``openai``.
        **arguments: Arguments of the model that differ from the file's.

    Raises:
        ValueError: If the file cannot be used, or its model is not known.
        FileNotFoundError: If there is no such file.
    """
    metadata = adapter_file.read(weights)[1]
    model = find_model(metadata["model"])
    names = argument_names(model) - _NOT_SETTINGS
    return model(
        backbone=backbone or adapter_file.backbone_name(metadata) or DEFAULT_BACKBONE,
        pretrained=pretrained or metadata.get("pretrained") or "openai",
        weights=weights,
        **{**{name: metadata[name] for name in names if name in metadata}, **arguments},
    )
