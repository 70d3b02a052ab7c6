# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Pre-processing: images of true proportions, and the same pixels in an exported graph as in the model.

anomalib switches antialiasing off for exports, so that an exported model sees other pixels than the one that was
tested. Resizing is linear and separable: two matrix products do the same, exactly, in any runtime.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize, Transform
from torchvision.transforms.v2.functional import get_size, normalize

from anomalib_fbclip.clip.frozen import CLIP_MEAN, CLIP_STD

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "RESIZES",
    "ExactPreProcessor",
    "FittingResize",
    "KeepProportions",
    "TileCanvas",
    "linear_matrix",
    "resize_images",
    "resize_matrix",
]

RESIZES = ("squash", "keep")
"""What becomes of an image's proportions: those of ``image_size``, as in the papers, or its own."""
_NEAR = 0.2  # how far the number of patches may be from that of image_size

Kernel = Callable[[torch.Tensor], torch.Tensor]
"""Distances in units of the kernel's scale, not negative, to weights."""

_CUBIC = -0.5  # the a of Keys' kernel in PyTorch's antialiased resize; without antialiasing it takes -0.75


def _cubic(x: torch.Tensor) -> torch.Tensor:
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _linear(x: torch.Tensor) -> torch.Tensor:
    return (1 - x).clamp(min=0)


class FittingResize(Resize):
    """Antialiased bicubic resize to a size that depends on the image's.

    anomalib resizes an image where it is read, and again in the batch: :meth:`fit` must leave its own results alone.

    Args:
        size: Height and width that stand for all others in log lines and anomalib's comparisons.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size, antialias=True, interpolation=InterpolationMode.BICUBIC)

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of these is resized to."""
        raise NotImplementedError

    def forward(self, *inputs: Any) -> Any:  # noqa: ANN401  # images, masks, or structures of them
        """Resize images, the first of the inputs, and masks (nearest) like them."""
        size = self.fit(*get_size(inputs[0]))
        return Resize(size, antialias=True, interpolation=InterpolationMode.BICUBIC)(*inputs)


class KeepProportions(FittingResize):
    """Resize to about the number of patches of a given size, in the image's own proportions.

    Of all grids whose number of patches is within a fifth of the wanted, the one nearest to the image's proportions is
    taken. So a square image gets the size itself if that is square, and an image that was resized once stays as it is.

    Args:
        size: Height and width whose number of patches is wanted, multiples of ``patch_size``.
        patch_size: Side of a patch in pixels.
    """

    def __init__(self, size: tuple[int, int], patch_size: int) -> None:
        super().__init__(size)
        self.patch_size = patch_size

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of these is resized to."""
        rows, columns = _nearest_grid(height / width, self.size[0] * self.size[1] // self.patch_size**2)
        return rows * self.patch_size, columns * self.patch_size


@lru_cache(maxsize=1024)
def _nearest_grid(proportion: float, count: int) -> tuple[int, int]:
    """Rows and columns of about ``count`` patches whose quotient is next to ``proportion``."""
    low, high = math.ceil((1 - _NEAR) * count), math.floor((1 + _NEAR) * count)
    grids = [
        (rows, min(max(int(rows / proportion) + more, -(-low // rows)), high // rows))
        for rows in range(1, high + 1)
        for more in (0, 1)
        if -(-low // rows) <= high // rows
    ]

    def rank(grid: tuple[int, int]) -> tuple[float, int]:
        # Several sizes may have the same proportions, and rounding must not choose among them.
        return round(abs(math.log(grid[0] / grid[1] / proportion)), 9), abs(math.prod(grid) - count)

    return min(grids, key=rank)


class TileCanvas(Transform):
    """Reduce an image to the size that its tiles are cut at.

    It is no ``Resize``, or anomalib would apply it twice, where an image is read and in the batch.

    Args:
        fit: Height and width of an image to those of its canvas, see :meth:`Tiling.canvas`.
    """

    def __init__(self, fit: Callable[[int, int], tuple[int, int]]) -> None:
        super().__init__()
        self.fit = fit

    def forward(self, *inputs: Any) -> Any:  # noqa: ANN401  # images, masks, or structures of them
        """Resize images, the first of the inputs, and masks (nearest) like them."""
        before = tuple(get_size(inputs[0]))
        size = self.fit(*before)
        resize = Resize(size, antialias=True, interpolation=InterpolationMode.BICUBIC)
        return resize(*inputs) if size != before else inputs if len(inputs) > 1 else inputs[0]


def squash(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> "ExactPreProcessor":
    """Resize (bicubic, antialiased, without keeping the aspect ratio) and normalise.

    Args:
        size: Height and width in pixels.
        mean: Mean of each colour.
        std: Standard deviation of each colour.
    """
    resize = Resize(size, antialias=True, interpolation=InterpolationMode.BICUBIC)
    return ExactPreProcessor(transform=Compose([resize, Normalize(mean=mean, std=std)]))


class ExactPreProcessor(PreProcessor):
    """anomalib's pre-processor, whose export keeps the antialiased resize.

    Outside of an export the transform itself is applied. In an exported graph, an antialiased bicubic resize to a fixed
    size becomes two matrices: constants where the input size is fixed, computed in the graph where it is not.
    """

    @property
    def fits_images(self) -> bool:
        """Whether the size of an image after the resize depends on its size before."""
        return any(isinstance(step, (FittingResize, TileCanvas)) for step in getattr(self.transform, "transforms", ()))

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Pre-process a batch; one that is cut into tiles in its own memory, as the loader keeps a large image."""
        steps = getattr(self.transform, "transforms", [])
        if len(steps) == 2 and isinstance(steps[0], TileCanvas) and isinstance(steps[1], Normalize):
            batch.image, batch.gt_mask = steps[0](batch.image, batch.gt_mask)
            batch.image = normalize(batch.image, list(steps[1].mean), list(steps[1].std), inplace=True)
        else:
            super().on_predict_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def checkpoint_config(self) -> dict[str, Any]:
        """What a checkpoint keeps; of a resize of ours nothing, for the model's arguments say it."""
        return {} if self.fits_images else super().checkpoint_config()

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take the transform of a checkpoint that holds one."""
        if "transform" in config:
            super().load_checkpoint_config(config)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Pre-process raw images ``[B, 3, H, W]`` in [0, 1]."""
        if self.transform is None:
            return batch
        if not torch.compiler.is_exporting():
            return self.transform(batch)
        for step in _normalize_first(self.transform):
            if isinstance(step, (FittingResize, TileCanvas)):
                batch = resize_images(batch, *step.fit(*batch.shape[-2:]))
            else:
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


