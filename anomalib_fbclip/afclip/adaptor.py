# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The adaptor that all token sets share (AF-CLIP, https://arxiv.org/abs/2507.19949).

Axes: B images, N = 1 + L tokens, class token first, D width of the visual tokens, h heads of 64.
:meth:`Adaptor.forward` is the equation, on one token set. :meth:`Adaptor.attend` gives the same for all windows of a
block. Aggregation is linear, and LayerNorm divides each token by one number, so query, key and value of a window are
the aggregate of *one* projection of the block's tokens, times a factor for each token: two thirds of the projections
are not computed, and no aggregated copy of the tokens is kept.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip.transformer import dot_product_attention
from anomalib_fbclip.common.functional import full_precision

from .aggregation import Mixing

HEADS = 8
HEAD_WIDTH = 64
_INNER = HEADS * HEAD_WIDTH


class Adaptor(nn.Module):
    """Layer normalisation and self-attention, without a residual connection.

    Args:
        width: Width D of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, _INNER, bias=False)
        self.to_k = nn.Linear(width, _INNER, bias=False)
        self.to_v = nn.Linear(width, _INNER, bias=False)
        self.to_out = nn.Linear(_INNER, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attend over one token set ``[B, N, D]``."""
        tokens = self.norm(tokens)
        query, key, value = (
            project(tokens).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)  # [B, h, N, 64]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        weights = (query @ key.mT / HEAD_WIDTH**0.5).softmax(dim=-1)  # [B, h, N, N]
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))

    def attend(self, tokens: torch.Tensor, mixings: Iterable[Mixing]) -> Iterator[torch.Tensor]:
        """Fast form of :meth:`forward` on each mixture of the tokens of one block, one after the other.

        Args:
            tokens: Tokens of the block ``[B, N, D]``.
            mixings: What makes each token set of them.

        Yields:
            torch.Tensor: ``[B, N, D]``.
        """
        weight = torch.cat((self.to_q.weight, self.to_k.weight, self.to_v.weight))  # [3 * h * 64, D]
        scaled = weight * self.norm.weight
        centred = scaled - scaled.mean(dim=-1, keepdim=True)  # W (x - mean(x)) = (W - rowmean(W)) x
        shift = weight @ self.norm.bias
        projected = F.linear(tokens, centred)
        exact = tokens.float()
        for mix in mixings:
            with full_precision(tokens.device):
                variance = mix(exact).var(dim=-1, correction=0, keepdim=True)
                factor = torch.rsqrt(variance + self.norm.eps).to(projected.dtype)  # [B, N, 1]
            qkv = torch.addcmul(shift.to(projected.dtype), mix(projected), factor)
            # In four axes: OpenVINO rounds to 8 bit in five many times slower.
            query, key, value = qkv.unflatten(-1, (3 * HEADS, HEAD_WIDTH)).transpose(1, 2).chunk(3, dim=1)
            attended = dot_product_attention(query, key, value)
            del qkv, query, key, value
            yield self.to_out(attended.transpose(1, 2).flatten(2))
