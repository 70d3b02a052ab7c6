# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip convert``: make an adapter file of weights in the form in which their authors publish them."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.adapted.load import load_module


def main(words: Sequence[str]) -> int:
    """Make an adapter file of published weights: FB-CLIP's .pth, AnomalyCLIP's epoch_15.pth, AF-CLIP's prompt file."""
    parser = argparse.ArgumentParser(prog="anomalib-fbclip convert", description=main.__doc__)
    parser.add_argument("weights", help="published file; AF-CLIP: the prompt file with its adaptor beside it")
    parser.add_argument("--output", type=Path, required=True, help="adapter to write (.safetensors)")
    parser.add_argument("--source", help="data set that it was trained on, such as VisA: a test on it then warns")
    parser.add_argument("--backbone", help="that it was trained on (default: ViT-L-14-336)")
    parser.add_argument("--pretrained", help="weights of the backbone: tag or file (default: openai)")
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        _, metadata = adapter_file.read(arguments.weights)
        model = load_module(arguments.weights, arguments.backbone, arguments.pretrained, source=arguments.source)
        kept = {"epoch": metadata["epoch"]} if "epoch" in metadata else {}
        path = model.save_adapter(arguments.output, **kept)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if model.source is None:
        sys.stderr.write("What it was trained on is not known, so no test can warn: give --source.\n")
    sys.stdout.write(f"{path}: adapter of {metadata['model']}, trained on {model.source or 'unknown data'}.\n")
    return 0
