# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The metrics of :mod:`anomalib_fbclip.host.metrics`, under the name that they had before."""

from anomalib_fbclip.host.metrics import AnyScoreHistogram, FullEvaluator, ImageScores, ScoreHistogram

__all__ = ["AnyScoreHistogram", "FullEvaluator", "ImageScores", "ScoreHistogram"]
