# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Global and local losses (AnomalyCLIP, https://arxiv.org/abs/2310.18961).

Axes: B images, S chosen blocks, L patches, H and W pixels. The literal forms are fast as they are.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import grid_to_map, map_matrix, tokens_to_grid
from anomalib_fbclip.common.losses import dice_loss

_SMOOTH = 1e-5


def focal_loss(probability: torch.Tensor, target: torch.Tensor, gamma: float = 2.0) -> torch.Tensor:
    """Mean of ``-(1 - p)^gamma log(p)``, p the probability of the true class of the two, slightly softened.

    Args:
        probability: Abnormal probability of any shape, in [0, 1].
        target: The same shape, 0 or 1.
        gamma: How strongly easy pixels are weighted down.
    """
    softened = target.clamp(_SMOOTH, 1 - _SMOOTH)
    p = softened * probability + (1 - softened) * (1 - probability) + _SMOOTH
    return (-((1 - p) ** gamma) * p.log()).mean()


class AnomalyCLIPLoss(nn.Module):
    """The training loss.

    Args:
        focal_gamma: Exponent of the focal loss.
        local_weight: Weight of focal and dice loss.

    Raises:
        ValueError: If an argument is negative.
    """

    def __init__(self, focal_gamma: float = 2.0, local_weight: float = 4.0) -> None:
        super().__init__()
        for name, value in (("focal_gamma", focal_gamma), ("local_weight", local_weight)):
            if value < 0:
                msg = f"{name}={value} is negative: give 0 or more."
                raise ValueError(msg)
        self.focal_gamma = focal_gamma
        self.local_weight = local_weight

    def forward(
        self,
        pred_score: torch.Tensor,
        anomaly_map: torch.Tensor,
        labels: torch.Tensor,
        masks: torch.Tensor | None,
        image_logit: torch.Tensor,
        patch_probability: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Loss parts, weighted, and their sum.

        Args:
            pred_score: Not used: the cross-entropy takes the logit, which does not saturate.
            anomaly_map: Up-sampled map ``[B, H, W]``, for its size.
            labels: 0 normal, 1 anomalous, ``[B]``.
            masks: 0 normal, 1 anomalous, ``[B, H, W]``; another size is brought to the map's (nearest). ``None``:
                the local losses are left out.
            image_logit: Abnormal minus normal logit of the images ``[B]``.
            patch_probability: Abnormal probability of the patches in each block ``[B, S, L]``.

        Returns:
            dict[str, torch.Tensor]: ``image``, ``focal``, ``dice`` as far as they apply, and ``total``.
        """
        del pred_score
        # Of two classes, softmax cross-entropy is the binary one of the difference.
        parts = {"image": F.binary_cross_entropy_with_logits(image_logit, labels.to(image_logit.dtype))}
        if masks is not None:
            size = anomaly_map.shape[-2:]
            target = (masks.float() > 0.5).to(patch_probability.dtype).reshape(-1, 1, *masks.shape[-2:])
            target = (
                F.interpolate(target, size=size, mode="nearest")[:, 0] if target.shape[-2:] != size else target[:, 0]
            )
            focal, dice = [], []
            for block in patch_probability.unbind(dim=1):
                grid = tokens_to_grid(block)  # [B, g, g]
                abnormal = grid_to_map(grid, map_matrix(grid.shape[-1], size[-1], 0, grid.device))  # [B, H, W]
                focal.append(focal_loss(abnormal, target, self.focal_gamma))
                dice.append(dice_loss(abnormal, target) + dice_loss(1 - abnormal, 1 - target))
            parts["focal"] = self.local_weight * torch.stack(focal).sum()
            parts["dice"] = self.local_weight * torch.stack(dice).sum()
        parts["total"] = torch.stack(list(parts.values())).sum()
        return parts
