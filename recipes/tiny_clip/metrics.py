# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Image AUROC, pixel AUROC and AUPRO of arrays, each the mean over groups of images."""

from __future__ import annotations

import numpy as np
import torch

from anomalib_fbclip.host.metrics import AnyScoreHistogram, ImageScores


def report(maps: np.ndarray, scores: np.ndarray, masks: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """The three numbers, each the mean over the groups (families).

    Args:
        maps: ``[M, S, S]``, of any range.
        scores: ``[M]``, of any range.
        masks: ``[M, S, S]``, boolean.
        groups: Name of each image's group ``[M]``.
    """
    rows = []
    for group in np.unique(groups):
        here = torch.from_numpy(np.flatnonzero(groups == group))
        target = torch.from_numpy(masks)[here]
        # Of two processes that train, one asks; it would wait for the other's counts.
        alone = {"sync_on_compute": False}
        image, pixel = ImageScores(**alone), AnyScoreHistogram(regions=True, **alone)
        image.update(torch.from_numpy(scores)[here], target.flatten(1).any(dim=1))
        pixel.update(torch.from_numpy(maps)[here], target)
        counted = pixel.compute()
        rows.append((image.compute()["AUROC"], counted["AUROC"], counted["AUPRO"]))
    return dict(zip(("image_auroc", "pixel_auroc", "aupro"), np.mean(rows, 0).round(4).tolist(), strict=True))
