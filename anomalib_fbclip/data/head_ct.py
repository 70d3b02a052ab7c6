# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``HeadCT``: head CT slices with and without haemorrhage, labels in a CSV file."""

import csv
from pathlib import Path

from anomalib.data.utils import LabelName

from anomalib_fbclip.registration import register_datamodules

from .labelled_folder import LabelledFolderDataset, TestOnlyDataModule, samples_from_rows

LABELS = "labels.csv"


class HeadCT(TestOnlyDataModule):
    """The head CT haemorrhage data set as it is published: ``labels.csv`` beside a folder of numbered images.

    Args:
        root: Folder with ``labels.csv``; the images ``000.png``, ``001.png``, ... may lie at any depth below it.
        category: What the images show; models with prompts for each class, such as WinCLIP, read it.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/HeadCT",
        category: str = "",
        eval_batch_size: int = 32,
        num_workers: int = 0,
    ) -> None:
        super().__init__(root, category, eval_batch_size, num_workers)

    def _setup(self, _stage: str | None = None) -> None:
        table = self.root / LABELS
        if not table.is_file():
            msg = f"root={str(self.root)!r}: there is no {LABELS} in it; give the folder that holds it."
            raise FileNotFoundError(msg)
        with table.open(encoding="utf-8", newline="") as file:
            lines = [line for line in csv.reader(file, skipinitialspace=True) if line]
        pictures = {int(path.stem): path for path in self.root.rglob("*.png") if path.stem.isdecimal()}
        rows = []
        for number, label in (line[:2] for line in lines[1:]):
            if int(number) not in pictures:
                msg = f"{table} lists image {number}, but there is no {int(number):03d}.png below {self.root}."
                raise FileNotFoundError(msg)
            abnormal = bool(int(label))
            index = LabelName.ABNORMAL if abnormal else LabelName.NORMAL
            rows.append((pictures[int(number)], "haemorrhage" if abnormal else "normal", index, ""))
        self.test_data = LabelledFolderDataset(samples_from_rows(rows))


register_datamodules()
