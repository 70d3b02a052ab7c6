# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Which differences between two rows of a table are larger than chance: a paired bootstrap over images.

The images of a category are drawn anew, with replacement, many times; both rows are measured on the same draws. A
difference is larger than chance where 95 % of its values lie on one side of zero. So that no map needs to be kept, the
pixels of each image are counted into bins, 32 times coarser than those of the metrics themselves.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.utils.cv import connected_components_cpu

from anomalib_fbclip.common.files import replacing
from anomalib_fbclip.host.metrics import ScoreHistogram

from .plan import Cell, Plan

Interval = tuple[float, float]
_COARSE = 5  # bits: 32 bins of the metrics make one
LIMIT = 0.3
"""Largest false-positive rate of AUPRO."""
RESAMPLED = ("image_AUROC", "image_AUPR", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO")
"""Metrics that are computed for draws of the images."""


class ImageCounts:
    """Counts of single images, from which metrics follow for any draw of the images.

    Attributes:
        paths: File of each image.
        scores: Image score ``[N]``; NaN where there is none.
        labels: 0 normal, 1 anomalous ``[N]``.
        pixels: For each image the used bins ``[U]`` and, for each of them, the number of normal pixels, of anomalous
            pixels, and the anomalous pixels over the area of their region ``[3, U]``.
        regions: Number of anomalous regions ``[N]``.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.scores: list[float] = []
        self.labels: list[int] = []
        self.regions: list[int] = []
        self.pixels: list[tuple[np.ndarray, np.ndarray]] = []

    def update(
        self,
        paths: Sequence[str],
        scores: torch.Tensor | None,
        labels: torch.Tensor | None,
        maps: torch.Tensor | None,
        masks: torch.Tensor | None,
        histogram: ScoreHistogram,
    ) -> None:
        """Count a batch.

        Args:
            paths: File of each image.
            scores: ``[B]``.
            labels: 0 or 1 ``[B]``.
            maps: ``[B, H, W]``.
            masks: 0 or 1 ``[B, H, W]``.
            histogram: Whose bins are used, made coarser.
        """
        number = len(paths)
        self.paths += [str(path) for path in paths]
        self.scores += [float("nan")] * number if scores is None else scores.float().flatten().tolist()
        self.labels += [0] * number if labels is None else labels.long().flatten().tolist()
        for index in range(number):
            if maps is None or masks is None:
                self.pixels.append((np.zeros(0, np.int32), np.zeros((3, 0), np.float32)))
                self.regions.append(0)
                continue
            bins = (histogram.to_bin(maps[index]).flatten() >> _COARSE).cpu()
            mask = masks[index].flatten().cpu() > 0
            area_share, regions = torch.zeros(len(mask)), 0
            if mask.any():
                found = connected_components_cpu((masks[index] > 0).float().cpu().reshape(1, 1, *masks.shape[-2:]))
                found = found.flatten().long()
                area = torch.bincount(found)
                area_share = torch.where(mask, 1 / area[found], 0.0)
                regions = int((area[1:] > 0).sum())
            used, place = bins.unique(return_inverse=True)
            counts = torch.stack([
                torch.bincount(place, weights=weight.double(), minlength=len(used))
                for weight in (~mask, mask, area_share)
            ])
            self.pixels.append((used.int().numpy(), counts.float().numpy()))
            self.regions.append(regions)

    def save(self, path: Path) -> None:
        """Write all counts into one compressed file."""
        sizes = [len(used) for used, _ in self.pixels]
        with replacing(path) as file:
            np.savez_compressed(
                file,
                paths=np.array(self.paths),
                scores=np.array(self.scores),
                labels=np.array(self.labels),
                regions=np.array(self.regions),
                sizes=np.array(sizes),
                used=np.concatenate([used for used, _ in self.pixels]),
                counts=np.concatenate([counts for _, counts in self.pixels], axis=1),
            )

    @classmethod
    def load(cls, path: Path) -> "ImageCounts":
        """Read what :meth:`save` wrote.

        Raises:
            OSError: If there is no such file.
        """
        counts = cls()
        with np.load(path) as file:
            counts.paths = file["paths"].tolist()
            counts.scores, counts.labels = file["scores"].tolist(), file["labels"].tolist()
            counts.regions = file["regions"].tolist()
            cuts = np.cumsum(file["sizes"])[:-1]
            counts.pixels = list(
                zip(np.split(file["used"], cuts), np.split(file["counts"], cuts, axis=1), strict=True),
            )
        return counts

    def resample(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics in percent of each draw; NaN where a draw holds one class only.

        Args:
            draws: How often each image was drawn ``[R, N]``.

        Returns:
            dict: Of :data:`RESAMPLED` ``[R]`` each.
        """
        labels = np.array(self.labels)
        order = np.argsort(-np.array(self.scores), kind="stable")
        ordered = np.array(self.scores)[order]
        first = np.flatnonzero(np.diff(ordered, prepend=np.inf) != 0)  # equal scores are one step of the curves
        groups = [np.add.reduceat(draws[:, order] * (labels[order] == kind), first, axis=1) for kind in (0, 1)]
        image = _areas(groups[0], groups[1], None, None)
        used = np.unique(np.concatenate([bins for bins, _ in self.pixels]))[::-1]
        values = {"image_AUROC": image["AUROC"], "image_AUPR": image["AUPR"]}
        if not len(used):
            return values | dict.fromkeys(RESAMPLED[2:], np.full(len(draws), np.nan))
        table = np.zeros((3, len(self.pixels), len(used)))
        for index, (bins, counts) in enumerate(self.pixels):
            table[:, index, len(used) - 1 - np.searchsorted(used[::-1], bins)] = counts
        pixel = _areas(draws @ table[0], draws @ table[1], draws @ table[2], draws @ np.array(self.regions, float))
        return values | {f"pixel_{name}": value for name, value in pixel.items()}


def _areas(
    normal: np.ndarray,
    anomalous: np.ndarray,
    overlap: np.ndarray | None,
    regions: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """``AUROC``, ``AUPR`` and ``AUPRO`` in percent from counts ``[R, K]``, the highest scores first."""
    alarms, hits = normal.cumsum(axis=1), anomalous.cumsum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate, recall = alarms / alarms[:, -1:], hits / hits[:, -1:]
        precision = hits / np.maximum(hits + alarms, 1e-12)
        values = {
            "AUROC": _area(rate, recall, 1.0),
            "AUPR": (np.diff(recall, axis=1, prepend=0) * precision).sum(axis=1),
        }
        if overlap is not None:
            # Scores of one bin differ: in it, precision goes from that of the bin before to its own.
            before = np.concatenate((precision[:, :1], precision[:, :-1]), axis=1)
            values["AUPR"] = (np.diff(recall, axis=1, prepend=0) * (before + precision) / 2).sum(axis=1)
        if overlap is not None and regions is not None:
            values["AUPRO"] = _area(rate, overlap.cumsum(axis=1) / regions[:, None], LIMIT) / LIMIT
    return {name: 100 * value for name, value in values.items()}


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """Area under each curve from (0, 0) up to ``limit``; the last piece is cut by interpolation."""
    x = np.concatenate((np.zeros((len(x), 1)), x), axis=1)
    y = np.concatenate((np.zeros((len(y), 1)), y), axis=1)
    left, right = np.minimum(x[:, :-1], limit), np.minimum(x[:, 1:], limit)
    slope = np.divide(np.diff(y, axis=1), np.diff(x, axis=1), out=np.zeros_like(left), where=np.diff(x, axis=1) > 0)
    end = y[:, :-1] + slope * (right - left)
    return ((right - left) * (y[:, :-1] + end) / 2).sum(axis=1)


def draw(number: int, times: int, seed: int) -> np.ndarray:
    """Draw ``number`` images with replacement, ``times`` times: how often each was drawn ``[times, number]``."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(number, np.full(number, 1 / number), size=times).astype(float)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of values ``[R]``; NaN where there are none."""
    values = values[~np.isnan(values)]
    return (float("nan"), float("nan")) if not len(values) else tuple(np.quantile(values, (0.025, 0.975)).tolist())


def compare(
    plan: Plan,
    load: Callable[[Cell], ImageCounts | None],
) -> dict[tuple[str, str, str], dict[str, Interval]]:
    """Differences of each row to the first, on the same draws of the images.

    Args:
        plan: The table.
        load: Counts of a cell's images; ``None`` for a cell that is not done.

    Returns:
        dict: For (model, data set, category or ``"mean"``) and each of :data:`RESAMPLED` the 95 % interval of the
        difference, in points. The mean is that over all categories; with several seeds of a row their mean is taken.
    """
    first, *others = plan.models
    found: dict[tuple[str, str, str], dict[str, Interval]] = {}
    if not plan.bootstrap or not others:
        return found
    for data in plan.datasets:
        differences: dict[str, list[dict[str, np.ndarray]]] = {model: [] for model in others}
        for index, category in enumerate(data.categories or (None,)):
            reference = _counts(plan, load, first, data.name, category)
            if reference is None:
                break
            draws = draw(len(reference[0].paths), plan.bootstrap, plan.seeds[0] + index)
            base = _mean_of(reference, draws)
            for model in others:
                counts = _counts(plan, load, model, data.name, category)
                if counts is None or any(each.paths != reference[0].paths for each in counts):
                    continue
                values = _mean_of(counts, draws)
                difference = {name: values[name] - base[name] for name in RESAMPLED}
                differences[model].append(difference)
                if category is not None:
                    found[model, data.name, category] = {name: interval(v) for name, v in difference.items()}
        for model, of_model in differences.items():
            if len(of_model) == len(data.categories or (None,)):
                found[model, data.name, "mean"] = {
                    name: interval(np.mean([each[name] for each in of_model], axis=0)) for name in RESAMPLED
                }
    return found


def _counts(
    plan: Plan,
    load: Callable[[Cell], ImageCounts | None],
    model: str,
    data: str,
    category: str | None,
) -> list[ImageCounts] | None:
    """Counts of all seeds of a row's cell; ``None`` if one is missing."""
    wanted = (model, data, category)
    loaded = [load(cell) for cell in plan.cells if (cell.model.name, cell.data.name, cell.category) == wanted]
    counts = [each for each in loaded if each is not None]
    return counts if counts and len(counts) == len(loaded) else None


def _mean_of(counts: Sequence[ImageCounts], draws: np.ndarray) -> dict[str, np.ndarray]:
    values = [each.resample(draws) for each in counts]
    return {name: np.mean([each[name] for each in values], axis=0) for name in RESAMPLED}
