# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Rows of a table and its three forms: CSV, Markdown, LaTeX."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .bootstrap import Interval
from .measure import AUPIMO, METRICS
from .plan import Cell, Plan
from .published import published

TITLES = {
    "image_AUROC": "image AUROC",
    "image_AUPR": "image AP",
    "image_F1Max": "image F1-max",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPR": "pixel AP",
    "pixel_AUPRO": "pixel AUPRO",
    "pixel_F1Max": "pixel F1-max",
    "pixel_AUPIMO": "AUPIMO",
}
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One line: a category, or the mean over those of a data set.

    Attributes:
        model: Name of the table's row.
        dataset: Name of the data set.
        category: Category, or ``"mean"``.
        metrics: In percent, mean over the seeds.
        paper: Published values, in percent.
        images: Images of one run.
        seconds_per_image: Of the model alone.
        peak_memory_mb: In MB.
        note: What there is to say.
        deviation: Standard deviation over the seeds; empty for a single seed.
        intervals: 95 % interval of the difference to the first row, from a paired bootstrap over images.
        seeds: Seeds that the values are of.
    """

    model: str
    dataset: str
    category: str
    metrics: Mapping[str, float]
    paper: Mapping[str, float]
    images: int
    seconds_per_image: float
    peak_memory_mb: float
    note: str
    deviation: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    def differs(self, metric: str) -> bool:
        """Whether the difference to the first row is larger than chance."""
        low, high = self.intervals.get(metric, (NAN, NAN))
        return low > 0 or high < 0

    def difference(self, metric: str) -> float:
        """Measured minus published, in points."""
        return self.metrics.get(metric, NAN) - self.paper.get(metric, NAN)


def make_rows(
    plan: Plan,
    results: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    intervals: Mapping[tuple[str, str, str], Mapping[str, Interval]] | None = None,
) -> list[Row]:
    """Rows of all cells, each data set followed by its mean.

    Args:
        plan: The table.
        results: Results by the key of their cell.
        failed: What went wrong, by the key of the cell.
        intervals: See :func:`~anomalib_fbclip.pipelines.table.bootstrap.compare`.
    """
    rows = []
    for model in plan.models:
        for data in plan.datasets:
            cells = [cell for cell in plan.cells if cell.model.name == model and cell.data == data]
            seeds = list(dict.fromkeys(cell.seed for cell in cells))
            of_seeds = [_rows_of_seed([c for c in cells if c.seed == seed], results, failed) for seed in seeds]
            rows += [_over_seeds(list(same)) for same in zip(*of_seeds, strict=True)]
    found = intervals or {}
    return [replace(row, intervals=found.get((row.model, row.dataset, row.category), {})) for row in rows]


def _rows_of_seed(
    cells: Sequence[Cell],
    results: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> list[Row]:
    """Rows of one model, data set and seed: its categories and their mean."""
    done = [_row(cell, results[cell.key]) for cell in cells if cell.key in results]
    rows = []
    if cells[0].data.categories:
        by_category = {row.category: row for row in done}
        rows = [
            by_category.get(str(cell.category)) or _missing(cell, failed.get(cell.key, "not run")) for cell in cells
        ]
    return [*rows, _mean(cells, done, failed)]


def _over_seeds(rows: Sequence[Row]) -> Row:
    """Mean and standard deviation of the same row over several seeds; those that failed are left out."""
    done = [row for row in rows if row.images] or list(rows)
    first = done[0]
    if len(rows) == 1:
        return first
    values = {name: [row.metrics[name] for row in done] for name in first.metrics}
    notes = sorted({row.note for row in rows if row.note})
    if len(done) < len(rows):
        notes.insert(0, f"{len(done)} of {len(rows)} seeds")
    return replace(
        first,
        metrics={name: float(np.mean(found)) for name, found in values.items()},
        deviation={name: float(np.std(found, ddof=1)) for name, found in values.items() if len(found) > 1},
        seconds_per_image=float(np.mean([row.seconds_per_image for row in done])),
        peak_memory_mb=max(row.peak_memory_mb for row in done),
        note="; ".join(notes),
        seeds=tuple(seed for row in done for seed in row.seeds),
    )


def _row(cell: Cell, result: Mapping[str, Any]) -> Row:
    return Row(
        cell.model.name,
        cell.data.name,
        cell.category or "mean",
        {name: _number(result["metrics"].get(name)) for name in _columns([result["metrics"]])},
        published(cell.model.published, cell.data.name, cell.category),
        int(result["images"]),
        _number(result["seconds_per_image"]),
        _number(result["peak_memory_mb"]),
        str(result.get("note", "")),
        seeds=(cell.seed,),
    )


def _columns(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """Metrics of a table; AUPIMO where it was asked for."""
    return [*METRICS, *([AUPIMO] if any(AUPIMO in each for each in metrics) else [])]


def _missing(cell: Cell, reason: str) -> Row:
    metrics = dict.fromkeys(METRICS, NAN)
    paper = published(cell.model.published, cell.data.name, cell.category)
    return Row(
        cell.model.name,
        cell.data.name,
        cell.category or "mean",
        metrics,
        paper,
        0,
        NAN,
        NAN,
        f"failed: {reason}",
    )


def _mean(cells: Sequence[Cell], done: Sequence[Row], failed: Mapping[str, str]) -> Row:
    first = cells[0]
    if not done:
        reason = failed.get(first.key, "not run")
        return _missing(Cell(first.model, first.data, None, first.seed, first.versions), reason)
    metrics, partly = {}, []
    for name in _columns([row.metrics for row in done]):
        values = [row.metrics[name] for row in done if not math.isnan(row.metrics[name])]
        metrics[name] = sum(values) / len(values) if values else NAN
        if 0 < len(values) < len(done):
            partly.append(name)
    images = sum(row.images for row in done)
    complete = len(done) == len(cells)
    notes = sorted({row.note for row in done if row.note})
    if partly:
        notes.append(f"not of every category: {', '.join(partly)}")
    paper = published(first.model.published, first.data.name, None) if complete and _all_categories(first) else {}
    return Row(
        first.model.name,
        first.data.name,
        "mean",
        metrics,
        # A mean over fewer categories than the paper's is not to be compared with it.
        {name: value for name, value in paper.items() if name not in partly},
        images,
        sum(row.seconds_per_image * row.images for row in done) / max(images, 1),
        max(row.peak_memory_mb for row in done),
        "; ".join([*([] if complete else [f"mean of {len(done)} of {len(cells)}"]), *notes]),
        seeds=(first.seed,),
    )


def _all_categories(cell: Cell) -> bool:
    from anomalib_fbclip.data.catalogue import BY_NAME

    known = BY_NAME.get(cell.data.name)
    return known is None or set(known.category_names) == set(cell.data.categories)


def to_csv(rows: Sequence[Row], plan: Plan) -> str:
    """All columns, in full precision: deviation over the seeds, interval of the difference to the first row, paper."""
    text = io.StringIO()
    found = plan.cells[0].versions
    columns = _columns([row.metrics for row in rows])
    header = ["model", "dataset", "category"]
    for name in columns:
        header += [name, *(f"{name}_{what}" for what in ("deviation", "low", "high", "paper", "difference"))]
    header += ["images", "seconds_per_image", "peak_memory_mb", "seed", *found, "note"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        line: list[Any] = [row.model, row.dataset, row.category]
        for name in columns:
            line += [row.metrics.get(name, NAN), row.deviation.get(name, NAN), *row.intervals.get(name, (NAN, NAN))]
            line += [row.paper.get(name, NAN), row.difference(name)]
        seeds = " ".join(map(str, row.seeds or plan.seeds))
        line += [row.images, row.seconds_per_image, row.peak_memory_mb, seeds, *found.values(), row.note]
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in line])
    return text.getvalue()


def to_markdown(rows: Sequence[Row], plan: Plan) -> str:
    """For reading: percent with one decimal; "paper" and "diff." where the paper has a number.

    A star marks what differs from the first row by more than chance.
    """
    header, body = _cells(rows)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * 3}{'---:|' * (len(header) - 3)}"]
    lines += [f"| {' | '.join(line)} |" for line in body]
    notes = [f"- {where}: {note}" for where, note in _notes(rows)]
    return "\n".join([*lines, "", _foot(rows, plan), *(["", "Notes:", "", *notes] if notes else [])]) + "\n"


def to_latex(rows: Sequence[Row], plan: Plan) -> str:
    """A tabular of booktabs, to be included."""
    header, body = _cells(rows)
    lines = [f"% {_foot(rows, plan)}", f"\\begin{{tabular}}{{lll{'r' * (len(header) - 3)}}}", "\\toprule"]
    lines += [" & ".join(_escape(cell) for cell in header) + " \\\\", "\\midrule"]
    lines += [" & ".join(_escape(cell) for cell in line) + " \\\\" for line in body]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _notes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What there is to say of rows, once for all categories of a data set that it is true of."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.note:
            grouped.setdefault((row.model, row.dataset, " ".join(row.note.split())), []).append(row.category)
    return [(f"{model}, {data}, {', '.join(names)}", note) for (model, data, note), names in grouped.items()]


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines; a published column only where some row has a number for it."""
    columns = _columns([row.metrics for row in rows])
    beside = {name for name in columns if any(name in row.paper for row in rows)}
    header = ["Model", "Data set", "Category"]
    for name in columns:
        header += [TITLES[name], "paper", "diff."] if name in beside else [TITLES[name]]
    header += ["images", "s/image", "MB"]
    body = []
    for row in rows:
        line = [row.model, row.dataset, row.category]
        for name in columns:
            deviation = f" ± {row.deviation[name]:.1f}" if name in row.deviation else ""
            line.append(_show(row.metrics.get(name, NAN), ".1f") + deviation + ("*" if row.differs(name) else ""))
            if name in beside:
                line += [_show(row.paper.get(name, NAN), ".1f"), _show(row.difference(name), "+.1f")]
        seconds, memory = _show(row.seconds_per_image, ".3f"), _show(row.peak_memory_mb, ".0f")
        body.append([*line, str(row.images), seconds, memory])
    return header, body


def _foot(rows: Sequence[Row], plan: Plan) -> str:
    found = ", ".join(f"{name} {number}" for name, number in plan.cells[0].versions.items())
    seeds = ", ".join(map(str, plan.seeds))
    parts = ["Percent; seconds of the model alone; peak memory"]
    if any(row.deviation for row in rows):
        parts.append("± standard deviation over the seeds of rows that are trained")
    if any(row.intervals for row in rows):
        parts.append(
            f"* differs from {plan.models[0]} by more than chance (paired bootstrap over images, {plan.bootstrap} "
            "draws, 95 %)",
        )
    return f"{'; '.join(parts)}; {'seed' if len(plan.seeds) == 1 else 'seeds'} {seeds}; {found}."


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)


def _show(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _escape(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "_&%#$" else letter for letter in text)
