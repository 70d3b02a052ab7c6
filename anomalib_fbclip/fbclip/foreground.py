# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Foreground soft mask from four cues of the tokens (paper, eq. 7-8 and 38-44)."""

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.functional import min_max_normalize

CUE_WEIGHTS = (0.3, 0.3, 0.3, 0.1)
"""Local saliency, centre distance, class-token inconsistency, temporal variation."""

BACKGROUND = 0.5
"""Mask value of a background patch, and the score above which a patch is foreground (mask 1)."""


def foreground_cues(tokens: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
    """The four cues of one layer, before normalisation.

    Args:
        tokens: Tokens of this layer ``[B, 1 + L, D]``, class token first.
        previous: Tokens of the selected layer before, ``None`` for the first.

    Returns:
        torch.Tensor: ``[4, B, L]``: distance to the mean of three raster neighbours (the zero padding counts),
            distance to the image's mean patch, ``1 - cos`` to the class token, distance to the layer before (or 0).
    """
    class_token, patches = tokens[:, :1], tokens[:, 1:]
    padded = F.pad(patches, (0, 0, 1, 1))
    neighbours = (padded[:, :-2] + patches + padded[:, 2:]) / 3
    local_saliency = (patches - neighbours).norm(dim=-1)
    centre_distance = (patches - patches.mean(dim=1, keepdim=True)).norm(dim=-1)
    inconsistency = 1 - F.cosine_similarity(patches, class_token, dim=-1)
    variation = torch.zeros_like(inconsistency) if previous is None else (patches - previous[:, 1:]).norm(dim=-1)
    return torch.stack((local_saliency, centre_distance, inconsistency, variation))


def smooth_raster(scores: torch.Tensor, width: int = 5) -> torch.Tensor:
    """Box filter along the raster sequence ``[B, L]``, mirrored at the ends.

    A sequence shorter than the mirror repeats its end instead: torch cannot reflect it, and the paper never meets it.
    """
    mode = "reflect" if scores.shape[-1] > width // 2 else "replicate"
    padded = F.pad(scores[:, None], (width // 2, width // 2), mode=mode)
    return F.avg_pool1d(padded, width, stride=1)[:, 0]


def foreground_mask(tokens: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
    """Soft mask of one layer.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``, class token first.
        previous: Tokens of the selected layer before, ``None`` for the first.

    Returns:
        torch.Tensor: ``[B, L]``, 1.0 for foreground and 0.5 for background patches.
    """
    cues = foreground_cues(tokens, previous)
    score = sum(weight * min_max_normalize(cue) for weight, cue in zip(CUE_WEIGHTS, cues, strict=True))
    return torch.where(smooth_raster(score) > BACKGROUND, 1.0, BACKGROUND).to(tokens.dtype)
