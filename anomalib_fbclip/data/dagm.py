# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``DAGM``: ten classes of generated textures with elliptic defect labels (Wieler, Hahn 2007)."""

from pathlib import Path

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from pandas import DataFrame

from anomalib_fbclip.registration import register_datamodules

from .labelled_folder import LabelledFolderDataset, samples_from_rows

CATEGORIES = tuple(f"Class{number}" for number in range(1, 11))


def make_dagm_samples(root: Path, category: str, split: Split) -> DataFrame:
    """List the images of one split of one class.

    An image is anomalous if there is a ``Label/<name>_label.PNG`` beside it.

    Args:
        root: Folder with ``Class1``, ..., ``Class10``.
        category: The class.
        split: ``train``: the good images of ``Train``, since anomalib's trained models want no others; ``test``: all
            of ``Test``.

    Raises:
        FileNotFoundError: If the folder holds no images.
    """
    folder = root / category / ("Train" if split == Split.TRAIN else "Test")
    labels = {path.stem.removesuffix("_label"): str(path) for path in (folder / "Label").glob("*_label.*")}
    rows = []
    for path in sorted(path for path in folder.glob("*") if path.suffix.lower() == ".png"):
        if path.stem not in labels:
            rows.append((path, "good", LabelName.NORMAL, ""))
        elif split == Split.TEST:
            rows.append((path, "defect", LabelName.ABNORMAL, labels[path.stem]))
    if not rows:
        msg = f"{str(folder)!r} holds no PNG images: root must hold Class1/Train, Class1/Test, Class1/Test/Label, ..."
        raise FileNotFoundError(msg)
    samples = samples_from_rows(rows, split)
    samples.attrs["task"] = "segmentation"
    return samples


class DAGM(AnomalibDataModule):
    """The DAGM 2007 data set as it is published: ``Class<n>/{Train,Test}/*.PNG`` with ``Label/*_label.PNG``.

    Args:
        root: Folder of the data set.
        category: ``Class1``, ..., ``Class10``.
        train_batch_size: Batch size of training.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
        val_split_mode: As in every anomalib data module.
        val_split_ratio: As in every anomalib data module.
        seed: As in every anomalib data module.

    Raises:
        ValueError: If the category is unknown.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/DAGM",
        category: str = "Class1",
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
        if category not in CATEGORIES:
            msg = f"category={category!r}: choose one of {list(CATEGORIES)}."
            raise ValueError(msg)
        self.root = Path(root).expanduser()
        self.category = category

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = LabelledFolderDataset(make_dagm_samples(self.root, self.category, Split.TRAIN))
        self.test_data = LabelledFolderDataset(make_dagm_samples(self.root, self.category, Split.TEST))


register_datamodules()
