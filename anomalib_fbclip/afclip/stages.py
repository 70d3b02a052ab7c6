# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The named record of every stage of AF-CLIP, read by tests, notebooks and stage maps."""

from dataclasses import dataclass, field

import torch

from anomalib_fbclip.adapted.stages import PanelGroup, Stages

from .aggregation import WINDOWS

_COLUMNS = tuple(f"r = {window}" for window in WINDOWS)


@dataclass
class AFCLIPStages(Stages):
    """Tensors of one forward pass; lists go block by block, windows 1, 3, 5 in each.

    Beside those of :class:`~anomalib_fbclip.adapted.stages.Stages`:

    Attributes:
        text_features_raw: Text features ``[2, d]`` before they are brought to unit length.
        aggregated: Token sets before the adaptor, each ``[B, N, D]``.
        joint_tokens: Token sets after adaptor, ``ln_post`` and projection, each ``[B, N, d]``.
        text_similarity: Their cosine to the normal and the abnormal text, each ``[B, N, 2]``.
    """

    text_features_raw: torch.Tensor | None = None
    aggregated: list[torch.Tensor] = field(default_factory=list)
    joint_tokens: list[torch.Tensor] = field(default_factory=list)
    text_similarity: list[torch.Tensor] = field(default_factory=list)

    def panels(self) -> list[PanelGroup]:
        """What aggregation leaves of the tokens, and the similarity of each token set to the texts."""
        to_class = [torch.cosine_similarity(each[:, 1:], each[:, :1], dim=-1) for each in self.aggregated]
        text = [(each[..., 1] - each[..., 0])[:, 1:] for each in self.text_similarity]
        return [
            PanelGroup("Windows: cosine to the class token", "viridis", 0.0, 1.0, _COLUMNS, to_class),
            PanelGroup("Text: cosine to abnormal minus normal", "coolwarm", -0.3, 0.3, _COLUMNS, text),
        ]
