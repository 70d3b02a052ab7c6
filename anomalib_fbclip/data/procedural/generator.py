# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""From a seed to an image and its mask."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from anomalib_fbclip.data.procedural.defects import KINDS, add_defect
from anomalib_fbclip.data.procedural.families import FAMILIES, OBJECTS, render
from anomalib_fbclip.data.procedural.fields import Surface
from anomalib_fbclip.data.procedural.variation import border, expose, light, markings, place, soften, speckle

MIN_SIZE = 32
MIN_STEP = 12
"""Least mean change inside a mask after exposure, of 255; light that hides the defect is drawn again, weaker."""


class Sample(NamedTuple):
    """One finished image.

    Attributes:
        image: uint8 ``[S, S, 3]``, RGB.
        mask: bool ``[S, S]``; all False when normal.
        clean: The same image without the defect, uint8 ``[S, S, 3]``; equal to ``image`` outside the mask.
        family: Name of the family.
        kind: Name of the defect, or ``good``.
    """

    image: np.ndarray
    mask: np.ndarray
    clean: np.ndarray
    family: str
    kind: str


def scene(family: str, rng: np.random.Generator, size: int, variation: float = 1.0) -> Surface:
    """A placed surface with its borders and harmless marks, before light and camera.

    Args:
        family: One of ``FAMILIES``.
        rng: Source of randomness.
        size: Side in pixels.
        variation: 0 for none of the normal variation, 1 for all of it.
    """
    surface = place(rng, render(family, rng, round(size * 1.3)), size)
    if family not in OBJECTS and rng.random() < 0.2 * variation:
        surface = border(rng, surface)
    image = surface.image
    if rng.random() < 0.2 * variation:
        image = markings(rng, image)
    if rng.random() < 0.2 * variation:
        image = speckle(rng, image)
    return Surface(image.astype(np.float32), surface.part)


def finish(
    rng: np.random.Generator,
    image: np.ndarray,
    clean: np.ndarray,
    mask: np.ndarray,
    variation: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Light and photograph the spoiled and the clean image alike; they differ inside the mask only.

    Under- or overexposure must not hide a defect: then the light is drawn again, weaker.

    Returns:
        ``(image, clean)``, uint8 ``[S, S, 3]`` each.
    """
    if rng.random() < 0.3 * variation:
        state = rng.bit_generator.state
        clean = soften(rng, clean)
        rng.bit_generator.state = state
        image = soften(rng, image)
    image = np.where(mask[..., None], image, clean)
    for strength in (1.0, 0.5, 0.0):
        state = rng.bit_generator.state
        out = _photograph(rng, image, variation * strength)
        after = rng.bit_generator.state
        rng.bit_generator.state = state
        good = _photograph(rng, clean, variation * strength) if mask.any() else out
        rng.bit_generator.state = after
        if not mask.any() or np.abs(out.astype(np.float32) - good)[mask].mean() >= MIN_STEP:
            break
    return out, good


def _photograph(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    """One exposure, uint8; two calls from the same state of ``rng`` differ only where their images do."""
    lit = light(rng, image.shape[0], strength)
    return np.round(expose(rng, image, lit, rng.uniform(0.3, 1.0)) * 255).astype(np.uint8)


def generate(family: str, kind: str, size: int, seed: int | tuple[int, ...], variation: float = 1.0) -> Sample:
    """Make one image; the same arguments give the same bytes.

    Args:
        family: One of ``FAMILIES``.
        kind: One of ``KINDS``, or ``good`` for none.
        size: Side in pixels, at least 32.
        seed: Seed, or a tuple of non-negative numbers that make one.
        variation: Strength of the normal variation, 0..1.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if family not in FAMILIES:
        msg = f"family must be one of {FAMILIES}, got {family!r}."
        raise ValueError(msg)
    if kind != "good" and kind not in KINDS:
        msg = f"kind must be 'good' or one of {KINDS}, got {kind!r}."
        raise ValueError(msg)
    if size < MIN_SIZE:
        msg = f"size must be at least {MIN_SIZE} pixels, got {size}."
        raise ValueError(msg)
    if not 0 <= variation <= 1:
        msg = f"variation must lie in 0..1, got {variation}."
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    surface = scene(family, rng, size, variation)
    if kind == "good":
        mask = np.zeros(surface.part.shape, dtype=bool)
        image, clean = finish(rng, surface.image, surface.image, mask, variation)
        return Sample(image, mask, clean, family, kind)
    spoiled = add_defect(rng, surface, kind)
    image, clean = finish(rng, spoiled.image, surface.image, spoiled.mask, variation)
    return Sample(image, spoiled.mask, clean, family, spoiled.kind)
