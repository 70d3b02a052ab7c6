# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Attention of like to like: queries look for queries, keys for keys or values for values, with CLIP's own weights.

CLIP's last blocks gather what the whole image shows into every patch, since only the class token was trained. Where
like looks for like, a patch gathers from patches that resemble it. After SCLIP (arXiv 2312.01597), ClearCLIP
(2407.12442) and CLIP Surgery (2304.05653). No weight is changed.
"""

import torch
from torch import nn

from .transformer import dot_product_attention, merge_heads, query_key_value

CORRELATIONS = {"qq-kk": (0, 1), "qq": (0,), "kk": (1,), "vv": (2,)}
"""What is compared with itself: places of the compared parts among query, key and value."""


def attend_like_to_like(parts: torch.Tensor, correlation: str) -> torch.Tensor:
    """Mean of softmax(x x^T / sqrt(width)) v over the chosen parts x.

    Args:
        parts: Query, key and value of every head ``[3, B, heads, N, width]``.
        correlation: One of :data:`CORRELATIONS`.

    Returns:
        torch.Tensor: ``[B, heads, N, width]``.
    """
    chosen = CORRELATIONS[correlation]
    attended = sum(dot_product_attention(parts[x], parts[x], parts[2]) for x in chosen)
    return attended / len(chosen)


def correlation_attention(attention: nn.MultiheadAttention, tokens: torch.Tensor, correlation: str) -> torch.Tensor:
    """:func:`attend_like_to_like` with the projections of an attention module.

    Args:
        attention: Attention of one of CLIP's blocks.
        tokens: Tokens ``[B, N, D]`` after the block's first normalisation.
        correlation: One of :data:`CORRELATIONS`.

    Returns:
        torch.Tensor: Tokens ``[B, N, D]`` after the output projection.
    """
    return merge_heads(attention, attend_like_to_like(query_key_value(attention, tokens), correlation))
