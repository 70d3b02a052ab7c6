# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The validation that anomalib's engine runs before each test and prediction of a zero-shot model.

All that our models can learn from it are thresholds. Where they learn nothing it is skipped; where its images are those
of the test, as in many data modules, each is scored once.
"""

from collections import deque
from typing import Any

import torch
from anomalib.data import Batch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from .batches import on_host
from .unreadable import DATA_SOURCE, files_of

LIMIT_BYTES = 2**30
_FIELDS = ("pred_score", "anomaly_map")


def is_preparation(trainer: Trainer) -> bool:
    """Whether a validation that is being set up is the engine's own, before a test or prediction: it prints nothing."""
    return trainer.state.fn == TrainerFn.VALIDATING and not getattr(trainer.validate_loop, "verbose", True)


def source_of(trainer: Trainer) -> object:
    """Where the images of a validation come from: data module, data loaders, or the model; ``None`` if not known."""
    return getattr(getattr(trainer.validate_loop, DATA_SOURCE, None), "instance", None)


def validates_on_test_images(datamodule: object) -> bool:
    """Whether a data module, which was set up, validates on the images that it tests."""
    validated, tested = (files_of(getattr(datamodule, name, None)) for name in ("val_data", "test_data"))
    return bool(validated) and validated == tested


class KeptPredictions:
    """Scores and maps of a validation, for a test of the same batches in the same order.

    Either all of them or, beyond the limit, none: a model may depend on the images before.

    Args:
        limit: Bytes to keep at most.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.left = limit
        self.state: object = None
        self._batches: deque[tuple[object, dict[str, torch.Tensor]]] = deque()

    def add(self, batch: Batch) -> None:
        """Keep the scores and maps of a batch."""
        if self.left < 0:
            return
        batch.pixel_sum = _sum_of(batch)
        seen = on_host(batch)
        kept = {name: value for name in _FIELDS if (value := getattr(seen, name)) is not None}
        self.left -= sum(value.numel() * value.element_size() for value in kept.values())
        self._batches.append((_key(batch, seen.pixel_sum), kept))
        if self.left < 0:
            self._batches.clear()

    def take(self, batch: Batch) -> dict[str, Any] | None:
        """Scores and maps of the next batch; ``None`` where another one was expected, and from then on."""
        if not self._batches:
            return None
        key, kept = self._batches.popleft()
        if key != _key(batch, _sum_of(batch)):
            self._batches.clear()
            return None
        return {name: value.to(batch.image.device) for name, value in kept.items()}


def _sum_of(batch: Batch) -> torch.Tensor:
    return batch.image.sum(dtype=torch.float64)


def _key(batch: Batch, pixel_sum: torch.Tensor) -> object:
    return tuple(batch.image_path or ()), tuple(batch.image.shape), float(pixel_sum)
