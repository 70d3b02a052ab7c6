# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Focal, dice and semantic consistency losses (FB-CLIP, https://arxiv.org/abs/2603.19608, eq. 32-37 and section 3.5).

Axes: B images, H and W pixels. The literal forms are fast as they are.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.losses import dice_loss, focal_loss


def semantic_consistency_loss(similarity: torch.Tensor, margin_weight: float = 0.5) -> torch.Tensor:
    """SCR: the image's mean feature should be near one of the two texts and not between them (eq. 34-37).

    Args:
        similarity: Cosine over temperature of the mean feature and both texts ``[B, 2]`` (eq. 32-33).
        margin_weight: Weight of the margin between the two.

    Returns:
        torch.Tensor: Entropy plus weighted margin, mean over the batch.
    """
    probability = similarity.softmax(dim=-1)  # eq. 34
    entropy = -(probability * (probability + 1e-8).log()).sum(dim=-1)  # eq. 35
    margin = F.relu(1 - (similarity[:, 1] - similarity[:, 0]).abs())  # eq. 36
    return (entropy + margin_weight * margin).mean()  # eq. 37


class FBCLIPLoss(nn.Module):
    """The training loss.

    Args:
        focal_gamma: Exponent of both focal losses.
        dice_weight: Weight of the dice loss.
        scr_weight: Weight of the semantic consistency loss; 0 switches it off (paper, Table 5).
    """

    def __init__(self, focal_gamma: float = 4.0, dice_weight: float = 0.2, scr_weight: float = 0.15) -> None:
        super().__init__()
        for name, value in (("focal_gamma", focal_gamma), ("dice_weight", dice_weight), ("scr_weight", scr_weight)):
            if value < 0:
                msg = f"{name}={value} is negative: give 0 or more."
                raise ValueError(msg)
        self.focal_gamma = focal_gamma
        self.dice_weight = dice_weight
        self.scr_weight = scr_weight

    def forward(
        self,
        pred_score: torch.Tensor,
        anomaly_map: torch.Tensor,
        similarity: torch.Tensor,
        labels: torch.Tensor,
        masks: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Loss parts, weighted, and their sum.

        Args:
            pred_score: Abnormal probability of the images ``[B]``.
            anomaly_map: Up-sampled, unsmoothed map ``[B, H, W]``.
            similarity: See :func:`semantic_consistency_loss`, ``[B, 2]``.
            labels: 0 normal, 1 anomalous, ``[B]``.
            masks: 0 normal, 1 anomalous, ``[B, H, W]``; another size is brought to the map's (nearest). ``None``:
                the two pixel losses are left out.

        Returns:
            dict[str, torch.Tensor]: ``focal_image``, ``focal_pixel``, ``dice``, ``scr`` as far as they apply, and
            ``total``.
        """
        parts = {"focal_image": focal_loss(pred_score, labels.to(pred_score.dtype), self.focal_gamma)}
        if masks is not None:
            target = (masks > 0).to(anomaly_map.dtype).reshape(-1, *masks.shape[-2:])
            if target.shape[-2:] != anomaly_map.shape[-2:]:
                target = F.interpolate(target[:, None], size=anomaly_map.shape[-2:], mode="nearest")[:, 0]
            parts["focal_pixel"] = focal_loss(anomaly_map, target, self.focal_gamma)
            parts["dice"] = self.dice_weight * dice_loss(anomaly_map, target)
        if self.scr_weight:
            parts["scr"] = self.scr_weight * semantic_consistency_loss(similarity)
        parts["total"] = torch.stack(list(parts.values())).sum()
        return parts
