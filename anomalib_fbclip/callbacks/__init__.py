# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Lightning callbacks of this package."""

from .adapter_checkpoint import AdapterCheckpoint
from .prediction_index import PredictionIndex

__all__ = ["AdapterCheckpoint", "PredictionIndex"]
