# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The published numbers, which come with the package."""

import csv
from functools import lru_cache
from importlib.resources import files

_COLUMNS = {
    ("image", "AUROC"): "image_AUROC",
    ("image", "AP"): "image_AUPR",
    ("pixel", "AUROC"): "pixel_AUROC",
    ("pixel", "AUPRO"): "pixel_AUPRO",
}


@lru_cache(maxsize=1)
def _table() -> dict[tuple[str, str, str, str], float]:
    text = files("anomalib_fbclip").joinpath("published", "results.csv").read_text(encoding="utf-8")
    values: dict[tuple[str, str, str, str], float] = {}
    for row in csv.DictReader(text.splitlines()):
        column = _COLUMNS[row["level"], row["metric"]]
        # Means stand in Table 1 and again in the tables of each data set: the first one counts.
        values.setdefault((row["method"], row["dataset"], row["category"], column), float(row["value"]))
    return values


def published(method: str | None, dataset: str, category: str | None) -> dict[str, float]:
    """Numbers of a method on one category of a data set of the paper, by metric, in percent; those that there are.

    Args:
        method: As the paper writes it, such as ``FB-CLIP``.
        dataset: As the paper writes it.
        category: ``None`` for the mean.
    """
    metrics = _COLUMNS.values()
    found = {metric: _table().get((method or "", dataset, category or "mean", metric)) for metric in metrics}
    return {metric: value for metric, value in found.items() if value is not None}
