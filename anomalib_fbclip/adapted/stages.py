# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The named record of the stages that all adapted models have, read by tests, notebooks and stage maps."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from anomalib_fbclip.common.functional import Grid


class PanelGroup(NamedTuple):
    """Maps of one kind, for an image of all stages: one row for each block.

    Attributes:
        title: Heading above the group.
        colours: Colour map of matplotlib.
        low: Value of its lower end.
        high: Value of its upper end.
        columns: Heading of each column; one empty string where there is a single column.
        grids: Patch values ``[B, L]``, block by block and column by column in each.
    """

    title: str
    colours: str
    low: float
    high: float
    columns: tuple[str, ...]
    grids: list[torch.Tensor]


@dataclass
class Stages:
    """Tensors of one forward pass; what is not part of the model stays ``None`` or empty.

    B images, N = 1 + L tokens with the class token first, g_h x g_w patches, H x W pixels.

    Attributes:
        grid: Rows and columns of the patches; ``None``: a square.
        text_features: Normal and abnormal text feature ``[2, d]``, of unit length.
        image_tokens: Tokens of the chosen blocks, each ``[B, N, D]``.
        memory_evidence: What the memory of a few-shot model adds to the abnormal logit ``[B, N]``.
        pred_score: Image scores ``[B]``.
        anomaly_map_grid: Patch probabilities ``[B, g_h, g_w]``.
        anomaly_map_upsampled: ``[B, H, W]``.
        anomaly_map_smoothed: ``[B, H, W]``.
    """

    grid: Grid | None = None
    text_features: torch.Tensor | None = None
    image_tokens: list[torch.Tensor] = field(default_factory=list)
    memory_evidence: torch.Tensor | None = None
    pred_score: torch.Tensor | None = None
    anomaly_map_grid: torch.Tensor | None = None
    anomaly_map_upsampled: torch.Tensor | None = None
    anomaly_map_smoothed: torch.Tensor | None = None

    def panels(self) -> list[PanelGroup]:  # noqa: PLR6301  # each model has its own
        """Maps of the model's own stages, from left to right."""
        return []

    def maps(self) -> dict[str, torch.Tensor | None]:
        """Maps ``[B, g_h, g_w]`` of the model's own that stand before the result, by their heading."""
        return {"patch probabilities": self.anomaly_map_grid}
