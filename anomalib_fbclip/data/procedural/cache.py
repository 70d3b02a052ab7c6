# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Images on disk, in the folders of MVTec AD: ``train/good``, ``test/<kind>``, ``ground_truth/<kind>``."""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.families import FAMILIES
from anomalib_fbclip.data.procedural.generator import MIN_SIZE, Sample, generate
from anomalib_fbclip.data.procedural.views import generate_views

logger = logging.getLogger(__name__)

VERSION = 2
"""Part of the cache's folder name; raise it when the same seed gives other images."""
GOOD = "good"
MASKS = {"train": "ground_truth_train", "test": "ground_truth"}
SPLITS = ("train", "test")


@dataclass(frozen=True)
class CacheSpec:
    """What decides the bytes of a family's images, apart from the family.

    Attributes:
        image_size: Side in pixels, at least 32.
        num_train: Train images a family, at least 1.
        num_test: Test images a family, at least 2: every second one is defective.
        train_anomalous: Whether every second train image is defective too.
        variation: Strength of the normal variation, 0..1.
        seed: Not negative.
        views: Images of each part, 1 or more; the numbers above are then those of parts.

    Raises:
        ValueError: If a value is out of its range.
    """

    image_size: int = 224
    num_train: int = 40
    num_test: int = 40
    train_anomalous: bool = False
    variation: float = 1.0
    seed: int = 0
    views: int = 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = {"image_size": MIN_SIZE, "num_train": 1, "num_test": 2, "seed": 0, "views": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                msg = f"{name} must be at least {bound}, got {getattr(self, name)}."
                raise ValueError(msg)
        if not 0 <= self.variation <= 1:
            msg = f"variation must lie in 0..1, got {self.variation}."
            raise ValueError(msg)

    @property
    def key(self) -> str:
        """Folder name that stands for these values."""
        train = f"{self.num_train}{'mixed' if self.train_anomalous else 'good'}"
        views = f"_{self.views}views" if self.views > 1 else ""
        sizes = f"v{VERSION}_{self.image_size}px_{train}_{self.num_test}test"
        return f"{sizes}_variation{self.variation:g}_seed{self.seed}{views}"

    def count(self, split: str) -> int:
        """Images of a split."""
        return self.num_train if split == "train" else self.num_test

    def kind(self, split: str, number: int) -> str:
        """Defect of the image ``number`` of a split, or ``good``: alternating, the kinds in turn."""
        mixed = split == "test" or self.train_anomalous
        return KINDS[number // 2 % len(KINDS)] if mixed and number % 2 else GOOD


def draw(family: str, spec: CacheSpec, split: str, number: int) -> Sample:
    """The image ``number`` of a split; its seed differs from every other's."""
    seed = (spec.seed, FAMILIES.index(family), SPLITS.index(split), number)
    return generate(family, spec.kind(split, number), spec.image_size, seed, spec.variation)


def _draw_named(family: str, spec: CacheSpec, split: str, number: int) -> dict[str, Sample]:
    """The images of one part by their names, which tell the family: anomalib's results keep folder and name only."""
    name = f"{family}_{number:04d}"
    if spec.views == 1:
        return {name: draw(family, spec, split, number)}
    seed = (spec.seed, FAMILIES.index(family), SPLITS.index(split), number)
    kind = spec.kind(split, number)
    views = generate_views(family, kind, spec.image_size, seed, spec.views, spec.variation)
    return {f"{name}_view{index}": view for index, view in enumerate(views)}


def write_family(root: Path, family: str, spec: CacheSpec) -> Path:
    """Write the images and masks of one family, unless they are there; the folder appears whole or not at all.

    Args:
        root: Cache folder.
        family: Name of the family.
        spec: What to draw.

    Returns:
        The family's folder, ``root / spec.key / family``.
    """
    target = root / spec.key / family
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.info("Drawing %d images of %s into %s", spec.num_train + spec.num_test, family, target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{family}.", dir=target.parent))
    temporary.chmod(0o755)
    for split in SPLITS:
        for number in range(spec.count(split)):
            for name, sample in _draw_named(family, spec, split, number).items():
                _write(temporary / split / sample.kind / f"{name}.png", sample.image[..., ::-1])
                if sample.kind != GOOD:
                    mask = sample.mask.astype(np.uint8) * 255
                    _write(temporary / MASKS[split] / sample.kind / f"{name}.png", mask)
    try:
        temporary.rename(target)
    except OSError:  # another process was faster: its folder holds the same bytes
        shutil.rmtree(temporary)
        if not target.is_dir():
            raise
    return target


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        msg = f"Could not write {path}; check the space and the rights of the cache folder, or choose another `root`."
        raise OSError(msg)
