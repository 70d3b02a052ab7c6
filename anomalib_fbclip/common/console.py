# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A console that cannot show every character."""

import io
import sys


def escape_what_cannot_be_shown() -> None:
    """Let the console show characters that it does not know as escapes.

    Without UTF-8 (``LC_ALL=C``, a redirected console of Windows), the first name with an umlaut, or the dot in Rich's
    progress bar, would otherwise end a run with an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in {"strict", "surrogateescape"}:
            stream.reconfigure(errors="backslashreplace")
