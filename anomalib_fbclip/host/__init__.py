# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The edges towards anomalib: Lightning hooks, pre- and post-processing, metrics, thresholds, exports, checkpoints."""
