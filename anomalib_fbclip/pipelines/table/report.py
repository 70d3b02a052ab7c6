# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Rows of a table and its three forms: CSV, Markdown, LaTeX."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .measure import METRICS
from .plan import Cell, Plan
from .published import published

TITLES = {
    "image_AUROC": "image AUROC",
    "image_AUPR": "image AP",
    "image_F1Max": "image F1-max",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "pixel AUPRO",
    "pixel_F1Max": "pixel F1-max",
}
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """One line: a category, or the mean over those of a data set."""

    model: str
    dataset: str
    category: str
    metrics: Mapping[str, float]
    paper: Mapping[str, float]
    images: int
    seconds_per_image: float
    peak_memory_mb: float
    note: str

    def difference(self, metric: str) -> float:
        """Measured minus published, in points."""
        return self.metrics[metric] - self.paper.get(metric, NAN)


def make_rows(plan: Plan, results: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> list[Row]:
    """Rows of all cells, each data set followed by its mean.

    Args:
        plan: The table.
        results: Results by the key of their cell.
        failed: What went wrong, by the key of the cell.
    """
    rows = []
    for model in plan.models:
        for data in plan.datasets:
            cells = [cell for cell in plan.cells if cell.model.name == model and cell.data == data]
            done = [_row(cell, results[cell.key]) for cell in cells if cell.key in results]
            if data.categories:
                by_category = {row.category: row for row in done}
                rows += [
                    by_category.get(str(cell.category)) or _missing(cell, failed.get(cell.key, "not run"))
                    for cell in cells
                ]
            rows.append(_mean(cells, done, failed))
    return rows


def _row(cell: Cell, result: Mapping[str, Any]) -> Row:
    return Row(
        cell.model.name,
        cell.data.name,
        cell.category or "mean",
        {name: _number(result["metrics"].get(name)) for name in METRICS},
        published(cell.model.published, cell.data.name, cell.category),
        int(result["images"]),
        _number(result["seconds_per_image"]),
        _number(result["peak_memory_mb"]),
        str(result.get("note", "")),
    )


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
    for name in METRICS:
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
    )


def _all_categories(cell: Cell) -> bool:
    from anomalib_fbclip.data.catalogue import BY_NAME

    known = BY_NAME.get(cell.data.name)
    return known is None or set(known.category_names) == set(cell.data.categories)


def to_csv(rows: Sequence[Row], plan: Plan) -> str:
    """All columns, in full precision."""
    text = io.StringIO()
    found = plan.cells[0].versions
    header = ["model", "dataset", "category"]
    for name in METRICS:
        header += [name, f"{name}_paper", f"{name}_difference"]
    header += ["images", "seconds_per_image", "peak_memory_mb", "seed", *found, "note"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        line: list[Any] = [row.model, row.dataset, row.category]
        for name in METRICS:
            line += [row.metrics[name], row.paper.get(name, NAN), row.difference(name)]
        line += [row.images, row.seconds_per_image, row.peak_memory_mb, plan.seed, *found.values(), row.note]
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in line])
    return text.getvalue()


def to_markdown(rows: Sequence[Row], plan: Plan) -> str:
    """For reading: percent with one decimal; "paper" and "diff." where the paper has a number."""
    header, body = _cells(rows)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * 3}{'---:|' * (len(header) - 3)}"]
    lines += [f"| {' | '.join(line)} |" for line in body]
    notes = [f"- {where}: {note}" for where, note in _notes(rows)]
    return "\n".join([*lines, "", _foot(plan), *(["", "Notes:", "", *notes] if notes else [])]) + "\n"


def to_latex(rows: Sequence[Row], plan: Plan) -> str:
    """A tabular of booktabs, to be included."""
    header, body = _cells(rows)
    lines = [f"% {_foot(plan)}", f"\\begin{{tabular}}{{lll{'r' * (len(header) - 3)}}}", "\\toprule"]
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
    beside = {name for name in METRICS if any(name in row.paper for row in rows)}
    header = ["Model", "Data set", "Category"]
    for name in METRICS:
        header += [TITLES[name], "paper", "diff."] if name in beside else [TITLES[name]]
    header += ["images", "s/image", "MB"]
    body = []
    for row in rows:
        line = [row.model, row.dataset, row.category]
        for name in METRICS:
            line.append(_show(row.metrics[name], ".1f"))
            if name in beside:
                line += [_show(row.paper.get(name, NAN), ".1f"), _show(row.difference(name), "+.1f")]
        seconds, memory = _show(row.seconds_per_image, ".3f"), _show(row.peak_memory_mb, ".0f")
        body.append([*line, str(row.images), seconds, memory])
    return header, body


def _foot(plan: Plan) -> str:
    found = ", ".join(f"{name} {number}" for name, number in plan.cells[0].versions.items())
    return f"Percent; seconds of the model alone; peak memory; seed {plan.seed}; {found}."


def _number(value: float | None) -> float:
    return NAN if value is None else float(value)


def _show(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _escape(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "_&%#$" else letter for letter in text)
