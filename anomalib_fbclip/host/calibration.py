# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds without labels: from a few normal images, or a number that the user gives."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from anomalib.data import InferenceBatch, PredictDataset

from .components import peak_of_area
from .post_processing import NORMAL_PICTURES, ProbabilityPostProcessor
from .thresholds import check_rate, normal_quantile, pictures_needed
from .unreadable import UNREADABLE, read_item

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val", "test")
_MOST_FILES = 300


class Grouping(Protocol):
    """Groups images into parts, see :class:`~anomalib_fbclip.host.parts.Parts`."""

    def scores(self, files: Sequence[str], scores: Sequence[float]) -> list[float]:
        """Score of each part."""


@dataclass
class NormalScores:
    """Scores of normal images, before post-processing.

    Attributes:
        scores: Score of each image.
        peaks: Largest value of each map.
        unreadable: Files that cannot be read, each with the reason.
        files: File of each score.
        marks: Value of each map below which a threshold marks something: where there is a least area, a component of
            it; else that of ``peaks``.
    """

    scores: list[torch.Tensor] = field(default_factory=list)
    peaks: list[torch.Tensor] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    marks: list[torch.Tensor] = field(default_factory=list)

    def marked(self, pixel: float) -> torch.Tensor:
        """Whether the map of each image is marked at a threshold: ``[n]``."""
        return torch.stack(self.marks) > pixel

    def counted_scores(self, pixel: float) -> torch.Tensor:
        """Scores ``[n]``, 0 where the threshold of the map marks small components alone: such an image is normal."""
        emptied = (torch.stack(self.peaks) > pixel) & ~self.marked(pixel)
        return torch.where(emptied, 0.0, torch.stack(self.scores))


def score_folder(
    source: str | Path,
    predict: Callable[[torch.Tensor, Path], InferenceBatch | None],
    min_area: int = 0,
) -> NormalScores:
    """Score the images of a folder one by one.

    Args:
        source: A normal image or a folder of them.
        predict: Scores and maps of raw images ``[1, 3, H, W]`` in [0, 1] and their file. ``None``: the model cannot be
            asked without what it remembers of this very image, which is left out.
        min_area: Least area of a component that counts, in pixels of the image.

    Raises:
        ValueError: If no image can be read.
        FileNotFoundError: If there is no such folder.
    """
    if not Path(source).expanduser().exists():
        msg = f"normal_source={str(source)!r} does not exist: give a normal image or a folder of them."
        raise FileNotFoundError(msg)
    dataset = PredictDataset(source)
    found, left_out = NormalScores(), 0
    for index, path in enumerate(dataset.image_filenames):
        try:
            image = read_item(dataset, index).image
        except UNREADABLE as error:
            found.unreadable.append(f"{path}: {error}")
            continue
        prediction = predict(image[None], Path(path))
        if prediction is None:
            left_out += 1
            continue
        found.files.append(str(path))
        found.scores.append(prediction.pred_score[0].float().cpu())
        found.peaks.append(prediction.anomaly_map.amax().float().cpu())
        size = (image.shape[-2], image.shape[-1])
        found.marks.append(peak_of_area(prediction.anomaly_map.squeeze(0), min_area, size))
    if left_out:
        logger.warning(
            "%d of the %d images of normal_source are all that the few-shot memory holds and left out of the "
            "thresholds.",
            left_out,
            len(dataset.image_filenames),
        )
    if not found.scores:
        msg = (
            f"normal_source={str(source)!r} holds no image that can be read and is not all of the few-shot memory, "
            f"give others: {found.unreadable}"
        )
        raise ValueError(msg)
    return found


def normal_files(source: str | Path | None, datamodule: object = None) -> list[Path]:
    """Normal images to calibrate an export on, at most 300.

    Args:
        source: A normal image or a folder of them; ``None``: the normal ones of the data module.
        datamodule: Data module of anomalib.

    Raises:
        ValueError: If there are none.
    """
    if source is not None:
        files = [Path(path) for path in PredictDataset(source).image_filenames]
    else:
        if datamodule is not None:
            datamodule.setup()  # type: ignore[attr-defined]
        tables = [getattr(getattr(datamodule, f"{split}_data", None), "samples", None) for split in _SPLITS]
        files = [
            Path(path) for table in tables if table is not None for path in table[table.label_index == 0].image_path
        ]
        files = list(dict.fromkeys(files))
    if not files:
        msg = "INT8_PTQ calibrates activations on normal images: give normal_source, or a data module with some."
        raise ValueError(msg)
    return files[:_MOST_FILES]


