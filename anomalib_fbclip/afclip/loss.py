# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Focal, L1 and patch alignment losses (AF-CLIP, https://arxiv.org/abs/2507.19949).

Axes: B images, M token sets (blocks and windows), L patches of a g x g grid, d width of the joint space.
:func:`pairwise_alignment` is the equation. :func:`alignment` gives the same without L x L similarities: the sum over
pairs of two groups is the product of the groups' sums.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import Grid, grid_of
from anomalib_fbclip.common.losses import focal_loss


def pairwise_alignment(tokens: torch.Tensor, defective: torch.Tensor) -> torch.Tensor:
    """Mean cosine of pairs of unlike patches minus that of pairs of like patches, not below 0; mean over token sets.

    Pairs are those within one image, each patch with itself included; images are taken together.

    Args:
        tokens: Projected patch tokens ``[B, M, L, d]``.
        defective: 1 for anomalous patches, else 0, ``[B, L]``.

    Returns:
        torch.Tensor: A scalar; 0 where there are no unlike pairs.
    """
    unlike = defective[:, :, None] != defective[:, None, :]  # [B, L, L]
    if not unlike.any():
        return tokens.sum() * 0
    unit = F.normalize(tokens, dim=-1)
    sets = []
    for each in unit.unbind(dim=1):
        cosine = each @ each.mT  # [B, L, L]
        sets.append((cosine[unlike].mean() - cosine[~unlike].mean()).clamp(min=0))
    return torch.stack(sets).mean()


def alignment(tokens: torch.Tensor, defective: torch.Tensor) -> torch.Tensor:
    """Fast form of :func:`pairwise_alignment`."""
    groups = torch.stack((1 - defective, defective), dim=1)  # [B, 2, L]
    sizes = groups.sum(dim=-1)  # [B, 2]
    # Without unlike pairs their sum of cosines is 0, and with it the result: no branch that waits for the device.
    unlike_pairs = (2 * sizes.prod(dim=-1)).sum().clamp(min=1)
    sums = groups[:, None] @ F.normalize(tokens, dim=-1)  # [B, M, 2, d]
    normal, abnormal = sums.unbind(dim=2)
    unlike = 2 * (normal * abnormal).sum(dim=(0, 2)) / unlike_pairs  # [M]
    like = sums.square().sum(dim=(0, 2, 3)) / sizes.square().sum()
    return (unlike - like).clamp(min=0).mean()


class AFCLIPLoss(nn.Module):
    """The training loss.

    Args:
        focal_gamma: Exponent of both focal losses.
        alignment_weight: Weight of the patch alignment loss; 0 switches it off.
        literal: Compare all pairs of patches, see :func:`pairwise_alignment`.

    Raises:
        ValueError: If a number is negative.
    """

    def __init__(self, focal_gamma: float = 4.0, alignment_weight: float = 1.0, literal: bool = False) -> None:
        super().__init__()
        for name, value in (("focal_gamma", focal_gamma), ("alignment_weight", alignment_weight)):
            if value < 0:
                msg = f"{name}={value} is negative: give 0 or more."
                raise ValueError(msg)
        self.focal_gamma = focal_gamma
        self.alignment_weight = alignment_weight
        self.alignment = pairwise_alignment if literal else alignment

    def forward(
        self,
        pred_score: torch.Tensor,
        anomaly_map: torch.Tensor,
        labels: torch.Tensor,
        masks: torch.Tensor | None,
        patch_probability: torch.Tensor,
        joint_tokens: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Loss parts, weighted, and their sum.

        Args:
            pred_score: Abnormal probability of the images ``[B]``.
            anomaly_map: Not used: map and mask are compared on the grid of patches.
            labels: 0 normal, 1 anomalous, ``[B]``.
            masks: 0 normal, 1 anomalous, ``[B, H, W]``, of the proportions of the images. ``None``: the losses of
                patches are left out.
            patch_probability: Abnormal probability of the patches ``[B, L]``.
            joint_tokens: Projected patch tokens ``[B, M, L, d]``.

        Returns:
            dict[str, torch.Tensor]: ``image``, ``focal``, ``l1``, ``alignment`` as far as they apply, and ``total``.
        """
        del anomaly_map
        parts = {"image": focal_loss(pred_score, labels.to(pred_score.dtype), self.focal_gamma)}
        if masks is not None:
            grid = grid_of(patch_probability.shape[1], masks.shape[-2:])
            target = grid_mask(masks, grid).flatten(1).to(patch_probability.dtype)
            parts["focal"] = focal_loss(patch_probability, target, self.focal_gamma)
            parts["l1"] = (patch_probability - target).abs().mean()
            if self.alignment_weight:
                parts["alignment"] = self.alignment_weight * self.alignment(joint_tokens, target)
        parts["total"] = torch.stack(list(parts.values())).sum()
        return parts


def grid_mask(masks: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Masks ``[B, H, W]`` on the grid of patches ``[B, g_h, g_w]``: bilinear, cut at 0.5."""
    masks = masks.float().reshape(-1, 1, *masks.shape[-2:])
    return (F.interpolate(masks, size=grid, mode="bilinear", align_corners=False)[:, 0] > 0.5).float()
