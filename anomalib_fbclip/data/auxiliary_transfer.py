# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``AuxiliaryTransfer``: train on the labelled images of one data set, test on another (the zero-shot protocol)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.data.utils import TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader, WeightedRandomSampler

from anomalib_fbclip.registration import register_datamodules

from .overlap import check_overlap
from .sets import combine, describe, load_datamodule, prepare, with_categories

SAMPLING = ("plain", "balanced")


class AuxiliaryTransfer(AnomalibDataModule):
    """The labelled *test* split of ``source``, normal and anomalous, to train on; ``target`` to validate and test on.

    anomalib keeps labelled anomalies out of training. The zero-shot protocol of the paper needs them: FB-CLIP's small
    trained part learns what "defect" means on an auxiliary data set, once, and is then tested on others.

    Args:
        source: Data module whose test split is trained on: an instance, its name, or class_path and init_args.
        target: Data module whose test split is validated and tested on, likewise. ``None``: only train, such as with
            ``anomalib fit``.
        source_category: One category of the source, several, or ``"all"``, as in the paper; ``None``: what ``source``
            says itself.
        target_category: The same for the target. Metrics then count all categories together; for a table with a row
            for each, see ``anomalib table``.
        sampling: ``"plain"``: each training image once an epoch. ``"balanced"``: as many draws, with replacement, of
            which normal and anomalous images are half each.
        train_batch_size: Batch size of training. The paper's is 4.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
        seed: As in every anomalib data module.

    Raises:
        ValueError: If an argument is unknown; and, when set up, if both sides share a category of one data set or
            images of the same content, of which one is named.

    Example:
        >>> data = AuxiliaryTransfer("MVTecAD", "Visa", source_category="all")
        >>> len(data.sources), len(data.targets)
        (15, 1)
    """

    def __init__(
        self,
        source: AnomalibDataModule | dict[str, Any] | str,
        target: AnomalibDataModule | dict[str, Any] | str | None = None,
        source_category: str | Sequence[str] | None = None,
        target_category: str | Sequence[str] | None = None,
        sampling: str = "plain",
        train_batch_size: int = 4,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        if sampling not in SAMPLING:
            msg = f"sampling={sampling!r}: choose one of {list(SAMPLING)}."
            raise ValueError(msg)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            # Both halves are taken from splits that the two data modules have made themselves.
            val_split_mode=ValSplitMode.SAME_AS_TEST,
            test_split_mode=TestSplitMode.FROM_DIR,
            seed=seed,
        )
        self.sampling = sampling
        self.sources = with_categories(load_datamodule(source), source_category)
        self.targets = with_categories(load_datamodule(target), target_category) if target is not None else []
        self.category = "_to_".join(describe(side) for side in (self.sources, self.targets) if side)

    @property
    def name(self) -> str:
        """Name of the target's folder: below it, anomalib keeps apart the images of several categories."""
        root = getattr(self.targets[0], "root", None) if self.targets else None
        return Path(root).resolve().name if root else super().name

    @property
    def source_name(self) -> str:
        """What an adapter trained here records as its source."""
        return describe(self.sources)

    def prepare_data(self) -> None:
        """Prepare both sides."""
        for datamodule in (*self.sources, *self.targets):
            prepare(datamodule)

    def _setup(self, _stage: str | None = None) -> None:
        for datamodule in (*self.sources, *self.targets):
            datamodule.setup()
        check_overlap(self.sources, self.targets)
        self.train_data = combine(self.sources)
        if self.targets:
            self.test_data = combine(self.targets)

    def _create_test_split(self) -> None:
        """Keep the target as it is: anomalib would fill it up from the source where it has no normal images."""

    def _create_val_split(self) -> None:
        if self.targets:
            super()._create_val_split()

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """The target's images; none without a target."""
        return super().val_dataloader() if self.targets else []

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """The target's images.

        Raises:
            ValueError: If there is no target.
        """
        if not self.targets:
            msg = "target=None: there is nothing to test on. Give a target, or train with 'anomalib fit'."
            raise ValueError(msg)
        return super().test_dataloader()

    def train_dataloader(self) -> DataLoader:
        """The source's images, in another order each epoch."""
        sampler = _balanced_sampler(self.train_data) if self.sampling == "balanced" else None
        return DataLoader(
            dataset=self.train_data,
            shuffle=sampler is None,
            sampler=sampler,
            batch_size=self.train_batch_size,
            num_workers=self.num_workers,
            collate_fn=self.external_collate_fn or self.train_data.collate_fn,
        )


def _balanced_sampler(dataset: AnomalibDataset) -> WeightedRandomSampler:
    labels = torch.tensor(dataset.samples["label_index"].to_numpy(dtype=int, copy=True))
    weights = 1.0 / torch.bincount(labels, minlength=2).clamp(min=1).double()
    return WeightedRandomSampler(weights[labels].tolist(), num_samples=len(labels), replacement=True)


register_datamodules()
