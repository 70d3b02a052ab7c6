# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FB-CLIP (Hu et al., CVPR 2026, https://arxiv.org/abs/2603.19608) as one readable pipeline.

:meth:`FBCLIPModel.detect` has the steps of the paper's method section in their order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from anomalib_fbclip.adapted.torch_model import AdaptedCLIP, Detection
from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.clip.prompts import PromptLearner
from anomalib_fbclip.common.functional import Grid, full_precision

from . import (
    background,
    published,  # noqa: F401  # registers the reader of the published weights
)
from .attention import FoldedHeads, ForegroundBackgroundAttention
from .foreground import foreground_mask
from .stages import FBCLIPStages
from .text_fusion import POOLINGS, STATES, TextFeatureFusion, TextFeatures
from .views import FAST, LITERAL, VIEWS

_SCALE_WEIGHTS = 6
"""Entries of the weights of the blocks in the published files; the first ones are used."""

_LEAST_PROBABILITY = 1e-4
"""Added to probabilities whose logits are smoothed, so that they are finite in half precision, as exported files may
compute, and stay in their order."""


@dataclass
class FBCLIPDetection(Detection):
    """Logits, and the tensors that the record of the stages starts from.

    Attributes:
        masks: Foreground mask of each block ``[B, L]``.
        features: Attended tokens, block by block ID, SEM, SPA, each ``[B, N, D]``.
        prototype: Background prototype ``[B, D]``; ``None``: no suppression.
    """

    masks: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)
    prototype: torch.Tensor | None = None


