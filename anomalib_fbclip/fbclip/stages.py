# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The named record of every stage, read by tests, notebooks and stage maps."""

from dataclasses import dataclass, field

import torch


@dataclass
class Stages:
    """Tensors of one forward pass; what an ablation switches off stays ``None`` or empty.

    Lists go layer by layer; ``suppressed_projected`` in the order layer by layer, ID, SEM, SPA in each.

    Attributes:
        prompt_embeddings: Prompt embeddings ``[2, 77, W]``.
        text_tokens: Text tokens ``[2, 77, W]``.
        text_eot: End-of-text feature ``[2, d]``.
        text_global: Mean feature ``[2, d]``.
        text_attention: Attention-pooled feature ``[2, d]``.
        text_features: Fused text features ``[2, d]``, of unit length.
        image_tokens: Tokens of the chosen blocks, each ``[B, N, D]``.
        foreground_mask: Soft masks, each ``[B, L]``.
        view_sem: Semantic views, each ``[B, N, D]``.
        view_spa: Spatial views, each ``[B, N, D]``.
        attended_id: Attended tokens of the ID view, each ``[B, N, D]``.
        attended_sem: The same of the SEM view.
        attended_spa: The same of the SPA view.
        background_prototype: ``[B, D]``.
        suppressed_projected: Suppressed features in the joint space, each ``[B, N, d]``.
        pred_score: Image scores ``[B]``.
        anomaly_map_grid: Patch probabilities ``[B, g, g]``.
        anomaly_map_upsampled: ``[B, H, H]``.
        anomaly_map_smoothed: ``[B, H, H]``.
    """

    prompt_embeddings: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    text_eot: torch.Tensor | None = None
    text_global: torch.Tensor | None = None
    text_attention: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    image_tokens: list[torch.Tensor] = field(default_factory=list)
    foreground_mask: list[torch.Tensor] = field(default_factory=list)
    view_sem: list[torch.Tensor] = field(default_factory=list)
    view_spa: list[torch.Tensor] = field(default_factory=list)
    attended_id: list[torch.Tensor] = field(default_factory=list)
    attended_sem: list[torch.Tensor] = field(default_factory=list)
    attended_spa: list[torch.Tensor] = field(default_factory=list)
    background_prototype: torch.Tensor | None = None
    suppressed_projected: list[torch.Tensor] = field(default_factory=list)
    pred_score: torch.Tensor | None = None
    anomaly_map_grid: torch.Tensor | None = None
    anomaly_map_upsampled: torch.Tensor | None = None
    anomaly_map_smoothed: torch.Tensor | None = None

    def add_layer(
        self,
        mask: torch.Tensor,
        views: dict[str, torch.Tensor],
        attended: dict[str, torch.Tensor],
    ) -> None:
        """Record mask, views and attended views of one layer."""
        self.foreground_mask.append(mask)
        for name in ("sem", "spa"):
            if name in views:
                getattr(self, f"view_{name}").append(views[name])
        for name, tokens in attended.items():
            getattr(self, f"attended_{name}").append(tokens)
