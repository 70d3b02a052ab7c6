# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Foreground-background attention (FB-CLIP, https://arxiv.org/abs/2603.19608, eq. 22-23).

Axes: B images, N = 1 + L tokens, class token first, D width of the visual tokens, h heads of 64.
:meth:`ForegroundBackgroundAttention.forward` is the equation. :meth:`ForegroundBackgroundAttention.attend` gives the
same for all views of a block at once. It is fast for two reasons. Each view is a linear mixture of the block's tokens,
and LayerNorm of a gated token needs no more than the token's mean and one factor. So query, key, value and the gate's
first layer of every view are the same mixture of *one* projection of the tokens, times a factor for each token: two
thirds of the projections are not computed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip.transformer import bfloat16_without_amx, dot_product_attention

from .views import Mixing

HEADS = 8
HEAD_WIDTH = 64
_INNER = HEADS * HEAD_WIDTH
HEADS_AT_ONCE = 2
"""Of the 16 heads of both streams, on a CPU: as fast as all together, with an eighth of the projections in memory."""
_LARGEST_LOGIT = 30.0
"""Beyond it a stream's tokens are below LayerNorm's eps (1e-10 is left); its exp(60) stays in float32."""


class Stream(nn.Module):
    """Self-attention of one stream (eq. 23): LayerNorm, query, key, value, a learnable scale, output projection.

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
        self.scale = nn.Parameter(torch.tensor(HEAD_WIDTH**-0.5))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attend over the gated tokens ``[B, N, D]`` of one stream."""
        tokens = self.norm(tokens)
        query, key, value = (
            project(tokens).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)  # [B, h, N, 64]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        weights = (query @ key.mT * self.scale).softmax(dim=-1)  # [B, h, N, N]
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class FoldedHeads(NamedTuple):
    """Some heads, with scale, LayerNorm's weight and its centring folded into their projections.

    Attributes:
        streams: Their streams, out of 0 foreground and 1 background, each with as many heads.
        projection: Queries, then keys, then values, of each of them stream by stream ``[3 * h * 64, D]``.
        shift: What the LayerNorm's bias adds to them ``[3 * h * 64]``.
        out: Output projection ``[D, h * 64]``.
    """

    streams: slice
    projection: torch.Tensor
    shift: torch.Tensor
    out: torch.Tensor


