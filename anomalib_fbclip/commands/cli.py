# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip <command>``: what this package can do beside anomalib's own command line.

A command's module is imported when the command is called and not before, so that one broken part (or a broken
anomalib) leaves the others alone.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from anomalib_fbclip.common.console import escape_what_cannot_be_shown

COMMANDS = {
    "calibrate": "anomalib_fbclip.commands.calibrate:main",
    "convert": "anomalib_fbclip.commands.convert:main",
    "doctor": "anomalib_fbclip.commands.doctor:main",
    "predict": "anomalib_fbclip.commands.front:predict",
    "report": "anomalib_fbclip.commands.report:main",
    "setup": "anomalib_fbclip.commands.setup:main",
    "share": "anomalib_fbclip.commands.share:main",
    "test": "anomalib_fbclip.commands.front:test",
    "watch": "anomalib_fbclip.commands.watch:main",
}
"""Name of a command -> ``module:function``. The function takes the remaining words and returns the exit code."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: Name of the command and its own arguments. ``None``: those of the process.

    Returns:
        int: Exit code of the command.
    """
    escape_what_cannot_be_shown()
    parser = argparse.ArgumentParser(
        prog="anomalib-fbclip",
        description="Commands of anomalib-fbclip. Training, testing, predicting and exporting are anomalib's: "
        "'anomalib train --model FBCLIP --help'.",
        epilog="'anomalib-fbclip <command> --help' tells about one command.",
    )
    parser.add_argument("command", choices=sorted(COMMANDS))
    words = sys.argv[1:] if words is None else list(words)
    chosen = parser.parse_args(words[:1]).command
    module, function = COMMANDS[chosen].split(":")
    return int(getattr(import_module(module), function)(words[1:]))
