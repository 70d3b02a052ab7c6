# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``DTDSynthetic``: textures of the Describable Textures Dataset with drawn defects (Aota, Tong, Okatani 2023)."""

from pathlib import Path

from anomalib.data.datamodules.image.mvtecad import MVTecAD
from anomalib.data.utils import ValSplitMode

from anomalib_fbclip.registration import register_datamodules

CATEGORIES = (
    "Blotchy_099",
    "Fibrous_183",
    "Marbled_078",
    "Matted_069",
    "Mesh_114",
    "Perforated_037",
    "Stratified_154",
    "Woven_001",
    "Woven_068",
    "Woven_104",
    "Woven_125",
    "Woven_127",
)


class DTDSynthetic(MVTecAD):
    """DTD-Synthetic, which has MVTec AD's layout: ``<texture>/{train,test,ground_truth}/...``.

    Args:
        root: Folder of the data set.
        category: The texture, such as ``Woven_001``.
        train_batch_size: Batch size of training.
        eval_batch_size: Batch size of validation and test.
        num_workers: Workers of the data loaders.
        val_split_mode: As in every anomalib data module.
        val_split_ratio: As in every anomalib data module.
        seed: As in every anomalib data module.

    Raises:
        ValueError: If the category is unknown.
        FileNotFoundError: When set up, if the folder is not there.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/DTD-Synthetic",
        category: str = "Woven_001",
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        if category not in CATEGORIES:
            msg = f"category={category!r}: choose one of {list(CATEGORIES)}."
            raise ValueError(msg)
        super().__init__(
            root=root,
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Look for the folder; MVTec AD's download is not wanted here."""
        if not (self.root / self.category).is_dir():
            msg = f"root={str(self.root)!r}: no {self.category} in it; give the folder that holds the textures."
            raise FileNotFoundError(msg)


register_datamodules()
