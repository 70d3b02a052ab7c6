# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_fbclip``, the same as the command ``anomalib-fbclip``."""

import sys

from anomalib_fbclip.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
