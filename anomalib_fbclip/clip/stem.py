# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Patch embedding that adds the features of a small convolutional network, for the embedded backbone.

The network is the beginning of EfficientNet-Lite0 (strides 8 and 16), with its normalisation layers folded into its
convolutions. A vision transformer on top of convolutional features is the hybrid of Dosovitskiy et al., "An image is
worth 16x16 words" (ICLR 2021, https://arxiv.org/abs/2010.11929).
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

FIRST = 32
BLOCKS = (
    *((16, 3, 1, 1), (24, 3, 2, 6), (24, 3, 1, 6), (40, 5, 2, 6), (40, 5, 1, 6)),
    *((80, 3, 2, 6), (80, 3, 1, 6), (80, 3, 1, 6), (112, 5, 1, 6), (112, 5, 1, 6), (112, 5, 1, 6)),
)
"""EfficientNet-Lite0 up to stride 16: (channels out, kernel, stride, factor of the inner channels) of each block."""
FINE = 5
"""Blocks after which the stride is 8."""
STRIDE = 8
"""Side of a patch, so that the features after :data:`FINE` blocks lie on the grid of the patches."""


class SameConv2d(nn.Conv2d):
    """Convolution whose output has side ``ceil(side / stride)``: an odd padding goes to the right and the bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pad and convolve ``[B, C, H, W]``."""
        pads = []
        for side in (x.shape[-1], x.shape[-2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


class InvertedResidual(nn.Module):
    """Expand, convolve each channel by itself, project; the input is added where the shapes agree.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output.
        kernel: Side of the kernels.
        stride: 1 or 2.
        factor: Inner channels over ``width_in``; 1: no expansion.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, factor: int) -> None:
        super().__init__()
        inner = width_in * factor
        self.expand = nn.Conv2d(width_in, inner, 1) if factor > 1 else None
        convolution = SameConv2d if stride > 1 else nn.Conv2d
        padding = 0 if stride > 1 else kernel // 2
        self.depth = convolution(inner, inner, kernel, stride, padding, groups=inner)
        self.project = nn.Conv2d(inner, width_out, 1)
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to ``[B, C', H / stride, W / stride]``."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depth(inner)))
        return out + x if self.residual else out


def network_features(
    first: nn.Module,
    blocks: nn.Sequential,
    images: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the network at strides 8 and 16, ``[B, 40, H / 8, W / 8]`` and ``[B, 112, H / 16, W / 16]``.

    Args:
        first: First convolution.
        blocks: Blocks after it, see :data:`BLOCKS`.
        images: Images ``[B, 3, H, W]`` normalised with CLIP's statistics.
    """
    fine = blocks[:FINE](F.relu6(first(images)))
    return fine, blocks[FINE:](fine)


class StemmedPatches(nn.Conv2d):
    """CLIP's patch embedding, plus linear maps of a convolutional network's features.

    It takes the place of a vision tower's ``conv1``; its own weight is the patches'.

    Args:
        width: Width D of the tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__(3, width, STRIDE, STRIDE, bias=False)
        self.first = SameConv2d(3, FIRST, 3, 2)
        blocks, before = [], FIRST
        for channels, kernel, stride, factor in BLOCKS:
            blocks.append(InvertedResidual(before, channels, kernel, stride, factor))
            before = channels
        self.blocks = nn.Sequential(*blocks)
        self.fine = nn.Conv2d(BLOCKS[FINE - 1][0], width, 1, bias=False)
        self.coarse = nn.Conv2d(before, width, 1, bias=False)

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's features of normalised images, at strides 8 and 16."""
        return network_features(self.first, self.blocks, images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images ``[B, 3, H, W]`` to patches ``[B, D, H / 8, W / 8]``."""
        fine, coarse = self.features(images)
        patches = super().forward(images) + self.fine(fine)
        coarse = F.interpolate(self.coarse(coarse), size=patches.shape[-2:], mode="bilinear", align_corners=False)
        return patches + coarse


def local_width(visual: nn.Module) -> int:
    """Width of :func:`local_features` of a vision tower; 0 where no network is under its patches."""
    patches = visual.conv1
    return patches.fine.in_channels + patches.coarse.in_channels if isinstance(patches, StemmedPatches) else 0


@torch.no_grad()
def local_features(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The network's features around each patch: both strides joined, each the mean of 3 x 3 places.

    These are the locally aware patch features of PatchCore (CVPR 2022, https://arxiv.org/abs/2106.08265, eq. 2).

    Args:
        visual: Vision tower with a :class:`StemmedPatches`.
        images: Normalised images ``[B, 3, H, W]``.

    Returns:
        torch.Tensor: ``[B, 1 + H / 8 * W / 8, 152]``, zeros in the place of the class token.
    """
    fine, coarse = visual.conv1.features(images.to(visual.conv1.weight.dtype))
    fine, coarse = (F.avg_pool2d(each, 3, stride=1, padding=1) for each in (fine, coarse))
    coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
    return F.pad(torch.cat((fine, coarse), dim=1).flatten(2).mT, (0, 0, 1, 0))
