# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Multi-strategy text feature fusion, MSTFF (FB-CLIP, https://arxiv.org/abs/2603.19608, eq. 1-6).

Axes: two prompts, normal first, of 77 text tokens; W width of the text tokens, d width of the joint space. The literal
form is fast as it is: it runs once for any number of images.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip import FrozenCLIP

STATES = ("object without defect.", "object with defect.")
"""Words behind the learnable context tokens of the normal and of the abnormal prompt (eq. 1-2)."""

POOLINGS = {"global": 1.0, "attention": 0.5, "eot": 0.5}
"""The three poolings of the text tokens and their fixed weights in the sum (eq. 6)."""


class TextFeatures(NamedTuple):
    """Text features ``[2, d]``, normal first; a pooling that is switched off is ``None``."""

    fused: torch.Tensor
    eot: torch.Tensor | None
    global_: torch.Tensor | None
    attention: torch.Tensor | None


class TextFeatureFusion(nn.Module):
    """Pool the text tokens in three ways, add and normalise.

    Args:
        clip: Backbone, for sizes and for its text projection.
        poolings: Any of ``"eot"`` (end-of-text token), ``"global"`` (mean of all 77 tokens) and ``"attention"``
            (learned weights). The paper's ablation (Table 3) switches them one by one.

    Raises:
        ValueError: If ``poolings`` is empty or holds an unknown name.
    """

    def __init__(self, clip: FrozenCLIP, poolings: Sequence[str] = tuple(POOLINGS)) -> None:
        super().__init__()
        self.poolings = tuple(poolings)
        if not self.poolings or set(self.poolings) - set(POOLINGS):
            msg = f"text_poolings={list(poolings)}: choose one or more of {list(POOLINGS)}."
            raise ValueError(msg)
        width, joint = clip.text_width, clip.embed_dim
        if "attention" in self.poolings:
            self.token_selector = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, 1))
            self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, joint))

    def forward(self, tokens: torch.Tensor, end_of_text: torch.Tensor, clip: FrozenCLIP) -> TextFeatures:
        """Fuse the text tokens.

        Args:
            tokens: Text tokens ``[2, 77, W]``.
            end_of_text: Index of the end-of-text token in each prompt ``[2]``.
            clip: Backbone, for its text projection.

        Returns:
            TextFeatures: Each ``[2, d]``; the fused one of unit length.
        """
        pooled: dict[str, torch.Tensor] = {}
        if "eot" in self.poolings:  # eq. 3
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            pooled["eot"] = clip.project_text(tokens[rows, end_of_text])
        if "global" in self.poolings:  # eq. 4
            pooled["global"] = clip.project_text(tokens.mean(dim=1))
        if "attention" in self.poolings:  # eq. 5
            weights = self.token_selector(tokens).softmax(dim=1)
            pooled["attention"] = self.projection((weights * tokens).sum(dim=1))
        fused = torch.stack([POOLINGS[name] * feature for name, feature in pooled.items()]).sum(dim=0)  # eq. 6
        fused = F.normalize(fused, dim=-1)
        return TextFeatures(fused, pooled.get("eot"), pooled.get("global"), pooled.get("attention"))
