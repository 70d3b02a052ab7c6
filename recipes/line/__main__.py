# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What ``anomalib-fbclip setup`` promises, and what happens on images that it did not see.

    python -m recipes.line magnetic_tile/
    python -m recipes.line magnetic_tile/ --good 100 --bad 40 --draws 3
    python -m recipes.line magnetic_tile/ --image-sizes 96 144 192 --shots 4 16 32
    python -m recipes.line magnetic_tile/ --strips --tiles 0 -1 --bad 24     # without tiles, and as setup chooses

Good images are those of ``MT_Free``, bad ones those of all five defects. Each draw takes others for the setup. With
``--strips`` an image is a row of four of them, 240 x 240 pixels each; in a bad one, one of the four is bad.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch

from anomalib_fbclip.adapted.line import set_up
from anomalib_fbclip.host.metrics import ImageScores

_CELL, _CELLS = 240, 4


def draw(root: Path, good: int, bad: int, seed: int, new: int, folder: Path, strips: bool = False) -> None:
    """Write images of a draw into ``good``, ``bad``, ``new_good`` and ``new_bad``."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    free = sorted(root.glob("MT_Free/Imgs/*.jpg"))
    chance.shuffle(free)
    parts = iter(free[good + new :])  # of the strips; the others are the first of each row
    for kind, number, files in (
        ("good", good, sorted(root.glob("MT_Free/Imgs/*.jpg"))),
        ("bad", bad, sorted(file for file in root.glob("MT_*/Imgs/*.jpg") if "MT_Free" not in file.parts)),
    ):
        random.Random(seed).shuffle(files)  # noqa: S311  # no secret
        for name, chosen in ((kind, files[:number]), (f"new_{kind}", files[number : number + new])):
            (folder / name).mkdir()
            for file in chosen:
                if strips:
                    others = [next(parts) for _ in range(_CELLS - 1)]
                    row = [_cell(each) for each in (file, *others)]
                    chance.shuffle(row)
                    cv2.imwrite(str(folder / name / f"{file.stem}.png"), np.concatenate(row, axis=1))
                else:
                    (folder / name / file.name).symlink_to(file.resolve())


def _cell(file: Path) -> np.ndarray:
    return cv2.resize(cv2.imread(str(file)), (_CELL, _CELL), interpolation=cv2.INTER_AREA)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of MT_Blowhole, ..., MT_Free")
    parser.add_argument("--good", type=int, default=60, help="good images for the setup")
    parser.add_argument("--bad", type=int, default=0, help="bad images for the setup")
    parser.add_argument("--new", type=int, default=100, help="new images of each kind")
    parser.add_argument("--draws", type=int, default=3, help="choices of the images")
    parser.add_argument("--rate", type=float, default=0.05, help="wanted false-alarm rate")
    parser.add_argument("--seconds-per-image", type=float, default=0.5, help="time per image")
    parser.add_argument("--image-sizes", type=int, nargs="*", default=[None], help="instead of choosing")
    parser.add_argument("--shots", type=int, nargs="*", default=[None], help="instead of choosing")
    parser.add_argument("--tiles", type=int, nargs="*", default=[-1], help="instead of choosing; 0: none, -1: choose")
    parser.add_argument("--min-area", type=int, default=0, help="least area of a defect, in pixels")
    parser.add_argument("--strips", action="store_true", help="rows of four tiles")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    logging.getLogger("anomalib_fbclip.adapted.line").setLevel(logging.INFO)
    sys.stdout.write(
        "| draw | size | tiles | memory | s | expected, 95 % | false alarms | found | by map | image AUROC |\n",
    )
    sys.stdout.write("|---|---|---|---|---|---|---|---|---|---|\n")
    for seed in range(arguments.draws):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw(arguments.root, arguments.good, arguments.bad, seed, arguments.new, folder, arguments.strips)
            for size, shot, side in product(arguments.image_sizes, arguments.shots, arguments.tiles):
                line = set_up(
                    folder / "good",
                    folder / "bad" if arguments.bad else None,
                    backbone="tiny",
                    seconds_per_image=arguments.seconds_per_image,
                    rate=arguments.rate,
                    image_size=size,
                    k_shot=shot,
                    tiles=None if side < 0 else side,
                    min_area=arguments.min_area,
                )
                good, bad = (line.module.score_normal(folder / kind) for kind in ("new_good", "new_bad"))
                metric, found = ImageScores(), line.thresholds
                labels = torch.tensor([0] * len(good.scores) + [1] * len(bad.scores))
                metric.update(torch.stack([*good.scores, *bad.scores]), labels)
                alarms, hits = (
                    float((each.counted_scores(found["pixel"]) > found["image"]).float().mean()) for each in (good, bad)
                )
                marked = float(bad.marked(found["pixel"]).float().mean())
                low, high = found["interval"]
                sys.stdout.write(
                    f"| {seed} | {line.module.image_size} | {line.module.hparams['tiles'] or '-'} "
                    f"| {line.module.k_shot} | {line.seconds:.2f} "
                    f"| {100 * found['expected_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f}) "
                    f"| {100 * alarms:.0f} | {100 * hits:.0f} | {100 * marked:.0f} "
                    f"| {100 * metric.compute()['AUROC']:.1f} |\n",
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
