# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""One residual block of an open_clip transformer, run on open_clip's weights, batch first.

open_clip changed the axis order of its transformers between the versions that anomalib admits, and its attention
module hides the fused kernel in some of them. Running the block from its weights gives the same tokens on all of them.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import full_precision, is_exporting

WEIGHTS_AT_ONCE = 2_000_000
"""Attention weights of the heads that :func:`dot_product_attention` takes together: they stay in the cache."""


@torch.compiler.assume_constant_result
def bfloat16_without_amx() -> bool:
    """Whether this processor multiplies in bfloat16 by AVX-512 and not by AMX, which is several times faster.

    ``False`` of torch before ``torch.cpu.get_capabilities``, and of a graph that is exported: other processors run it.
    """
    if is_exporting():
        return False
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_tile")


def dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(scale * query key^T) value, by torch's fused kernel or, where that is slow, some heads at a time.

    Args:
        query: ``[B, heads, N, width]``.
        key: ``[B, heads, M, width]``.
        value: ``[B, heads, M, width]``.
        scale: Multiplies the products; ``None``: 1 / sqrt(width).
        causal: Let each token see itself and the tokens before it only.

    Returns:
        torch.Tensor: ``[B, heads, N, width]``.
    """
    # torch's fused kernel has no use for these instructions, and takes twice as long as products and softmax.
    in_turn = query.device.type == "cpu" and query.dtype == torch.bfloat16 and bfloat16_without_amx()
    # A compiler writes each turn down, and those of many images would take it hours.
    in_turn = in_turn and not (torch.compiler.is_compiling() and len(query) > 1)
    # A gradient would keep all weights.
    if not in_turn or causal or any(tokens.requires_grad for tokens in (query, key, value)):
        return F.scaled_dot_product_attention(query, key, value, scale=scale, is_causal=causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query if scale == 1 else query * scale
    key = key.contiguous()  # else the product transposes and copies the keys of each head
    heads_at_once = min(max(1, WEIGHTS_AT_ONCE // (query.shape[2] * key.shape[2])), query.shape[:2].numel())
    parts = (tokens.flatten(0, 1).split(heads_at_once) for tokens in (query, key, value))
    attended = []
    # New memory of this size would be paid in each turn, page by page. A compiler plans its memory itself.
    compiling = torch.compiler.is_compiling()
    weights = None if compiling else query.new_empty(heads_at_once, query.shape[2], key.shape[2])
    with full_precision(query.device):
        for q, k, v in zip(*parts, strict=True):
            out = None if weights is None else weights[: len(q)]
            attended.append((torch.softmax(torch.bmm(q, k.mT, out=out), dim=-1, out=out) @ v).transpose(0, 1))
    return torch.cat(attended, dim=1).unflatten(1, query.shape[:2]).permute(1, 2, 0, 3)


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
    return merge_heads(attention, dot_product_attention(query, key, value, causal=causal))


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
