# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The families of surfaces and objects, and which of them are for testing only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from anomalib_fbclip.data.procedural import objects, textures
from anomalib_fbclip.data.procedural.fields import Surface

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TEST_ONLY_FAMILIES = ("wood", "tiles", "leather")
"""Never used to train the backbone or the adapter; the zero-shot numbers are measured on these. Written only here."""

TEXTURES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    name: getattr(textures, name)
    for name in (
        *("fabric", "brushed_metal", "stripes", "dots", "marble", "gravel", "plain", "carpet", "concrete", "mesh"),
        *("plaid", "corrugated", "foam", "paper", "hammered", "wood", "tiles", "leather"),
    )
}
OBJECTS: dict[str, Callable[[np.random.Generator, int], Surface]] = {
    name: getattr(objects, name) for name in ("machined_part", "printed_board", "pill", "gear", "cap")
}
FAMILIES = (*TEXTURES, *OBJECTS)
TRAIN_FAMILIES = tuple(name for name in FAMILIES if name not in TEST_ONLY_FAMILIES)
GROUPS = {"all": FAMILIES, "train": TRAIN_FAMILIES, "test": TEST_ONLY_FAMILIES}


def render(family: str, rng: np.random.Generator, size: int) -> Surface:
    """Draw one defect-free surface, evenly lit.

    Args:
        family: One of :data:`FAMILIES`.
        rng: Source of randomness.
        size: Side in pixels.

    Returns:
        The surface; for a texture the part is the whole frame.
    """
    if family in OBJECTS:
        surface = OBJECTS[family](rng, size)
        return Surface(np.clip(surface.image, 0, 1).astype(np.float32), surface.part)
    image = np.clip(TEXTURES[family](rng, size), 0, 1).astype(np.float32)
    return Surface(image, np.ones((size, size), dtype=bool))


def resolve(category: str | Sequence[str]) -> tuple[str, ...]:
    """Names of families from one name, a group (``all``, ``train``, ``test``) or a sequence of names.

    Raises:
        ValueError: If a name is unknown, repeated, or none is given.
    """
    names = GROUPS.get(category, (category,)) if isinstance(category, str) else tuple(category)
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names or len(set(names)) != len(names):
        msg = f"category must be one of {(*GROUPS, *FAMILIES)}, or distinct families of these, got {category!r}."
        raise ValueError(msg)
    return tuple(names)
