# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Kill jobs at random moments, let them go on, and compare with a run that nobody disturbed.

    python -m recipes.faults                         # 20 tries of each job, a quarter of an hour on one core
    python -m recipes.faults --only training --tries 3 --seed 1

A killed process gets no chance to tidy up (SIGKILL). Processes are forked, so this needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from recipes.faults.jobs import JOBS

if TYPE_CHECKING:
    from collections.abc import Callable


def forked(run: Callable[[Path], None], folder: Path, seconds: float | None = None) -> tuple[bool, float]:
    """Run in another process, kill it after ``seconds``. Returns whether it ended by itself, and how long it ran."""
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        with Path(folder.parent, "log.txt").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            try:
                run(folder)
            except BaseException:  # noqa: BLE001  # reported by the exit code; a forked child must not return
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    while seconds is None or time.monotonic() - begin < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                log = Path(folder.parent, "log.txt").read_text(encoding="utf-8")
                raise RuntimeError(f"{folder} ended with status {status}:\n{log[-3000:]}")  # noqa: TRY003, EM102
            return True, time.monotonic() - begin
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, time.monotonic() - begin


def same(one: object, other: object) -> bool:
    """Bit for bit."""
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def tries(name: str, number: int, random_number: random.Random, root: Path) -> dict[str, int]:
    """Kill one job so many times, each time from the beginning; counts of what happened."""
    job = JOBS[name](root)
    forked(job.run, root / "warm")  # what is drawn or imported once is no part of the time
    _, duration = forked(job.run, root / "undisturbed")
    expected = job.result(root / "undisturbed")
    counts = dict.fromkeys(("tries", "killed", "left work behind", "damaged files", "same result"), 0)
    for index in range(number):
        folder = root / f"try{index}"
        moment = random_number.uniform(0.02, duration)
        while forked(job.run, folder, moment)[0]:
            # Done before that: on a machine that is shared, the undisturbed run may have been a slow one.
            shutil.rmtree(folder)
            moment /= 2
        counts["tries"] += 1
        counts["killed"] += 1
        counts["left work behind"] += bool(job.done(folder))
        counts["damaged files"] += len(job.damaged(folder))
        forked(job.run, folder)
        counts["same result"] += same(job.result(folder), expected)
    return counts


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--only", choices=JOBS, nargs="+", default=list(JOBS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A forked process must not wait for threads that were not forked with it.
    torch.set_num_threads(1)
    logging.disable(logging.INFO)

    console = Console()
    table = Table("job", "tries", "killed", "left work behind", "damaged files", "same result")
    bad = 0
    for name in options.only:
        with tempfile.TemporaryDirectory() as root:
            counts = tries(name, options.tries, random.Random(options.seed), Path(root))  # noqa: S311  # no secret
        table.add_row(name, *map(str, counts.values()))
        console.print(f"{name}: {counts}", soft_wrap=True)
        bad += counts["damaged files"] + counts["tries"] - counts["same result"]
    console.print(table)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
