# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Products and weighted sums over the 5 x 5 neighbourhoods of SPA (FB-CLIP, https://arxiv.org/abs/2603.19608, eq. 16).

Axes: B images, L patches in raster order of a grid of g_h rows and g_w columns. The 25 neighbours go row by row; tokens
outside the grid are 0.

No form copies the tokens 25 times. A CPU picks the neighbours of each patch: torch has a kernel for products of chosen
rows, and one for weighted sums of chosen rows. Elsewhere, and in graphs, which lack them, a row of the grid is
multiplied with another, as a matrix of which a band counts: g_w / 5 times the needed products.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import Grid, is_exporting

WINDOW = 5
"""Side of the neighbourhoods of the spatial view, in patches (eq. 16)."""
_REACH = WINDOW // 2


def neighbour_products(centres: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Dot product of each centre with the 25 tokens around it.

    Args:
        centres: ``[B, g_h, g_w, D]``.
        tokens: ``[B, g_h, g_w, D]``.

    Returns:
        torch.Tensor: ``[B, L, 25]``, without a gradient; 0 outside the grid.
    """
    return (_picked_products if _picks(tokens.device) else _banded_products)(centres, tokens)


def neighbour_mixing(weights: torch.Tensor, grid: Grid) -> Callable[[torch.Tensor], torch.Tensor]:
    """Weighted sum of the 25 tokens around each patch, as a mixture of tokens.

    Args:
        weights: ``[B, L, 25]``.
        grid: Rows and columns of the patches.

    Returns:
        Callable[[torch.Tensor], torch.Tensor]: Mixes tokens ``[B, 1 + L, C]`` of any width C; keeps the class token.
    """
    return (_picked_mixing if _picks(weights.device) else _banded_mixing)(weights, grid)


def _picks(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling() and not is_exporting()


@lru_cache(maxsize=16)
def _neighbours(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch number of each neighbour, the patch's own outside the grid, and where it is inside: ``[L, 25]`` of both."""
    with torch.inference_mode(mode=False):  # training could not use a tensor of inference mode
        height, width = grid
        steps = torch.arange(-_REACH, _REACH + 1)
        row = (torch.arange(height)[:, None] + steps)[:, None, :, None]  # [g_h, 1, 5, 1]
        column = (torch.arange(width)[:, None] + steps)[None, :, None, :]  # [1, g_w, 1, 5]
        inside = ((row >= 0) & (row < height) & (column >= 0) & (column < width)).reshape(-1, WINDOW**2)
        number = (row * width + column).reshape(-1, WINDOW**2)
        return torch.where(inside, number, torch.arange(height * width)[:, None]), inside


@lru_cache(maxsize=16)
def _pattern(grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """Sparse ``[L, L]`` with an entry for each pair of neighbours."""
    number, inside = _neighbours(grid)
    with torch.inference_mode(mode=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR")  # "in beta state"; of what is used here the tests check values
        starts = F.pad(inside.sum(dim=-1).cumsum(0), (1, 0))
        entries = torch.zeros(int(starts[-1]), dtype=dtype)
        shape = (len(number), len(number))
        return torch.sparse_csr_tensor(starts, number[inside], entries, shape, check_invariants=False)


def _picked_products(centres: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    batch, height, width, _ = tokens.shape
    pattern, inside = _pattern((height, width), tokens.dtype), _neighbours((height, width))[1].expand(batch, -1, -1)
    products = torch.sparse.sampled_addmm(pattern, centres.flatten(1, 2), tokens.flatten(1, 2).mT, beta=0.0)
    return tokens.new_zeros(inside.shape).masked_scatter_(inside, products.values())


def _picked_mixing(weights: torch.Tensor, grid: Grid) -> Callable[[torch.Tensor], torch.Tensor]:
    number, inside = _neighbours(grid)
    weights = F.pad(weights * inside, (0, 0, 1, 0))
    weights[:, 0, 0] = 1  # the class token is the sum of itself
    images = torch.arange(len(weights))[:, None, None] * weights.shape[1]
    rows = (F.pad(number + 1, (0, 0, 1, 0)) + images).flatten(0, 1)  # [B * (1 + L), 25]

    def mix(values: torch.Tensor) -> torch.Tensor:
        each = weights.flatten(0, 1).to(values.dtype)
        mixed = F.embedding_bag(rows, values.flatten(0, 1), per_sample_weights=each, mode="sum")
        return mixed.view(values.shape)

    return mix


def _banded_products(centres: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    batch, height, width = centres.shape[:3]
    padded = F.pad(tokens, (0, 0, _REACH, _REACH, _REACH, _REACH))
    bands = []
    for shift in range(WINDOW):
        block = centres @ padded.narrow(1, shift, height).transpose(-1, -2)
        # The band is read out of each [g_w, g_w + 4] block by a change of stride.
        stretched = F.pad(block.flatten(-2), (0, width)).unflatten(-1, (width, width + WINDOW))
        bands.append(stretched.narrow(-1, 0, WINDOW))
    return torch.cat(bands, dim=-1).reshape(batch, height * width, WINDOW**2)


def _banded_mixing(weights: torch.Tensor, grid: Grid) -> Callable[[torch.Tensor], torch.Tensor]:
    bands = _bands(weights, grid)

    def mix(values: torch.Tensor) -> torch.Tensor:
        patches = values[:, 1:].unflatten(1, grid)
        outside = patches.new_zeros(patches.shape[0], _REACH, grid[1], patches.shape[-1])
        image = torch.cat((outside, patches, outside), dim=1)  # padding would fill all of it first
        return torch.cat((values[:, :1], _banded_sum(bands.to(values.dtype), image)), dim=1)

    return mix


def _bands(weights: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights of the 25 tokens around each place ``[B, L, 25]`` to row-by-row bands ``[5, B, g_h, g_w, g_w]``."""
    width = grid[1]
    rows = weights.unflatten(1, grid).unflatten(-1, (WINDOW, WINDOW))
    padded = F.pad(rows.movedim(-2, 0), (0, width)).flatten(-2)[..., : width * (width + WINDOW - 1)]
    return padded.unflatten(-1, (width, width + WINDOW - 1)).narrow(-1, _REACH, width).contiguous()


def _banded_sum(bands: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """Sum of the 25 tokens around each place: bands, padded rows ``[B, g_h + 4, g_w, C]`` -> ``[B, L, C]``."""
    height, width = bands.shape[2:4]
    # narrow() and not [:, a:b], of which a graph has one node for each axis; the sum is part of the product.
    band, *others = bands.flatten(1, 2).unbind()
    total = band @ padded.narrow(1, 0, height).flatten(0, 1)
    for shift, band in enumerate(others, start=1):
        total.baddbmm_(band, padded.narrow(1, shift, height).flatten(0, 1))
    return total.view(-1, height * width, padded.shape[-1])
