# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Local semantics of CLIP, restored without training: attention of like to like in the last blocks.

CLIP's last blocks gather what the whole picture shows into every patch, since only the class token was trained. Where
queries look for queries (or keys for keys, values for values), a patch gathers from patches that are like it. After
SCLIP (arXiv 2312.01597), ClearCLIP (2407.12442) and CLIP Surgery (2304.05653). No weight is changed.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip.transformer import merge_heads, query_key_value

CORRELATIONS = {"qq-kk": (0, 1), "qq": (0,), "kk": (1,), "vv": (2,)}
"""What is compared with itself: places of the compared parts among query, key and value."""


def correlation_attention(attention: nn.MultiheadAttention, tokens: torch.Tensor, correlation: str) -> torch.Tensor:
    """Attention whose weights are the mean of softmax(x x^T / sqrt(width)) over the chosen parts x.

    Args:
        attention: Attention of one of CLIP's blocks.
        tokens: Tokens ``[B, N, D]`` after the block's first normalisation.
        correlation: One of :data:`CORRELATIONS`.

    Returns:
        torch.Tensor: Tokens ``[B, N, D]`` after the output projection.
    """
    parts = query_key_value(attention, tokens)
    chosen = CORRELATIONS[correlation]
    attended = sum(F.scaled_dot_product_attention(parts[x], parts[x], parts[2]) for x in chosen)
    return merge_heads(attention, attended / len(chosen))


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
