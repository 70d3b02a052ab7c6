# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Multi-scale spatial aggregation (AF-CLIP, https://arxiv.org/abs/2507.19949).

Axes: B images, N = 1 + L tokens, class token first, L patches in raster order of a grid of g_h rows and g_w
columns, C any width.
:func:`aggregate` is the equation. :func:`mixing` gives the same as a function of tokens of any width, so that it can be
applied to projections of the tokens as well: the Gaussian is separable, so that the sum over a window is the product
with one banded matrix along the rows of the grid and with the same matrix along its columns.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import Grid, grid_of

WINDOWS = (1, 3, 5)
"""Sides of the neighbourhoods, in patches."""

SIGMA = 4.0
"""Of the Gaussian weights within a window, in patches."""

Mixing = Callable[[torch.Tensor], torch.Tensor]
"""A linear mixture of tokens ``[B, 1 + L, C]``, class token first, for any width C."""


def aggregate(tokens: torch.Tensor, window: int, grid: Grid | None = None) -> torch.Tensor:
    """Replace each patch by the Gaussian-weighted sum of its neighbourhood, zeros outside the grid.

    Args:
        tokens: Tokens ``[B, 1 + L, C]``.
        window: Side r of the neighbourhood, odd.
        grid: Rows and columns of the patches; ``None``: a square.

    Returns:
        torch.Tensor: ``[B, 1 + L, C]``, the class token unchanged.
    """
    batch, count, width = tokens.shape
    image = tokens[:, 1:].mT.reshape(batch, width, *(grid_of(count - 1) if grid is None else grid))
    neighbours = F.unfold(image, window, padding=window // 2).view(batch, width, window**2, -1)  # [B, C, r * r, L]
    line = _line(window, tokens)
    weights = torch.outer(line, line).flatten()  # over the whole window 1, also at the border
    return torch.cat((tokens[:, :1], torch.einsum("bckl,k->blc", neighbours, weights)), dim=1)


def mixing(window: int, grid: Grid | None = None) -> Mixing:
    """Fast form of :func:`aggregate`."""
    if window == 1:
        return lambda tokens: tokens

    def mix(tokens: torch.Tensor) -> torch.Tensor:
        height, width = grid_of(tokens.shape[1] - 1) if grid is None else grid
        values = tokens[:, 1:].unflatten(1, (height, width))  # [B, g_h, g_w, C]
        along_columns = _band(height, window, tokens) @ values.flatten(2)  # [B, g_h, g_w * C]
        mixed = _band(width, window, tokens) @ along_columns.unflatten(2, (width, -1))
        return torch.cat((tokens[:, :1], mixed.flatten(1, 2)), dim=1)

    return mix


def _line(window: int, like: torch.Tensor) -> torch.Tensor:
    """Weights along one axis ``[r]``, with sum 1."""
    offsets = torch.arange(window, device=like.device) - window // 2
    weights = torch.exp(-(offsets.float() ** 2) / (2 * SIGMA**2))
    return (weights / weights.sum()).to(like.dtype)


def _band(count: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Matrix ``[count, count]`` of the weighted sums along one axis."""
    axis = torch.arange(count, device=like.device)
    offsets = axis - axis[:, None] + window // 2  # place of column j within the window of row i
    inside = (offsets >= 0) & (offsets < window)
    return torch.where(inside, _line(window, like)[offsets.clamp(0, window - 1)], 0.0).to(like.dtype)
