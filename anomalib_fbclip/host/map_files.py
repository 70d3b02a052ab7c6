# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Writes the maps of a prediction or test as files of numbers, at the size of the images."""

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from anomalib.utils.path import generate_output_filename
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from anomalib_fbclip.common.files import below, common_root, replacing

from .batches import on_host
from .components import original_size
from .processes import own_number
from .unreadable import predicted_files

logger = logging.getLogger(__name__)

FORMATS = ("png", "npy")
_WHITE = 65535


class MapFiles(Callback):
    """Write the map of each image as numbers, at the size of the image.

    The values are those that the table calls ``map_max``: in [0, 1], with the threshold at 0.5 where the post-processor
    normalises. ``save_maps`` of our models adds this callback.

    Args:
        kind: ``"png"``: 16 bit, 65535 for 1. ``"npy"``: float32, as they are.
        dirpath: Folder to write to. ``None``: ``maps`` in the run's folder.

    Raises:
        ValueError: If the kind is another.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[MapFiles("npy")])
    """

    def __init__(self, kind: str = "png", dirpath: str | Path | None = None) -> None:
        if kind not in FORMATS:
            msg = f"save_maps={kind!r}: choose 'png' (16 bit) or 'npy' (float32), or None."
            raise ValueError(msg)
        self.kind = kind
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self._root: Path | None = None

    def folder(self, trainer: Trainer) -> Path:
        """Where the files are."""
        return self.dirpath or Path(trainer.default_root_dir) / "maps"

    def path_of(self, image_path: str | Path) -> Path:
        """Where the map of a predicted file is, below the folder."""
        return self._named(below(image_path, self._root))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that all files have in common."""
        del pl_module
        self._root = common_root(predicted_files(trainer))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401  # anomalib's batch
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the maps of a batch, as the post-processor left them."""
        del pl_module, outputs, batch_idx, dataloader_idx
        for number, item in enumerate(on_host(batch)):
            path = self.path_of(item.image_path or f"unnamed/{number}.png")
            self._write(item, self.folder(trainer) / path)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401  # anomalib's batch
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the maps of a batch, named as the strips are; of several processes, one writes each."""
        del pl_module, outputs
        datamodule = getattr(trainer, "datamodule", None)
        for item in list(on_host(batch))[: own_number(trainer, batch_idx, dataloader_idx)]:
            path = generate_output_filename(
                input_path=item.image_path or "",
                output_path=self.folder(trainer),
                dataset_name=getattr(datamodule, "name", None),
                category=getattr(datamodule, "category", None),
            )
            self._write(item, self._named(Path(path)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the files are."""
        del pl_module
        if trainer.is_global_zero:
            logger.info("Maps: %s", self.folder(trainer))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the files are."""
        self.on_predict_end(trainer, pl_module)

    def _named(self, path: Path) -> Path:
        same = path.suffix.lower() == f".{self.kind}"
        return path if same else path.with_name(f"{path.name}.{self.kind}")

    def _write(self, item: Any, path: Path) -> None:  # noqa: ANN401  # anomalib's item
        if item.anomaly_map is None:
            return
        height, width = original_size(item.image_path, tuple(item.anomaly_map.shape))
        values = item.anomaly_map.float().squeeze().clamp(0, 1).numpy()
        values = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)
        with replacing(path) as file:
            if self.kind == "npy":
                with file.open("wb") as stream:
                    np.save(stream, values)
            else:
                Image.fromarray(np.rint(values * _WHITE).astype(np.uint16)).save(file)
