# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip setup``: one file for a line, from a folder of good images."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from anomalib_fbclip.adapted.lightning_model import AdaptedModule
from anomalib_fbclip.adapted.line import Line, set_up
from anomalib_fbclip.host.thresholds import share_interval


def main(words: Sequence[str]) -> int:
    """Choose image size, tiles and memory for a time per image, find thresholds, and write one file."""
    parser = argparse.ArgumentParser(prog="anomalib-fbclip setup", description=main.__doc__)
    parser.add_argument("good", type=Path, help="folder of good images, two or more; 100 or more are better")
    parser.add_argument("--bad", type=Path, help="folder of bad images, if there are any")
    parser.add_argument("--output", type=Path, required=True, help="line file to write (.safetensors)")
    parser.add_argument("--model", default="FBCLIP", help="where no adapter file names it (default: %(default)s)")
    parser.add_argument("--backbone", help="where the adapter does not name it (default: ViT-L-14-336)")
    parser.add_argument("--pretrained", help="backbone weights, if not those that the adapter names: tag or file")
    parser.add_argument("--weights", default="auto", help="adapter (default: the one embedded with the backbone)")
    parser.add_argument("--seconds-per-image", type=float, default=0.5, help="time per image (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.05, help="wanted false-alarm rate (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="in pixels, instead of choosing it")
    parser.add_argument("--tiles", type=int, help="side of tiles in pixels, instead of choosing it; 0: none")
    parser.add_argument("--k-shot", type=int, help="good images in the memory, instead of choosing their number")
    parser.add_argument("--memory-radius", type=_radius, default="auto", help="compare patches with those of good "
                        "images at most so many patches from their place; none: with all (default: as the good images "
                        "say)")  # fmt: skip
    parser.add_argument("--min-area", type=int, default=0, help="least area of a defect in pixels of the images; "
                        "smaller marks do not count (default: all count)")  # fmt: skip
    parser.add_argument("--region", type=Path, help="mask, white where the images show the product")
    parser.add_argument("--crop-to-region", action="store_true", help="cut images to the bounding box of the region")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: %(default)s)")
    arguments = vars(parser.parse_args(words))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("anomalib_fbclip").setLevel(logging.INFO)
    output = arguments.pop("output")
    try:
        line = set_up(**arguments)
        path = line.module.save_line(output)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(_expectations(line, path))
    return 0


def _radius(word: str) -> int | str | None:
    if word in {"auto", "none"}:
        return None if word == "none" else word
    return int(word)


def _expectations(line: Line, path: Path) -> str:
    found, module = line.thresholds, line.module
    low, high = (100 * end for end in found["interval"])
    said = (
        f"{path}: {module.model_name} on {module.hparams['backbone']}, {module.image_size} pixels{_cut(module)}, "
        f"{module.k_shot} good images in the memory{_near(module)}. Private: it holds features of these images.\n"
        f"Time per image: {line.seconds:.3g} s.\n"
        f"Thresholds for score {found['image']:.4f} and map {found['pixel']:.4f}, from {found['pictures']} good "
        f"images.\n"
        f"False alarms to expect: {100 * found['expected_rate']:.3g} %, 95 % interval {low:.3g} to {high:.3g} %.\n"
    )
    if line.bad.scores:
        number = len(line.bad.scores)
        by_score = int((line.bad.counted_scores(found["pixel"]) > found["image"]).sum())
        by_map = int(line.bad.marked(found["pixel"]).sum())
        low, high = (100 * end for end in share_interval(by_score, number))
        said += (
            f"Bad images found: {by_score} of {number} by score (95 % interval {low:.3g} to {high:.3g} %), {by_map} by "
            f"map. Image AUROC {100 * (line.auroc or 0):.1f} %. Size, tiles and memory were chosen on these images.\n"
        )
    return said + f"Use it: anomalib predict --model {module.model_name} --model.weights {path} --data <folder>\n"


def _near(module: AdaptedModule) -> str:
    radius = module.model.memory_radius
    return "" if radius is None else f", patches compared near their place (memory_radius={radius})"


def _cut(module: AdaptedModule) -> str:
    """Tiles and least area, where there are some."""
    side, least = module.hparams["tiles"], module.hparams["min_area"]
    tiles = "" if side is None else f", tiles of {side} pixels"
    return tiles + (f", defects from {least} pixels on" if least else "")
