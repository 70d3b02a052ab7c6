# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What ``anomalib-fbclip setup`` promises, and what happens on images that it did not see.

    python -m recipes.line magnetic_tile/
    python -m recipes.line magnetic_tile/ --good 100 --bad 40 --draws 3
    python -m recipes.line magnetic_tile/ --image-sizes 96 144 192 --shots 4 16 32

Good images are those of ``MT_Free``, bad ones those of all five defects. Each draw takes others for the setup.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from pathlib import Path

import torch

from anomalib_fbclip.adapted.line import set_up
from anomalib_fbclip.host.metrics import ImageScores


def draw(root: Path, good: int, bad: int, seed: int, new: int, folder: Path) -> None:
    """Link images of a draw into ``good``, ``bad``, ``new_good`` and ``new_bad``."""
    for kind, number, files in (
        ("good", good, sorted(root.glob("MT_Free/Imgs/*.jpg"))),
        ("bad", bad, sorted(file for file in root.glob("MT_*/Imgs/*.jpg") if "MT_Free" not in file.parts)),
    ):
        random.Random(seed).shuffle(files)  # noqa: S311  # no secret
        for name, chosen in ((kind, files[:number]), (f"new_{kind}", files[number : number + new])):
            (folder / name).mkdir()
            for file in chosen:
                (folder / name / file.name).symlink_to(file.resolve())


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
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    sys.stdout.write("| draw | size | memory | s | expected, 95 % | false alarms | found | by map | image AUROC |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|---|\n")
    for seed in range(arguments.draws):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            draw(arguments.root, arguments.good, arguments.bad, seed, arguments.new, folder)
            for size in arguments.image_sizes:
                for shot in arguments.shots:
                    line = set_up(
                        folder / "good",
                        folder / "bad" if arguments.bad else None,
                        backbone="tiny",
                        seconds_per_image=arguments.seconds_per_image,
                        rate=arguments.rate,
                        image_size=size,
                        k_shot=shot,
                    )
                    good, bad = (line.module.score_normal(folder / kind) for kind in ("new_good", "new_bad"))
                    metric, found = ImageScores(), line.thresholds
                    labels = torch.tensor([0] * len(good.scores) + [1] * len(bad.scores))
                    metric.update(torch.stack([*good.scores, *bad.scores]), labels)
                    alarms, hits = (
                        sum(float(score) > found["image"] for score in each.scores) / len(each.scores)
                        for each in (good, bad)
                    )
                    marked = sum(float(peak) > found["pixel"] for peak in bad.peaks) / len(bad.peaks)
                    low, high = found["interval"]
                    sys.stdout.write(
                        f"| {seed} | {line.module.image_size} | {line.module.k_shot} | {line.seconds:.2f} "
                        f"| {100 * found['expected_rate']:.1f} ({100 * low:.1f} to {100 * high:.1f}) "
                        f"| {100 * alarms:.0f} | {100 * hits:.0f} | {100 * marked:.0f} "
                        f"| {100 * metric.compute()['AUROC']:.1f} |\n",
                    )
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