def linear_matrix(size_in: int, size_out: int) -> torch.Tensor:
    """Matrix ``[size_out, size_in]`` of the antialiased bilinear resize along one axis; not negative, rows sum to 1."""
    return _matrix(torch.arange(1, size_in + 1, dtype=torch.float64), size_out, torch.float64, _linear).float()


def resize_images(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Antialiased bicubic resize of images ``[B, 3, H, W]`` in two matrix products, the same in any runtime."""
    return images if images.shape[-2:] == (height, width) else _resize(images, height, width)


def _matrix(
    places: torch.Tensor,
    size_out: int,
    dtype: torch.dtype,
    kernel: Kernel = _cubic,
) -> torch.Tensor:
    """Matrix from the places 1, 2, ..., ``size_in`` of the pixels.

    Distances of pixel centres are whole numbers over one denominator, and are subtracted as such: a runtime that
    computes in bfloat16 knows no odd number above 256.
    """
    size_in = places[-1]
    centres = (2 * torch.arange(size_out, dtype=places.dtype) + 1)[:, None] * size_in
    x = ((2 * places - 1)[None] * size_out - centres).abs().to(dtype) / (2 * size_in.clamp(min=size_out)).to(dtype)
    weights = kernel(x)
    return weights / weights.sum(dim=1, keepdim=True)


def _resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows = resize_matrix(images.shape[-2], height).to(images)
    columns = resize_matrix(images.shape[-1], width).to(images)
    return rows @ (images @ columns.T)


def statistics_of(pre_processor: object) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of each colour that a pre-processor normalises with; ``None`` where it does not."""
    for step in _steps(getattr(pre_processor, "transform", None)):
        if isinstance(step, Normalize):
            return tuple(map(float, step.mean)), tuple(map(float, step.std))
    return None


def _steps(transform: object) -> list[Any]:
    return list(transform.transforms) if isinstance(transform, Compose) else [transform]


def _normalize_first(transform: Transform) -> list[Transform]:
    """Steps of a transform, in the graph's order.

    The rows of a resize sum to 1, so a normalisation may come before it as well as after it. OpenVINO's CPU plug-in
    fuses one that comes after into the matrix product and then stops, because its channels are not the product's.
    """
    steps = _steps(transform)
    for index in range(len(steps) - 1):
        if _is_exact_resize(steps[index]) and isinstance(steps[index + 1], Normalize):
            steps[index : index + 2] = steps[index + 1], steps[index]
    return steps


def _is_exact_resize(step: object) -> bool:
    return isinstance(step, TileCanvas) or (
        isinstance(step, Resize)
        and step.interpolation is InterpolationMode.BICUBIC
        and bool(step.antialias)
        and step.size is not None
        and len(step.size) == 2
    )
