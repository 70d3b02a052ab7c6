# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""AF-CLIP (Fang et al., ACM MM 2025, https://arxiv.org/abs/2507.19949) as one readable pipeline.

:meth:`AFCLIPModel.encode_text`, :meth:`~AFCLIPModel.detect` and :meth:`~AFCLIPModel.abnormal_probability` are the steps
of the method in their order.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.adapted.torch_model import AdaptedCLIP, Detection
from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.common.functional import Grid
from anomalib_fbclip.host.tiling import Place

from . import published  # noqa: F401  # registers the reader of the published weights
from .adaptor import Adaptor
from .aggregation import WINDOWS, aggregate, mixing
from .memory import TEXT_WEIGHT, WindowMemory
from .prompts import StatePrompts
from .stages import AFCLIPStages


class AFCLIPModel(AdaptedCLIP):
    """AF-CLIP (Fang et al., ACM MM 2025).

    Args:
        clip: Frozen backbone.
        feature_layers: Blocks whose tokens are read, counted from 1. ``None``: 6, 12, 18, 24 for a tower of 24 blocks,
            the same relative depths for another.
        n_ctx: Learnable vectors in front of both prompts.
        temperature: Divides the cosine of tokens and text.
        smoothing_sigma: Gaussian smoothing of the returned map, in pixels of the input; 0 switches it off.
        few_shot: Let the paper's memory of normal images decide together with the text, see :meth:`remember`.
        literal: Compute the equations in their literal form: slower, the same values up to rounding.
        memory_radius: See :class:`~anomalib_fbclip.adapted.torch_model.AdaptedCLIP`.

    Raises:
        ValueError: If an argument is out of range; the message holds the value.

    Example:
        >>> from anomalib_fbclip.clip import load_clip
        >>> model = AFCLIPModel(load_clip("tiny", image_size=64)).eval()
        >>> prediction = model(torch.zeros(1, 3, 64, 64))
        >>> prediction.anomaly_map.shape
        torch.Size([1, 64, 64])
    """

    model_name = "AFCLIP"

    def __init__(
        self,
        clip: FrozenCLIP,
        feature_layers: Sequence[int] | None = None,
        n_ctx: int = 12,
        temperature: float = 0.07,
        smoothing_sigma: float = 4.0,
        few_shot: bool = False,
        literal: bool = False,
        memory_radius: int | None = None,
    ) -> None:
        super().__init__(clip, feature_layers, temperature, smoothing_sigma, few_shot, literal, memory_radius)
        self.prompts = StatePrompts(clip, n_ctx)
        self.adaptor = Adaptor(clip.vision_width)

    def architecture(self) -> dict[str, Any]:
        """What a model and an adapter must have in common, see :meth:`AdaptedCLIP.architecture`."""
        return {**super().architecture(), "n_ctx": self.prompts.n_ctx}

    def encode_text(self) -> torch.Tensor:
        """Normal and abnormal text feature ``[2, d]``, of unit length."""
        return F.normalize(self.raw_text_features(), dim=-1)

    def raw_text_features(self) -> torch.Tensor:
        """End-of-text tokens of both prompts in the joint space ``[2, d]``."""
        tokens = self.clip.encode_text(self.prompts(), causal=True)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.clip.project_text(tokens[rows, self.prompts.end_of_text])

    def detect(
        self,
        tokens: Iterable[torch.Tensor],
        text_features: torch.Tensor,
        grid: Grid | None = None,
    ) -> Detection:
        """From the tokens of the blocks to logits.

        Axes: B images, N = 1 + L tokens, D vision width, d joint width.

        Args:
            tokens: Tokens of each chosen block ``[B, N, D]``, class token first.
            text_features: ``[2, d]``, of unit length, normal first.
            grid: Rows and columns of the patches; ``None``: a square.
        """
        # The alignment loss wants all projected tokens, which are three times the tower's: not kept for a prediction.
        learning = self.training or torch.is_grad_enabled()
        kept = []
        logits = torch.zeros((), device=text_features.device)
        for block in tokens:
            for joint in self.joint_tokens(block, grid):  # one [B, N, d] for each window
                logits = logits + self.similarity(joint, text_features)  # [B, N, 2]
                if learning:
                    kept.append(joint[:, 1:])
        logit = logits[..., 1] - logits[..., 0]
        terms = {"patch_probability": logit[:, 1:].sigmoid(), "joint_tokens": torch.stack(kept, dim=1)} if kept else {}
        return Detection(logit, terms)

    def joint_tokens(self, tokens: torch.Tensor, grid: Grid | None = None) -> Iterator[torch.Tensor]:
        """Tokens of one block through aggregation, adaptor and projection, window by window.

        Args:
            tokens: Tokens of the block ``[B, N, D]``.
            grid: See :meth:`detect`.

        Yields:
            torch.Tensor: ``[B, N, d]``, not of unit length.
        """
        attended: Iterable[torch.Tensor]
        if self.literal:
            attended = (self.adaptor(aggregate(tokens, window, grid)) for window in WINDOWS)
        else:
            attended = self.adaptor.attend(tokens, [mixing(window, grid) for window in WINDOWS])
        for each in attended:
            yield self.clip.project(self.clip.visual.ln_post(each))

    def make_memory(self) -> WindowMemory:
        """The paper's memory."""
        return WindowMemory(len(self.feature_layers), self.clip.vision_width, self.memory_radius)

    def abnormal_probability(
        self,
        logit: torch.Tensor,
        tokens: Sequence[torch.Tensor],
        grid: Grid | None = None,
        places: Sequence[Place] = (),
    ) -> torch.Tensor:
        """Probability of class token and patches ``[B, 1 + L]``; with a memory its score + 0.1 * the text's.

        Args:
            logit: Of the text ``[B, 1 + L]``.
            tokens: See :meth:`TokenMemory.compared`; none: no memory is asked.
            grid: See :meth:`detect`.
            places: See :meth:`AdaptedCLIP.score`.
        """
        text = logit.sigmoid()
        if self.memory is None or not tokens:
            return text
        return (self.memory.score(tokens, grid, places) + TEXT_WEIGHT * text).clamp(max=1)

    def record(self, tokens: list[torch.Tensor], detection: Detection, grid: Grid | None = None) -> AFCLIPStages:
        """The record of every stage, see :class:`AFCLIPStages`."""
        del detection
        text = self.text_features()
        joint = [each for block in tokens for each in self.joint_tokens(block, grid)]
        return AFCLIPStages(
            text_features=text,
            image_tokens=tokens,
            text_features_raw=self.raw_text_features(),
            aggregated=[self.aggregate(block, window, grid) for block in tokens for window in WINDOWS],
            joint_tokens=joint,
            text_similarity=[self.similarity(each, text) * self.temperature for each in joint],
        )

    def aggregate(self, tokens: torch.Tensor, window: int, grid: Grid | None = None) -> torch.Tensor:
        """Spatial aggregation of one block for one window ``[B, N, D]``."""
        return aggregate(tokens, window, grid) if self.literal else mixing(window, grid)(tokens)
