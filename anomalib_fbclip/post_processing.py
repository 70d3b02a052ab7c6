# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Labels and masks from probabilities: a fixed scale, and a threshold that is usable from the first picture."""

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer

from anomalib_fbclip.metrics import ScoreHistogram


class ProbabilityPostProcessor(PostProcessor):
    """anomalib's post-processor for scores that are probabilities already.

    It differs from the host's in three points. Thresholds start at 0.5 and not at NaN, so that a folder without any
    validation data gets labels; validation data with both classes replace them by the F1-optimal ones. The scale is
    fixed to [0, 1] and does not follow the pictures at hand, so that a good picture stays dark. And normalisation
    bends the scale at the threshold (which lands on 0.5) instead of shifting and clamping it: ranking, and with it
    every ranking metric, is untouched; at the threshold 0.5 nothing changes at all.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("_image_threshold", 0.5),
            ("_pixel_threshold", 0.5),
            ("image_min", 0.0),
            ("image_max", 1.0),
            ("pixel_min", 0.0),
            ("pixel_max", 1.0),
        ):
            getattr(self, name).fill_(value)
        self._image_scores = ScoreHistogram()
        self._pixel_scores = ScoreHistogram()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        *args,
        **kwargs,
    ) -> None:
        """Count the scores of a validation batch."""
        del trainer, pl_module, args, kwargs
        if not self.enable_thresholding or outputs is None:
            return
        if outputs.gt_label is not None:
            self._image_scores.update(outputs.pred_score, outputs.gt_label)
        if outputs.gt_mask is not None:
            self._pixel_scores.update(outputs.anomaly_map, outputs.gt_mask)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds where both classes were seen."""
        del trainer, pl_module
        for scores, threshold in (
            (self._image_scores, self._image_threshold),
            (self._pixel_scores, self._pixel_threshold),
        ):
            if scores.update_called:
                # compute() first: it gathers the counts of all processes.
                with scores.sync_context(should_unsync=True):
                    if scores.has_both_classes:
                        threshold.fill_(scores.best_f1()[1])
            scores.reset()

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        if preds is None:
            return None
        # Multiplying by the reciprocal slope keeps 0.5 an exact fixed point of the threshold 0.5.
        below = 0.5 * (preds - norm_min) / (threshold - norm_min).clamp(min=1e-12)
        above = 0.5 + 0.5 * (preds - threshold) / (norm_max - threshold).clamp(min=1e-12)
        return torch.where(preds <= threshold, below, above).clamp(0, 1)
