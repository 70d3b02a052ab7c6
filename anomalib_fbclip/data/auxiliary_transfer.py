# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``AuxiliaryTransfer``: train on the labelled pictures of one data set, test on another (the zero-shot protocol)."""

from pathlib import Path

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.utils import TestSplitMode, ValSplitMode

from anomalib_fbclip.registration import register_datamodules


class AuxiliaryTransfer(AnomalibDataModule):
    """The labelled *test* split of ``source``, normal and anomalous, to train on; ``target`` to validate and test on.

    anomalib keeps labelled anomalies out of training. The zero-shot protocol of the paper needs them: FB-CLIP's small
    trained part learns what "defect" means on an auxiliary data set, once, and is then tested on others.

    Args:
        source: Data module whose test split is trained on.
        target: Data module whose test split is validated and tested on.
        train_batch_size: Batch size of training. The paper's is 4.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
        seed: As in every anomalib data module.

    Raises:
        ValueError: When set up, if both share pictures; some are named.

    Example:
        >>> from anomalib.data import MVTecAD, Visa
        >>> data = AuxiliaryTransfer(source=MVTecAD(category="bottle"), target=Visa())  # doctest: +SKIP
    """

    def __init__(
        self,
        source: AnomalibDataModule,
        target: AnomalibDataModule,
        train_batch_size: int = 4,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            # Both halves are taken from splits that the two data modules have made themselves.
            val_split_mode=ValSplitMode.SAME_AS_TEST,
            test_split_mode=TestSplitMode.FROM_DIR,
            seed=seed,
        )
        self.source = source
        self.target = target
        self.category = "_to_".join(filter(None, (_describe(source), _describe(target))))

    @property
    def source_name(self) -> str:
        """What an adapter trained here records as its source."""
        return _describe(self.source)

    def prepare_data(self) -> None:
        """Prepare both data modules."""
        self.source.prepare_data()
        self.target.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        for datamodule in (self.source, self.target):
            datamodule.setup()
        self.train_data = self.source.test_data
        self.test_data = self.target.test_data
        shared = _pictures(self.train_data) & _pictures(self.test_data)
        if shared:
            msg = (
                f"source and target share {len(shared)} pictures, such as {min(shared)}: a model tested on what it was "
                f"trained on tells nothing. Choose another source, other categories or other folders."
            )
            raise ValueError(msg)


def _describe(datamodule: AnomalibDataModule) -> str:
    return "-".join(filter(None, (datamodule.name, str(datamodule.category or ""))))


def _pictures(dataset: object) -> set[str]:
    return {str(Path(path).resolve()) for path in dataset.samples["image_path"]}  # type: ignore[attr-defined]


register_datamodules()
