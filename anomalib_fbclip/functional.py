# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Plain functions on tokens and maps, shared by the models."""

from functools import lru_cache

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses


def min_max_normalize(values: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Scale each row of ``[B, L]`` to [0, 1]; a range below ``eps`` counts as ``eps``."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=eps)


def map_matrix(grid: int, size: int, sigma: float) -> torch.Tensor:
    """Matrix M of the whole way from patch grid to image: ``map = M @ grid_map @ M.T``.

    Bilinear up-sampling (``align_corners=False``) and Gaussian smoothing (cut at four sigma, border mirrored with the
    edge pixel repeated) are linear and separable, so both together are one small matrix, exact in any framework.

    Args:
        grid: Patches along one side.
        size: Pixels along one side.
        sigma: Standard deviation in pixels of the map; 0 leaves the smoothing out.

    Returns:
        torch.Tensor: ``[size, grid]`` in float32, rows summing to 1.
    """
    return _map_matrix(grid, size, float(sigma)).clone()


@lru_cache(maxsize=16)
def _map_matrix(grid: int, size: int, sigma: float) -> torch.Tensor:
    identity = torch.eye(grid, dtype=torch.float64)[None]
    upsample = F.interpolate(identity, size=size, mode="linear", align_corners=False)[0].T
    return (_gaussian_matrix(size, sigma) @ upsample).float() if sigma > 0 else upsample.float()


def _gaussian_matrix(size: int, sigma: float) -> torch.Tensor:
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    kernel /= kernel.sum()
    source = torch.arange(size)[:, None] + offsets
    # A mirrored border of period 2 * size holds for kernels that are wider than the map, too.
    source = source.remainder(2 * size)
    source = torch.where(source < size, source, 2 * size - 1 - source)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, source, kernel.expand(size, -1).contiguous())


def grid_to_map(grid_map: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Apply :func:`map_matrix` to both axes: ``[B, g, g]`` to ``[B, H, H]``."""
    matrix = matrix.to(grid_map.dtype)
    return matrix @ grid_map @ matrix.T


def tokens_to_grid(values: torch.Tensor) -> torch.Tensor:
    """``[B, L]`` in raster order to the square ``[B, g, g]``."""
    grid = round(values.shape[-1] ** 0.5)
    return values.unflatten(-1, (grid, grid))
