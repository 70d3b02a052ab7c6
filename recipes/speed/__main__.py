# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Time and memory of the bare visual tower, the literal form of FB-CLIP, and ours, on this machine.

    python -m recipes.speed                                           # the paper's model, one image of 518 pixels
    python -m recipes.speed --sizes 224 336 518 700                   # growth with the image
    python -m recipes.speed --batches 1 2 4 8 --precisions float32 bfloat16 --device cuda
    python -m recipes.speed --backbone tiny --sizes 112

Backbones have random weights (``tiny`` its own): time and memory do not depend on them. On a CPU every combination of
size, batch and precision is measured in a process of its own, time and memory apart; see ``recipes/speed/measure.py``.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .measure import FORMS, MEMORY_ENVIRONMENT, read_results

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


def run(arguments: list[str], batches: list[int], what: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    """One measuring process; ``{batch: {"time" or "memory": {form: seconds or bytes}}}``."""
    command = [
        sys.executable,
        "-m",
        "recipes.speed.measure",
        *arguments,
        "--batches",
        *map(str, batches),
        "--what",
        *what,
    ]
    environment = {**os.environ, **(MEMORY_ENVIRONMENT if what == ["memory"] else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603  # ours
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")  # noqa: TRY003, EM102
    return read_results(done.stdout)


def rows(seconds: dict[str, float], memory: dict[str, float], size: int, batch: str, precision: str) -> list[list[str]]:
    """Table rows of one combination."""
    result = []
    bare = memory["bare tower"]
    for form, time in seconds.items():
        extra = memory[form] - bare if form in memory else None
        literal = memory.get("literal form")
        share = "" if extra is None or literal is None or form == "bare tower" else f"{extra / (literal - bare):.2f}"
        result.append([
            form,
            str(size),
            batch,
            precision,
            f"{time:.4f}",
            f"{time / seconds['bare tower']:.2f}",
            f"{int(batch) / time:.2f}",
            "" if extra is None else f"{extra / 1e6:.0f}",
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
    parser.add_argument("--out", type=Path, help="also write the table as CSV")
    options = parser.parse_args()
    forms = ["bare tower", *(form for form in options.forms if form != "bare tower")]
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(*COLUMNS, title=f"{options.backbone} on {options.device}, median of {options.repeats}")
    lines = []
    # A GPU's memory is counted by torch, so one process measures all; a CPU's needs a process that held nothing before.
    whats = [["time"], ["memory"]] if options.device == "cpu" else [["time", "memory"]]
    together = [[batch] for batch in options.batches] if options.device == "cpu" else [options.batches]
    for size, precision, batches in track(list(product(options.sizes, options.precisions, together)), console=console):
        arguments = ["--backbone", options.backbone, "--size", str(size), "--precision", precision]
        arguments += ["--device", options.device, "--repeats", str(options.repeats), "--forms", *forms]
        found = [run(arguments, batches, what) for what in whats]
        for batch in map(str, batches):
            lines += rows(found[0][batch]["time"], found[-1][batch]["memory"], size, batch, precision)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if options.out:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])


if __name__ == "__main__":
    main()
