# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Losses on probabilities that several models share."""

import torch


def focal_loss(probability: torch.Tensor, target: torch.Tensor, gamma: float = 4.0) -> torch.Tensor:
    """Mean of ``-(1 - p_t)^gamma log(p_t)``, p_t the probability of the true class.

    Args:
        probability: Abnormal probability of any shape, in [0, 1].
        target: The same shape, 0 or 1.
        gamma: How strongly easy pixels are weighted down.
    """
    of_truth = torch.where(target > 0.5, probability, 1 - probability)
    return ((1 - of_truth) ** gamma * -torch.log(of_truth.clamp(min=1e-8))).mean()


def dice_loss(probability: torch.Tensor, target: torch.Tensor, smooth: float = 1.0) -> torch.Tensor:
    """One minus the dice overlap of maps ``[B, H, W]``, for each image, then their mean."""
    overlap = (probability * target).sum(dim=(-2, -1))
    total = probability.sum(dim=(-2, -1)) + target.sum(dim=(-2, -1))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()
