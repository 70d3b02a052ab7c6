# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Background prototype and suppression (FB-CLIP, https://arxiv.org/abs/2603.19608, eq. 24-31).

Axes: B images, N = 1 + L tokens, class token first, D width of the visual tokens. The literal forms are fast as they
are. :func:`suppress_background` is linear in feature and prototype for a given weight, so a projection may come before
it as well as after it: ``project(suppress(F, P, w)) = suppress(project(F), project(P), w)``. The model projects first,
as it then projects the prototype once and holds no suppressed tokens of width D.
"""

from collections.abc import Sequence

import torch

BANKS = ("half", "full")
_EPS = 1e-8


def background_prototype(features: Sequence[torch.Tensor], bank: str = "half") -> torch.Tensor:
    """Prototype of the background over all blocks and views (eq. 24-26).

    Args:
        features: Attended features, each ``[B, N, D]``.
        bank: ``"half"``: the first ``N // 2`` tokens of each feature, that is the class token and the upper half of
            the image; ``"full"``: all N (paper, Table 5).

    Returns:
        torch.Tensor: ``[B, D]``, half the mean plus half the maximum over the bank.
    """
    count = features[0].shape[1]
    # A single patch leaves the class token: an empty bank has no mean.
    kept = max(count // 2, 1) if bank == "half" else count  # eq. 24
    # Mean and maximum of the concatenated bank (eq. 25), without the concatenation.
    mean = torch.stack([feature[:, :kept].mean(dim=1) for feature in features]).mean(dim=0)
    peak = torch.stack([feature[:, :kept].amax(dim=1) for feature in features]).amax(dim=0)
    return 0.5 * mean + 0.5 * peak  # eq. 26


def background_dissimilarity(feature: torch.Tensor, prototype: torch.Tensor) -> torch.Tensor:
    """Weight of each token in the suppression: ``1 - cos`` to the prototype (eq. 27, 30).

    Args:
        feature: Attended tokens ``[B, N, D]``.
        prototype: Background prototype ``[B, D]``.

    Returns:
        torch.Tensor: ``[B, N, 1]`` in [0, 2].
    """
    norms = feature.norm(dim=-1, keepdim=True) * prototype.norm(dim=-1)[:, None, None]  # [B, N, 1]
    return 1 - feature @ prototype[..., None] / norms.clamp(min=_EPS)


def suppress_background(feature: torch.Tensor, prototype: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Move each token away from the background prototype (eq. 28, 30-31).

    Args:
        feature: Attended tokens ``[B, N, D]``, or their projections.
        prototype: Background prototype ``[B, D]``, or its projection.
        weight: See :func:`background_dissimilarity`, ``[B, N, 1]``.

    Returns:
        torch.Tensor: Of the shape of ``feature``.
    """
    anomaly = feature - prototype[:, None]  # eq. 28; its norm, the reconstruction error of eq. 29, enters no score
    return torch.addcmul(feature, anomaly, weight).mul_(0.5)  # eq. 30-31: 0.5 F + 0.5 A weight, one tensor less
