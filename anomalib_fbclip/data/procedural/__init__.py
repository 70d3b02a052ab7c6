# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Procedural surfaces: images and exact masks from a seed, without any file."""

from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.families import FAMILIES, TEST_ONLY_FAMILIES, TRAIN_FAMILIES, resolve
from anomalib_fbclip.data.procedural.generator import Sample, generate

__all__ = [
    "FAMILIES",
    "KINDS",
    "TEST_ONLY_FAMILIES",
    "TRAIN_FAMILIES",
    "Sample",
    "generate",
    "resolve",
]
