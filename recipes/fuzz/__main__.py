# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Random damage to adapters, weights, settings and images: each try succeeds, or ends in a clean error.

    python -m recipes.fuzz --minutes 10
    python -m recipes.fuzz --seed 3 --minutes 1          # other tries
    python -m recipes.fuzz --target settings --only 1234  # one try again, with its traceback

Every try has a number, which with ``--seed`` gives all of its random choices. A clean error is a ``ValueError``,
``TypeError`` or ``FileNotFoundError`` whose message names what is wrong: the file, or the argument. A success is a
model whose scores are finite. Everything else is reported with its number, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from .targets import TARGETS, Unclean

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHOWN = 300


def main(words: Sequence[str] | None = None) -> int:
    """Try until the time is over; 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m recipes.fuzz", description="Random damage, clean errors.")
    parser.add_argument("--minutes", type=float, default=10.0, help="time to try for (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other tries (default: %(default)s)")
    parser.add_argument("--target", choices=list(TARGETS), help="one target alone (default: all in turn)")
    parser.add_argument("--only", type=int, help="number of one try, again and with its traceback")
    arguments = parser.parse_args(words)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console = Console(soft_wrap=True)
    names = [arguments.target] if arguments.target else list(TARGETS)
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[str, str] = {}
    end = time.monotonic() + 60 * arguments.minutes
    number = arguments.only or 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            name = names[number % len(names)]
            rng = random.Random(f"{arguments.seed}/{name}/{number}")  # noqa: S311  # not for secrets
            torch.manual_seed(number)
            try:
                outcome = TARGETS[name](rng, Path(folder))
            except Unclean as error:
                outcome = "FOUND"
                kind = f"{name}: {type(error.__cause__).__name__} at {_place(error.__cause__)}"
                if kind not in found:
                    found[kind] = f"--seed {arguments.seed} --target {name} --only {number}"
                    console.print(f"{kind}\n  {found[kind]}\n  {str(error)[:_SHOWN]}", markup=False, highlight=False)
                if arguments.only is not None:
                    traceback.print_exception(error)
            counts[name, outcome] += 1
            if arguments.only is not None:
                break
            number += 1
    for (name, outcome), times in sorted(counts.items()):
        console.print(f"{name:10} {outcome:14} {times}")
    console.print(f"{number} tries, {len(found)} kinds of finding.")
    return int(bool(found))


def _place(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    ours = [frame for frame in frames if "anomalib_fbclip" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "the check of the result"


if __name__ == "__main__":
    sys.exit(main())
