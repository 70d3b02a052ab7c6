# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Matching and text together (FiSeCLIP, https://arxiv.org/abs/2507.11003; our reading, see the README beside).

Distances weighted by the text, and a scale on which 0.5 is a usable threshold. Axes: B images, P images of batch and
bank, L patches. The literal forms are fast as they are.
"""

import torch

CONTRAST = 4.0
"""Steepness of the scale: half and twice the threshold's distance become 0.06 and 0.94."""
MIN_DISTANCE = 1e-3
"""Least distance that counts as abnormal, so that the noise between equal images is none."""


def weigh_by_text(distances: torch.Tensor, probability: torch.Tensor, weight: float) -> torch.Tensor:
    """Distances times ``1 + weight * (2 p - 1)``.

    The text raises or lowers what matching found and adds nothing to it: a patch that matches everywhere has distance 0
    and stays normal whatever the text says.

    Args:
        distances: ``[B, L]``, not negative.
        probability: Refined text map ``[B, L]`` in [0, 1]; 0.5 changes nothing.
        weight: In [0, 1].
    """
    return distances * (1 + weight * (2 * probability - 1))


def normal_limit(distances: torch.Tensor, deviations: float) -> torch.Tensor:
    """The distance at which a patch counts as abnormal: median + deviations * 1.4826 * median absolute deviation.

    Both medians stay where they are as long as less than half of the patches are anomalous.

    Args:
        distances: Weighted distances of all images at hand ``[P, L]``; NaN for those that have none.
        deviations: How many (robust) standard deviations above the median.

    Returns:
        torch.Tensor: Scalar, at least :data:`MIN_DISTANCE`; NaN where all are.
    """
    median = distances.nanmedian()
    spread = (distances - median).abs().nanmedian()
    return (median + deviations * 1.4826 * spread).clamp(min=MIN_DISTANCE)


def to_probability(distances: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Put distances on [0, 1]: 0 stays 0, the limit becomes 0.5; the order never changes."""
    ratio = (distances / limit) ** CONTRAST
    return ratio / (1 + ratio)


def image_score(class_probability: torch.Tensor, grid_map: torch.Tensor, class_weight: float) -> torch.Tensor:
    """Weighted mean of the class token's text probability and the largest map value.

    Args:
        class_probability: ``[B]`` in [0, 1].
        grid_map: ``[B, L]`` in [0, 1].
        class_weight: Weight of the class token in [0, 1].

    Returns:
        torch.Tensor: ``[B]`` in [0, 1].
    """
    return class_weight * class_probability + (1 - class_weight) * grid_map.amax(dim=1)
