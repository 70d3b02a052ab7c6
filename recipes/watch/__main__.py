# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Latency and memory of ``anomalib-fbclip watch``: a camera in another process writes images at a given rate.

    python -m recipes.watch line.safetensors                                 # 3000 images, 10 a second
    python -m recipes.watch line.safetensors --images parts/ --number 100 --rate 1
    python -m recipes.watch line.safetensors --number 7200 --rate 2 --no-restart   # an hour of one process
    python -m recipes.watch none --number 20000 --rate 100                   # without a model: the watching alone

Latency is the time from closing a file to its row on the disk. Memory is what the process holds (VmRSS), read every
tenth of the run. Half-way the watch is stopped by SIGTERM and started again on the same table, unless told otherwise;
images that had no row by then are counted and not timed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np

_WITHOUT_MODEL = (
    "import sys, anomalib_fbclip.commands.watch as watch\n"
    "from anomalib_fbclip.host.unreadable import read_picture\n"
    "watch.load_module = lambda _: None\n"
    "watch.scorer = lambda *_: lambda path: {'score': float(read_picture(path).mean()), 'label': 0}\n"
    "sys.exit(watch.main(sys.argv[1:]))"
)


def start(words: list[str], weights: str) -> subprocess.Popen:
    """Start the command, and wait until it watches."""
    code = _WITHOUT_MODEL if weights == "none" else "import sys; from anomalib_fbclip.commands.watch import main; "
    code += "" if weights == "none" else "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-W", "ignore", "-c", code, *words, "--weights", weights]
    # Its standard output is one line an image, which nobody reads here.
    log = Path(words[0]).parent / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file)  # noqa: S603  # our own command
    while "Watching" not in log.read_text(encoding="utf-8"):
        if process.poll() is not None:
            sys.exit(f"watch ended with {process.returncode}")
        time.sleep(0.1)
    time.sleep(0.5)
    return process


def resident(process: subprocess.Popen) -> float:
    """Megabytes that the process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def read(table: Path) -> list[dict[str, str]]:
    """Rows of the table."""
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stop(process: subprocess.Popen) -> None:
    """End it by SIGTERM, which must give exit code 0."""
    process.send_signal(signal.SIGTERM)
    if process.wait(30):
        sys.exit(f"watch ended with {process.returncode}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="line file, or 'none': no model, the watching alone")
    parser.add_argument("--images", type=Path, help="folder of images to write again and again (default: noise, 64 px)")
    parser.add_argument("--number", type=int, default=3000, help="images to write")
    parser.add_argument("--rate", type=float, default=10.0, help="images a second")
    parser.add_argument("--no-restart", dest="restart", action="store_false", help="one process from end to end")
    arguments = parser.parse_args()
    if arguments.images:
        contents = [file.read_bytes() for file in sorted(arguments.images.iterdir())[:50]]
    else:
        drawn = np.random.default_rng(0).integers(90, 130, (20, 64, 64, 3), dtype=np.uint8)
        contents = [cv2.imencode(".png", image)[1].tobytes() for image in drawn]
    with tempfile.TemporaryDirectory() as name:
        folder, table = Path(name) / "camera", Path(name) / "table.csv"
        folder.mkdir()
        words = [str(folder), "--output", str(table)]
        process, closed, left, begun = start(words, arguments.weights), {}, set(), time.time()
        for number, content in zip(range(arguments.number), itertools.cycle(contents), strict=False):
            if arguments.restart and number == arguments.number // 2:
                stop(process)
                left = closed.keys() - {row["path"] for row in read(table)}
                process = start(words, arguments.weights)
                begun = time.time() - number / arguments.rate
            time.sleep(max(0.0, begun + number / arguments.rate - time.time()))
            path = folder / f"{number:06d}.png"
            path.write_bytes(content)
            closed[str(path)] = time.time()
            if number % max(1, arguments.number // 10) == 0:
                sys.stdout.write(f"{number} images written: {resident(process):.0f} MB\n")
                sys.stdout.flush()
        while sum(1 for _ in table.open(encoding="utf-8")) <= arguments.number and process.poll() is None:
            time.sleep(0.2)
        sys.stdout.write(f"{arguments.number} images written: {resident(process):.0f} MB\n")
        stop(process)
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    late = sorted(
        datetime.fromisoformat(row["time"]).timestamp() - closed[row["path"]] for row in rows if row["path"] not in left
    )
    errors = sum(bool(row["error"]) for row in rows)
    sys.stdout.write(
        f"{len(left)} images were left for the second start. "
        f"{len(rows)} rows for {len({row['path'] for row in rows})} of {arguments.number} images, {errors} errors. "
        f"Latency median {1000 * late[len(late) // 2]:.0f} ms, 99 % {1000 * late[int(0.99 * len(late))]:.0f} ms, "
        f"largest {1000 * late[-1]:.0f} ms.\n",
    )


if __name__ == "__main__":
    main()
