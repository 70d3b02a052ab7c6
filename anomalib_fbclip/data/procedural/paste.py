# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Drawn defects in photographs of any size."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from .defects import KINDS, add_defect
from .fields import Surface

_LEAST_SIDE = 32
_MOST_SIDE = 256
"""Of the square that a defect is drawn in; larger ones are drawn at this size and enlarged."""
_GREY = 1 / 512
"""Where the colours differ by less, the camera knows none, and a coloured defect would be found too easily."""
_MOST_AREAS = 4
"""A defect of a least area has up to so many times this area."""


class Patch(NamedTuple):
    """A square of an image that shows a defect.

    Attributes:
        top: First row.
        left: First column.
        pixels: ``[s, s, 3]`` in [0, 1].
        mask: Pixels of the defect ``[s, s]``.
    """

    top: int
    left: int
    pixels: np.ndarray
    mask: np.ndarray


def draw_patch(image: np.ndarray, part: np.ndarray, seed: int, least_side: int, min_area: int = 0) -> Patch:
    """Draw one defect of a random size on an image.

    Args:
        image: Photograph ``[H, W, 3]`` in [0, 1], float32.
        part: Pixels that may show a defect ``[H, W]``, some true.
        seed: Of place, size and appearance; the kinds of defect take turns.
        least_side: The defect is drawn in a square whose side is between this and the image's shorter side, uniformly
            in its logarithm.
        min_area: Instead, the defect has about one to four times this area in pixels. 0: no area is wanted.
    """
    rng = np.random.default_rng(seed)
    shorter = min(part.shape)
    low = min(max(least_side, _LEAST_SIDE), shorter)
    side = round(low * (shorter / low) ** rng.random())
    rows, columns = np.nonzero(part)
    pick = rng.integers(len(rows))
    place, wanted = (int(rows[pick]), int(columns[pick])), min_area * _MOST_AREAS ** rng.random()
    shape_seed = int(rng.integers(2**31))
    patch = _draw(image, part, side, place, seed, shape_seed)
    for _ in range(3 if min_area else 0):  # what is drawn grows about with the square, but not exactly
        side = round(float(np.clip(side * (wanted / max(1, patch.mask.sum())) ** 0.5, min(8, shorter), shorter)))
        patch = _draw(image, part, side, place, seed, shape_seed)
    return patch


def _draw(
    image: np.ndarray,
    part: np.ndarray,
    side: int,
    place: tuple[int, int],
    kind: int,
    seed: int,
) -> Patch:
    """A defect in a square of a side, around a place as far as the image allows."""
    top, left = (int(np.clip(at - side // 2, 0, length - side)) for at, length in zip(place, part.shape, strict=True))
    window = np.ascontiguousarray(image[top : top + side, left : left + side])
    inside = part[top : top + side, left : left + side]
    change, mask = draw_change(window, inside, KINDS[kind % len(KINDS)], np.random.default_rng(seed))
    pixels = np.where(inside[..., None], np.clip(window + change, 0, 1), window)
    return Patch(top, left, pixels.astype(np.float32), mask & inside)


def draw_change(
    window: np.ndarray,
    part: np.ndarray,
    kind: str,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What a drawn defect changes in a square of a photograph, which keeps its texture; grey in a grey one.

    Args:
        window: ``[s, s, 3]`` in [0, 1], float32.
        part: Pixels that may show the defect ``[s, s]``.
        kind: One of :data:`KINDS`.
        rng: Source of randomness.

    Returns:
        tuple: What is added to the pixels ``[s, s, 3]``, and the pixels of the defect ``[s, s]``.
    """
    side = len(window)
    drawn_side = min(max(side, _LEAST_SIDE), _MOST_SIDE)
    small = cv2.resize(window, (drawn_side, drawn_side), interpolation=cv2.INTER_AREA)
    allowed = cv2.resize(part.astype(np.uint8), (drawn_side, drawn_side), interpolation=cv2.INTER_NEAREST) > 0
    if not allowed.any():
        allowed[:] = True  # the part is thinner than a pixel of the drawing
    defect = add_defect(rng, Surface(small, allowed), kind)
    change = defect.image - small
    if np.ptp(window, axis=2).max() < _GREY:
        change = np.broadcast_to(change.mean(axis=2, keepdims=True), change.shape)
    change = cv2.resize(np.ascontiguousarray(change), (side, side), interpolation=cv2.INTER_LINEAR)
    return change, cv2.resize(defect.mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) > 0
