# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip report``: one HTML page of a prediction that was made."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from anomalib_fbclip.host.report import find_table, write_report


def main(words: Sequence[str]) -> int:
    """Write one HTML page of a prediction, which needs no other file."""
    parser = argparse.ArgumentParser(prog="anomalib-fbclip report", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a run, such as results/FBCLIP/latest")
    parser.add_argument("--output", type=Path, help="page to write (default: report.html beside predictions.csv)")
    arguments = parser.parse_args(words)
    try:
        table = find_table(arguments.folder)
        page = write_report(table, arguments.output or table.with_name("report.html"))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{page} ({page.stat().st_size / 1e6:.1f} MB)\n")
    return 0
