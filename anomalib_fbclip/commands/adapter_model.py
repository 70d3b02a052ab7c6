# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The model of an adapter, for the commands that read one."""

from importlib import import_module
from typing import Any

from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.adapted.lightning_model import AdaptedModule
from anomalib_fbclip.common.arguments import argument_names
from anomalib_fbclip.registration import MODELS

_NOT_SETTINGS = ("backbone", "pretrained", "weights", "thresholds", "source")


def model_of(
    weights: str,
    metadata: adapter_file.AdapterMetadata,
    backbone: str | None = None,
    pretrained: str | None = None,
    source: str | None = None,
) -> Any:  # noqa: ANN401  # of any adapted model
    """The model of an adapter, with the settings that the adapter was made for.

    Args:
        weights: Adapter: ours or published.
        metadata: What the adapter says of itself.
        backbone: Where the adapter does not name it. ``None``: ViT-L-14-336.
        pretrained: Weights of the backbone, if not those that the adapter names. ``None``: openai.
        source: What the adapter was trained on, where it does not say it.

    Raises:
        ValueError: If the adapter is one of an unknown model, or does not fit.
    """
    for module in MODELS.values():
        import_module(module)
    known = {model.__name__: model for model in AdaptedModule.__subclasses__()}
    if metadata["model"] not in known:
        msg = f"adapter {weights!r} is one of the model {metadata['model']}; this command knows {sorted(known)}."
        raise ValueError(msg)
    model_class = known[metadata["model"]]
    return model_class(
        backbone=backbone or adapter_file.backbone_name(metadata) or "ViT-L-14-336",
        pretrained=pretrained or metadata.get("pretrained") or "openai",
        weights=weights,
        source=source,
        **{key: metadata[key] for key in argument_names(model_class) - {*_NOT_SETTINGS} if key in metadata},
    )
