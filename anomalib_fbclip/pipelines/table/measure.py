# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Metrics, time and memory of one test run, of any anomalib model, on its scores as they come out of it."""

import logging
import sys
import time
from pathlib import Path

import torch
from anomalib.metrics import AUPIMO as PIMO
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_fbclip.host.metrics import AnyScoreHistogram, ImageScores, ScoreHistogram
from anomalib_fbclip.host.module import ScoringModule
from anomalib_fbclip.host.post_processing import ProbabilityPostProcessor

from .bootstrap import ImageCounts

logger = logging.getLogger(__name__)

METRICS = (
    *("image_AUROC", "image_AUPR", "image_F1Max"),
    *("pixel_AUROC", "pixel_AUPR", "pixel_AUPRO", "pixel_F1Max"),
)
AUPIMO = "pixel_AUPIMO"
"""Measured where a table asks for it: anomalib's keeps all maps in memory."""


class Measure(Callback):
    """Counts each batch before the model's own callbacks see it.

    anomalib's post-processor shifts scores and clamps them to [0, 1], which makes ties; a user's callback comes before
    it. So the ranking is the model's own, whatever range its scores have, and no validation pass is needed.

    Args:
        aupimo: Also compute anomalib's AUPIMO.
    """

    def __init__(self, aupimo: bool = False) -> None:
        self.image = ImageScores()
        self.pixel: ScoreHistogram = AnyScoreHistogram(regions=True)
        self.counts = ImageCounts()
        self.aupimo = PIMO(fields=("anomaly_map", "gt_mask")) if aupimo else None
        self.images = 0
        self.timed_images = 0
        self.seconds = 0.0
        self.metric_seconds = 0.0
        self._started = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the bins; have each image scored while the clock runs."""
        del trainer
        if isinstance(pl_module, ScoringModule):
            pl_module.forget_validation()
        if isinstance(getattr(pl_module, "post_processor", None), ProbabilityPostProcessor):
            # Probabilities crowd at both ends of [0, 1]; these bins are fine at both.
            self.pixel = ScoreHistogram(regions=True)
        for metric in (self.image, self.pixel):
            metric.to(pl_module.device)
        reset_peak_memory()

    def on_test_batch_start(self, *args, **kwargs) -> None:
        """Start the clock: what follows is the model's resizing, normalising and scoring."""
        del args, kwargs
        _synchronize()
        self._started = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop the clock and count the batch.

        Raises:
            ValueError: If a score or a map holds NaN.
        """
        del trainer, pl_module, outputs, dataloader_idx
        _synchronize()
        now = time.perf_counter()
        number = len(batch.image)  # type: ignore[attr-defined]
        self.images += number
        # The first batch also pays for what is made once, unless it is the only one.
        if batch_idx == 1:
            self.seconds, self.timed_images = 0.0, 0
        self.seconds += now - self._started
        self.timed_images += number
        scores, maps = batch.pred_score, batch.anomaly_map  # type: ignore[attr-defined]
        labels, masks = batch.gt_label, batch.gt_mask  # type: ignore[attr-defined]
        if scores is None and maps is not None:
            scores = maps.flatten(1).amax(dim=1)
        if any(values is not None and values.isnan().any() for values in (scores, maps)):
            msg = "the model's scores hold NaN: no ranking is defined."
            raise ValueError(msg)
        if scores is not None and labels is not None:
            self.image.update(scores, labels)
        if maps is not None and masks is not None:
            maps = maps.reshape(masks.shape)
            self.pixel.update(maps, masks)
            if self.aupimo is not None:
                self.aupimo.update(batch)
        paths = batch.image_path or [str(self.images - number + index) for index in range(number)]  # type: ignore[attr-defined]
        self.counts.update(paths, scores, labels, maps, masks, self.pixel)
        self.metric_seconds += time.perf_counter() - now

    def results(self) -> dict[str, float]:
        """All metrics, in percent; NaN where the data do not define a value."""
        started = time.perf_counter()
        values: dict[str, float] = {}
        for prefix, metric in (("image", self.image), ("pixel", self.pixel)):
            if metric.update_called:
                values |= {f"{prefix}_{name}": 100 * value for name, value in metric.compute().items()}
        if self.aupimo is not None and self.aupimo.update_called:
            try:
                values[AUPIMO] = 100 * float(self.aupimo.compute())
            except ValueError as error:
                logger.warning("AUPIMO is not defined on these %d images: %s", self.images, error)
        self.metric_seconds += time.perf_counter() - started
        wanted = METRICS if self.aupimo is None else (*METRICS, AUPIMO)
        return {name: values.get(name, float("nan")) for name in wanted}

    @property
    def seconds_per_image(self) -> float:
        """Time of the model alone, without loading and metrics."""
        return self.seconds / max(self.timed_images, 1)


def reset_peak_memory() -> None:
    """Forget the peak so far, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def peak_memory_mb() -> float:
    """Peak of the accelerator's memory, or of the process without one, in MB (10^6 bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
    except (OSError, StopIteration):
        try:
            import resource
        except ImportError:  # Windows
            return float("nan")
        # Linux counts in kB, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
