# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``MagneticTile``: photographs of magnetic tiles with five kinds of defect (Huang, Qiu, Yuan 2020)."""

from collections.abc import Sequence
from pathlib import Path

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from pandas import DataFrame
from torchvision.transforms.v2 import Transform

from anomalib_fbclip.registration import register_datamodules

DEFECTS = ("MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Uneven")
GOOD = "MT_Free"


class MagneticTileDataset(AnomalibDataset):
    """One split of some defect kinds.

    Args:
        root: Folder with ``MT_Blowhole``, ..., ``MT_Free``.
        defects: Defect kinds.
        split: ``train``: good tiles; ``test``: the defects and other good tiles.
        augmentations: Applied to image and mask.
    """

    def __init__(
        self,
        root: Path,
        defects: Sequence[str],
        split: Split,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        self.samples = make_magnetic_tile_samples(root, defects, split)


def make_magnetic_tile_samples(root: Path, defects: Sequence[str], split: Split) -> DataFrame:
    """List the images of one split.

    The 952 good tiles are dealt out to the five defect kinds in turn, so that runs on different kinds share no image;
    of each share every other tile goes to the test split.

    Raises:
        FileNotFoundError: If ``root`` is not the data set's folder.
    """
    good = sorted((root / GOOD / "Imgs").glob("*.jpg"))
    if not good:
        msg = f"root={str(root)!r}: no {GOOD}/Imgs/*.jpg below it; give the folder that holds {GOOD}, {DEFECTS[0]}, ..."
        raise FileNotFoundError(msg)
    rows = []
    for defect in defects:
        share = good[DEFECTS.index(defect) :: len(DEFECTS)]
        rows += [(path, GOOD, LabelName.NORMAL, "") for path in share[int(split == Split.TEST) :: 2]]
        if split == Split.TEST:
            for path in sorted((root / defect / "Imgs").glob("*.jpg")):
                rows.append((path, defect, LabelName.ABNORMAL, str(path.with_suffix(".png"))))
    samples = DataFrame(
        [(str(path), label, int(index), mask, split.value) for path, label, index, mask in rows],
        columns=["image_path", "label", "label_index", "mask_path", "split"],
    )
    samples.attrs["task"] = "segmentation"
    return samples


class MagneticTile(AnomalibDataModule):
    """The magnetic tile data set as it is published: ``MT_<kind>/Imgs/*.jpg`` with a ``.png`` mask beside each.

    Args:
        root: Folder of the data set.
        category: One defect kind, several, or ``"all"``: ``MT_Blowhole``, ``MT_Break``, ``MT_Crack``, ``MT_Fray``,
            ``MT_Uneven``. Each kind brings its own fifth of the good tiles.
        train_batch_size: Batch size of training.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
        val_split_mode: As in every anomalib data module.
        val_split_ratio: As in every anomalib data module.
        seed: As in every anomalib data module.

    Raises:
        ValueError: If a category is unknown.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/magnetic_tile",
        category: str | Sequence[str] = "all",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            test_split_mode=TestSplitMode.FROM_DIR,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = Path(root)
        chosen = DEFECTS if category == "all" else (category,) if isinstance(category, str) else tuple(category)
        if not chosen or set(chosen) - set(DEFECTS):
            msg = f"category={category!r}: choose 'all' or some of {list(DEFECTS)}."
            raise ValueError(msg)
        self.defects = chosen
        self.category = category if isinstance(category, str) else "-".join(chosen)

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = MagneticTileDataset(self.root, self.defects, Split.TRAIN)
        self.test_data = MagneticTileDataset(self.root, self.defects, Split.TEST)


register_datamodules()
