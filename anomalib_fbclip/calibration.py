# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds of a Lightning module without labels: from a few normal pictures, or a number that the user gives."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import InferenceBatch, PredictDataset

from anomalib_fbclip.post_processing import FIXED, NORMAL_PICTURES, ProbabilityPostProcessor
from anomalib_fbclip.thresholds import check_rate, normal_quantile, pictures_needed
from anomalib_fbclip.unreadable import UNREADABLE, read_item

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)


class CalibratedModule(_Base):
    """Mixin of a Lightning module whose thresholds may come from normal pictures.

    A model sets the attributes by :meth:`set_calibration`, and its hooks call :meth:`calibrate_once`; pictures are read
    when thresholds are needed for the first time, and again when the trained part has changed.
    """

    normal_source: str | None = None
    false_alarm_rate: float = 0.05
    threshold: float | None = None
    _calibrated: object = None

    def set_calibration(self, normal_source: str | None, false_alarm_rate: float, threshold: float | None) -> None:
        """Check and keep what the user wants.

        Raises:
            ValueError: If the rate or the threshold is out of range, if both a threshold and pictures are given, or if
                the post-processor is another one.
        """
        check_rate(false_alarm_rate)
        if threshold is not None and not 0 <= threshold <= 1:
            msg = f"threshold={threshold}: give a probability from 0 to 1, or None to find one."
            raise ValueError(msg)
        if threshold is not None and normal_source is not None:
            msg = f"threshold={threshold} and normal_source={normal_source!r}: give one of the two."
            raise ValueError(msg)
        if (threshold, normal_source) != (None, None) and not isinstance(self.post_processor, ProbabilityPostProcessor):
            msg = "threshold and normal_source need this model's own post-processor: leave post_processor at True."
            raise ValueError(msg)
        self.normal_source, self.false_alarm_rate, self.threshold = normal_source, false_alarm_rate, threshold

    def calibrate_once(self) -> None:
        """Set the thresholds that the user asked for; pictures are read once for the parameters as they are."""
        if self.threshold is not None:
            # Each time, for labelled validation data may have set others.
            self.post_processor.set_thresholds(self.threshold, self.threshold)
        elif self.normal_source is not None:
            state = self._calibration_state()
            if self._calibrated != state:
                self.calibrate(self.normal_source, self.false_alarm_rate)
                self._calibrated = state

    def calibrate(self, normal_source: str | Path, false_alarm_rate: float = 0.05) -> dict[str, Any]:
        """Set the thresholds from normal pictures, at a wanted rate of false alarms.

        The image threshold is one for scores. The pixel threshold is one for the *largest* value of a map: the rate is
        the share of normal pictures on which anything at all is marked, and not a share of pixels, which depend on each
        other and say nothing about how sure a threshold is.

        Args:
            normal_source: A picture or a folder of them, all normal.
            false_alarm_rate: Wanted share of normal pictures above each threshold.

        Returns:
            dict: Thresholds and what is known of them, as :attr:`ProbabilityPostProcessor.thresholds`.

        Raises:
            ValueError: If no picture can be read, or the rate is not between 0 and 1.
            FileNotFoundError: If there is no such folder.
        """
        check_rate(false_alarm_rate)
        if not Path(normal_source).expanduser().exists():
            msg = f"normal_source={str(normal_source)!r} does not exist: give a normal picture or a folder of them."
            raise FileNotFoundError(msg)
        scores, peaks, unreadable = self._score_pictures(normal_source)
        if not scores:
            msg = (
                f"normal_source={str(normal_source)!r} holds no picture that can be read and is not in the few-shot "
                f"memory, give others: {unreadable}"
            )
            raise ValueError(msg)
        image = normal_quantile(torch.stack(scores), false_alarm_rate)
        pixel = normal_quantile(torch.stack(peaks), false_alarm_rate)
        self.post_processor.set_thresholds(
            image.threshold,
            pixel.threshold,
            origin=NORMAL_PICTURES,
            pictures=len(scores),
            false_alarm_rate=false_alarm_rate,
            expected_rate=image.expected_rate,
            interval=[image.low, image.high],
        )
        logger.info(
            "Thresholds from %d normal pictures at a wanted false-alarm rate of %.3g %%: image %.4f, pixel %.4f. "
            "The rate to expect is %.3g %%; with so few pictures it lies between %.3g %% and %.3g %% (95 %% interval).",
            len(scores),
            100 * false_alarm_rate,
            image.threshold,
            pixel.threshold,
            100 * image.expected_rate,
            100 * image.low,
            100 * image.high,
        )
        if image.expected_rate > false_alarm_rate:
            logger.warning(
                "%d normal pictures cannot hold a false-alarm rate of %.3g %%: give %d or more.",
                len(scores),
                100 * false_alarm_rate,
                pictures_needed(false_alarm_rate),
            )
        if unreadable:
            logger.warning("Left out of the thresholds, as they cannot be read:\n%s", "\n".join(unreadable))
        return self.post_processor.thresholds

    @property
    def thresholds(self) -> dict[str, Any] | None:
        """Thresholds and where they come from, for adapters and exports; ``None`` with a foreign post-processor."""
        return getattr(self.post_processor, "thresholds", None)

    def restore_thresholds(self, metadata: Mapping[str, Any]) -> None:
        """Take the thresholds of an adapter, where it has some for maps like those of this model."""
        stored = metadata.get("thresholds")
        if stored is None or not isinstance(self.post_processor, ProbabilityPostProcessor):
            return
        # A file from before it was stored, or the published one, is smoothed as in the paper.
        theirs = {"k_shot": 0, "smoothing_sigma": 4.0, **metadata}
        ours = {
            "image_size": self.model.clip.image_size,
            "smoothing_sigma": self.model.smoothing_sigma,
            "k_shot": getattr(self, "k_shot", 0),
        }
        different = [name for name, value in ours.items() if theirs[name] != value]
        if not different:
            self.post_processor.set_thresholds(**stored)
        elif stored["origin"] != FIXED:
            logger.warning(
                "The adapter's thresholds are for %s and not used with %s: give normal_source.",
                ", ".join(f"{name}={theirs[name]}" for name in different),
                ", ".join(f"{name}={ours[name]}" for name in different),
            )

    def _calibration_state(self) -> object:
        """What thresholds from normal pictures depend on: they are found anew where it has changed."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [(0 if t.is_inference() else t._version, t.shape) for t in tensors]  # noqa: SLF001  # no public name

    @property
    def _known_pictures(self) -> Sequence[Path]:
        """Pictures that the model has seen, which say nothing about others."""
        return ()

    def _score_images(self, images: torch.Tensor) -> InferenceBatch:
        """Score and map of transformed images, as in a prediction."""
        return self.model(images)

    @torch.no_grad()
    def _score_pictures(self, source: str | Path) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
        """Score and largest map value of each picture, before post-processing, and the files that cannot be read."""
        dataset = PredictDataset(source)
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        scores, peaks, unreadable = [], [], []
        known = {path.resolve() for path in self._known_pictures}
        given = [index for index, path in enumerate(dataset.image_filenames) if Path(path).resolve() not in known]
        if len(given) < len(dataset.image_filenames):
            logger.warning(
                "%d of the %d pictures of normal_source are in the few-shot memory and left out of the thresholds.",
                len(dataset.image_filenames) - len(given),
                len(dataset.image_filenames),
            )
        for index in given:
            path = dataset.image_filenames[index]
            try:
                image = read_item(dataset, index).image
            except UNREADABLE as error:
                unreadable.append(f"{path}: {error}")
                continue
            image = image[None].to(device)
            prediction = self._score_images(self.pre_processor.transform(image) if self.pre_processor else image)
            scores.append(prediction.pred_score[0].float().cpu())
            peaks.append(prediction.anomaly_map.amax().float().cpu())
        self.model.train(training)
        return scores, peaks, unreadable
