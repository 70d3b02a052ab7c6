# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Background prototype and suppression (paper, eq. 24-31)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

BANKS = ("half", "full")


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
