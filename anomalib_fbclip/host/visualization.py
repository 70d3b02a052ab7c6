# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Result pictures of a prediction, one for each file, also in nested folders."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.data import ImageBatch, ImageItem
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image
from lightning.pytorch import LightningModule, Trainer

from anomalib_fbclip.common.files import replacing

from .processes import own_number
from .unreadable import predicted_files

if TYPE_CHECKING:
    from PIL import Image

_TEXT_SIZE = 18
"""Pixels; the host's own captions do not fit into its panels."""


class PredictionVisualizer(ImageVisualizer):
    """anomalib's visualizer, with score and verdict, and with the whole folder structure of what is predicted.

    The host keeps a file's last folder only, so ``line1/good/0.png`` and ``line2/good/0.png`` overwrite each other.
    Here all folders below the one that the files have in common are kept, and its name. Tests write as the host does.

    Args:
        text_config: As the host's; ``{"enable": False}`` leaves captions, score and verdict out.
        **kwargs: As the host's.
    """

    output_dir: str | Path | None
    _root: Path | None = None

    def __init__(self, text_config: dict[str, Any] | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(text_config={"size": _TEXT_SIZE, **(text_config or {})}, **kwargs)

    def visualize(self, predictions: Any) -> Any:  # noqa: ANN401  # all kinds that the host takes
        """One strip for each image, with its score and what is made of it."""
        if isinstance(predictions, ImageBatch):
            strips = [self.visualize(item) for item in predictions]
            return strips[0] if len(strips) == 1 else strips
        strip = super().visualize(predictions)
        if strip is None or not isinstance(predictions, ImageItem) or predictions.pred_score is None:
            return strip
        return self._with_verdict(strip, predictions)

    def _with_verdict(self, strip: "Image.Image", item: ImageItem) -> "Image.Image":
        text = f"{float(item.pred_score):.3f}"
        if item.pred_label is not None:
            text += ", anomalous" if bool(item.pred_label) else ", normal"
        style = dict(self.text_config)
        if not style.pop("enable"):
            return strip
        bottom = strip.height - 10 - 1.5 * (style["size"] or _TEXT_SIZE)
        return add_text_to_image(strip, text, position=(10, int(bottom)), **style)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one picture for each image of the batch; of several processes, one writes it."""
        del pl_module, outputs
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        datamodule = getattr(trainer, "datamodule", None)
        for item in list(batch)[: own_number(trainer, batch_idx, dataloader_idx)]:
            strip = self.visualize(item)
            if strip is not None:
                target = generate_output_filename(
                    input_path=item.image_path or "",
                    output_path=self.output_dir,
                    dataset_name=getattr(datamodule, "name", None),
                    category=getattr(datamodule, "category", None),
                )
                _save(strip, Path(target))

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
        outputs: ImageBatch,
        batch: ImageBatch,
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
                _save(picture, target)


def _save(picture: "Image.Image", target: Path) -> None:
    with replacing(target) as file:
        picture.save(file)
