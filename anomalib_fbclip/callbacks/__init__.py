# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Lightning callbacks of this package."""

from anomalib_fbclip.adapted.adapter_checkpoint import AdapterCheckpoint
from anomalib_fbclip.host.prediction_index import PredictionIndex
from anomalib_fbclip.host.report import Report

__all__ = ["AdapterCheckpoint", "PredictionIndex", "Report"]
