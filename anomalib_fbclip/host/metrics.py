# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Metrics of Table 1 at a cost that does not dwarf the model.

anomalib keeps every pixel until the end and sorts: 20-30 s and gigabytes for 200 maps of 518 x 518, for each metric.
Here pixel scores are counted into fine bins while they come, and all curves are read from the same counts. The bins
follow the floating-point grid, 1024 to an octave from both ends of [0, 1], so that values agree to 1e-4.
"""

import logging
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from anomalib.metrics import Evaluator
from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_precision_recall_curve

from .batches import on_host
from .components import label_components
from .processes import own_number
from .regions import inside_of

logger = logging.getLogger(__name__)

_SHIFT = 13  # of float32's 23 bits of mantissa, 10 are kept
_HALF = int(torch.tensor(0.5).view(torch.int32)) >> _SHIFT
BINS = 2 * _HALF + 1


def score_to_bin(scores: torch.Tensor) -> torch.Tensor:
    """Bin of each score in [0, 1] (others are clamped), rising with the score and equally fine near 0 and near 1."""
    scores = scores.detach().float().clamp(0, 1)
    mirrored = torch.where(scores <= 0.5, scores, 1 - scores)
    low = mirrored.view(torch.int32).long() >> _SHIFT
    return torch.where(scores <= 0.5, low, 2 * _HALF - low)


def bin_to_score(index: torch.Tensor) -> torch.Tensor:
    """A score below all scores of bin ``index`` and above all of the bins before."""
    low = torch.where(index <= _HALF, index, 2 * _HALF - index + 1)
    edge = (low.int() << _SHIFT).view(torch.float32)
    # Bins near 1 are finer than float32 is there: where 1 - edge was rounded up, a score of this bin could equal it.
    above = 1 - edge
    above = torch.where(1 - above < edge, torch.nextafter(above, torch.tensor(0.0)), above)
    return torch.where(index <= _HALF, torch.nextafter(edge, torch.tensor(-1.0)), above)


class ScoreHistogram(Metric):
    """Counts of normal and anomalous scores in [0, 1]; memory does not grow with the number of images.

    Args:
        regions: Also weight each anomalous pixel by one over the area of its connected region, for AUPRO.
        **kwargs: Of torchmetrics' ``Metric``.
    """

    full_state_update = False
    bins = BINS
    to_bin = staticmethod(score_to_bin)
    to_score = staticmethod(bin_to_score)
    normal: torch.Tensor
    anomalous: torch.Tensor
    overlap: torch.Tensor
    num_regions: torch.Tensor

    def __init__(self, regions: bool = False, **kwargs: Any) -> None:  # noqa: ANN401  # torchmetrics' own
        super().__init__(**kwargs)
        self.regions = regions
        for name in ("normal", "anomalous", "overlap"):
            self.add_state(name, torch.zeros(self.bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_regions", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: torch.Tensor, target: torch.Tensor, inside: torch.Tensor | None = None) -> None:
        """Count scores ``[B, H, W]`` (or ``[B]``) against 0/1 targets of the same shape.

        Args:
            scores: In [0, 1].
            target: 1 where there is an anomaly; 0 outside of ``inside``.
            inside: What is counted, of the same shape. ``None``: everything.
        """
        bins = self.to_bin(scores).flatten().to(self.normal.device)
        positive = target.flatten().to(bins.device) > 0
        negative = ~positive
        if inside is not None:
            negative &= inside.to(bins.device).flatten()
        # Boolean indices and bincount would make the host wait for the device.
        self.normal.index_add_(0, bins, negative.double())
        self.anomalous.index_add_(0, bins, positive.double())
        if self.regions:
            weights, number = _region_weights(target.reshape(-1, *target.shape[-2:]))
            self.overlap.index_add_(0, bins, weights.flatten().to(bins.device))
            self.num_regions += number

    def _apply(self, *args: Any, **kwargs: Any) -> "ScoreHistogram":  # noqa: ANN401  # torch's own signature
        """Move as asked, and stay exact: a trainer in half precision would count in half precision, too."""
        try:
            args[0](torch.zeros((), dtype=torch.float64))
        except TypeError:
            # A device without double precision, such as Apple's: the counts stay on the processor.
            return self
        super()._apply(*args, **kwargs)
        for name in self._defaults:
            self._defaults[name] = torch.zeros_like(getattr(self, name), dtype=torch.float64)
            setattr(self, name, getattr(self, name).double())
        return self

    @property
    def has_both_classes(self) -> bool:
        """Whether ranking is defined on what was counted."""
        return bool(self.normal.sum() > 0) and bool(self.anomalous.sum() > 0)

    def best_f1(self) -> tuple[float, float]:
        """Largest F1 over all thresholds, and the threshold: anomalous is what is greater."""
        hits, alarms = self._from_top(self.anomalous), self._from_top(self.normal)
        f1 = 2 * hits / (hits + alarms + self.anomalous.sum())
        best = int(f1.argmax())
        return float(f1[best]), float(self.to_score(torch.tensor(self.bins - 1 - best)))

    def compute(self) -> dict[str, float]:
        """``AUROC``, ``AUPR``, ``F1Max`` and, with regions, ``AUPRO`` (false-positive rate up to 0.3).

        NaN where the data do not define a value: no normal or no anomalous pixels.
        """
        names = ("AUROC", "AUPR", "AUPRO", "F1Max") if self.regions else ("AUROC", "AUPR", "F1Max")
        if not self.has_both_classes:
            return dict.fromkeys(names, float("nan"))
        hits, alarms = self._from_top(self.anomalous), self._from_top(self.normal)
        false_positive_rate = _with_zero(alarms / alarms[-1])
        recall = _with_zero(hits / hits[-1])
        values = {
            "AUROC": float(torch.trapezoid(recall, false_positive_rate)),
            "AUPR": float((recall.diff() * hits / (hits + alarms).clamp(min=1)).sum()),
            "F1Max": self.best_f1()[0],
        }
        if self.regions:
            per_region = _with_zero(self._from_top(self.overlap) / self.num_regions)
            values["AUPRO"] = _area_up_to(false_positive_rate, per_region, limit=0.3)
        return {name: values[name] for name in names}

    @staticmethod
    def _from_top(counts: torch.Tensor) -> torch.Tensor:
        return counts.flip(0).cumsum(0)


def _region_weights(target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """One over the area of its connected region for each anomalous pixel ``[B, H, W]``; the number of regions."""
    weights, number = np.zeros(target.shape), 0
    for weight, mask in zip(weights, (target > 0).cpu().numpy(), strict=True):
        labels, stats, _ = label_components(mask)
        each = 1 / stats[:, cv2.CC_STAT_AREA].clip(min=1)
        each[0] = 0
        weight[:] = each[labels]
        number += len(each) - 1
    return torch.from_numpy(weights), number


_ANY_SHIFT = 12  # of float32's 23 bits of mantissa, 11 are kept
_ANY_HALF = 0x7F800000 >> _ANY_SHIFT


def any_score_to_bin(scores: torch.Tensor) -> torch.Tensor:
    """Bin of each score of any sign and size, rising with the score, 2048 to an octave."""
    bits = scores.detach().float().contiguous().view(torch.int32)
    size = ((bits & 0x7FFFFFFF) >> _ANY_SHIFT).long().clamp(max=_ANY_HALF)
    return torch.where(bits < 0, _ANY_HALF - size, _ANY_HALF + size)


def any_bin_to_score(index: torch.Tensor) -> torch.Tensor:
    """A score below all scores of bin ``index`` and not below any of the bins before."""
    size = index - _ANY_HALF
    # A bin of negative scores ends, downwards, where the size of the next one begins; that of zero is one of them.
    edge = (torch.where(size > 0, size, (1 - size).clamp(max=_ANY_HALF)).int() << _ANY_SHIFT).view(torch.float32)
    return torch.where(size > 0, torch.nextafter(edge, torch.tensor(-torch.inf)), -edge)


class AnyScoreHistogram(ScoreHistogram):
    """The same for scores of any range, such as distances: about 50 MB, however many images."""

    bins = 2 * _ANY_HALF + 1
    to_bin = staticmethod(any_score_to_bin)
    to_score = staticmethod(any_bin_to_score)


class ImageScores(Metric):
    """Exact image-level AUROC, average precision and F1-max; NaN where only one class was seen."""

    full_state_update = False
    scores: list[torch.Tensor]
    labels: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401  # torchmetrics' own
        super().__init__(**kwargs)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep scores ``[B]`` and 0/1 labels ``[B]``."""
        self.scores.append(scores.detach().float().flatten())
        self.labels.append(labels.detach().long().flatten())

    def compute(self) -> dict[str, float]:
        """``AUROC``, ``AUPR``, ``F1Max``."""
        scores = torch.cat(list(self.scores)) if not isinstance(self.scores, torch.Tensor) else self.scores
        labels = torch.cat(list(self.labels)) if not isinstance(self.labels, torch.Tensor) else self.labels
        if labels.unique().numel() < 2:
            return dict.fromkeys(("AUROC", "AUPR", "F1Max"), float("nan"))
        # torchmetrics takes scores outside of [0, 1] as logits, and their sigmoid is 1 from 17 on. All three need the
        # order alone.
        distinct, order = scores.unique(return_inverse=True)
        scores = order / len(distinct)
        precision, recall, _ = binary_precision_recall_curve(scores, labels)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {
            "AUROC": float(binary_auroc(scores, labels)),
            "AUPR": float(binary_average_precision(scores, labels)),
            "F1Max": float(f1.max()),
        }


