# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Procedural surfaces: same seed, same bytes; masks exact; test families unseen; every argument matters."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from anomalib_fbclip.data.procedural import (
    FAMILIES,
    KINDS,
    TEST_ONLY_FAMILIES,
    TRAIN_FAMILIES,
    generate,
    resolve,
)
from anomalib_fbclip.data.procedural.cache import CacheSpec, draw, write_family
from recipes.tiny_clip import captions

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64


@pytest.mark.parametrize("family", FAMILIES)
def test_same_seed_same_bytes(family: str) -> None:
    """Images and masks are a function of the arguments."""
    one, two = (generate(family, "stain", SIZE, (3, 1)) for _ in range(2))
    assert one.image.tobytes() == two.image.tobytes()
    assert one.mask.tobytes() == two.mask.tobytes()
    assert one.image.tobytes() != generate(family, "stain", SIZE, (3, 2)).image.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_exact(kind: str) -> None:
    """Nothing differs outside the mask; inside, the image has changed visibly."""
    for family in FAMILIES:
        sample = generate(family, kind, 96, (5, KINDS.index(kind)))
        assert sample.mask.any(), family
        assert np.array_equal(sample.image[~sample.mask], sample.clean[~sample.mask]), family
        change = np.abs(sample.image.astype(int) - sample.clean).mean(axis=2)[sample.mask]
        assert (change > 0).mean() > 0.5, family
        assert change.mean() > 5, family


@pytest.mark.parametrize("family", FAMILIES)
def test_good_has_no_mask(family: str) -> None:
    """A good image is its own clean version."""
    sample = generate(family, "good", SIZE, 0)
    assert not sample.mask.any()
    assert np.array_equal(sample.image, sample.clean)


def test_test_families_are_not_trained_on() -> None:
    """Training and testing families are disjoint, and there are enough of both families and kinds."""
    assert not set(TRAIN_FAMILIES) & set(TEST_ONLY_FAMILIES)
    assert set(TRAIN_FAMILIES) | set(TEST_ONLY_FAMILIES) == set(FAMILIES)
    assert resolve("train") == TRAIN_FAMILIES
    assert resolve("test") == TEST_ONLY_FAMILIES
    assert resolve(["wood", "foam"]) == ("wood", "foam")
    assert len(FAMILIES) >= 12
    assert len(KINDS) >= 10


def test_import_is_light() -> None:
    """The generator needs neither torch nor anomalib."""
    code = "import sys, anomalib_fbclip.data.procedural; sys.exit(bool({'torch', 'anomalib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_captions_stay_inside_the_vocabulary() -> None:
    """No caption or prompt holds a token that the cut vocabulary lacks."""
    tokenizer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    known = {token for text in captions.vocabulary_texts() for token in tokenizer.encode(text)}
    rng = np.random.default_rng(0)
    texts = [captions.caption(family, kind, rng) for family in FAMILIES for kind in ("good", *KINDS) for _ in range(5)]
    texts += [text for _ in range(300) for text in captions.prompt_pair(rng)] + captions.kind_captions()
    assert not {token for text in texts for token in tokenizer.encode(text)} - known
    assert {"object without defect.", "object with defect."} <= set(captions.PLAIN_PROMPTS)


def test_captions_say_what_is_there() -> None:
    """The wording of a defect names it, that of a good image never does."""
    rng = np.random.default_rng(0)
    good = [captions.caption("fabric", "good", rng) for _ in range(100)]
    bad = [captions.caption("fabric", "scratch", rng) for _ in range(100)]
    assert all("fabric" in text for text in good + bad)
    assert not any("scratch" in text for text in good)
    assert sum("scratch" in text for text in bad) > 60


@pytest.mark.parametrize(
    "change",
    [{"image_size": 48}, {"seed": 1}, {"variation": 0.0}, {"train_anomalous": True}, {"num_train": 5}, {"num_test": 6}],
)
def test_every_argument_changes_the_cache(change: dict[str, object]) -> None:
    """Each value enters the folder's name, and the images or their number."""
    base = CacheSpec(image_size=SIZE, num_train=4, num_test=4)
    other = replace(base, **change)
    assert base.key != other.key

    def everything(spec: CacheSpec) -> list[bytes]:
        return [draw("wood", spec, s, n).image.tobytes() for s in ("train", "test") for n in range(spec.count(s))]

    assert everything(base) != everything(other)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("image_size", 8), ("num_train", 0), ("num_test", 1), ("seed", -1), ("variation", 1.5)],
)
def test_bad_values_are_named(argument: str, value: float) -> None:
    """The message holds the name and the value."""
    with pytest.raises(ValueError, match=rf"{argument} must .* got {value}"):
        CacheSpec(**{argument: value})


@pytest.mark.parametrize("category", ["granite", [], ["wood", "wood"]])
def test_bad_category(category: object) -> None:
    """An unknown, empty or repeated category is refused with the list of what there is."""
    with pytest.raises(ValueError, match="category must be one of"):
        resolve(category)


def test_cache_is_written_once_and_whole(tmp_path: Path) -> None:
    """The layout is MVTec AD's, every defective image has its mask, nothing unfinished stays behind."""
    spec = CacheSpec(image_size=SIZE, num_train=4, num_test=8, train_anomalous=True)
    folder = write_family(tmp_path, "wood", spec)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert write_family(tmp_path, "wood", spec) == folder
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(list(folder.glob("train/*/*.png"))) == 4
    assert len(list(folder.glob("test/good/*.png"))) == 4
    for split, masks in (("train", "ground_truth_train"), ("test", "ground_truth")):
        bad = {p.relative_to(folder / split) for p in folder.glob(f"{split}/*/*.png") if p.parent.name != "good"}
        assert bad == {p.relative_to(folder / masks) for p in folder.glob(f"{masks}/*/*.png")}
    assert [path.name for path in folder.parent.iterdir()] == ["wood"]


@pytest.mark.parametrize("train_anomalous", [False, True])
def test_datamodule(tmp_path: Path, *, train_anomalous: bool) -> None:
    """Splits are as promised: normal train unless asked otherwise, mixed test, the same for validation."""
    from anomalib_fbclip.data.procedural_surfaces import ProceduralSurfaces

    datamodule = ProceduralSurfaces(
        tmp_path,
        "test",
        image_size=SIZE,
        num_train=4,
        num_test=4,
        train_anomalous=train_anomalous,
        train_batch_size=12,
    )
    datamodule.prepare_data()
    datamodule.setup()
    assert (datamodule.name, datamodule.category) == ("ProceduralSurfaces", "test")
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.image.shape == (12, 3, SIZE, SIZE)
    assert int(batch.gt_label.sum()) == (6 if train_anomalous else 0)
    assert bool(batch.gt_mask.any()) is train_anomalous
    for loader in (datamodule.test_dataloader(), datamodule.val_dataloader()):
        batch = next(iter(loader))
        assert len(batch) == 12
        assert (batch.gt_mask.flatten(1).any(dim=1) == batch.gt_label.bool()).all()
        assert int(batch.gt_label.sum()) == 6
