# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Connected components of what is marked, in pixels of the original image."""

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F  # noqa: N812

ROUNDS = 14
"""Of :func:`drop_small_in_graph`."""


class Component(NamedTuple):
    """One connected component of a mask; pixels that touch at a corner belong together.

    Attributes:
        box: Left, top, right, bottom in pixels of the original image; right and bottom exclusive, as in Pillow's
            ``crop``.
        area: In pixels of the original image.
        peak: Largest value of the map in it, in [0, 1].
        centre: Its centre of mass, x and y in pixels of the original image.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    centre: tuple[int, int]


def find_components(mask: torch.Tensor, anomaly_map: torch.Tensor, size: tuple[int, int]) -> list[Component]:
    """The components of a mask, the highest peak first.

    They are found on the grid of the map, and scaled: places and areas are as fine as a pixel of the map.

    Args:
        mask: What is marked ``[h, w]``.
        anomaly_map: ``[h, w]`` in [0, 1].
        size: Height and width of the original image in pixels.

    Example:
        >>> mask = torch.zeros(4, 4, dtype=torch.bool)
        >>> mask[1, 1:3] = True
        >>> find_components(mask, mask * 0.75, (8, 16))
        [Component(box=(4, 2, 12, 4), area=16, peak=0.75, centre=(8, 3))]
    """
    labels, stats, centres = label_components(mask.detach().cpu().numpy())
    peaks = np.zeros(len(stats))
    inside = labels > 0
    np.maximum.at(peaks, labels[inside], anomaly_map.detach().float().cpu().numpy()[inside])
    rows, columns = size[0] / labels.shape[0], size[1] / labels.shape[1]
    found = [
        Component(
            (
                int(left * columns),
                int(top * rows),
                int(np.ceil((left + width) * columns)),
                int(np.ceil((top + height) * rows)),
            ),
            max(1, round(area * rows * columns)),
            round(float(peaks[number]), 6),
            (int((centres[number, 0] + 0.5) * columns), int((centres[number, 1] + 0.5) * rows)),
        )
        for number, (left, top, width, height, area) in enumerate(stats.tolist())
        if number
    ]
    return sorted(found, key=lambda component: (-component.peak, component.box))


def drop_small(mask: torch.Tensor, min_area: float, size: tuple[int, int]) -> torch.Tensor:
    """A mask ``[h, w]`` without its components of less than ``min_area`` pixels of an image of a height and width."""
    labels, stats, _ = label_components(mask.detach().cpu().numpy())
    kept = stats[:, cv2.CC_STAT_AREA] * (size[0] * size[1] / labels.size) >= min_area
    kept[0] = False
    return torch.from_numpy(kept[labels]).to(mask.device)


def peak_of_area(anomaly_map: torch.Tensor, min_area: float, size: tuple[int, int]) -> torch.Tensor:
    """The value below which a threshold marks a component of a least area.

    Without a least area this is the largest value of the map.

    Args:
        anomaly_map: ``[h, w]``.
        min_area: Least area in pixels of the original image; 0 or 1: any pixel.
        size: Height and width of the original image in pixels.

    Returns:
        torch.Tensor: A scalar; 0 where the whole map is smaller.
    """
    anomaly_map = anomaly_map.detach().float().cpu()
    values = anomaly_map.flatten().sort().values
    # What is marked only grows as the threshold falls.
    low, high = -1, len(values) - 1
    if min_area <= 1 or drop_small(anomaly_map >= values[high], min_area, size).any():
        return values[high]
    while high - low > 1:
        middle = (low + high) // 2
        if drop_small(anomaly_map >= values[middle], min_area, size).any():
            low = middle
        else:
            high = middle
    return values[low] if low >= 0 else values.new_zeros(())


def drop_small_in_graph(masks: torch.Tensor, min_area: int, size: tuple[int, int]) -> torch.Tensor:
    """What :func:`drop_small` does, of a batch ``[B, h, w]``, in operations that an exported graph can hold.

    Each pixel points to one of its component with a higher number. In a round, what a pixel points to is let point to
    the highest pointer near that pixel, and pointers of pointers are followed, so that distances double. Rounds stand
    in a row, as a graph has no loop: :data:`ROUNDS` suffice for far more tangled masks than maps give.

    Args:
        masks: What is marked, of one size each.
        min_area: Least area in pixels of the original image.
        size: Height and width of the original image in pixels; may be symbolic.
    """
    number, height, width = masks.shape
    inside = masks.reshape(number, 1, height, width).to(torch.int64)
    places = torch.arange(1, height * width + 1, device=masks.device).reshape(1, 1, height, width)
    flat = inside.flatten(1)
    pointers = (places * inside).flatten(1)  # 0: not marked
    for _ in range(ROUNDS):
        near = F.max_pool2d(pointers.reshape(inside.shape).float(), 3, stride=1, padding=1).long().flatten(1) * flat
        # Place 0 takes what is not marked.
        table = torch.cat((torch.zeros_like(pointers[:, :1]), torch.maximum(pointers, near)), dim=1)
        table = table.scatter_reduce(1, pointers, near, reduce="amax")
        table = table.gather(1, table)
        pointers = table.gather(1, table)[:, 1:]
    areas = torch.zeros_like(table).scatter_add(1, pointers, flat).gather(1, pointers)
    kept = areas * (size[0] * size[1]) >= min_area * height * width
    return (kept & (flat > 0)).reshape(masks.shape)


def original_size(path: str | Path | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of an image file; without a file those of a shape that ends with them."""
    if path is not None and Path(path).is_file():
        with Image.open(path) as image:
            return image.height, image.width
    return int(shape[-2]), int(shape[-1])


def components_of(item: Any) -> list[Component]:  # noqa: ANN401  # anomalib's item
    """The components of a post-processed item; none where it has no mask or map."""
    if item.pred_mask is None or item.anomaly_map is None:
        return []
    size = original_size(item.image_path, tuple(item.anomaly_map.shape))
    return find_components(item.pred_mask.reshape(item.anomaly_map.shape[-2:]), item.anomaly_map.squeeze(), size)


def label_components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number of the component of each pixel ``[h, w]``, 0 outside; OpenCV's statistics of each; their centres."""
    _, labels, stats, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return labels, stats, centres
