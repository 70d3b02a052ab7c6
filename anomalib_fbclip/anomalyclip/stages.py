# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The named record of every stage of AnomalyCLIP, read by tests, notebooks and stage maps."""

from dataclasses import dataclass, field

import torch

from anomalib_fbclip.adapted.stages import PanelGroup, Stages


@dataclass
class AnomalyCLIPStages(Stages):
    """Tensors of one forward pass.

    Beside those of :class:`~anomalib_fbclip.adapted.stages.Stages`:

    Attributes:
        prompt_embeddings: Prompt embeddings ``[2, 77, W]``.
        text_features_raw: Text features ``[2, d]`` before they are brought to unit length.
        image_feature: Projected class token ``[B, d]``.
        patch_tokens: Projected local patch tokens of each block ``[B, L, d]``.
        text_similarity: Their cosine to the normal and the abnormal text, each ``[B, L, 2]``.
        patch_probability: Abnormal probability of the patches in each block ``[B, L]``.
    """

    prompt_embeddings: torch.Tensor | None = None
    text_features_raw: torch.Tensor | None = None
    image_feature: torch.Tensor | None = None
    patch_tokens: list[torch.Tensor] = field(default_factory=list)
    text_similarity: list[torch.Tensor] = field(default_factory=list)
    patch_probability: list[torch.Tensor] = field(default_factory=list)

    def panels(self) -> list[PanelGroup]:
        """Similarity of the local patch tokens to both texts, and the probability that follows from it."""
        cosines = [one for each in self.text_similarity for one in each.unbind(dim=-1)]
        return [
            PanelGroup("Local tokens: cosine to the text", "viridis", -0.5, 0.5, ("normal", "abnormal"), cosines),
            PanelGroup("Probability", "inferno", 0.0, 1.0, ("",), self.patch_probability),
        ]
