# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""How far a student's maps and scores are from its teacher's, most of all where the teacher sees defects."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class StudentLoss(nn.Module):
    """Distance of standardised logits, and the order of the highest ones.

    Args:
        top_weight: How much more a pixel counts for each standard deviation that the teacher has it above the mean.
        rank_weight: Weight of the order of the teacher's highest pixels against all others; 0 switches it off.
        top_share: Share of the pixels of each image that count as highest, in (0, 1].

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, top_weight: float = 1.0, rank_weight: float = 0.2, top_share: float = 0.05) -> None:
        super().__init__()
        if top_weight < 0 or rank_weight < 0:
            msg = f"top_weight={top_weight}, rank_weight={rank_weight}: give 0 or more."
            raise ValueError(msg)
        if not 0 < top_share <= 1:
            msg = f"top_share={top_share}: give a share in (0, 1]."
            raise ValueError(msg)
        self.top_weight = top_weight
        self.rank_weight = rank_weight
        self.top_share = top_share

    def forward(
        self,
        score: torch.Tensor,
        grid_map: torch.Tensor,
        score_target: torch.Tensor,
        map_target: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Parts of the loss and their ``total``, all of standardised logits.

        Args:
            score: The student's ``[B]``.
            grid_map: The student's ``[B, h, w]``.
            score_target: The teacher's ``[B]``.
            map_target: The teacher's ``[B, h, w]``.
        """
        weight = 1 + self.top_weight * map_target.clamp(min=0)
        parts = {
            "map": (weight * F.smooth_l1_loss(grid_map, map_target, reduction="none")).sum() / weight.sum(),
            "score": F.smooth_l1_loss(score, score_target),
        }
        if self.rank_weight:
            parts["rank"] = self.rank_weight * self._rank(grid_map.flatten(1), map_target.flatten(1))
        return {**parts, "total": torch.stack(list(parts.values())).sum()}

    def _rank(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """RankNet's loss over pairs of the highest pixels of an image and as many drawn from all ``[B, L]``."""
        number = max(1, round(self.top_share * teacher.shape[1]))
        top = teacher.topk(number, dim=1).indices
        other = torch.randint(teacher.shape[1], top.shape, device=top.device)
        gap = teacher.gather(1, top) - teacher.gather(1, other)
        margin = student.gather(1, top) - student.gather(1, other)
        # As likely as the gap of the teacher says: no pair is pushed farther apart than there.
        return F.binary_cross_entropy_with_logits(margin, gap.sigmoid()) - _entropy(gap).mean()


def _entropy(logit: torch.Tensor) -> torch.Tensor:
    """What is left of the cross-entropy where student and teacher agree."""
    return F.binary_cross_entropy_with_logits(logit, logit.sigmoid(), reduction="none")
