# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Plain functions on tokens and maps, shared by the models."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import numpy as np
import torch


def min_max_normalize(values: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Scale each row of ``[B, L]`` to [0, 1]; a range below ``eps`` counts as ``eps``."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=eps)


@torch.compiler.assume_constant_result
def map_matrix(grid: int, size: int, sigma: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Matrix M of the whole way from patch grid to image: ``map = M @ grid_map @ M.T``.

    Bilinear up-sampling (``align_corners=False``) and Gaussian smoothing (cut at four sigma, border mirrored with the
    edge pixel repeated) are linear and separable, so both together are one small matrix, exact in any framework.

    Args:
        grid: Patches along one side.
        size: Pixels along one side.
        sigma: Standard deviation in pixels of the map; 0 leaves the smoothing out.
        device: Where the matrix is; made once for each device, as a copy to a GPU would wait for it.

    Returns:
        torch.Tensor: ``[size, grid]`` in float32, rows summing to 1; shared, so not to be changed in place.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # what is made there belongs to the recorded graph
        return torch.from_numpy(_map_values(grid, size, float(sigma)).copy()).to(device)
    return _map_matrix(grid, size, float(sigma), torch.device(device))


@lru_cache(maxsize=16)
def _map_matrix(grid: int, size: int, sigma: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(mode=False):  # a tensor of inference mode cannot be used in training later
        return torch.from_numpy(_map_values(grid, size, sigma).copy()).to(device)


@lru_cache(maxsize=16)
def _map_values(grid: int, size: int, sigma: float) -> np.ndarray:
    place = np.clip((np.arange(size) + 0.5) * (grid / size) - 0.5, 0, None)
    low = np.minimum(place.astype(int), grid - 1)
    upsample, rows = np.zeros((size, grid)), np.arange(size)
    np.add.at(upsample, (rows, low), 1 - (place - low))
    np.add.at(upsample, (rows, np.minimum(low + 1, grid - 1)), place - low)
    return (_gaussian_matrix(size, sigma) @ upsample if sigma > 0 else upsample).astype(np.float32)


def _gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    # A mirrored border of period 2 * size holds for kernels that are wider than the map, too.
    source = (np.arange(size)[:, None] + offsets) % (2 * size)
    source = np.where(source < size, source, 2 * size - 1 - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), kernel)
    return matrix


def grid_to_map(grid_map: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Apply :func:`map_matrix` to both axes: ``[B, g, g]`` to ``[B, H, H]``."""
    matrix = matrix.to(grid_map.dtype)
    return matrix @ grid_map @ matrix.T


def tokens_to_grid(values: torch.Tensor) -> torch.Tensor:
    """``[B, L]`` in raster order to the square ``[B, g, g]``."""
    grid = round(values.shape[-1] ** 0.5)
    return values.unflatten(-1, (grid, grid))


def relative_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Blocks at the same relative depth in another tower.

    Args:
        layers: Blocks of a tower of ``layers[-1]`` blocks, counted from 1.
        num_layers: Blocks of the tower at hand.

    Returns:
        tuple[int, ...]: Ascending; fewer where two fall on one block.
    """
    return tuple(sorted({max(1, round(layer * num_layers / layers[-1])) for layer in layers}))


def full_precision(device: torch.device) -> AbstractContextManager:
    """Compute in float32 where autocast is on.

    Where it is off nothing is switched: an exporter makes a sub-graph of every switch, which cost half of its time.
    """
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def is_dense(tensor: object) -> bool:
    """Whether something from a file is a tensor of floating-point numbers that are really there."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and not tensor.is_meta
    )


def check_finite(images: torch.Tensor) -> None:
    """Refuse NaN and infinite pixels.

    Args:
        images: ``[B, 3, H, W]``.

    Raises:
        ValueError: If there are any; the message numbers the images.
    """
    # A branch on tensor values breaks tracing, and an exported graph has no one to tell.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.isfinite(images).all():
        return
    bad = [index for index, image in enumerate(images) if not torch.isfinite(image).all()]
    msg = f"images {bad} of the batch hold NaN or infinite pixels: remove or repair them."
    raise ValueError(msg)
