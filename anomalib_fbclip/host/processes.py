# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Several processes sharing one run: one folder for all, and each image counted once."""

from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler

_T = TypeVar("_T")


def share_folder(trainer: Trainer) -> None:
    """Let all processes write into the first one's folder: anomalib makes one for each, and ``latest`` is the last's.

    Args:
        trainer: Trainer of several processes, which can already talk to each other.
    """
    own = Path(trainer.default_root_dir)
    shared = Path(trainer.strategy.broadcast(str(own)))
    if own != shared:
        trainer._default_root_dir = str(shared)  # noqa: SLF001  # the property has no setter
        with suppress(OSError):  # not there, or in use: nobody's loss
            own.rmdir()
    trainer.strategy.barrier()
    latest = shared.parent / "latest"
    if trainer.is_global_zero and latest.is_symlink() and latest.resolve() != shared.resolve():
        latest.unlink()
        latest.symlink_to(shared, target_is_directory=True)


def own_number(trainer: Trainer, batch_idx: int, dataloader_idx: int = 0) -> int | None:
    """How many images of a test batch count in this process.

    PyTorch's sampler repeats the first images where the last processes would have fewer than the others; repetitions
    come last, and counted twice they would change the metrics.

    Args:
        trainer: Trainer of a running test.
        batch_idx: Number of the batch.
        dataloader_idx: Number of its data loader.

    Returns:
        Number of images, the first of the batch. ``None``: all of them.
    """
    loaders = trainer.test_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, (list, tuple)) else loaders
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if not isinstance(sampler, DistributedSampler) or sampler.shuffle or sampler.drop_last or size is None:
        return None
    share = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    return max(0, share - batch_idx * size)


def gather(trainer: Trainer, rows: list[_T]) -> list[_T]:
    """Rows of all processes, those of the first one first; must be called by all of them.

    Args:
        trainer: Trainer of a run.
        rows: Rows of this process, of plain types.
    """
    if trainer.world_size == 1:
        return rows
    parts: list[list[_T]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
