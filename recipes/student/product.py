# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""One drawn product: a single surface, of which each image shows another place in another light.

The images of ``ProceduralSurfaces`` are of one family, each with a drawing, colours and a direction of its own: as many
products as images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from anomalib.data import Folder

from anomalib_fbclip.data.procedural.defects import KINDS, add_defect
from anomalib_fbclip.data.procedural.families import render
from anomalib_fbclip.data.procedural.fields import Surface
from anomalib_fbclip.data.procedural.generator import finish

if TYPE_CHECKING:
    from pathlib import Path

SIDE, WINDOW, SURFACE = 256, 320, 512
"""Pixels of an image, of what it shows of the surface, and of the surface."""
TURN = 3.0
"""Standard deviation of the turn in degrees."""
VARIATION = 0.5
"""Of light and camera, see ``ProceduralSurfaces``."""


def photograph(surface: Surface, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 ``[S, S, 3]``, and its mask ``[S, S]``."""
    warp = cv2.getRotationMatrix2D((SURFACE / 2,) * 2, rng.normal(0, TURN), SIDE / WINDOW)
    slack = (SURFACE - WINDOW) / 2 * SIDE / WINDOW
    warp[:, 2] += (SIDE - SURFACE) / 2 + rng.uniform(-slack, slack, 2)
    seen = cv2.warpAffine(surface.image, warp, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT).clip(0, 1)
    spoiled, mask = seen, np.zeros((SIDE, SIDE), dtype=bool)
    if kind != "good":
        spoiled, mask, *_ = add_defect(rng, Surface(seen, np.ones_like(mask)), kind)
    return finish(rng, spoiled, seen, mask, VARIATION)[0], mask


def write_product(folder: Path, family: str, images: int, tested: int, seed: int = 0) -> Folder:
    """Draw ``images`` good images to learn from and ``tested`` others, half of them bad, as a data module.

    Args:
        folder: Where they go.
        family: Of the surface.
        images: Number of images to learn from.
        tested: Number of images to test.
        seed: Of surface and images.
    """
    for name in ("train", "good", "bad", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    surface = render(family, np.random.default_rng((seed, 0)), SURFACE)
    for index in range(images + tested):
        rng = np.random.default_rng((seed, 1, index))
        number = index - images
        kind = KINDS[number // 2 % len(KINDS)] if number >= 0 and number % 2 else "good"
        place = "train" if number < 0 else "good" if kind == "good" else "bad"
        image, mask = photograph(surface, kind, rng)
        cv2.imwrite(str(folder / place / f"{index:04d}.png"), image[..., ::-1])
        if place == "bad":
            cv2.imwrite(str(folder / "masks" / f"{index:04d}.png"), mask * np.uint8(255))
    return Folder(
        name=f"product of {family}",
        root=folder,
        normal_dir="train",
        normal_test_dir="good",
        abnormal_dir="bad",
        mask_dir="masks",
        test_split_mode="from_dir",
        val_split_mode="same_as_test",
        train_batch_size=8,
        num_workers=0,
    )
