# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Matching within a batch (FiSeCLIP, https://arxiv.org/abs/2507.11003; our reading, see the README beside this file).

How far each patch is from the nearest reference patch of every other image. Axes: B images of the batch, M earlier
images, R = B + M references, L patches in raster order, D width of the visual tokens.
"""

import math

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import Grid, grid_of, pair

BLOCK_ELEMENTS = 1 << 22
"""Largest block of the distance matrix that is held, in elements (16 MB in float32), but at least one image pair."""

PAPER_GRID = 37
NEIGHBOURHOODS = (1, 3, 5)
_BILLION = 10**9


def relative_neighbourhoods(grid: int | Grid) -> tuple[int, ...]:
    """Neighbourhoods 1, 3, 5 of a grid of 37 patches; in another grid the odd sizes nearest to the same share of it.

    Of a grid that is not square, the square of as many patches counts.
    """
    side = math.prod(pair(grid)) ** 0.5
    return tuple(sorted({2 * max(0, round((size * side / PAPER_GRID - 1) / 2)) + 1 for size in NEIGHBOURHOODS}))


def neighbourhood_average(patches: torch.Tensor, size: int, grid: Grid | None = None) -> torch.Tensor:
    """Average over size x size neighbours on the patch grid and scale to unit length.

    Args:
        patches: ``[B, L, D]`` in raster order of a grid.
        size: Odd; 1 averages nothing. Places beyond the border do not count.
        grid: Rows and columns of the patches; ``None``: a square.

    Returns:
        torch.Tensor: ``[B, L, D]`` in float32, of unit length.
    """
    patches = F.normalize(patches.float(), dim=-1)
    if size == 1:
        return patches
    grid = grid_of(patches.shape[1]) if grid is None else grid
    plane = patches.transpose(1, 2).unflatten(-1, grid)
    plane = F.avg_pool2d(plane, size, stride=1, padding=size // 2, count_include_pad=False)
    return F.normalize(plane.flatten(2).transpose(1, 2), dim=-1)


def nearest_distance(patches: torch.Tensor, reference: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Distance (1 - cosine) / 2 of each patch to the nearest kept patch of one other image.

    Args:
        patches: Unit vectors of one image ``[L, D]``.
        reference: Unit vectors of another image ``[L, D]``.
        kept: What may serve as a reference ``[L]``.

    Returns:
        torch.Tensor: ``[L]`` in [0, 1].
    """
    return (1 - (patches @ reference[kept].T).amax(dim=-1)).clamp(min=0) / 2


def nearest_distances_literal(
    patches: torch.Tensor,
    kept: torch.Tensor,
    bank_patches: torch.Tensor,
    bank_kept: torch.Tensor,
) -> torch.Tensor:
    """:func:`nearest_distance` of each image to each other one; arguments and result as :func:`nearest_distances`."""
    references, allowed = torch.cat((patches, bank_patches)), torch.cat((kept, bank_kept))
    distances = patches.new_full((len(patches), len(references), patches.shape[1]), torch.inf)
    for query, own in enumerate(patches):
        for number, (reference, mask) in enumerate(zip(references, allowed, strict=True)):
            if number != query:
                distances[query, number] = nearest_distance(own, reference, mask)
    return distances


def nearest_distances(
    patches: torch.Tensor,
    kept: torch.Tensor,
    bank_patches: torch.Tensor,
    bank_kept: torch.Tensor,
) -> torch.Tensor:
    """Fast form of :func:`nearest_distances_literal`.

    Cosines are symmetric, so each pair of images of the batch is multiplied once and read in both directions. Several
    references go through one product, as many as :data:`BLOCK_ELEMENTS` admits.

    Args:
        patches: Unit vectors of the batch ``[B, L, D]``.
        kept: What may serve as a reference ``[B, L]``.
        bank_patches: Unit vectors of earlier images ``[M, L, D]``; M may be 0.
        bank_kept: ``[M, L]``.

    Returns:
        torch.Tensor: ``[B, B + M, L]`` in [0, 1]; an image's distance to itself is infinite.
    """
    count, length, _ = patches.shape
    references, allowed = torch.cat((patches, bank_patches)), torch.cat((kept, bank_kept))
    distances = patches.new_full((count, len(references), length), torch.inf)
    step = max(1, BLOCK_ELEMENTS // length**2)
    for query in range(count):
        for start in range(query + 1, len(references), step):
            stop = min(start + step, len(references))
            # [R, L of the references, L of the query]: one block of the distance matrix
            block = references[start:stop] @ patches[query].T
            best = block.masked_fill(~allowed[start:stop, :, None], -1).amax(dim=1)
            distances[query, start:stop] = (1 - best) / 2
            inside = max(0, min(stop, count) - start)
            if inside:
                best = block[:inside].masked_fill(~kept[query], -1).amax(dim=2)
                distances[start : start + inside, query] = (1 - best) / 2
    return distances.clamp(min=0)


def nearest_of_each_image(
    distances: torch.Tensor,
    valid: torch.Tensor,
    owners: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances to images from those to their tiles: an image has a patch if one of its tiles has it.

    Args:
        distances: To each of R tiles ``[B, R, L]``.
        valid: Which tile counts for which row ``[B, R]``.
        owners: Key of the image that each tile is from ``[R]``.

    Returns:
        tuple: Distances to each of I images ``[B, I, L]``, infinite where none of its tiles counts, and which image
        counts for which row ``[B, I]``.
    """
    groups = owners.unique(return_inverse=True)[1]
    found = distances.new_full((len(distances), int(groups.max()) + 1, distances.shape[2]), torch.inf)
    found.scatter_reduce_(
        1,
        groups[None, :, None].expand_as(distances),
        distances.masked_fill(~valid[..., None], torch.inf),
        "amin",
    )
    return found, found.isfinite().all(dim=2)


def mean_of_smallest(distances: torch.Tensor, valid: torch.Tensor, share: float) -> torch.Tensor:
    """Mean of the smallest distances over the reference images.

    A defect that repeats in fewer images than the share stays far away; a rare normal patch is near as soon as a share
    of the images has it.

    Args:
        distances: ``[B, R, L]``.
        valid: Which reference counts for which image ``[B, R]``.
        share: Share of an image's references; at least one.

    Returns:
        torch.Tensor: ``[B, L]``; 0 for an image without any reference.
    """
    number = valid.sum(dim=1)
    # In whole billionths, for float32 would take 10 of 30 times 0.3, not every device has double precision, and a way
    # over the host would wait for the device. A thousand of them are a margin for shares such as a third.
    count = ((number * round(share * _BILLION) + _BILLION - 1001) // _BILLION).clamp(min=1)
    ordered = distances.masked_fill(~valid[..., None], torch.inf).sort(dim=1).values
    taken = torch.arange(distances.shape[1], device=distances.device) < torch.minimum(count, number)[:, None]
    return ordered.masked_fill(~taken[..., None], 0).sum(dim=1) / count[:, None]
