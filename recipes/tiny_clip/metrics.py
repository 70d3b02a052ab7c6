# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Image AUROC, pixel AUROC and AUPRO in numpy, for quick looks; anomalib's own metrics are the reference."""

from __future__ import annotations

import cv2
import numpy as np


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve by ranks; ties count half."""
    labels = labels.astype(bool)
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    good, bad = int((~labels).sum()), int(labels.sum())
    return float((ranks[labels].sum() - bad * (bad + 1) / 2) / (good * bad))


def aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3, steps: int = 200) -> float:
    """Mean overlap per connected defect against the false-positive rate, area up to ``limit``, divided by it."""
    negatives = np.sort(maps[~masks])[::-1]
    rates = np.linspace(0, limit, steps)
    thresholds = negatives[np.minimum((rates * len(negatives)).astype(int), len(negatives) - 1)]
    overlaps = []
    for one, mask in zip(maps, masks, strict=True):
        count, regions = cv2.connectedComponents(mask.astype(np.uint8))
        for number in range(1, count):
            values = np.sort(one[regions == number])
            overlaps.append(1 - np.searchsorted(values, thresholds, side="right") / len(values))
    return float(np.trapezoid(np.mean(overlaps, 0), rates) / limit)


def report(maps: np.ndarray, scores: np.ndarray, masks: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """The three numbers, each the mean over the groups (families)."""
    rows = []
    for group in np.unique(groups):
        at = groups == group
        pixels = auroc(maps[at].ravel(), masks[at].ravel())
        rows.append((auroc(scores[at], masks[at].any((1, 2))), pixels, aupro(maps[at], masks[at])))
    return dict(zip(("image_auroc", "pixel_auroc", "aupro"), np.mean(rows, 0).round(4).tolist(), strict=True))
