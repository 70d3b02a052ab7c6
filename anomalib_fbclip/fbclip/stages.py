# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The named record of every stage, read by tests, notebooks and stage maps."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.functional import tokens_to_grid

if TYPE_CHECKING:
    from .torch_model import FBCLIPModel


@dataclass
class Stages:
    """Tensors of one forward pass; what an ablation switches off stays ``None`` or empty.

    Lists go layer by layer; lists "of every view" in the order layer by layer, ID, SEM, SPA in each.

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
        suppressed_projected: Suppressed features of every view in the joint space, each ``[B, N, d]``.
        gates: Foreground gates of the attention of every view, each ``[B, N]``, 0..1.
        background_similarity: Cosine of the attended tokens of every view to the prototype, each ``[B, N]``.
        text_similarity_before: Cosine of the attended tokens of every view, projected but not suppressed, to the
            normal and the abnormal text, each ``[B, N, 2]``.
        text_similarity: The same after suppression.
        memory_evidence: What the memory of a few-shot model adds to the abnormal logit ``[B, N]``.
        anomaly_map_grid_before: Patch probabilities without suppression ``[B, g, g]``.
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
    gates: list[torch.Tensor] = field(default_factory=list)
    background_similarity: list[torch.Tensor] = field(default_factory=list)
    text_similarity_before: list[torch.Tensor] = field(default_factory=list)
    text_similarity: list[torch.Tensor] = field(default_factory=list)
    memory_evidence: torch.Tensor | None = None
    anomaly_map_grid_before: torch.Tensor | None = None
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

    def derive(self, model: "FBCLIPModel") -> None:
        """Fill what the forward pass has no need of: gates, similarities, and the map without suppression.

        Args:
            model: The model that has filled the rest.
        """
        per_view = {"id": self.image_tokens, "sem": self.view_sem, "spa": self.view_spa}
        logits: torch.Tensor | float = 0.0
        weights = model.scale_weights.softmax(dim=0)
        for layer in range(len(self.image_tokens)):
            for name in model.views:
                attended = getattr(self, f"attended_{name}")[layer]
                if model.attention is not None:
                    self.gates.append(model.attention.gate(per_view[name][layer])[..., 0])
                if self.background_prototype is not None:
                    similarity = F.cosine_similarity(attended, self.background_prototype[:, None], dim=-1)
                    self.background_similarity.append(similarity)
                before = self._to_text(model.clip.project(attended))
                self.text_similarity_before.append(before)
                self.text_similarity.append(self._to_text(self.suppressed_projected[len(self.text_similarity)]))
                logits = logits + weights[layer] * before / model.temperature
        if self.memory_evidence is not None:
            logits = logits + F.pad(self.memory_evidence[..., None], (1, 0))
        self.anomaly_map_grid_before = tokens_to_grid(logits.softmax(dim=-1)[:, 1:, 1])  # type: ignore[union-attr]

    def _to_text(self, joint: torch.Tensor) -> torch.Tensor:
        return F.normalize(joint, dim=-1) @ self.text_features.T  # type: ignore[union-attr]
