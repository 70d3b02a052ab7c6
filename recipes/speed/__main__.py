# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Time and memory of the bare visual tower, the literal form of FB-CLIP, and ours, on this machine.

    python -m recipes.speed                                           # the paper's model, one image of 518 pixels
    python -m recipes.speed --sizes 224 336 518 700                   # growth with the image
    python -m recipes.speed --batches 1 8 32 --precisions float32 bfloat16 --device cuda --at-once 6
    python -m recipes.speed --backbone tiny --sizes 112

Backbones have random weights (``tiny`` its own): time and memory do not depend on them. Every combination of size,
batch and precision is measured in a process of its own, on a CPU time and memory apart; see
``recipes/speed/measure.py``. With ``--at-once`` several processes warm up and compile side by side; they are measured
one after another.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .measure import FORMS, MEMORY_ENVIRONMENT, WARM, read_results

COLUMNS = (
    "form",
    "size",
    "batch",
    "precision",
    "seconds",
    "of bare tower",
    "images/s",
    "extra memory, MB",
    "of literal",
)


def start(arguments: list[str], what: list[str]) -> subprocess.Popen[str]:
    """A measuring process, which warms up and waits."""
    return subprocess.Popen(  # noqa: S603  # ours
        [sys.executable, "-m", "recipes.speed.measure", *arguments, "--what", *what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(MEMORY_ENVIRONMENT if what == ["memory"] else {})},
    )


def warm_up(process: subprocess.Popen[str]) -> str:
    """Wait until a process is warm, or has ended; what it wrote before."""
    assert process.stdout is not None
    return "".join(itertools.takewhile(lambda line: line != f"{WARM}\n", process.stdout))


def finish(process: subprocess.Popen[str], written: str) -> dict[str, dict[str, float]]:
    """Let a process measure; ``{"time" or "memory": {form: seconds or bytes}}``."""
    output, _ = process.communicate("\n")
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}:\n{(written + output)[-2000:]}")  # noqa: TRY003, EM102
    return read_results(output)


def rows(time: dict[str, float], memory: dict[str, float], combination: tuple[int, str, int]) -> list[list[str]]:
    """Table rows of one size, precision and batch."""
    size, precision, batch = combination
    result = []
    bare = memory["bare tower"]
    for form, seconds in time.items():
        extra = memory[form] - bare
        literal = memory.get("literal form")
        share = "" if literal is None or form == "bare tower" else f"{extra / (literal - bare):.2f}"
        result.append([
            form,
            str(size),
            str(batch),
            precision,
            f"{seconds:.4f}",
            f"{seconds / time['bare tower']:.2f}",
            f"{batch / seconds:.2f}",
            f"{extra / 1e6:.0f}",
            share,
        ])
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-L-14-336")
    parser.add_argument("--sizes", type=int, nargs="+", default=[518])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    usual = [form for form in FORMS if "compiled" not in form]  # a compiler takes minutes, and needs one of C++
    parser.add_argument("--forms", nargs="+", default=usual, choices=list(FORMS))
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="measured runs after one image to warm up; the median counts",
    )
    parser.add_argument("--at-once", type=int, default=1, help="processes that warm up side by side")
    parser.add_argument("--out", type=Path, help="also write the table as CSV")
    options = parser.parse_args()
    forms = ["bare tower", *(form for form in options.forms if form != "bare tower")]
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(*COLUMNS, title=f"{options.backbone} on {options.device}, median of {options.repeats}")
    common = ["--backbone", options.backbone, "--device", options.device, "--repeats", str(options.repeats)]
    # torch counts a GPU's memory, so one process measures both; a CPU's needs a process that held nothing before.
    whats = [["time"], ["memory"]] if options.device == "cpu" else [["time", "memory"]]
    combinations = list(itertools.product(options.sizes, options.precisions, options.batches))
    runs = list(itertools.product(combinations, whats))
    found: dict[tuple[int, str, int], dict[str, dict[str, float]]] = {combination: {} for combination in combinations}
    for first in track(range(0, len(runs), options.at_once), console=console):
        started = []
        for combination, what in runs[first : first + options.at_once]:
            size, precision, batch = map(str, combination)
            arguments = ["--size", size, "--precision", precision, "--batch", batch, "--forms", *forms]
            started.append((combination, start([*common, *arguments], what)))
        written = [warm_up(process) for _, process in started]
        for (combination, process), words in zip(started, written, strict=True):
            found[combination] |= finish(process, words)
    lines = [line for combination, values in found.items() for line in rows(**values, combination=combination)]
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if options.out:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])


if __name__ == "__main__":
    main()
