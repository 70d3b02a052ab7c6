# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Foreground-background attention (paper, eq. 22-23), projected once for all views of a block.

Each view is a linear mixture of the block's tokens, and a stream's LayerNorm takes from a gated token no more than its
mean and a factor. So query, key, value and the gate's first layer of every view are the same mixture of *one* projection
of the tokens, times a factor for each token. That saves two thirds of the projections; both streams attend as sixteen
heads of one call. The literal form is in ``tests/reference``.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

HEADS = 8
HEAD_WIDTH = 64
_INNER = HEADS * HEAD_WIDTH
_SMALLEST_GATE = 1e-9
"""Below it a stream's tokens vanish against LayerNorm's eps; above zero the gradient's 1 / s^4 stays in float32."""


class Stream(nn.Module):
    """The parameters of one stream: LayerNorm, q, k, v without bias, a learnable scale, output projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, _INNER, bias=False)
        self.to_k = nn.Linear(width, _INNER, bias=False)
        self.to_v = nn.Linear(width, _INNER, bias=False)
        self.to_out = nn.Linear(_INNER, width)
        self.scale = nn.Parameter(torch.tensor(HEAD_WIDTH**-0.5))


class FoldedWeights(NamedTuple):
    """What :meth:`ForegroundBackgroundAttention.fold` makes of the parameters.

    Attributes:
        projection: ``[3 * 2 * 512 + D / 2, D]``: query, key, value, each of both streams, then the gate's first layer.
        shift: ``[3 * 2 * 512]``: what the LayerNorms' biases add to query, key, value.
        out: ``[D, 2 * 512]``: output projections of both streams.
        out_bias: ``[D]``.
    """

    projection: torch.Tensor
    shift: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor


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
        """Attend over one token set.

        Args:
            tokens: One view of one layer ``[B, N, D]``, class token first.

        Returns:
            torch.Tensor: ``[B, N, D]``.
        """
        folded = self.fold()
        return self.attend(tokens, F.linear(tokens, folded.projection), folded)

    def fold(self) -> FoldedWeights:
        """Fold scale, LayerNorm's weight and its centring into the projections; once for all layers and views."""
        streams = (self.foreground, self.background)
        queries = [stream.to_q.weight * stream.scale for stream in streams]
        weight = torch.cat(queries + [s.to_k.weight for s in streams] + [s.to_v.weight for s in streams])
        parts = weight.unflatten(0, (3, 2, _INNER))
        scaled = parts * torch.stack([stream.norm.weight for stream in streams])[:, None]
        centred = scaled - scaled.mean(dim=-1, keepdim=True)  # W (x - mean(x)) = (W - rowmean(W)) x
        shift = (parts * torch.stack([stream.norm.bias for stream in streams])[:, None]).sum(dim=-1)
        return FoldedWeights(
            torch.cat((centred.flatten(0, 2), self.gate[0].weight)),
            shift.flatten(),
            torch.cat([stream.to_out.weight for stream in streams], dim=1),
            self.foreground.to_out.bias + self.background.to_out.bias,
        )

    def attend(
        self,
        view: torch.Tensor,
        projected: torch.Tensor,
        folded: FoldedWeights,
    ) -> torch.Tensor:
        """Attend over one view.

        Args:
            view: The view ``[B, N, D]``; only its variance over D is read.
            projected: The view times ``folded.projection``, ``[B, N, 3 * 2 * 512 + D / 2]``.
            folded: Of :meth:`fold`.

        Returns:
            torch.Tensor: Attended tokens ``[B, N, D]``.
        """
        inner = len(folded.shift)
        gate = self.gate[1:](projected[..., inner:] + self.gate[0].bias)
        strength = torch.cat((gate, 1 - gate), dim=-1).to(view.dtype).clamp(min=_SMALLEST_GATE)
        # LayerNorm of s * x is (x - mean) / sqrt(var + eps / s^2): written so, the gate's gradient does not cancel.
        variance = view.var(dim=-1, correction=0, keepdim=True)
        factor = torch.rsqrt(variance + self.foreground.norm.eps / strength.square())  # [B, N, 2]
        heads = (3, 2 * HEADS, HEAD_WIDTH)
        factor = factor.repeat_interleave(HEADS, dim=-1)[:, :, None, :, None].to(projected.dtype)
        shift = folded.shift.to(projected.dtype).view(heads)
        qkv = torch.addcmul(shift, projected[..., :inner].unflatten(-1, heads), factor)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return self.norm(F.linear(attended.transpose(1, 2).flatten(2), folded.out, folded.out_bias))
