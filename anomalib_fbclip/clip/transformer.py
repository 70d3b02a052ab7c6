# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""One residual block of an open_clip transformer, run on open_clip's weights, batch first.

open_clip changed the axis order of its transformers between the versions that anomalib admits, and its attention
module hides the fused kernel in some of them. Running the block from its weights gives the same tokens on all of them.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses


def query_key_value(attention: nn.MultiheadAttention, tokens: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values of every head.

    Args:
        attention: Module with a fused ``in_proj_weight``, as CLIP's blocks have it.
        tokens: Tokens ``[B, N, D]``.

    Returns:
        torch.Tensor: ``[3, B, heads, N, D / heads]``.
    """
    batch, count, _ = tokens.shape
    qkv = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    return qkv.view(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)


def merge_heads(attention: nn.MultiheadAttention, attended: torch.Tensor) -> torch.Tensor:
    """Heads ``[B, heads, N, D / heads]`` back to tokens ``[B, N, D]``, after the output projection."""
    return attention.out_proj(attended.transpose(1, 2).flatten(2))


def self_attention(attention: nn.MultiheadAttention, tokens: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Multi-head self-attention with the weights of a ``torch.nn.MultiheadAttention``.

    Args:
        attention: Module with a fused ``in_proj_weight``, as CLIP's blocks have it.
        tokens: Tokens ``[B, N, D]``.
        causal: Let each token see itself and the tokens before it only.

    Returns:
        torch.Tensor: Tokens ``[B, N, D]`` after the output projection.
    """
    query, key, value = query_key_value(attention, tokens)
    return merge_heads(attention, F.scaled_dot_product_attention(query, key, value, is_causal=causal))


def residual_block(block: nn.Module, tokens: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """Run one ``open_clip`` ``ResidualAttentionBlock``.

    Args:
        block: The block; layer scales are applied where it has them.
        tokens: Tokens ``[B, N, D]``.
        causal: Mask of the attention, see :func:`self_attention`.

    Returns:
        torch.Tensor: Tokens ``[B, N, D]``.
    """
    tokens = tokens + block.ls_1(self_attention(block.attn, block.ln_1(tokens), causal))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