class ForegroundBackgroundAttention(nn.Module):
    """A gate splits each token into a foreground and a background stream; both attend, their sum is normalised.

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
        """The equation, on one token set.

        Args:
            tokens: Tokens ``[B, N, D]``.

        Returns:
            torch.Tensor: ``[B, N, D]``.
        """
        gate = self.gate(tokens)  # eq. 22, [B, N, 1]
        foreground = self.foreground(tokens * gate)
        background = self.background(tokens * (1 - gate))
        return self.norm(foreground + background)  # eq. 23

    def fold(self, device: torch.device) -> list[FoldedHeads] | None:
        """All heads, folded once for all blocks of an image; ``None`` where they are better folded a few at a time.

        Args:
            device: Where the tokens are.
        """
        in_half = self.in_half(device)
        if not (in_half or torch.is_grad_enabled() or torch.compiler.is_compiling() or device.type != "cpu"):
            return None
        # A graph of few large nodes is written, loaded and run faster than one of many small ones. On a CPU in half
        # precision, memory for all heads would go back to the system each time, and be paid page by page again.
        folded = list(self._folded_heads(HEADS if in_half and device.type == "cpu" else 2 * HEADS))
        if not torch.is_autocast_enabled(device.type):
            return folded
        # Once here and not in each block: without gradients autocast remembers nothing.
        dtype = torch.get_autocast_dtype(device.type)
        return [heads._replace(projection=heads.projection.to(dtype), out=heads.out.to(dtype)) for heads in folded]

    def in_half(self, device: torch.device) -> bool:
        """Whether products are computed in half precision on this device."""
        return torch.is_autocast_enabled(device.type) or self.gate[0].weight.dtype != torch.float32

    def products_are_cheap(self, device: torch.device) -> bool:
        """Whether products cost less than mixtures do: in half precision, but not on every processor."""
        return self.in_half(device) and not (device.type == "cpu" and bfloat16_without_amx())

    def attend(
        self,
        tokens: torch.Tensor,
        mixings: Sequence[Mixing],
        variances: Sequence[torch.Tensor],
        folded: Sequence[FoldedHeads] | None = None,
    ) -> list[torch.Tensor]:
        """Fast form of :meth:`forward` for each view of one block.

        Args:
            tokens: Tokens of the block ``[B, N, D]``.
            mixings: What makes each view of them.
            variances: Variance over D of each view's tokens ``[B, N, 1]``.
            folded: See :meth:`fold`; ``None``: some heads at a time are folded here.

        Returns:
            list[torch.Tensor]: For each view ``[B, N, D]``.
        """
        factors = self._factors(tokens, mixings, variances)
        bias = self.foreground.to_out.bias + self.background.to_out.bias
        attended: list[list[torch.Tensor]] = [[] for _ in mixings]  # for each view the heads, [B, N, h * 64]
        outs = []
        for heads in folded or self._folded_heads(HEADS_AT_ONCE):
            projected = F.linear(tokens, heads.projection)
            outs.append(heads.out)
            for view, mix in enumerate(mixings):
                attended[view].append(_attend(mix(projected), factors[view][..., heads.streams], heads.shift))
            del projected
        out = torch.cat(outs, dim=1)
        results = []
        while attended:  # in turn: the heads of one view and its result are held together, not those of all
            results.append(self.norm(F.linear(torch.cat(attended.pop(0), dim=-1), out, bias)))
        return results

    def _factors(
        self,
        tokens: torch.Tensor,
        mixings: Sequence[Mixing],
        variances: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        hidden = F.linear(tokens, self.gate[0].weight)
        return [self._stream_factors(mix(hidden), variance) for mix, variance in zip(mixings, variances, strict=True)]

    def _stream_factors(self, hidden: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """What LayerNorm multiplies the centred tokens of both streams with, ``[B, N, 2]``.

        LayerNorm of s * x is (x - mean) / sqrt(var + eps / s^2): written so, the gate's gradient does not cancel.
        The gates are sigmoid(z) and 1 - sigmoid(z), so 1 / s = 1 + exp(-z) and 1 + exp(z). Gates saturate, and 1 minus
        a sigmoid would then be that sigmoid's rounding error, another one in every runtime.
        """
        logit = self.gate[1:-1](hidden + self.gate[0].bias).to(variance.dtype)
        logit = logit.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        weakness = 1 + torch.cat((-logit, logit), dim=-1).exp()
        return torch.rsqrt(variance + self.foreground.norm.eps * weakness.square())

    def _folded_heads(self, at_once: int) -> Iterator[FoldedHeads]:
        """Heads of both streams, ``at_once`` together; no more than those are folded and held at a time."""
        for start in range(0, 2 * HEADS, at_once):
            chosen = []
            for index, stream in enumerate((self.foreground, self.background)):
                first, last = max(start - index * HEADS, 0), min(start + at_once - index * HEADS, HEADS)
                if first < last:
                    chosen.append(_fold(stream, index, slice(first * HEAD_WIDTH, last * HEAD_WIDTH)))
            streams, projections, shifts, outs = zip(*chosen, strict=True)
            yield FoldedHeads(
                slice(streams[0], streams[-1] + 1),  # a list would be copied to a GPU in each use
                torch.cat(projections, dim=1).flatten(0, 2),
                torch.cat(shifts, dim=1).flatten(),
                torch.cat(outs, dim=1),
            )


def _fold(stream: Stream, index: int, rows: slice) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stream, projection ``[3, h, 64, D]``, shift ``[3, h, 64]`` and output of some heads of a stream."""
    weight = torch.stack((stream.to_q.weight[rows] * stream.scale, stream.to_k.weight[rows], stream.to_v.weight[rows]))
    weight = weight.unflatten(1, (-1, HEAD_WIDTH))
    scaled = weight * stream.norm.weight
    centred = scaled - scaled.mean(dim=-1, keepdim=True)  # W (x - mean(x)) = (W - rowmean(W)) x
    return index, centred, weight @ stream.norm.bias, stream.to_out.weight[:, rows]


def _attend(projected: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Attention of some heads: projections ``[B, N, 3 * h * 64]``, factor of each stream -> ``[B, N, h * 64]``."""
    # In four axes: OpenVINO rounds to 8 bit in five many times slower.
    factor = factor.repeat(1, 1, 3)[..., None].to(projected.dtype)
    each = (factor.shape[2], -1)
    shift = shift.to(projected.dtype).unflatten(0, each)
    qkv = torch.addcmul(shift, projected.unflatten(-1, each), factor).flatten(2).unflatten(-1, (-1, HEAD_WIDTH))
    query, key, value = qkv.transpose(1, 2).chunk(3, dim=1)
    return dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(2)