class FBCLIPModel(AdaptedCLIP):
    """FB-CLIP (Hu et al., CVPR 2026).

    Args:
        clip: Frozen backbone.
        feature_layers: Blocks whose tokens are read, counted from 1. ``None``: 1, 6, 12, 18, 24 for a tower of 24
            blocks, the same relative depths for another.
        n_ctx: Learnable context tokens of each prompt.
        text_poolings: Poolings of the text tokens, out of ``"global"``, ``"attention"``, ``"eot"`` (Table 3).
        views: Views of the image tokens, out of ``"id"``, ``"sem"``, ``"spa"`` (Table 4).
        attention: Foreground-background attention on or off (Table 2).
        suppression: Background suppression on or off (Table 2).
        bank: Tokens behind the background prototype, ``"half"`` or ``"full"`` (Table 5).
        causal_text: CLIP's causal mask in the text transformer. The released weights were trained without it.
        temperature: Divides the cosine of tokens and text.
        smoothing_sigma: Gaussian smoothing of the returned map, in pixels of the input; 0 switches it off.
        few_shot: Let a memory of normal images join the text's score, see :meth:`remember`. Not part of the paper.
        literal: Compute the equations in their literal form: slower, the same values up to rounding.
        smooth_logits: Up-sample and smooth the logits of the map instead of its probabilities, so that evidence of
            neighbours adds up before it saturates. Not part of the paper.
        memory_radius: See :class:`~anomalib_fbclip.adapted.torch_model.AdaptedCLIP`.

    Raises:
        ValueError: If an argument is out of range; the message holds the value.

    Example:
        >>> from anomalib_fbclip.clip import load_clip
        >>> model = FBCLIPModel(load_clip("tiny", image_size=64)).eval()
        >>> prediction = model(torch.zeros(1, 3, 64, 64))
        >>> prediction.anomaly_map.shape
        torch.Size([1, 64, 64])
    """

    model_name = "FBCLIP"
    paper_layers = (1, 6, 12, 18, 24)

    def __init__(
        self,
        clip: FrozenCLIP,
        feature_layers: Sequence[int] | None = None,
        n_ctx: int = 12,
        text_poolings: Sequence[str] = tuple(POOLINGS),
        views: Sequence[str] = VIEWS,
        attention: bool = True,
        suppression: bool = True,
        bank: str = "half",
        causal_text: bool = False,
        temperature: float = 0.07,
        smoothing_sigma: float = 4.0,
        few_shot: bool = False,
        literal: bool = False,
        smooth_logits: bool = False,
        memory_radius: int | None = None,
    ) -> None:
        super().__init__(clip, feature_layers, temperature, smoothing_sigma, few_shot, literal, memory_radius)
        if not views or set(views) - set(VIEWS):
            msg = f"views={list(views)}: choose one or more of {list(VIEWS)}."
            raise ValueError(msg)
        if bank not in background.BANKS:
            msg = f"bank={bank!r}: choose one of {list(background.BANKS)}."
            raise ValueError(msg)
        self.views = tuple(view for view in VIEWS if view in views)
        self.suppression = suppression
        self.bank = bank
        self.causal_text = causal_text
        self.smooth_logits = smooth_logits

        self.prompts = PromptLearner(clip, n_ctx, STATES)
        self.text_fusion = TextFeatureFusion(clip, text_poolings)
        self.attention = ForegroundBackgroundAttention(clip.vision_width) if attention else None
        self.scale_weights = nn.Parameter(torch.ones(max(_SCALE_WEIGHTS, len(self.feature_layers))))

    def architecture(self) -> dict[str, Any]:
        """What a model and an adapter must have in common, see :meth:`AdaptedCLIP.architecture`."""
        return {
            **super().architecture(),
            "n_ctx": self.prompts.n_ctx,
            "text_poolings": sorted(self.text_fusion.poolings),
            "views": list(self.views),
            "attention": self.attention is not None,
            "suppression": self.suppression,
            "bank": self.bank,
            "causal_text": self.causal_text,
            "smooth_logits": self.smooth_logits,
        }

    def encode_text(self) -> torch.Tensor:
        """MSTFF (section 3.1, eq. 1-6): normal and abnormal text feature ``[2, d]``, of unit length."""
        return self.fuse_text(self.clip.encode_text(self.prompts(), causal=self.causal_text)).fused

    def fuse_text(self, text_tokens: torch.Tensor) -> TextFeatures:
        """Text tokens ``[2, 77, W]`` to the fused text features and their parts (eq. 3-6)."""
        return self.text_fusion(text_tokens, self.prompts.end_of_text, self.clip)

    def detect(
        self,
        tokens: Iterable[torch.Tensor],
        text_features: torch.Tensor,
        grid: Grid | None = None,
    ) -> FBCLIPDetection:
        """From the tokens of the blocks to logits (section 3.2 to 3.4).

        Axes: B images, N = 1 + L tokens, D vision width, d joint width.

        Args:
            tokens: Tokens of each chosen block ``[B, N, D]``, class token first.
            text_features: ``[2, d]``, of unit length, normal first.
            grid: Rows and columns of the patches; ``None``: a square.
        """
        masks, features = self.enhance(tokens, grid)  # MVFBE, eq. 7-23: block by block ID, SEM, SPA, each [B, N, D]
        prototype = (
            background.background_prototype(features, self.bank) if self.suppression else None
        )  # eq. 24-26, [B, D]
        layer_weights = self.scale_weights.softmax(dim=0)
        logits = torch.zeros((), device=text_features.device)
        for index, feature in enumerate(features):
            joint = self.suppress(feature, prototype)  # eq. 27-31, [B, N, d]
            logits = logits + layer_weights[index // len(self.views)] * self.similarity(joint, text_features)
        similarity = self.similarity(joint.mean(dim=1), text_features)  # eq. 32-33, [B, 2]
        logit = logits[..., 1] - logits[..., 0]  # [B, N]
        return FBCLIPDetection(logit, {"similarity": similarity}, masks, features, prototype)

    def enhance(
        self,
        tokens: Iterable[torch.Tensor],
        grid: Grid | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """MVFBE (section 3.2): foreground masks, and attended views of every block.

        Masks and the weights of views hold no learnable parameter, so they are computed without gradients, and in
        float32 whatever the precision around: single weights decide there, and they cost little.

        Args:
            tokens: See :meth:`detect`.
            grid: See :meth:`detect`.

        Returns:
            Masks, one ``[B, L]`` for each block; features, block by block ID, SEM, SPA, each ``[B, N, D]``.
        """
        masks: list[torch.Tensor] = []
        features: list[torch.Tensor] = []
        previous = None
        folded = None if self.attention is None or self.literal else self.attention.fold(self.scale_weights.device)
        for layer_tokens in tokens:
            exact = layer_tokens.float()
            with torch.no_grad(), full_precision(exact.device):
                mask = foreground_mask(exact, previous)  # eq. 7-8
            masks.append(mask)
            previous = None  # or the attention would share the memory with the block before
            if self.literal:
                features += self._attend_literally(layer_tokens, mask, grid)  # eq. 9-23
            else:
                features += self._attend(layer_tokens, mask, grid, folded)
            previous = exact
        return masks, features

    def _attend_literally(self, tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None) -> list[torch.Tensor]:
        """Each view of one block (eq. 9-21) through the attention that all share (eq. 22-23)."""
        views = [self.view(name, tokens.float(), mask, grid) for name in self.views]
        return views if self.attention is None else [self.attention(view) for view in views]

    def _attend(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        grid: Grid | None,
        folded: Sequence[FoldedHeads] | None,
    ) -> list[torch.Tensor]:
        """The same with the views as mixtures, so that the attention projects the tokens of a block once."""
        exact = tokens.float()
        with torch.no_grad(), full_precision(exact.device):
            mixings = [FAST[name](exact, mask, grid) for name in self.views]
        if self.attention is None:
            return [mix(exact) for mix in mixings]
        if torch.is_autocast_enabled(tokens.device.type):
            # Once here and not once in each product: without gradients autocast remembers nothing.
            tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
        views = (mix(tokens) for mix in mixings)
        if not self.attention.products_are_cheap(tokens.device):
            return self.attention.attend(tokens, mixings, [_variance(view) for view in views], folded)
        # Mixtures cost more than products here: each view is mixed once, before its projection.
        unmixed = FAST["id"](exact, mask, grid)
        return [self.attention.attend(view, [unmixed], [_variance(view)], folded)[0] for view in views]

    @torch.no_grad()
    def view(self, name: str, tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """One view ``[B, N, D]`` of the tokens ``[B, N, D]`` of a block, in float32 (eq. 9-20)."""
        with full_precision(tokens.device):
            return LITERAL[name](tokens, mask, grid) if self.literal else FAST[name](tokens, mask, grid)(tokens)

    def suppress(self, feature: torch.Tensor, prototype: torch.Tensor | None) -> torch.Tensor:
        """Background suppression (section 3.3) and projection to the joint space, ``[B, N, d]`` in float32.

        Args:
            feature: Attended tokens ``[B, N, D]``.
            prototype: Background prototype ``[B, D]``; ``None``: no suppression.
        """
        if prototype is None:
            return self.clip.project(feature).float()
        if self.literal:
            weight = background.background_dissimilarity(feature, prototype)
            return self.clip.project(background.suppress_background(feature, prototype, weight)).float()
        joint = self.clip.project(feature).float()
        with full_precision(joint.device):
            feature, prototype = feature.float(), prototype.float()
            weight = background.background_dissimilarity(feature, prototype)
            return background.suppress_background(joint, prototype @ self.clip.visual.proj.float(), weight)

    def smooth(self, grid_map: torch.Tensor, size: int | Sequence[int], sigma: float) -> torch.Tensor:
        """Up-sampled and smoothed map ``[B, H, W]`` of probabilities, see ``smooth_logits``."""
        if not self.smooth_logits:
            return super().smooth(grid_map, size, sigma)
        logit = (grid_map + _LEAST_PROBABILITY).log() - (1 - grid_map + _LEAST_PROBABILITY).log()
        return super().smooth(logit, size, sigma).sigmoid()

    def record(self, tokens: list[torch.Tensor], detection: Detection, grid: Grid | None = None) -> FBCLIPStages:
        """The record of every stage, see :class:`FBCLIPStages`."""
        return FBCLIPStages.of(self, tokens, detection, grid)


def _variance(tokens: torch.Tensor) -> torch.Tensor:
    """Variance over the last axis ``[..., 1]``, as ``var(correction=0)``, whose kernel takes eight times as long."""
    tokens = tokens.float()
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    return centred.norm(dim=-1, keepdim=True).square() / tokens.shape[-1]
