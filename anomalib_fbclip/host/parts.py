# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Several images of one part: one score, one threshold, one verdict, and the view that gave it."""

import csv
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_fbclip.common.files import replacing

from .batches import on_host
from .metrics import ImageScores, ScoreHistogram
from .post_processing import LABELS, ProbabilityPostProcessor
from .prediction_index import PredictionIndex
from .processes import gather
from .unreadable import files_of, predicted_files
from .verdicts import UNCALIBRATED, Tested, confusion, is_calibrated

logger = logging.getLogger(__name__)

FROM_DATA = "data"
"""Stands for the pattern of the data module."""

PATTERNS = {"RealIAD": r"^(.*[/\\]S\d+)[/\\]"}
"""Class of a data module of anomalib -> pattern of a part in its paths; ours have an attribute ``group_by``."""

RULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "log_odds": lambda scores: torch.logit(scores, eps=1e-6).mean().sigmoid(),
    "max": lambda scores: scores.max(),
    "mean": lambda scores: scores.mean(),
    "any": lambda scores: 1 - (1 - scores).prod(),
}
"""Score of a part from those of its views ``[V]``, in [0, 1]."""

COLUMNS = ("part", "score", "label", "threshold", "views", "view", "truth")


class View(NamedTuple):
    """One image of a part.

    Attributes:
        path: Its file.
        score: Before normalisation, in [0, 1].
        truth: Whether it is anomalous; ``None`` where that is not known.
    """

    path: str
    score: float
    truth: bool | None = None


class Part(NamedTuple):
    """One part.

    Attributes:
        name: What the pattern finds in the paths of its images.
        score: Before normalisation, in [0, 1].
        view: The image with the highest score.
        views: Number of images.
        truth: Whether one of them is anomalous; ``None`` where that is not known.
    """

    name: str
    score: float
    view: str
    views: int
    truth: bool | None