class InsideEvaluator(Evaluator):
    """anomalib's evaluator, whose pixel metrics see the pixels inside of the regions alone.

    Its pixel metrics must take pixels in any shape, as AUROC and F1 do.
    """

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401  # anomalib's batch, whose fields may be missing
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch."""
        if self.compute_on_cpu and trainer.num_devices == 1:
            batch = on_host(batch)  # anomalib would move what each metric keeps, one after the other
        super().on_test_batch_end(
            trainer,
            pl_module,
            outputs,
            _inside_of(pl_module, batch),
            batch_idx,
            dataloader_idx,
        )


def _inside_of(pl_module: LightningModule, batch: Any) -> Any:  # noqa: ANN401
    """A batch whose maps and masks are lists of the pixels inside."""
    inside = inside_of(pl_module, batch.image_path, batch.anomaly_map)
    if inside is None:
        return batch
    pixels = {
        name: value[inside]
        for name in ("anomaly_map", "pred_mask", "gt_mask")
        if (value := getattr(batch, name)) is not None
    }
    return SimpleNamespace(pred_score=batch.pred_score, pred_label=batch.pred_label, gt_label=batch.gt_label, **pixels)


class FullEvaluator(Evaluator):
    """Image AUROC, AUPR, F1Max and pixel AUROC, AUPR, AUPRO, F1Max in one pass.

    Pixel metrics are left out where the data have no masks. A metric that is not defined (one class only) is logged as
    NaN, which tables show as missing, with one line that says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageScores()
        self.pixel = ScoreHistogram(regions=True)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401  # anomalib's batch, whose fields may be missing
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the batch, each image once, also where several processes share the test."""
        del outputs
        own = own_number(trainer, batch_idx, dataloader_idx)
        if batch.gt_label is not None and batch.pred_score is not None:
            self.image.update(batch.pred_score[:own], batch.gt_label[:own])
        if batch.gt_mask is not None and batch.anomaly_map is not None:
            inside = inside_of(pl_module, batch.image_path, batch.anomaly_map)
            # Regions are found on the host, and what writes strips has the masks copied anyway.
            masks = on_host(batch).gt_mask[:own]
            self.pixel.update(batch.anomaly_map[:own], masks, None if inside is None else inside[:own])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log all values and forget the counts."""
        del pl_module
        for prefix, metric in (("image", self.image), ("pixel", self.pixel)):
            if not metric.update_called:
                continue
            values = {f"{prefix}_{name}": value for name, value in metric.compute().items()}
            metric.reset()
            if any(value != value for value in values.values()):  # noqa: PLR0124  # NaN
                logger.warning("%s metrics are missing: the test data hold one class only.", prefix)
            for name, value in values.items():
                self.log(name, value)
                if trainer.barebones:
                    trainer.callback_metrics[name] = trainer.logged_metrics[name] = torch.tensor(value)


def _with_zero(curve: torch.Tensor) -> torch.Tensor:
    return torch.cat((curve.new_zeros(1), curve))


def _area_up_to(x: torch.Tensor, y: torch.Tensor, limit: float) -> float:
    """Area under ``y`` over ``x`` in [0, limit], divided by ``limit``; the last piece is cut by interpolation."""
    after = int((x > limit).long().argmax())
    step = (limit - x[after - 1]) / (x[after] - x[after - 1])
    end = y[after - 1] + step * (y[after] - y[after - 1])
    x = torch.cat((x[:after], x.new_tensor([limit])))
    return float(torch.trapezoid(torch.cat((y[:after], end[None])), x) / limit)
