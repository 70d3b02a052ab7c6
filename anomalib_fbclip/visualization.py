# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Result pictures of a prediction, one for each file, also in nested folders."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer

from anomalib_fbclip.distributed import own_number
from anomalib_fbclip.unreadable import predicted_files

if TYPE_CHECKING:
    from anomalib.data import ImageBatch


class PredictionVisualizer(ImageVisualizer):
    """anomalib's visualizer, with the whole folder structure of what is predicted.

    The host keeps a file's last folder only, so ``line1/good/0.png`` and ``line2/good/0.png`` overwrite each other.
    Here all folders below the one that the files have in common are kept, and its name. Tests write as the host does.
    """

    output_dir: str | Path | None
    _root: Path | None = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: "ImageBatch",
        batch: "ImageBatch",
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one picture for each image of the batch; of several processes, one writes it."""
        own = list(batch)[: own_number(trainer, batch_idx, dataloader_idx)]
        super().on_test_batch_end(trainer, pl_module, outputs, own, batch_idx, dataloader_idx)  # type: ignore[arg-type]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that all files have in common."""
        del pl_module
        folders = [os.path.abspath(path.parent) for path in predicted_files(trainer)]  # noqa: PTH100  # keeps links
        try:
            self._root = Path(os.path.commonpath(folders)).parent if folders else None
        except ValueError:  # several drives
            self._root = None

    def picture_path(self, image_path: str | Path) -> Path:
        """Where the picture of a file is written, below ``output_dir``."""
        path = Path(os.path.abspath(image_path))  # noqa: PTH100  # keeps links
        if self._root is not None and path.is_relative_to(self._root):
            return path.relative_to(self._root)
        return Path(path.parent.name, path.name)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: "ImageBatch",
        batch: "ImageBatch",
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one picture for each image of the batch."""
        del pl_module, outputs, batch_idx, dataloader_idx
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        for number, item in enumerate(batch):
            picture = self.visualize(item)
            if picture is not None:
                target = Path(self.output_dir) / self.picture_path(item.image_path or f"unnamed/{number}.png")
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target)
