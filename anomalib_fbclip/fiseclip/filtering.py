# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The text side (FiSeCLIP, https://arxiv.org/abs/2507.11003; our reading, see the README beside this file).

Probabilities of patches, refined within the image, decide what may serve as a reference. Axes: B images, L patches, d
width of the joint space. The literal forms are fast as they are.
"""

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import is_exporting


def abnormal_probability(joint: torch.Tensor, text_features: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probability of "abnormal" of each token (softmax over two cosines).

    Args:
        joint: Tokens in the joint space ``[..., d]``.
        text_features: ``[2, d]`` of unit length, normal first; or ``[B, 2, d]``, one pair an image of ``[B, N, d]``.
        temperature: Divides the cosines.

    Returns:
        torch.Tensor: ``[...]`` in [0, 1].
    """
    similarity = F.normalize(joint, dim=-1) @ text_features.transpose(-1, -2)
    return (similarity / temperature).softmax(dim=-1)[..., 1]


def refine(probability: torch.Tensor, joint: torch.Tensor, share: float) -> torch.Tensor:
    """Average the text map over each patch's most similar patches of the same image, itself included.

    Args:
        probability: ``[B, L]``.
        joint: The patches' restored tokens ``[B, L, d]``.
        share: Share of the image's patches that is averaged; at least one patch, so that 0 changes nothing.

    Returns:
        torch.Tensor: ``[B, L]``.
    """
    count = max(1, round(share * probability.shape[1]))
    if count == 1:
        return probability
    # One image's [L, L] at a time; an exported graph knows no number of images and takes them together.
    tokens = F.normalize(joint, dim=-1)
    if is_exporting():
        return _average_of_similar(tokens, probability, count)
    parts = zip(tokens.split(1), probability.split(1), strict=True)
    return torch.cat([_average_of_similar(*part, count) for part in parts])


def _average_of_similar(tokens: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    similar = (tokens @ tokens.transpose(1, 2)).topk(count, dim=-1).indices  # [B, L, count]
    return values[:, None].expand(-1, values.shape[1], -1).gather(2, similar).mean(dim=-1)


def reference_mask(probability: torch.Tensor, share: float) -> torch.Tensor:
    """Which patches of an image may serve as references: all but the top share of the refined text map.

    Args:
        probability: Refined text map ``[B, L]``.
        share: Share of the patches that is left out, at most one half.

    Returns:
        torch.Tensor: Boolean ``[B, L]``, True for what stays; at least half of each row.
    """
    dropped = int(share * probability.shape[1])
    mask = torch.ones_like(probability, dtype=torch.bool)
    if dropped:
        # Patches that are each other's most similar ones tie exactly: a stable order decides alike everywhere.
        order = probability.argsort(dim=-1, descending=True, stable=True)
        mask.scatter_(1, order[:, :dropped], value=False)
    return mask
