# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip watch``: score the images of a folder as they appear."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import torch

from anomalib_fbclip.adapted.load import load_module
from anomalib_fbclip.host.module import ScoringModule
from anomalib_fbclip.host.post_processing import FIXED
from anomalib_fbclip.host.unreadable import read_picture
from anomalib_fbclip.host.watch import Table, watch


def main(words: Sequence[str]) -> int:
    """Score the images of a folder as they appear, one row each. Ctrl-C or SIGTERM end it."""
    parser = argparse.ArgumentParser(prog="anomalib-fbclip watch", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder that images are written to; its subfolders count")
    parser.add_argument("--weights", required=True, help="line file of 'anomalib-fbclip setup', or an adapter")
    parser.add_argument("--output", type=Path, required=True, help="table (.csv); a later run goes on with it")
    parser.add_argument("--settle", type=float, default=0.5, help="seconds that a file must stay as it is where nobody "
                        "reports that it was closed (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rescan", type=float, default=10.0, help="seconds between listings of the folder, for files "
                        "that nobody reports (default: %(default)s)")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="score what is there and return")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    stop = Event()
    before = {number: signal.signal(number, _stopper(stop)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        table = Table(arguments.output)
        score = scorer(load_module(arguments.weights), arguments.device)
        _say(f"Watching {arguments.folder}: {len(table)} files have a row in {arguments.output}.")
        options = {"settle": arguments.settle, "rescan": arguments.rescan, "once": arguments.once}
        written = watch(arguments.folder, table, score, stop, report=_report, **options)
    except (OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    table.close()
    _say(f"{written} rows written to {arguments.output}.")
    return 0


def scorer(module: ScoringModule, device: str = "cpu") -> Callable[[Path], dict[str, Any]]:
    """A function from an image file to its columns, by a model that stays loaded."""
    module = module.to(device).eval()
    if module.thresholds is None or module.thresholds["origin"] == FIXED:
        sys.stderr.write("No thresholds from good images: labels are at the plain 0.5. Run 'anomalib-fbclip setup'.\n")
    threshold = round(float(module.post_processor.normalized_image_threshold), 6)

    def score(path: Path) -> dict[str, Any]:
        image = read_picture(path)[None].to(device)
        with torch.inference_mode():
            prediction = module(image)
        return {
            "score": round(float(prediction.pred_score), 6),
            "label": int(prediction.pred_label),
            "threshold": threshold,
            "map_max": round(float(prediction.anomaly_map.amax()), 6),
        }

    return score


def _stopper(stop: Event) -> Callable[..., None]:
    def handle(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    return handle


def _report(row: dict[str, Any]) -> None:
    said = row.get("error") or f"{row['score']:.3f} {'anomalous' if row['label'] else 'normal'}"
    _say(f"{row['path']}: {said}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n".encode("utf-8", "replace").decode())
    sys.stdout.flush()
