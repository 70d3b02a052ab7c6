# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Batches for the recipe: made on the fly, a little wilder than the data module's images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from anomalib_fbclip.data.procedural.defects import KINDS, add_defect
from anomalib_fbclip.data.procedural.families import OBJECTS, TEST_ONLY_FAMILIES, TRAIN_FAMILIES
from anomalib_fbclip.data.procedural.fields import Surface
from anomalib_fbclip.data.procedural.generator import finish, generate, scene
from recipes.tiny_clip.captions import caption

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
VARIATIONS = (0.5, 1.0)
"""Strengths of the normal variation, as often one as the other: an inspection station and free images."""


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


def _picture(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, str, str]:
    """One training image: mixtures of two textures, several defects, zoomed crops."""
    family = str(rng.choice(TRAIN_FAMILIES))
    full = round(size * rng.uniform(1.1, 1.6)) if rng.random() < 0.3 else size
    variation = float(rng.choice(VARIATIONS))
    surface = scene(family, rng, full, variation)
    if family not in OBJECTS and rng.random() < 0.2:
        other = scene(str(rng.choice([name for name in TRAIN_FAMILIES if name not in OBJECTS])), rng, full, variation)
        mixed = (
            surface.image * (0.35 + 1.1 * other.image.mean(2, keepdims=True))
            if rng.random() < 0.5
            else (0.5 * surface.image + 0.5 * other.image)
        )
        surface = Surface(np.clip(mixed, 0, 1).astype(np.float32), surface.part & other.part)
    kind, image, mask = "good", surface.image, np.zeros(surface.part.shape, dtype=bool)
    if rng.random() < 0.6 and surface.part.mean() > 0.05:
        for _ in range(1 + int(rng.random() < 0.15)):
            spoiled = add_defect(rng, Surface(image, surface.part), str(rng.choice(KINDS)))
            image, mask, kind = spoiled.image, mask | spoiled.mask, spoiled.kind
    image, _ = finish(rng, image, surface.image, mask, variation)
    top, left = rng.integers(0, full - size + 1, 2)
    image, mask = image[top : top + size, left : left + size], mask[top : top + size, left : left + size]
    if mask.sum() < 0.0008 * size * size:
        kind = "good" if not mask.any() else "skip"
    return image, mask, family, kind


def make_batch(rng: np.random.Generator, count: int, size: int) -> Batch:
    """Draw ``count`` training images of ``size`` pixels, about 60 % with a defect."""
    images, masks, kinds, texts, families = [], [], [], [], []
    while len(images) < count:
        image, mask, family, kind = _picture(rng, size)
        if kind == "skip":
            continue
        turns, mirror = int(rng.integers(4)), rng.random() < 0.5
        image, mask = np.rot90(image, turns), np.rot90(mask, turns)
        images.append(image[:, ::-1] if mirror else image)
        masks.append(mask[:, ::-1] if mirror else mask)
        kinds.append(0 if kind == "good" else 1 + KINDS.index(kind))
        texts.append(caption(family, kind, rng))
        families.append(family)
    return Batch(
        to_tensor(np.stack(images)),
        torch.from_numpy(np.stack(masks).astype(np.float32)),
        torch.tensor(kinds),
        texts,
        families,
    )


def unseen_set(
    families: tuple[str, ...] = TEST_ONLY_FAMILIES,
    each: int = 60,
    size: int = 224,
    seed: int = 2026,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half good, half defective images of each family.

    Returns:
        ``(images uint8 [M, S, S, 3], masks bool [M, S, S], families [M])``.
    """
    samples = [
        generate(family, "good" if number % 2 else KINDS[number // 2 % len(KINDS)], size, (seed, place, number))
        for place, family in enumerate(families)
        for number in range(each)
    ]
    names = np.array([sample.family for sample in samples])
    return np.stack([sample.image for sample in samples]), np.stack([sample.mask for sample in samples]), names
