# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib table``: models x data sets x categories in one table, beside the published numbers."""

from .pipeline import Table, main

__all__ = ["Table", "main"]
