# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Labels and masks from probabilities: a fixed scale, and a threshold that is usable from the first image."""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer

from .components import drop_small, drop_small_in_graph, original_size
from .metrics import ScoreHistogram
from .regions import inside_of

FIXED, LABELS, NORMAL_PICTURES = "fixed", "labels", "normal pictures"


class ProbabilityPostProcessor(PostProcessor):
    """anomalib's post-processor for scores that are probabilities already.

    It differs from the host's in three points. Thresholds start at 0.5 and not at NaN, so that a folder without any
    validation data gets labels; validation data with both classes replace them by the F1-optimal ones. The scale is
    fixed to [0, 1] and does not follow the pictures at hand, so that a good picture stays dark. And normalisation
    bends the scale at the threshold (which lands on 0.5) instead of shifting and clamping it: ranking, and with it
    every ranking metric, is untouched; at the threshold 0.5 nothing changes at all.

    Attributes:
        origin: Where the thresholds come from: ``"origin"`` is ``"fixed"``, ``"labels"`` or ``"normal pictures"``, the
            last with their number, the wanted and the expected false-alarm rate and its interval. Plain types only:
            it goes into checkpoints, adapters and exports.
        chosen: Whether somebody gave the thresholds as numbers.
        min_area: Components of a mask of fewer pixels of the original image are taken out of it, and an image whose
            mask had components and has none left is normal. 0: none are.
    """

    min_area = 0

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
        self.origin: dict[str, Any] = {"origin": FIXED}
        self.chosen = False
        self._image_scores = ScoreHistogram()
        self._pixel_scores = ScoreHistogram()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "origin")

    @property
    def thresholds(self) -> dict[str, Any]:
        """Both thresholds, on the scale of the model's probabilities, and where they come from."""
        return {"image": float(self._image_threshold), "pixel": float(self._pixel_threshold), **self.origin}

    @property
    def calibrated(self) -> bool:
        """Whether the thresholds rest on anything: good images, labels, or numbers that somebody gave."""
        return self.chosen or self.origin["origin"] != FIXED

    @property
    def takes_labels(self) -> bool:
        """Whether labelled validation data set the thresholds."""
        return self.enable_thresholding and self.origin["origin"] != NORMAL_PICTURES

    def set_thresholds(self, image: float, pixel: float, **origin: Any) -> None:  # noqa: ANN401  # plain types
        """Set both thresholds, such as :attr:`thresholds` of another.

        Thresholds from normal images, an adapter's as well, are kept when labelled validation data come by: somebody
        asked for them.

        Args:
            image: Threshold of the score, in [0, 1].
            pixel: Threshold of the map, in [0, 1].
            **origin: See :attr:`origin`; without it the thresholds are numbers that somebody chose.

        Raises:
            ValueError: If a threshold is not in [0, 1].
        """
        for name, value in (("image", image), ("pixel", pixel)):
            if not 0 <= value <= 1:
                msg = f"{name} threshold {value}: give a probability, from 0 to 1."
                raise ValueError(msg)
        self._image_threshold.fill_(image)
        self._pixel_threshold.fill_(pixel)
        self.origin = origin or {"origin": FIXED}
        self.chosen = not origin

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        *args,
        **kwargs,
    ) -> None:
        """Count the scores of a validation batch."""
        del trainer, args, kwargs
        if not self.enable_thresholding or outputs is None:
            return
        if outputs.gt_label is not None:
            self._image_scores.update(outputs.pred_score, outputs.gt_label)
        if outputs.gt_mask is not None:
            inside = inside_of(pl_module, outputs.image_path, outputs.anomaly_map)
            self._pixel_scores.update(outputs.anomaly_map, outputs.gt_mask, inside)

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
                    if scores.has_both_classes and self.origin["origin"] != NORMAL_PICTURES:
                        threshold.fill_(scores.best_f1()[1])
                        self.origin = {"origin": LABELS}
            scores.reset()

    def threshold_batch(self, batch: Batch) -> None:
        """Set labels and masks, without components that are smaller than :attr:`min_area`."""
        super().threshold_batch(batch)
        if self.min_area and batch.pred_mask is not None:
            paths = batch.image_path or [None] * len(batch.image)
            sizes = [original_size(path, tuple(batch.image.shape)) for path in paths]
            batch.pred_mask, batch.pred_label = self.without_small(batch.pred_mask, batch.pred_label, sizes)

    def without_small(
        self,
        masks: torch.Tensor,
        labels: torch.Tensor | None,
        sizes: Sequence[tuple[int, int]],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masks and labels without components that are smaller than :attr:`min_area`.

        Args:
            masks: What is above the map's threshold ``[B, H, W]``.
            labels: Whether the score is above its own ``[B]``.
            sizes: Height and width of each original image in pixels; all alike in an exported graph.

        Returns:
            tuple: Masks; and labels, false where a mask had components and has none left.
        """
        if torch.compiler.is_exporting():
            left = drop_small_in_graph(masks, self.min_area, sizes[0])
        else:
            cut = [drop_small(mask, self.min_area, size) for mask, size in zip(masks.cpu(), sizes, strict=True)]
            left = torch.stack(cut).to(masks.device)
        emptied = masks.flatten(1).any(dim=1) & ~left.flatten(1).any(dim=1)
        return left, None if labels is None else labels & ~emptied.reshape(labels.shape)

    @staticmethod
    def _apply_threshold(preds: torch.Tensor | None, threshold: torch.Tensor) -> torch.Tensor | None:
        # anomalib's reads each threshold from the device to see whether it is NaN; here none ever is.
        return None if preds is None else preds > threshold

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        if preds is None:
            return None
        # Multiplying by the reciprocal slope keeps 0.5 an exact fixed point of the threshold 0.5. In place, as a map of
        # a large image has hundreds of megabytes.
        below = (preds - norm_min).mul_(0.5).div_((threshold - norm_min).clamp(min=1e-12))
        above = (preds - threshold).mul_(0.5).div_((norm_max - threshold).clamp(min=1e-12)).add_(0.5)
        above = torch.where(preds <= threshold, below, above)
        del below
        return above.clamp_(0, 1)
