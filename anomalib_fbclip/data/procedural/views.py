# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Several images of one part: from several sides, under several lights, partly hidden."""

from __future__ import annotations

import cv2
import numpy as np

from anomalib_fbclip.data.procedural.defects import Defect, add_defect
from anomalib_fbclip.data.procedural.fields import Surface, colour, noise, smoothstep
from anomalib_fbclip.data.procedural.generator import Sample, finish, scene

HIDDEN = 0.8
"""Share of the views in which something stands before the part."""
LEAST_SEEN = 0.3
"""Share of a defect that must be in sight for a view to be labelled as defective."""


def generate_views(
    family: str,
    kind: str,
    size: int,
    seed: tuple[int, ...],
    number: int,
    variation: float = 1.0,
) -> list[Sample]:
    """Make the images of one part; the same arguments give the same bytes.

    The part is drawn once, with its defect if it has one. Each view turns and tilts it, hides a side of it behind a
    holder in :data:`HIDDEN` of the views, and lights it anew. A view in which less than :data:`LEAST_SEEN` of the
    defect is in sight is drawn without it and is ``good``; at least one view of a defective part shows the defect.

    Args:
        family: Name of the family.
        kind: One of the kinds of defects, or ``good`` for none.
        size: Side in pixels.
        seed: Non-negative numbers that make a seed.
        number: Views, one or more.
        variation: Strength of the normal variation, 0..1.
    """
    rng = np.random.default_rng(seed)
    surface = scene(family, rng, size, variation)
    spoiled = None if kind == "good" else add_defect(rng, surface, kind)
    holder = colour(rng, (0.0, 0.3), (0.05, 0.6))
    shown = int(rng.integers(number))
    return [
        _view(family, surface, spoiled, holder, np.random.default_rng((*seed, view)), variation, view == shown)
        for view in range(number)
    ]


def _view(
    family: str,
    surface: Surface,
    spoiled: Defect | None,
    holder: np.ndarray,
    rng: np.random.Generator,
    variation: float,
    must_show: bool,
) -> Sample:
    """One view of a part."""
    size = surface.part.shape[0]
    whole, mask = 0, np.zeros((size, size), dtype=bool)
    turn = _camera(rng, size)
    if spoiled is not None:
        whole = max(int(spoiled.mask.sum()), 4)
        looks = [turn, *(_camera(rng, size) for _ in range(8)), np.eye(3)] if must_show else [turn]
        for turn in looks:
            mask = _warp(spoiled.mask.astype(np.float32), turn, size) > 0.5
            if mask.sum() >= LEAST_SEEN * whole:
                break
    clean = _warp(surface.image, turn, size)
    image = clean if spoiled is None else _warp(spoiled.image, turn, size)
    hides = rng.random() < HIDDEN
    cover = _cover(rng, size)
    if hides and not (must_show and (mask & ~(cover > 0)).sum() < LEAST_SEEN * whole):
        before = holder * (1 + 0.05 * noise(rng, size, 8))[..., None]
        image, clean = ((each * (1 - cover[..., None]) + before * cover[..., None]) for each in (image, clean))
        mask &= ~(cover > 0)
    kind = "good" if spoiled is None or mask.sum() < LEAST_SEEN * whole else spoiled.kind
    if kind == "good":
        image, mask = clean, np.zeros((size, size), dtype=bool)
    image, clean = np.clip(image, 0, 1).astype(np.float32), np.clip(clean, 0, 1).astype(np.float32)
    image, clean = finish(rng, image, clean, mask, variation)
    return Sample(image, mask, clean, family, kind)


def _camera(rng: np.random.Generator, size: int) -> np.ndarray:
    """Homography of a camera that is turned about the part and tilted."""
    angle = np.radians(90 * rng.integers(4) + rng.normal(0, 8))
    line = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=np.float32)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], dtype=np.float32)
    # Corners move inwards in the image, so that the part fills it: a tilted look at its middle.
    seen = line @ rotation.T * 0.72 * (1 + rng.uniform(-0.12, 0.12, (4, 1)).astype(np.float32))
    corners = ((seen + 1) / 2 * size).astype(np.float32)
    frame = np.array([[0, 0], [size, 0], [size, size], [0, size]], dtype=np.float32)
    return cv2.getPerspectiveTransform(corners, frame)


def _warp(values: np.ndarray, turn: np.ndarray, size: int) -> np.ndarray:
    return cv2.warpPerspective(values, turn, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _cover(rng: np.random.Generator, size: int) -> np.ndarray:
    """How much of each pixel a holder hides that comes in from one side ``[S, S]``."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    angle, edge = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.4)
    across = np.cos(angle) * line[None] + np.sin(angle) * line[:, None] - edge
    return smoothstep(across + 0.05 * noise(rng, size, 3), 0, 0.02).astype(np.float32)
