# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Pre-processing that gives the same pixels in an exported graph as in the model.

anomalib switches antialiasing off for exports, so that an exported model sees other pixels than the one that was
tested. Resizing is linear and separable: two matrix products do the same, exactly, in any runtime.
"""

import torch
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_fbclip.clip.frozen import CLIP_MEAN, CLIP_STD

__all__ = ["CLIP_MEAN", "CLIP_STD", "ExactPreProcessor", "resize_matrix"]

_CUBIC = -0.5  # the a of Keys' kernel in PyTorch's antialiased resize; without antialiasing it takes -0.75


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor, whose export keeps the antialiased resize.

    Outside of an export the transform itself is applied. In an exported graph, an antialiased bicubic resize to a fixed
    size becomes two matrices: constants where the input size is fixed, computed in the graph where it is not.
    """

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Pre-process raw images ``[B, 3, H, W]`` in [0, 1]."""
        if self.transform is None:
            return batch
        if not torch.compiler.is_exporting():
            return self.transform(batch)
        for step in _normalize_first(self.transform):
            batch = _resize(batch, *step.size) if _is_exact_resize(step) else step(batch)
        return batch


def resize_matrix(size_in: int, size_out: int) -> torch.Tensor:
    """Matrix ``[size_out, size_in]`` of the antialiased bicubic resize along one axis; rows sum to 1.

    It is symbolic in ``size_in`` too, for graphs that take images of any size. Kernel and borders are PyTorch's: Keys'
    cubic with a = -0.5, widened by the scale where the image shrinks, cut at the border and normalised.
    """
    if isinstance(size_in, int):
        # No cache: a tensor that is made while a graph is recorded belongs to that graph and breaks the next one.
        return _matrix(torch.arange(1, size_in + 1, dtype=torch.float64), size_out, torch.float64).float()
    # A size becomes a tensor without a symbolic float, which exporters do not translate.
    return _matrix(torch.ones(size_in, dtype=torch.int64).cumsum(0), size_out, torch.float32)


def _matrix(places: torch.Tensor, size_out: int, dtype: torch.dtype) -> torch.Tensor:
    """Matrix from the places 1, 2, ..., ``size_in`` of the pixels.

    Distances of pixel centres are whole numbers over one denominator, and are subtracted as such: a runtime that
    computes in bfloat16 knows no odd number above 256.
    """
    size_in = places[-1]
    centres = (2 * torch.arange(size_out, dtype=places.dtype) + 1)[:, None] * size_in
    x = ((2 * places - 1)[None] * size_out - centres).abs().to(dtype) / (2 * size_in.clamp(min=size_out)).to(dtype)
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows = resize_matrix(images.shape[-2], height).to(images)
    columns = resize_matrix(images.shape[-1], width).to(images)
    return rows @ (images @ columns.T)


def _normalize_first(transform: Transform) -> list[Transform]:
    """Steps of a transform, in the graph's order.

    The rows of a resize sum to 1, so a normalisation may come before it as well as after it. OpenVINO's CPU plug-in
    fuses one that comes after into the matrix product and then stops, because its channels are not the product's.
    """
    steps = list(transform.transforms) if isinstance(transform, Compose) else [transform]
    for index in range(len(steps) - 1):
        if _is_exact_resize(steps[index]) and isinstance(steps[index + 1], Normalize):
            steps[index : index + 2] = steps[index + 1], steps[index]
    return steps


def _is_exact_resize(step: object) -> bool:
    return (
        isinstance(step, Resize)
        and step.interpolation is InterpolationMode.BICUBIC
        and bool(step.antialias)
        and step.size is not None
        and len(step.size) == 2
    )
