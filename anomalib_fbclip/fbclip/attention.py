# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Foreground-background attention (paper, eq. 22-23)."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

HEADS = 8
HEAD_WIDTH = 64


class Stream(nn.Module):
    """The attention weights of one stream: LayerNorm, q, k, v without bias, a learnable scale, output projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.tensor(HEAD_WIDTH**-0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Self-attention of the gated tokens ``[B, N, D]``, no residual."""
        batch, count, _ = tokens.shape
        weight = torch.cat((self.to_q.weight * self.scale, self.to_k.weight, self.to_v.weight))
        qkv = F.linear(self.norm(tokens), weight)
        query, key, value = qkv.view(batch, count, 3, HEADS, HEAD_WIDTH).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return self.to_out(attended.transpose(1, 2).reshape(batch, count, -1))


class ForegroundBackgroundAttention(nn.Module):
    """A gate parts each token into a foreground and a background stream; both attend, their sum is normalised.

    One module serves all layers and views.

    Args:
        width: Width D of the visual tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1), nn.Sigmoid())
        self.foreground = Stream(width)
        self.background = Stream(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attend.

        Args:
            tokens: One view of one layer ``[B, N, D]``, class token first.

        Returns:
            torch.Tensor: ``[B, N, D]``.
        """
        gate = self.gate(tokens)
        return self.norm(self.foreground(tokens * gate) + self.background(tokens * (1 - gate)))
