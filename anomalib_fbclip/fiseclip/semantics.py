# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Local semantics of CLIP, restored without training: attention of like to like in the last blocks."""

import torch
from torch import nn

from anomalib_fbclip.clip.like_to_like import CORRELATIONS, correlation_attention

__all__ = ["CORRELATIONS", "restore_semantics"]


def restore_semantics(visual: nn.Module, tokens: torch.Tensor, num_blocks: int, correlation: str) -> torch.Tensor:
    """Run the last blocks once more with :func:`correlation_attention`.

    The very last block gives its attention alone, without residual and feed-forward (ClearCLIP).

    Args:
        visual: open_clip ``VisionTransformer``.
        tokens: Tokens ``[B, N, D]`` that enter the first of these blocks.
        num_blocks: How many of the last blocks, at least 1.
        correlation: One of :data:`CORRELATIONS`.

    Returns:
        torch.Tensor: Tokens ``[B, N, D]``, without ``ln_post``.
    """
    *earlier, last = visual.transformer.resblocks[-num_blocks:]
    for block in earlier:
        tokens = tokens + block.ls_1(correlation_attention(block.attn, block.ln_1(tokens), correlation))
        tokens = tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
    return last.ls_1(correlation_attention(last.attn, last.ln_1(tokens), correlation))
