# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Foreground soft mask (FB-CLIP, https://arxiv.org/abs/2603.19608, eq. 7-8 and 38-44).

Axes: B images, L patches in raster order, D width of the visual tokens. The class token comes first in every token set.
The literal form is fast as it is; there is no other.
"""

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import min_max_normalize

CUE_WEIGHTS = (0.3, 0.3, 0.3, 0.1)
"""Weights of local saliency, centre distance, class-token inconsistency and temporal variation (eq. 7)."""

FOREGROUND_THRESHOLD = 0.5
"""Score above which a patch is foreground (eq. 8)."""

BACKGROUND_VALUE = 0.5
"""Mask value of a background patch; that of a foreground patch is 1 (eq. 8)."""

_EPS = 1e-8


def foreground_mask(tokens: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
    """Soft mask of one block (eq. 7-8): 1 where the weighted, smoothed cues are above the threshold.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``.
        previous: Tokens of the selected block before, ``None`` for the first.

    Returns:
        torch.Tensor: ``[B, L]``, 1.0 for foreground and 0.5 for background patches.
    """
    cues = foreground_cues(tokens, previous)  # [4, B, L]
    score = sum(weight * min_max_normalize(cue) for weight, cue in zip(CUE_WEIGHTS, cues, strict=True))  # eq. 43, 7
    return torch.where(smooth_raster(score) > FOREGROUND_THRESHOLD, 1.0, BACKGROUND_VALUE).to(tokens.dtype)  # eq. 8


def foreground_cues(tokens: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
    """The four cues of one block (eq. 38-42), before normalisation.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``.
        previous: Tokens of the selected block before, ``None`` for the first.

    Returns:
        torch.Tensor: ``[4, B, L]``: distance to the mean of three raster neighbours (the zero padding counts),
        distance to the image's mean patch, ``1 - cos`` to the class token, distance to the block before (or 0).
    """
    patches = tokens[:, 1:]
    padded = F.pad(patches, (0, 0, 1, 1))
    # In place: three tensors of the tokens' size less.
    neighbours = (padded[:, :-2] + patches).add_(padded[:, 2:]).div_(3)
    local_saliency = neighbours.sub_(patches).norm(dim=-1)  # eq. 38
    centre_distance = (patches - patches.mean(dim=1, keepdim=True)).norm(dim=-1)  # eq. 39-40
    inconsistency = 1 - class_similarity(tokens)  # eq. 41
    variation = torch.zeros_like(inconsistency) if previous is None else (patches - previous[:, 1:]).norm(dim=-1)
    return torch.stack((local_saliency, centre_distance, inconsistency, variation))


def class_similarity(tokens: torch.Tensor) -> torch.Tensor:
    """Cosine of each patch and the class token ``[B, L]``, of tokens ``[B, 1 + L, D]``.

    ``cosine_similarity`` would divide both by their norms first, patch by patch.
    """
    norms = tokens.norm(dim=-1).clamp(min=_EPS)
    return (tokens[:, 1:] @ tokens[:, 0, :, None])[..., 0] / (norms[:, 1:] * norms[:, :1])


def smooth_raster(scores: torch.Tensor, width: int = 5) -> torch.Tensor:
    """Box filter along the raster sequence ``[B, L]``, mirrored at the ends.

    A sequence shorter than the mirror repeats its end instead: torch cannot reflect it, and the paper never meets it.
    """
    mode = "reflect" if scores.shape[-1] > width // 2 else "replicate"
    padded = F.pad(scores[:, None], (width // 2, width // 2), mode=mode)
    return F.avg_pool1d(padded, width, stride=1)[:, 0]
