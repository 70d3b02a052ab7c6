# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Background prototype and suppression (paper, eq. 24-31)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

BANKS = ("half", "full")
_EPS = 1e-8


def background_prototype(features: Sequence[torch.Tensor], bank: str = "half") -> torch.Tensor:
    """Prototype of the background over all layers and views.

    Args:
        features: Attended features, each ``[B, N, D]`` with N = 1 + L tokens, class token first.
        bank: ``"half"``: the first ``N // 2`` tokens of each feature, that is the class token and the upper half of
            the image; ``"full"``: all N (paper, Table 5).

    Returns:
        torch.Tensor: ``[B, D]``, half the mean plus half the maximum over the bank.
    """
    count = features[0].shape[1]
    # A single patch leaves the class token: an empty bank has no mean.
    kept = max(count // 2, 1) if bank == "half" else count
    mean = torch.stack([feature[:, :kept].mean(dim=1) for feature in features]).mean(dim=0)
    peak = torch.stack([feature[:, :kept].amax(dim=1) for feature in features]).amax(dim=0)
    return 0.5 * mean + 0.5 * peak


def suppress_background(feature: torch.Tensor, prototype: torch.Tensor) -> torch.Tensor:
    """Move each token away from the background prototype, the more the less it resembles it.

    Args:
        feature: Attended tokens ``[B, N, D]``.
        prototype: Background prototype ``[B, D]``.

    Returns:
        torch.Tensor: ``0.5 F + 0.5 (F - prototype)(1 - cos(F, prototype))``, ``[B, N, D]``.
    """
    prototype = prototype[:, None]
    weight = 1 - F.cosine_similarity(feature, prototype, dim=-1)[..., None]
    return 0.5 * feature + 0.5 * (feature - prototype) * weight


def suppressed_similarity(
    feature: torch.Tensor,
    prototype: torch.Tensor | None,
    projection: torch.Tensor,
    texts: torch.Tensor,
) -> torch.Tensor:
    """Cosine of the suppressed, projected tokens with the text features, without building those tokens.

    Suppression gives ``a F - b P`` with two numbers a, b for each token, so the projected token's dot products and its
    norm follow from those of the projected F and P.

    Args:
        feature: Attended tokens ``[B, N, D]``.
        prototype: Background prototype ``[B, D]``; ``None``: no suppression.
        projection: CLIP's visual projection ``[D, d]``.
        texts: Text features ``[2, d]``, of unit length.

    Returns:
        torch.Tensor: ``[B, N, 2]``, in float32.
    """
    joint = (feature @ projection).float()
    texts = texts.float()
    with torch.autocast(joint.device.type, enabled=False):
        if prototype is None:
            return F.normalize(joint, dim=-1) @ texts.T
        feature, prototype = feature.float(), prototype.float()
        norms = (
            feature.norm(dim=-1, keepdim=True).clamp(min=_EPS) * prototype.norm(dim=-1).clamp(min=_EPS)[:, None, None]
        )
        weight = 1 - feature @ prototype[..., None] / norms
        a, b = 0.5 + 0.5 * weight, 0.5 * weight  # [B, N, 1]
        point = prototype @ projection.float()  # [B, d]
        along_texts = a * (joint @ texts.T) - b * (point @ texts.T)[:, None]
        along_point = joint @ point[..., None]
        square = a * a * joint.square().sum(dim=-1, keepdim=True) - 2 * a * b * along_point
        square = square + b * b * point.square().sum(dim=-1)[:, None, None]
        return along_texts / square.clamp(min=_EPS**2).sqrt()
