# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Batches for the recipe: made on the fly, a little wilder than the data module's images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from anomalib_fbclip.data.procedural.defects import KINDS, add_defect
from anomalib_fbclip.data.procedural.families import OBJECTS, TRAIN_FAMILIES
from anomalib_fbclip.data.procedural.fields import Surface
from anomalib_fbclip.data.procedural.generator import finish, scene
from recipes.tiny_clip.captions import caption
from recipes.tiny_clip.variety import SURFACES, add_soft_defect, dark_frame, photograph

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
OWN_SURFACES, SOFT_DEFECTS, CAMERAS = 0.3, 0.4, 0.6
"""Shares of the training images with a surface, a defect and a camera of :mod:`variety`."""
VARIATIONS = (0.5, 1.0)
"""Strengths of the normal variation, as often one as the other: an inspection station and free images."""


def to_images(images: torch.Tensor) -> np.ndarray:
    """Back from :func:`to_tensor` to uint8 ``[B, S, S, 3]``."""
    return ((images * STD + MEAN) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


class Batch(NamedTuple):
    """Images ``[B, 3, S, S]`` normalised; masks ``[B, S, S]`` 0/1; kinds ``[B]`` (0 good, then ``KINDS``); captions."""

    images: torch.Tensor
    masks: torch.Tensor
    kinds: torch.Tensor
    captions: list[str]
    families: list[str]


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 ``[B, S, S, 3]`` to CLIP's normalised float32 ``[B, 3, S, S]``."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def _surface(
    rng: np.random.Generator,
    size: int,
    variation: float,
    families: tuple[str, ...],
    rough: bool,
) -> tuple[Surface, str]:
    """One normal surface and its family: of the data module, of the recipe alone, or a mixture of two."""
    if rough and rng.random() < OWN_SURFACES:
        family = str(rng.choice(list(SURFACES)))
        image = np.clip(SURFACES[family](rng, size), 0, 1).astype(np.float32)
        surface = Surface(image, np.ones((size, size), dtype=bool))
    else:
        family = str(rng.choice(families))
        surface = scene(family, rng, size, variation)
    if family in OBJECTS:
        return surface, family
    if rng.random() < 0.2:
        other = scene(str(rng.choice([name for name in families if name not in OBJECTS])), rng, size, variation)
        mixed = (
            surface.image * (0.35 + 1.1 * other.image.mean(2, keepdims=True))
            if rng.random() < 0.5
            else (0.5 * surface.image + 0.5 * other.image)
        )
        surface = Surface(np.clip(mixed, 0, 1).astype(np.float32), surface.part & other.part)
    if rough and rng.random() < 0.15:
        surface = dark_frame(rng, surface)
    return surface, family


def _picture(
    rng: np.random.Generator,
    size: int,
    families: tuple[str, ...] = TRAIN_FAMILIES,
    kinds: tuple[str, ...] = KINDS,
    rough: bool = True,
) -> tuple[np.ndarray, np.ndarray, str, str]:
    """One training image: a surface, several defects, hard or soft, a zoomed crop, a camera."""
    full = round(size * rng.uniform(1.1, 1.6)) if rng.random() < 0.3 else size
    variation = float(rng.choice(VARIATIONS))
    surface, family = _surface(rng, full, variation, families, rough)
    kind, image, mask = "good", surface.image, np.zeros(surface.part.shape, dtype=bool)
    if rng.random() < 0.6 and surface.part.mean() > 0.05:
        for _ in range(1 + int(rng.random() < 0.15)):
            if rough and rng.random() < SOFT_DEFECTS:
                image, found, name = add_soft_defect(rng, Surface(image, surface.part))
                mask, kind = mask | found, kind if name == "good" else name
            else:
                spoiled = add_defect(rng, Surface(image, surface.part), str(rng.choice(kinds)))
                image, mask, kind = spoiled.image, mask | spoiled.mask, spoiled.kind
    image, clean = finish(rng, image, surface.image, mask, variation)
    if rough and rng.random() < CAMERAS:
        image = photograph(rng, image, clean, mask)
    top, left = rng.integers(0, full - size + 1, 2)
    image, mask = image[top : top + size, left : left + size], mask[top : top + size, left : left + size]
    if mask.sum() < 0.0008 * size * size:
        kind = "good" if not mask.any() else "skip"
    return image, mask, family, kind


def make_batch(
    rng: np.random.Generator,
    count: int,
    size: int,
    families: tuple[str, ...] = TRAIN_FAMILIES,
    kinds: tuple[str, ...] = KINDS,
    rough: bool = True,
) -> Batch:
    """Draw ``count`` training images of ``size`` pixels, about 60 % with a defect.

    Args:
        rng: Source of randomness.
        count: Number of images.
        size: Side in pixels.
        families: Of the data module, to draw from; the recipe's own surfaces are always among the images.
        kinds: Defects of the data module, to draw from; a stain may replace another, the soft ones are always there.
        rough: Also draw what :mod:`variety` has.
    """
    images, masks, numbers, texts, names = [], [], [], [], []
    while len(images) < count:
        image, mask, family, kind = _picture(rng, size, families, kinds, rough)
        if kind == "skip":
            continue
        turns, mirror = int(rng.integers(4)), rng.random() < 0.5
        image, mask = np.rot90(image, turns), np.rot90(mask, turns)
        images.append(image[:, ::-1] if mirror else image)
        masks.append(mask[:, ::-1] if mirror else mask)
        numbers.append(0 if kind == "good" else 1 + KINDS.index(kind))
        texts.append(caption(family, kind, rng))
        names.append(family)
    return Batch(
        to_tensor(np.stack(images)),
        torch.from_numpy(np.stack(masks).astype(np.float32)),
        torch.tensor(numbers),
        texts,
        names,
    )
