# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Writes the adapter file at the end of each training epoch."""

import logging
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

logger = logging.getLogger(__name__)


class AdapterCheckpoint(Callback):
    """Write ``adapter.safetensors`` after each training epoch, and tell where it is.

    Also before its validation, so that an image that cannot be read there does not take the epoch with it.

    An adapter holds the trained tensors only (a few MB) and is what ``weights=`` takes. :class:`FBCLIP` adds this
    callback to its training runs by itself, unless the trainer has one already.

    Args:
        dirpath: Folder to write to. ``None``: ``weights/adapter`` in the run's folder.
        filename: Name of the file; ``{epoch}`` is replaced by the epoch, counted from 1, which keeps one file an epoch.

    Raises:
        ValueError: If the file name does not end in ``.safetensors``.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[AdapterCheckpoint(filename="epoch-{epoch}.safetensors")])
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = "adapter.safetensors") -> None:
        if not filename.endswith(".safetensors"):
            msg = f"filename={filename!r}: use the suffix .safetensors."
            raise ValueError(msg)
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self.filename = filename
        self.last_path: Path | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was trained so far; thresholds follow at the end of the epoch."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the adapter, once for all processes."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = self.dirpath or Path(trainer.default_root_dir) / "weights" / "adapter"
        epoch = trainer.current_epoch + 1
        self.last_path = pl_module.save_adapter(folder / self.filename.format(epoch=epoch), epoch=epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell where the adapter is."""
        del trainer, pl_module
        if self.last_path is not None:
            logger.info("Adapter written to %s: use it with weights=%s", self.last_path, self.last_path)