class Calibrator:
    """What a user wants of the thresholds, and how they are found from normal images.

    Args:
        post_processor: Post-processor whose thresholds are set.
        normal_source: A normal image or a folder of them; ``None``: no thresholds from images.
        false_alarm_rate: Wanted share of normal images above each threshold, in (0, 1).
        threshold: Fixed threshold of score and map in [0, 1]; ``None``: none.

    Raises:
        ValueError: If the rate or the threshold is out of range, if both a threshold and images are given, or if the
            post-processor has no thresholds to set.
    """

    def __init__(
        self,
        post_processor: object,
        normal_source: str | None = None,
        false_alarm_rate: float = 0.05,
        threshold: float | None = None,
    ) -> None:
        check_rate(false_alarm_rate)
        if threshold is not None and not 0 <= threshold <= 1:
            msg = f"threshold={threshold}: give a probability from 0 to 1, or None to find one."
            raise ValueError(msg)
        if threshold is not None and normal_source is not None:
            msg = f"threshold={threshold} and normal_source={normal_source!r}: give one of the two."
            raise ValueError(msg)
        if (threshold, normal_source) != (None, None) and not isinstance(post_processor, ProbabilityPostProcessor):
            msg = "threshold and normal_source need this model's own post-processor: leave post_processor at True."
            raise ValueError(msg)
        self.normal_source = normal_source
        self.false_alarm_rate = false_alarm_rate
        self.threshold = threshold
        self._state: object = None

    @property
    def wants_own(self) -> bool:
        """Whether the user asked for thresholds that no validation data replace."""
        return self.threshold is not None or self.normal_source is not None

    def set_once(
        self,
        post_processor: ProbabilityPostProcessor,
        state: Callable[[], object],
        score: Callable[[str], NormalScores],
        parts: Grouping | None = None,
    ) -> None:
        """Set the thresholds that the user asked for; images are read once for the model as it is.

        Args:
            post_processor: Where thresholds are set.
            state: What thresholds from normal images depend on: they are found anew where it has changed.
            score: Scores of the images of a folder.
            parts: See :func:`set_thresholds`.
        """
        if self.threshold is not None:
            # Each time, for labelled validation data may have set others.
            post_processor.set_thresholds(self.threshold, self.threshold)
        elif self.normal_source is not None:
            now = state()
            if self._state != now:
                set_thresholds(post_processor, score(self.normal_source), self.false_alarm_rate, parts)
                self._state = now


def set_thresholds(
    post_processor: ProbabilityPostProcessor,
    normal: NormalScores,
    false_alarm_rate: float,
    parts: Grouping | None = None,
) -> dict[str, Any]:
    """Set thresholds from the scores of normal images, at a wanted rate of false alarms.

    The image threshold is one for scores. The pixel threshold is one for the *largest* value of a map: the rate is the
    share of normal images on which anything at all is marked, and not a share of pixels, which depend on each other and
    say nothing about how sure a threshold is. With a least area, what counts is the largest value that a component of
    it reaches, and the score of an image with smaller components alone does not count.

    Args:
        post_processor: Where thresholds are set.
        normal: Scores of one normal image or more.
        false_alarm_rate: Wanted share of normal images above each threshold, in (0, 1).
        parts: What groups the images into parts; parts then have a threshold of their own, at the same rate.

    Returns:
        dict: Thresholds and what is known of them, as :attr:`ProbabilityPostProcessor.thresholds`.
    """
    pixel = normal_quantile(torch.stack(normal.marks), false_alarm_rate)
    image = normal_quantile(normal.counted_scores(pixel.threshold), false_alarm_rate)
    post_processor.set_thresholds(
        image.threshold,
        pixel.threshold,
        origin=NORMAL_PICTURES,
        pictures=len(normal.scores),
        false_alarm_rate=false_alarm_rate,
        expected_rate=image.expected_rate,
        interval=[image.low, image.high],
        **({} if parts is None else _of_parts(normal, false_alarm_rate, parts)),
    )
    logger.info(
        "Thresholds from %d normal images at a wanted false-alarm rate of %.3g %%: image %.4f, pixel %.4f. "
        "The rate to expect is %.3g %%; with so few images it lies between %.3g %% and %.3g %% (95 %% interval).",
        len(normal.scores),
        100 * false_alarm_rate,
        image.threshold,
        pixel.threshold,
        100 * image.expected_rate,
        100 * image.low,
        100 * image.high,
    )
    if parts is not None:
        logger.info("Threshold of parts: %.4f, from %d.", *(post_processor.origin[name] for name in ("part", "parts")))
    if image.expected_rate > false_alarm_rate:
        logger.warning(
            "%d normal images cannot hold a false-alarm rate of %.3g %%: give %d or more.",
            len(normal.scores),
            100 * false_alarm_rate,
            pictures_needed(false_alarm_rate),
        )
    if normal.unreadable:
        logger.warning("Left out of the thresholds, as they cannot be read:\n%s", "\n".join(normal.unreadable))
    return post_processor.thresholds


def _of_parts(normal: NormalScores, false_alarm_rate: float, parts: Grouping) -> dict[str, Any]:
    """Threshold of parts, and their number."""
    scores = parts.scores(normal.files, [float(score) for score in normal.scores])
    return {"part": normal_quantile(torch.tensor(scores), false_alarm_rate).threshold, "parts": len(scores)}
