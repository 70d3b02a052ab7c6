# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Memory and time of one run over many images.

    python -m recipes.scale                        # 10 000 images, predict: scores, heat maps, index
    python -m recipes.scale --what test            # all metrics of the table, with masks
    python -m recipes.scale --number 500 --size 56 --images none

A hundred drawings of 96 pixels, half of them defective, under as many names as are asked for. Memory is the largest
that the process ever held, so it can only grow; what to look for is where it stops.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

from anomalib_fbclip import FBCLIP, LabelledFolder
from anomalib_fbclip.data.procedural.cache import CacheSpec, write_family

DRAWINGS = 100


def draw(root: Path, number: int) -> None:
    """``good`` and ``bad`` images, and the masks of the bad ones, by name."""
    drawn = write_family(root / "drawn", "wood", CacheSpec(image_size=96, num_train=1, num_test=DRAWINGS))
    sources = sorted((drawn / "test").rglob("*.png"))
    for index in range(number):
        source = sources[index % len(sources)]
        kind = source.parent.name
        side = "good" if kind == "good" else "bad"
        target = root / "pictures" / side / f"{index:06d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        if side == "bad":
            mask = root / "masks" / target.name
            mask.parent.mkdir(exist_ok=True)
            shutil.copyfile(drawn / "ground_truth" / kind / source.name, mask)


class Watch(Callback):
    """Notes time and peak memory about ten times a run."""

    def __init__(self, number: int) -> None:
        self.every = max(1, number // 10)
        self.seen = 0
        self.rows: list[tuple[int, float, float]] = []

    def _note(self, size: int) -> None:
        before = self.seen // self.every
        self.seen += size
        if self.seen // self.every > before:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
            self.rows.append((self.seen, time.monotonic(), peak))

    def on_predict_batch_end(self, *args, **kwargs) -> None:
        """After a batch of a prediction."""
        self._note(len((kwargs.get("batch") or args[3]).image))

    def on_test_batch_end(self, *args, **kwargs) -> None:
        """After a batch of a test."""
        self._note(len((kwargs.get("batch") or args[3]).image))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--what", choices=("predict", "test"), default="predict")
    parser.add_argument("--size", type=int, default=112, help="pixels that the model sees")
    parser.add_argument("--pictures", choices=("all", "none"), default="all", help="heat maps to write")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root, options.number)
        watch = Watch(options.number)
        model = FBCLIP(
            backbone="tiny",
            image_size=options.size,
            metrics="full",
            visualizer=options.pictures == "all",
        )
        engine = Engine(default_root_dir=root / "results", accelerator="cpu", devices=1, callbacks=[watch])
        begin = time.monotonic()
        if options.what == "predict":
            engine.predict(model, dataset=PredictDataset(root / "pictures"), return_predictions=False)
        else:
            data = LabelledFolder(
                name="many",
                root=root,
                normal_dir="pictures/good",
                abnormal_dir="pictures/bad",
                mask_dir="masks",
                eval_batch_size=8,
                num_workers=0,
            )
            engine.test(model, datamodule=data)
        written = len(list((root / "results").rglob("*.png")))

    table = Table("pictures", "seconds", "an image, ms", "peak memory, MB")
    for seen, moment, peak in watch.rows:
        seconds = moment - begin
        table.add_row(str(seen), f"{seconds:.1f}", f"{1000 * seconds / seen:.1f}", f"{peak:.0f}")
    Console().print(table)
    Console().print(f"{options.what}, {options.number} images, {options.size} px, {written} heat maps on disk")


if __name__ == "__main__":
    main()
