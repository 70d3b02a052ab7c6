# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A small convolutional network that learns the maps and scores of a teacher on the images of one product.

Knowledge distillation (Hinton et al., Distilling the Knowledge in a Neural Network, 2015, https://arxiv.org/abs/1503.02531)
of dense maps: the teacher is any adapted CLIP of this package, with its adapter and its memory of normal images.
"""

from .lightning_model import Student
from .torch_model import StudentModel

__all__ = ["Student", "StudentModel"]
