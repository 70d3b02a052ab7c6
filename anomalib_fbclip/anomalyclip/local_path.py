# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Local path through the visual tower, DPAM (AnomalyCLIP, https://arxiv.org/abs/2310.18961).

Axes: B images, N = 1 + L tokens, class token first, D width of the visual tokens. With x the tokens that enter a block
and A its attention with the values in the place of queries and keys, the local tokens y are x + A(x) after the first of
the local blocks and y + A(x) after each further one; x itself goes on as in CLIP. :func:`two_paths` is that,
:func:`two_paths_together` gives the same faster: both attentions of a block start from one normalisation and one
projection to query, key and value, and of CLIP's own path no more than the class token is wanted behind the last block.
"""

from collections.abc import Sequence

import torch
from torch import nn

from anomalib_fbclip.clip.like_to_like import attend_like_to_like, correlation_attention
from anomalib_fbclip.clip.transformer import dot_product_attention, merge_heads, query_key_value, residual_block
from anomalib_fbclip.clip.vision import embed_patches


def two_paths(visual: nn.Module, images: torch.Tensor, layers: Sequence[int], local_blocks: int) -> list[torch.Tensor]:
    """Class token of CLIP's path behind the last block, and patch tokens of the local path, by the equations.

    Args:
        visual: open_clip ``VisionTransformer``.
        images: Normalised images ``[B, 3, H, W]``.
        layers: Block numbers, counted from 1, ascending.
        local_blocks: How many of the last blocks run the local path; before them its tokens are CLIP's.

    Returns:
        list[torch.Tensor]: One ``[B, N, D]`` for each entry of ``layers``, without ``ln_post``.
    """
    blocks = visual.transformer.resblocks
    x = embed_patches(visual, images)  # [B, N, D]
    y = x
    chosen = []
    for number, block in enumerate(blocks, start=1):
        if number > len(blocks) - local_blocks:
            y = y + block.ls_1(correlation_attention(block.attn, block.ln_1(x), "vv"))
            x = residual_block(block, x)
        else:
            y = x = residual_block(block, x)
        if number in layers:
            chosen.append(y)
    return [torch.cat((x[:, :1], patches[:, 1:]), dim=1) for patches in chosen]


def two_paths_together(
    visual: nn.Module,
    images: torch.Tensor,
    layers: Sequence[int],
    local_blocks: int,
) -> list[torch.Tensor]:
    """Fast form of :func:`two_paths`."""
    blocks = visual.transformer.resblocks
    x = embed_patches(visual, images)
    y = x
    chosen = []
    for number, block in enumerate(blocks, start=1):
        first = len(blocks) - local_blocks + 1
        query, key, value = parts = query_key_value(block.attn, block.ln_1(x))
        if first <= number <= layers[-1]:
            y = y + block.ls_1(merge_heads(block.attn, attend_like_to_like(parts, "vv")))
        if number == len(blocks):
            query, x = query[:, :, :1], x[:, :1]
        x = x + block.ls_1(merge_heads(block.attn, dot_product_attention(query, key, value)))
        del parts, query, key, value  # before the block's largest tensor
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        if number < first:
            y = x
        if number in layers:
            chosen.append(y)
    return [torch.cat((x[:, :1], patches[:, 1:]), dim=1) for patches in chosen]
