# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip share``: put an adapter and its model card on the hub."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anomalib_fbclip.adapted.sharing import share


def main(words: Sequence[str]) -> int:
    """Put an adapter and its model card on the hub."""
    parser = argparse.ArgumentParser(prog="anomalib-fbclip share", description=main.__doc__)
    parser.add_argument("adapter", type=Path, help="adapter file of this package (.safetensors)")
    parser.add_argument("repo_id", help="owner/name; made if it does not exist")
    parser.add_argument("--results", type=Path, help="CSV file with metrics for the model card")
    parser.add_argument("--license", dest="license_name", help="licence for the model card, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--include-private", action="store_true", help="share a line file, with its images' features")
    try:
        place = share(**vars(parser.parse_args(words)))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{place}\n")
    return 0
