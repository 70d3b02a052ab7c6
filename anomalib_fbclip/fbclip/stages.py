# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The named record of every stage of FB-CLIP, read by tests, notebooks and stage maps."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.adapted.stages import PanelGroup, Stages
from anomalib_fbclip.common.functional import Grid, tokens_to_grid

from .background import background_dissimilarity


@dataclass
class FBCLIPStages(Stages):
    """Tensors of one forward pass; what an ablation switches off stays ``None`` or empty.

    Lists go block by block; lists "of every view" in the order block by block, ID, SEM, SPA in each. Beside those of
    :class:`~anomalib_fbclip.adapted.stages.Stages`:

    Attributes:
        prompt_embeddings: Prompt embeddings ``[2, 77, W]``.
        text_tokens: Text tokens ``[2, 77, W]``.
        text_eot: End-of-text feature ``[2, d]``.
        text_global: Mean feature ``[2, d]``.
        text_attention: Attention-pooled feature ``[2, d]``.
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
        anomaly_map_grid_before: Patch probabilities without suppression ``[B, g_h, g_w]``.
        views: Names of the views.
    """

    prompt_embeddings: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    text_eot: torch.Tensor | None = None
    text_global: torch.Tensor | None = None
    text_attention: torch.Tensor | None = None
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
    anomaly_map_grid_before: torch.Tensor | None = None
    views: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Any,  # noqa: ANN401  # see below
        tokens: list[torch.Tensor],
        detection: Any,  # noqa: ANN401  # see below
        grid: Grid | None = None,
    ) -> "FBCLIPStages":
        """Record the stages of one forward pass, with the model's own functions.

        Args:
            model: The :class:`FBCLIPModel`.
            tokens: Tokens of the chosen blocks, each ``[B, N, D]``.
            detection: What ``model.detect`` made of them, a :class:`FBCLIPDetection`.
            grid: Rows and columns of the patches; ``None``: a square.
        """
        embeddings = model.prompts()
        text_tokens = model.clip.encode_text(embeddings, causal=model.causal_text)
        text = model.fuse_text(text_tokens)
        stages = cls(
            text_features=text.fused,
            image_tokens=tokens,
            prompt_embeddings=embeddings,
            text_tokens=text_tokens,
            text_eot=text.eot,
            text_global=text.global_,
            text_attention=text.attention,
            foreground_mask=detection.masks,
            background_prototype=detection.prototype,
            views=model.views,
        )
        logits: torch.Tensor | float = 0.0
        weights = model.scale_weights.softmax(dim=0)
        for index, feature in enumerate(detection.features):
            layer, name = index // len(model.views), model.views[index % len(model.views)]
            view = model.view(name, tokens[layer].float(), detection.masks[layer], grid)
            getattr(stages, f"attended_{name}").append(feature)
            if name != "id":
                getattr(stages, f"view_{name}").append(view)
            if model.attention is not None:
                stages.gates.append(model.attention.gate(view.to(tokens[layer].dtype))[..., 0])
            if detection.prototype is not None:
                dissimilarity = background_dissimilarity(feature, detection.prototype)
                stages.background_similarity.append(1 - dissimilarity[..., 0])
            before, after = model.suppress(feature, None), model.suppress(feature, detection.prototype)
            stages.suppressed_projected.append(after)
            stages.text_similarity_before.append(F.normalize(before, dim=-1) @ text.fused.T)
            stages.text_similarity.append(F.normalize(after, dim=-1) @ text.fused.T)
            logits = logits + weights[layer] * model.similarity(before, text.fused)
        logit = logits[..., 1] - logits[..., 0]  # type: ignore[index]
        if detection.memory_evidence is not None:
            logit = logit + detection.memory_evidence
        stages.anomaly_map_grid_before = tokens_to_grid(logit[:, 1:].sigmoid(), grid)
        return stages

    def panels(self) -> list[PanelGroup]:
        """Mask, views, gates, similarity to the background prototype and to the texts (paper, Figures 4 and 5)."""
        heads = tuple(name.upper() for name in self.views)
        sets = {"id": self.image_tokens, "sem": self.view_sem, "spa": self.view_spa}
        views = [sets[name][layer] for layer in range(len(self.image_tokens)) for name in self.views]
        to_class_token = [torch.cosine_similarity(view[:, 1:], view[:, :1], dim=-1) for view in views]
        text = [(similarity[..., 1] - similarity[..., 0])[:, 1:] for similarity in self.text_similarity]
        groups = [
            PanelGroup("Foreground", "gray", 0.0, 1.0, ("",), self.foreground_mask),
            PanelGroup("Views: cosine to the class token", "viridis", 0.0, 1.0, heads, to_class_token),
            PanelGroup(
                "Gates: share of the foreground stream",
                "cividis",
                0.0,
                1.0,
                heads,
                [gate[:, 1:] for gate in self.gates],
            ),
            PanelGroup(
                "Cosine to the background prototype",
                "bone",
                0.0,
                1.0,
                heads,
                [similarity[:, 1:] for similarity in self.background_similarity],
            ),
            PanelGroup("Text: cosine to abnormal minus normal", "coolwarm", -0.6, 0.6, heads, text),
        ]
        return [group for group in groups if group.grids]

    def maps(self) -> dict[str, torch.Tensor | None]:
        """The patch map without and with background suppression."""
        return {
            "without background suppression": self.anomaly_map_grid_before,
            "with background suppression": self.anomaly_map_grid,
        }
