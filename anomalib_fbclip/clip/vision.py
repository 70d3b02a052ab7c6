# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Patch and class tokens of chosen blocks of CLIP's visual tower."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import Grid, grid_of

from .transformer import residual_block


def resize_position_embedding(positions: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Resize learned positions to another grid, as the published FB-CLIP does: bilinear, no antialiasing.

    open_clip's own resize is bicubic and does not give the same tokens.

    Args:
        positions: ``[1 + g0 * g0, D]``, class token first.
        grid: Rows and columns of the image's patches.

    Returns:
        torch.Tensor: ``[1 + g_h * g_w, D]``; the class row is unchanged.
    """
    trained_grid = grid_of(positions.shape[0] - 1)
    if grid == trained_grid:
        return positions
    patches = positions[1:].T.reshape(1, -1, *trained_grid)
    patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    return torch.cat((positions[:1], patches.flatten(2)[0].T))


def embed_patches(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Images to the tokens that enter the first block.

    Args:
        visual: open_clip ``VisionTransformer``.
        images: Normalised images ``[B, 3, H, W]``, H and W multiples of the patch size.

    Returns:
        torch.Tensor: Tokens ``[B, 1 + g_h * g_w, D]``, class token first, after ``ln_pre``.
    """
    patches = visual.conv1(images)
    grid = (patches.shape[-2], patches.shape[-1])
    patches = patches.flatten(2).transpose(1, 2)
    class_token = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
    positions = resize_position_embedding(visual.positional_embedding, grid)
    return visual.ln_pre(torch.cat((class_token, patches), dim=1) + positions.to(patches.dtype))


def block_tokens(visual: nn.Module, images: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
    """Tokens after the chosen blocks; blocks behind the last chosen one are not run.

    Args:
        visual: open_clip ``VisionTransformer``.
        images: Normalised images ``[B, 3, H, W]``.
        layers: Block numbers, counted from 1, ascending.

    Returns:
        list[torch.Tensor]: One ``[B, 1 + g_h * g_w, D]`` for each entry of ``layers``, without ``ln_post``.
    """
    tokens = embed_patches(visual, images)
    chosen = []
    for number, block in enumerate(visual.transformer.resblocks[: layers[-1]], start=1):
        tokens = residual_block(block, tokens)
        if number in layers:
            chosen.append(tokens)
    return chosen
