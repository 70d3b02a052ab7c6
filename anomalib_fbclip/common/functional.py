# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Plain functions on tokens and maps, shared by the models."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import torch

Grid = tuple[int, int]
"""Patches of an image: rows and columns."""


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a size that is one number for a square, or two.

    Raises:
        ValueError: If there are more or fewer numbers.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        msg = f"size {size!r}: give one number for a square, or two, height and width."
        raise ValueError(msg)
    return int(sides[0]), int(sides[1])


def one_or_pair(size: int | Sequence[int]) -> int | tuple[int, int]:
    """A size as its users write it: one number for a square, else height and width."""
    height, width = pair(size)
    return height if height == width else (height, width)


def as_json(size: Any) -> Any:  # noqa: ANN401  # any value
    """A size as JSON gives it back: a pair as a list; other values as they are."""
    return list(size) if isinstance(size, tuple) else size


def grid_of(count: int, size: int | Sequence[int] = 1) -> Grid:
    """Rows and columns of the patches of an image.

    Args:
        count: Patches L.
        size: Height and width of the image, or anything of its proportions; one number for a square.

    Raises:
        ValueError: If there is no such grid.
    """
    height, width = pair(size)
    rows = round((count * height / width) ** 0.5)
    if not rows or count % rows or rows * width != count // rows * height:
        msg = f"{count} patches do not fill an image of the proportions {height} : {width}: give their grid."
        raise ValueError(msg)
    return rows, count // rows


def min_max_normalize(values: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Scale each row of ``[B, L]`` to [0, 1]; a range below ``eps`` counts as ``eps``."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=eps)


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether a graph is recorded for a file. Compiled graphs of torch 2.10 are taken for one, unless asked outside."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def map_matrix(grid: int, size: int, sigma: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """Matrix of the way from patch grid to image along one axis: ``map = rows @ grid_map @ columns.T``.

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
    if is_exporting():  # what is made there belongs to the recorded graph
        return torch.from_numpy(_map_values(grid, size, float(sigma)).copy()).to(device)
    return _map_matrix(grid, size, float(sigma), torch.device(device))


@lru_cache(maxsize=64)
def _map_matrix(grid: int, size: int, sigma: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(mode=False):  # a tensor of inference mode cannot be used in training later
        return torch.from_numpy(_map_values(grid, size, sigma).copy()).to(device)


@lru_cache(maxsize=64)
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


def grid_to_map(grid_map: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    """Apply :func:`map_matrix` to both axes.

    Args:
        grid_map: ``[B, g_h, g_w]``.
        rows: Matrix of the vertical axis ``[H, g_h]``.
        columns: Matrix of the horizontal axis ``[W, g_w]``; ``None``: the same as of the vertical one.

    Returns:
        torch.Tensor: ``[B, H, W]``.
    """
    columns = rows if columns is None else columns
    return rows.to(grid_map.dtype) @ grid_map @ columns.to(grid_map.dtype).T


def upsample(grid_map: torch.Tensor, size: int | Sequence[int], sigma: float) -> torch.Tensor:
    """Map of patches to a map of pixels.

    Args:
        grid_map: ``[B, g_h, g_w]``.
        size: Height and width in pixels; one number for a square.
        sigma: Standard deviation of the smoothing in pixels of the map; 0 leaves it out.

    Returns:
        torch.Tensor: ``[B, H, W]``.
    """
    sides = zip(grid_map.shape[-2:], pair(size), strict=True)
    return grid_to_map(grid_map, *(map_matrix(grid, side, sigma, grid_map.device) for grid, side in sides))


def tokens_to_grid(values: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """``[B, L]`` in raster order to ``[B, g_h, g_w]``; ``grid=None``: a square."""
    return values.unflatten(-1, grid_of(values.shape[-1]) if grid is None else grid)


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


_CHECKED: ContextVar[bool] = ContextVar("checked", default=False)


@contextmanager
def pixels_checked() -> Iterator[None]:
    """Leave :func:`check_finite` out: the caller has looked at the images, and each look waits for the device."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def are_pixels_checked() -> bool:
    """Whether the caller has looked at the pixels, see :func:`pixels_checked`."""
    return _CHECKED.get()


def check_finite(images: torch.Tensor) -> None:
    """Refuse NaN and infinite pixels.

    Args:
        images: ``[B, 3, H, W]``.

    Raises:
        ValueError: If there are any; the message numbers the images.
    """
    # A branch on tensor values breaks tracing, and an exported graph has no one to tell.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or are_pixels_checked() or torch.isfinite(images).all():
        return
    bad = [index for index, image in enumerate(images) if not torch.isfinite(image).all()]
    msg = f"images {bad} of the batch hold NaN or infinite pixels: remove or repair them."
    raise ValueError(msg)
