# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip calibrate``: write thresholds from normal images into an adapter."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.adapted.load import load_module

_SCORING = {
    "image_size": "input in pixels, such as 518 or [336,672],",
    "resize": "'squash' or 'keep',",
    "tiles": "side of tiles in pixels,",
}
"""Arguments of the model that change its scores, and so its thresholds."""


def main(words: Sequence[str]) -> int:
    """Write thresholds from normal images into an adapter, at a wanted rate of false alarms."""
    parser = argparse.ArgumentParser(prog="anomalib-fbclip calibrate", description=main.__doc__)
    parser.add_argument(
        "weights",
        help="adapter or line file: .safetensors, published weights, or hf://owner/repo/file",
    )
    parser.add_argument("normal", type=Path, help="a normal image or a folder of them")
    parser.add_argument("--rate", type=float, default=0.05, help="wanted false-alarm rate (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="adapter to write (.safetensors)")
    parser.add_argument("--backbone", help="where the adapter does not name it (default: ViT-L-14-336)")
    parser.add_argument("--pretrained", help="backbone weights, if not those that the adapter names: tag or file")
    for name, meaning in _SCORING.items():
        parser.add_argument(f"--{name}", type=yaml.safe_load, help=f"{meaning} that the thresholds are for")
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = {name: getattr(arguments, name) for name in _SCORING if getattr(arguments, name) is not None}
    try:
        metadata = adapter_file.read(arguments.weights)[1]
        model = load_module(arguments.weights, arguments.backbone, arguments.pretrained, **settings)
        found = model.calibrate(arguments.normal, arguments.rate)
        kept = {"epoch": metadata["epoch"]} if "epoch" in metadata else {}
        path = (model.save_line if adapter_file.is_line(metadata) else model.save_adapter)(arguments.output, **kept)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    low, high = found["interval"]
    sys.stdout.write(
        f"{path}: thresholds for score {found['image']:.4f} and map {found['pixel']:.4f} from {found['pictures']} "
        f"normal images. False-alarm rate to expect {found['expected_rate']:.3g}, 95 % interval {low:.3g} to "
        f"{high:.3g}.\n",
    )
    return 0