class Parts(Callback):
    r"""Group the images of a run into parts, and judge each part.

    A test logs ``part_AUROC``, ``part_AUPR``, ``part_F1Max`` and, at the threshold, ``part_F1Score``, and names the
    confused parts with the view of the highest score. A prediction writes ``parts.csv`` beside the table of the images.
    ``group_by`` of our models adds this callback.

    The threshold of parts is found as that of images: from the parts of the normal images, or F1-optimal on the parts
    of labelled validation data. Else it is that of the images.

    Args:
        group_by: Regular expression, searched for in each path. Its group ``part``, else its first group, else all that
            it matches, is the name of the part. ``"data"``: the data module's own.
        rule: ``log_odds``: mean of the log-odds of the views; ``max``: a part is as anomalous as its most anomalous
            view; ``mean`` of the views; ``any``: probability that one of them is anomalous if they were independent.

    Attributes:
        last: Parts of the last test or prediction.

    Raises:
        ValueError: If the pattern is none or the rule is unknown.

    Example:
        >>> Parts(r"(part_\d+)_view").name_of("images/part_07_view2.png")
        'part_07'
    """

    def __init__(self, group_by: str, rule: str = "log_odds") -> None:
        if rule not in RULES:
            msg = f"part_score={rule!r}: choose one of {[*RULES]}."
            raise ValueError(msg)
        self.rule = rule
        self._given = group_by
        self._pattern = None if group_by == FROM_DATA else _compiled(group_by)
        self.last: list[Part] = []
        self._rows: dict[str, View] = {}

    def name_of(self, path: str | Path) -> str:
        """Part of an image.

        Raises:
            ValueError: If the pattern does not match.
        """
        if self._pattern is None:
            msg = "group_by='data' and no data module with a pattern of its own: give a regular expression."
            raise ValueError(msg)
        found = self._pattern.search(str(path))
        if found is None:
            msg = f"group_by={self._pattern.pattern!r} is not in the path {str(path)!r}: give a pattern that fits all."
            raise ValueError(msg)
        if "part" in self._pattern.groupindex:
            return found["part"]
        return found[1] if self._pattern.groups else found[0]

    def group(self, views: Sequence[View]) -> list[Part]:
        """The parts of views, in the order of their first ones."""
        grouped: dict[str, list[View]] = {}
        for view in views:
            grouped.setdefault(self.name_of(view.path), []).append(view)
        parts = []
        for name, own in grouped.items():
            score = float(RULES[self.rule](torch.tensor([view.score for view in own])))
            truths = [view.truth for view in own if view.truth is not None]
            top = max(own, key=lambda view: view.score)
            parts.append(Part(name, score, top.path, len(own), any(truths) if truths else None))
        return parts

    def scores(self, files: Sequence[str], scores: Sequence[float]) -> list[float]:
        """Score of each part of images."""
        return [part.score for part in self.group([View(*row) for row in zip(files, scores, strict=True)])]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the pattern of the data module, if that is wanted."""
        del pl_module, stage
        datamodule = getattr(trainer, "datamodule", None)
        if self._given == FROM_DATA and datamodule is not None:
            own = getattr(datamodule, "group_by", None) or PATTERNS.get(type(datamodule).__name__)
            if own is None:
                msg = f"group_by='data', but {type(datamodule).__name__} has no pattern: give a regular expression."
                raise ValueError(msg)
            self._pattern = _compiled(own)

    @staticmethod
    def note(batch: Any) -> None:  # noqa: ANN401  # anomalib's batch
        """Keep the scores of a batch before the post-processor bends them."""
        batch.raw_score = batch.pred_score

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        del trainer, pl_module
        self._rows = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, with a pattern that fits all files."""
        self.on_validation_start(trainer, pl_module)
        for path in files_of(getattr(getattr(trainer, "datamodule", None), "test_data", None)):
            self.name_of(path)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, with a pattern that fits all files."""
        self.on_validation_start(trainer, pl_module)
        for path in predicted_files(trainer):
            self.name_of(path)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401  # anomalib's batch
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the views of a batch."""
        del trainer, outputs, batch_idx, dataloader_idx
        seen = on_host(batch)
        raw = seen.raw_score.float().flatten().tolist()
        emptied = _emptied(pl_module.post_processor, seen)
        limit = float(pl_module.post_processor.image_threshold) if any(emptied) else 1.0
        truths = [None] * len(raw) if seen.gt_label is None else seen.gt_label.bool().tolist()
        for path, score, truth, small in zip(batch.image_path, raw, truths, emptied, strict=True):
            # By path, for several processes may repeat an image.
            self._rows[path] = View(path, min(score, limit) if small else score, truth)

    def on_test_batch_end(self, *args, **kwargs) -> None:
        """Note the views of a batch."""
        self.on_validation_batch_end(*args, **kwargs)

    def on_predict_batch_end(self, *args, **kwargs) -> None:
        """Note the views of a batch."""
        self.on_validation_batch_end(*args, **kwargs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the threshold of parts where labels have just set that of images."""
        parts = self._all(trainer)
        processor = pl_module.post_processor
        if not isinstance(processor, ProbabilityPostProcessor) or processor.origin["origin"] != LABELS:
            return
        scores = ScoreHistogram()
        known = [part for part in parts if part.truth is not None]
        scores.update(torch.tensor([part.score for part in known]), torch.tensor([int(bool(p.truth)) for p in known]))
        if scores.has_both_classes:
            processor.origin = {**processor.origin, "part": scores.best_f1()[1]}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of parts."""
        self.last = self._all(trainer)
        known = [part for part in self.last if part.truth is not None]
        if not known:
            return
        metric = ImageScores()
        metric.update(torch.tensor([part.score for part in known]), torch.tensor([bool(part.truth) for part in known]))
        values = {f"part_{name}": value for name, value in metric.compute().items()}
        threshold = threshold_of(pl_module.post_processor)
        if threshold is not None:
            hits = sum(part.score > threshold and bool(part.truth) for part in known)
            wrong = sum((part.score > threshold) != bool(part.truth) for part in known)
            values["part_F1Score"] = 2 * hits / max(2 * hits + wrong, 1)
        for name, value in values.items():
            pl_module.log(name, value)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the confused parts by name, with the view of the highest score."""
        threshold = threshold_of(pl_module.post_processor)
        known = [part for part in self.last if part.truth is not None]
        if not known or threshold is None or not trainer.is_global_zero:
            return
        rows = [Tested(f"{p.name} ({p.view})", p.score, p.score > threshold, bool(p.truth)) for p in known]
        logger.info("%d parts at the threshold %.4f:\n%s", len(known), threshold, confusion(rows)[1])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table of the parts."""
        self.last = self._all(trainer)
        if not trainer.is_global_zero:
            return
        tables = [each.last_path for each in trainer.callbacks if isinstance(each, PredictionIndex) and each.last_path]
        path = (tables[0].parent if tables else Path(trainer.default_root_dir)) / "parts.csv"
        processor, threshold = pl_module.post_processor, threshold_of(pl_module.post_processor)
        calibrated = is_calibrated(processor)
        anomalous = 0
        with replacing(path) as file, file.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            table = csv.DictWriter(stream, COLUMNS)
            table.writeheader()
            for part in self.last:
                label = None if threshold is None else int(part.score > threshold)
                anomalous += label or 0
                score, shown = _shown(processor, part.score, threshold)
                table.writerow({
                    "part": part.name,
                    "score": round(score, 6),
                    "label": label if calibrated else UNCALIBRATED,
                    "threshold": None if shown is None else round(shown, 6),
                    "views": part.views,
                    "view": part.view,
                    "truth": None if part.truth is None else int(part.truth),
                })
        if threshold is not None and self.rule != "max" and "part" not in getattr(processor, "origin", {}):
            logger.warning(
                "The threshold of parts is that of images, %.4f, for part_score=%r: no parts were there to find their "
                "own. Give normal_source, or part_score='max'.",
                threshold,
                self.rule,
            )
        counts = f": {anomalous} anomalous" if calibrated and threshold is not None else ""
        logger.info("Parts: %s (%d parts%s)", path, len(self.last), counts)

    def _all(self, trainer: Trainer) -> list[Part]:
        """The parts of all processes."""
        rows = gather(trainer, list(self._rows.values()))
        return self.group(list({view.path: view for view in rows}.values()))


def threshold_of(post_processor: object) -> float | None:
    """Threshold of parts before normalisation: their own, else that of images."""
    origin = getattr(post_processor, "origin", {})
    image = getattr(post_processor, "image_threshold", None)
    return origin.get("part", None if image is None else float(image))


def _shown(processor: object, score: float, threshold: float | None) -> tuple[float, float | None]:
    """Score and threshold as tables have them: with normalisation, 0.5 is the threshold of parts."""
    if threshold is None or not isinstance(processor, ProbabilityPostProcessor) or not processor.enable_normalization:
        return score, threshold
    values = torch.tensor([score, threshold], dtype=torch.float64)
    ends = (processor.image_min.double().cpu(), processor.image_max.double().cpu())
    bent = processor._normalize(values, *ends, values[1])  # noqa: SLF001  # of this package's own class
    return (score, threshold) if bent is None else (float(bent[0]), float(bent[1]))


def _emptied(processor: object, batch: Any) -> list[bool]:  # noqa: ANN401  # anomalib's batch
    """Images whose marked components were all smaller than the least area."""
    if not getattr(processor, "min_area", 0) or batch.pred_label is None or batch.pred_mask is None:
        return [False] * len(batch.image_path)
    above = batch.pred_score > processor.normalized_image_threshold  # type: ignore[attr-defined]
    return (above & ~batch.pred_label.bool()).flatten().tolist()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        msg = f"group_by={pattern!r} is no regular expression: {error}."
        raise ValueError(msg) from error
