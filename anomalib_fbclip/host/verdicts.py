# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What is said of an image, what that rests on, and how often it was right in a test."""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from .batches import on_host
from .processes import gather, own_number

logger = logging.getLogger(__name__)

ANOMALOUS, NORMAL, UNCALIBRATED = "anomalous", "normal", "uncalibrated"
ONLY_SCORE = "score above its threshold, no pixel above the map's"
ONLY_MAP = "pixels above the map's threshold, score below its own"
TOO_SMALL = "score above its threshold, all marked components smaller than min_area"
_NAMED = 20


class Verdict(NamedTuple):
    """What is said of one image.

    Attributes:
        word: ``anomalous``, ``normal``, ``uncalibrated`` where the thresholds rest on nothing, or empty without labels.
        note: Where score and map disagree, how; else empty.
    """

    word: str
    note: str = ""

    @property
    def label(self) -> int | str | None:
        """As tables have it: 1, 0, ``uncalibrated`` or ``None``."""
        return {ANOMALOUS: 1, NORMAL: 0, "": None}.get(self.word, self.word)


def is_calibrated(post_processor: object) -> bool:
    """Whether the thresholds of a post-processor rest on anything; another's than ours are taken for granted."""
    return bool(getattr(post_processor, "calibrated", True))


def judge(
    item: Any,  # noqa: ANN401  # of anomalib or with its fields
    calibrated: bool = True,
    post_processor: object = None,
) -> Verdict:
    """The verdict on a post-processed item.

    Args:
        item: Item with ``pred_label`` and ``pred_mask``, either of which may be ``None``.
        calibrated: Whether the thresholds rest on anything.
        post_processor: Where the threshold of the score is, for notes on small components.
    """
    if not calibrated:
        return Verdict(UNCALIBRATED)
    if item.pred_label is None:
        return Verdict("")
    anomalous = bool(item.pred_label)
    word = ANOMALOUS if anomalous else NORMAL
    if item.pred_mask is None or bool(item.pred_mask.any()) == anomalous:
        return Verdict(word, TOO_SMALL if not anomalous and _is_above(item, post_processor) else "")
    return Verdict(word, ONLY_SCORE if anomalous else ONLY_MAP)


def _is_above(item: Any, post_processor: object) -> bool:  # noqa: ANN401  # of anomalib or with its fields
    """Whether the score of an image is above its threshold, where small components may have changed its label."""
    threshold = getattr(post_processor, "normalized_image_threshold", None)
    return bool(getattr(post_processor, "min_area", 0)) and float(item.pred_score) > float(threshold or 0)


def is_command_line(trainer: Trainer) -> bool:
    """Whether anomalib's command line started the run."""
    return any(isinstance(callback, SaveConfigCallback) for callback in trainer.callbacks)


def how_to_calibrate(trainer: Trainer) -> str:
    """The one command, or line of Python, that sets thresholds for the run that just ended."""
    if not is_command_line(trainer):
        return "model.calibrate('FOLDER_OF_GOOD_IMAGES')"
    program, *words = sys.argv
    # In another program the words are not those of this run.
    begin = [Path(program).name, *words] if Path(program).name.startswith("anomalib") else ["anomalib", "..."]
    return f"{shlex.join(begin)} --model.normal_source FOLDER_OF_GOOD_IMAGES"


class Tested(NamedTuple):
    """One image, or part, of a test.

    Attributes:
        path: Its name.
        score: Its score.
        label: Whether it is called anomalous.
        truth: Whether it is.
    """

    path: str
    score: float
    label: bool
    truth: bool


def confusion(rows: Sequence[Tested]) -> tuple[dict[str, int], str]:
    """Numbers of ``hits``, ``misses``, ``false alarms`` and ``rejections``, and what a log says of them."""
    alarms = sorted((row for row in rows if row.label and not row.truth), key=lambda row: -row.score)
    misses = sorted((row for row in rows if row.truth and not row.label), key=lambda row: row.score)
    bad = sum(bool(row.truth) for row in rows)
    counts = {
        "hits": bad - len(misses),
        "misses": len(misses),
        "false alarms": len(alarms),
        "rejections": len(rows) - bad - len(alarms),
    }
    return counts, "\n".join((_matrix(counts), _names("False alarms", alarms), _names("Misses", misses)))


class Confusion(Callback):
    """Log the confusion matrix of a test at the threshold, and the false alarms and misses by name.

    Our models add it by themselves.

    Attributes:
        counts: Numbers of the last test: ``hits``, ``misses``, ``false alarms`` and ``rejections``.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._rows: list[Tested] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count anew."""
        del trainer, pl_module
        self.counts, self._rows = {}, []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,  # noqa: ANN401  # anomalib's batch, whose fields may be missing
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the images of a batch, as the post-processor left it."""
        del pl_module, outputs
        if batch.gt_label is None or batch.pred_label is None or batch.pred_score is None:
            return
        names, seen = batch.image_path or [""] * len(batch.gt_label), on_host(batch)
        rows = [
            Tested(str(name), float(score), bool(label), bool(truth))
            for name, score, label, truth in zip(names, seen.pred_score, seen.pred_label, seen.gt_label, strict=True)
        ]
        self._rows += rows[: own_number(trainer, batch_idx, dataloader_idx)]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was counted, in one message."""
        rows = gather(trainer, self._rows)
        self._rows = []
        if not rows or not trainer.is_global_zero:
            return
        self.counts, text = confusion(rows)
        logger.info("%d images at the threshold %s:\n%s", len(rows), _basis(pl_module), text)


def _matrix(counts: dict[str, int]) -> str:
    rows = (
        ("called", ANOMALOUS, NORMAL),
        (ANOMALOUS, counts["hits"], counts["misses"]),
        (NORMAL, counts["false alarms"], counts["rejections"]),
    )
    return "\n".join(f"  {name:<10}{first!s:>12}{second!s:>10}" for name, first, second in rows)


def _names(title: str, rows: list[Tested]) -> str:
    named = [f"\n  {row.score:.3f}  {row.path}" for row in rows[:_NAMED]]
    more = f"\n  and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"{title}: {len(rows) or 'none'}{''.join(named)}{more}"


def _basis(pl_module: LightningModule) -> str:
    """The threshold, and what it rests on."""
    found = getattr(getattr(pl_module, "post_processor", None), "thresholds", None)
    if found is None:
        return "of the post-processor"
    origin = {"labels": "best F1 on labelled validation data", "normal pictures": "from good images"}
    text = origin.get(found["origin"], "as given" if is_calibrated(pl_module.post_processor) else UNCALIBRATED)
    if found["origin"] == "labels" and getattr(pl_module, "validates_on_test_images", False):
        text = "best F1 on these same images, so that all numbers here are too good"
    return f"{found['image']:.4f} ({text})"
