# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib table``: the pipeline behind the command."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from anomalib.pipelines.components.base import Pipeline, Runner
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anomalib_fbclip.common.files import replacing

from .plan import Cell, Plan, make_plan
from .store import CellStore

logger = logging.getLogger(__name__)

SECTION = "table"


class Table(Pipeline):
    """Test models on all categories of data sets, and set them beside the published numbers."""

    def run(self, args: Namespace | None = None) -> None:
        """Fill the table and write it.

        Args:
            args: Of the command line: ``config``, ``results``, ``root``. ``None``: those of the process.

        Raises:
            SystemExit: With 1, when all is written, if a cell failed.
        """
        args = args if args is not None else self.get_parser().parse_args()
        config = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) or {}
        if SECTION not in config:
            msg = f"{args.config} has no section {SECTION!r}: see configs/experiment/paper_table.yaml."
            raise ValueError(msg)
        plan = make_plan(config[SECTION], getattr(args, "results", None), getattr(args, "root", None))
        results, failed = fill(plan)
        write(plan, results, failed)
        if failed:
            raise SystemExit(1)

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """The arguments of the command."""
        if parser is None:
            parser = ArgumentParser(prog=f"anomalib {SECTION}", description=Table.__doc__)
            parser.add_argument("--config", type=str, required=True, help="Configuration with a section 'table'.")
            parser.add_argument("--results", type=str | None, default=None, help="Folder to write to.")
            parser.add_argument("--root", type=str | None, default=None, help="Folder of the data sets (./datasets).")
        return parser

    def _setup_runners(self, args: dict) -> list[Runner]:  # noqa: PLR6301  # anomalib's hook
        """None: the cells depend on each other's model, which anomalib's runners would build for each."""
        del args
        return []


def fill(plan: Plan) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run all cells that are not done, with a progress bar.

    Returns:
        Results, and what went wrong, by the key of the cell.
    """
    # Nothing heavy is imported before the command line has been read.
    from .run import run_plan

    results: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("table", total=len(plan.cells))
        told = set()

        def report(cell: Cell, result: dict[str, Any] | None, error: str | None) -> None:
            what = " ".join(filter(None, (cell.model.name, cell.data.name, cell.category)))
            progress.update(task, advance=1, description=what)
            if result is not None:
                results[cell.key] = result
            elif (cell.model.name, cell.data.name, error) not in told:
                # What is missing would be said again for each category.
                told.add((cell.model.name, cell.data.name, error))
                progress.console.print(f"{what}: failed, {error}", markup=False, highlight=False)

        failed = run_plan(plan, report)
    return results, failed


def write(plan: Plan, results: dict[str, dict[str, Any]], failed: dict[str, str]) -> None:
    """Write the three forms of the table, and show where they are."""
    from .bootstrap import ImageCounts, compare
    from .report import make_rows, to_csv, to_latex, to_markdown

    store = CellStore(plan.results / "cells")

    def load(cell: Cell) -> ImageCounts | None:
        path = store.counts_file(cell.key)
        return ImageCounts.load(path) if cell.key in results and path.is_file() else None

    rows = make_rows(plan, results, failed, compare(plan, load))
    for suffix, form in ((".csv", to_csv), (".md", to_markdown), (".tex", to_latex)):
        with replacing(plan.results / f"table{suffix}") as file:
            file.write_text(form(rows, plan), encoding="utf-8")
    console = Console()
    console.print(
        f"{len(results)} of {len(plan.cells)} cells: {plan.results}/table.csv, table.md, table.tex",
        markup=False,
    )
    if failed:
        console.print(f"{len(failed)} failed; run the command again to try only these.", markup=False)


def main(words: Sequence[str] | None = None) -> int:
    """``anomalib table`` without anomalib's command line.

    Args:
        words: Arguments; ``None``: those of the process.

    Returns:
        int: Exit code, 1 if a cell failed.
    """
    try:
        Table().run(Table.get_parser().parse_args(words))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
