# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""AnomalyCLIP (Zhou et al., ICLR 2024, https://arxiv.org/abs/2310.18961) as one readable pipeline.

:meth:`AnomalyCLIPModel.encode_text`, :meth:`~AnomalyCLIPModel.encode_image` and :meth:`~AnomalyCLIPModel.detect` are
the steps of the method in their order.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.adapted.torch_model import AdaptedCLIP, Detection
from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.common.functional import Grid

from . import published  # noqa: F401  # registers the reader of the published weights
from .local_path import two_paths, two_paths_together
from .prompts import DeepPromptLearner
from .stages import AnomalyCLIPStages

_LOCAL_SHARE = 19 / 24
_DEPTH_SHARE = 9 / 12


class AnomalyCLIPModel(AdaptedCLIP):
    """AnomalyCLIP (Zhou et al., ICLR 2024).

    Args:
        clip: Frozen backbone.
        feature_layers: Blocks whose local patch tokens are read, counted from 1. ``None``: the last block, as in the
            released scripts; the paper's figure shows 6, 12, 18, 24 of 24.
        n_ctx: Learnable context tokens of each prompt.
        prompt_depth: Blocks of the text tower whose input holds learnable tokens; 1: the prompts themselves alone.
            ``None``: 9 of 12, the same share of another tower.
        deep_tokens: Learnable tokens before each of the blocks 2 to ``prompt_depth``.
        local_blocks: How many of the last visual blocks run the local path. ``None``: 19 of 24, the same share of
            another tower.
        temperature: Divides the cosine of tokens and text.
        smoothing_sigma: Gaussian smoothing of the returned map, in pixels of the input; 0 switches it off.
        few_shot: Let a memory of normal images join the text's score, see :meth:`remember`. Not part of the paper.
        literal: Run both paths of the visual tower apart, by the equations: slower, the same values up to rounding.
        memory_radius: See :class:`~anomalib_fbclip.adapted.torch_model.AdaptedCLIP`.

    Raises:
        ValueError: If an argument is out of range; the message holds the value.

    Example:
        >>> from anomalib_fbclip.clip import load_clip
        >>> model = AnomalyCLIPModel(load_clip("tiny", image_size=64)).eval()
        >>> prediction = model(torch.zeros(1, 3, 64, 64))
        >>> prediction.anomaly_map.shape
        torch.Size([1, 64, 64])
    """

    model_name = "AnomalyCLIP"
    paper_layers = (24,)

    def __init__(
        self,
        clip: FrozenCLIP,
        feature_layers: Sequence[int] | None = None,
        n_ctx: int = 12,
        prompt_depth: int | None = None,
        deep_tokens: int = 4,
        local_blocks: int | None = None,
        temperature: float = 0.07,
        smoothing_sigma: float = 4.0,
        few_shot: bool = False,
        literal: bool = False,
        memory_radius: int | None = None,
    ) -> None:
        super().__init__(clip, feature_layers, temperature, smoothing_sigma, few_shot, literal, memory_radius)
        if local_blocks is None:
            local_blocks = max(1, round(_LOCAL_SHARE * clip.num_layers))
        if not 1 <= local_blocks <= clip.num_layers:
            msg = (
                f"local_blocks={local_blocks}: choose between 1 and {clip.num_layers}, the blocks of the visual tower."
            )
            raise ValueError(msg)
        if prompt_depth is None:
            prompt_depth = max(1, round(_DEPTH_SHARE * clip.num_text_layers))
        self.local_blocks = local_blocks
        self.prompts = DeepPromptLearner(clip, n_ctx, prompt_depth, deep_tokens)

    @property
    def token_key(self) -> str:  # type: ignore[override]
        """Names the tokens of this model's way through the visual tower."""
        return f"local{self.local_blocks}"

    def architecture(self) -> dict[str, Any]:
        """What a model and an adapter must have in common, see :meth:`AdaptedCLIP.architecture`."""
        return {
            **super().architecture(),
            "n_ctx": self.prompts.n_ctx,
            "prompt_depth": self.prompts.depth,
            "deep_tokens": self.prompts.deep_tokens,
            "local_blocks": self.local_blocks,
        }

    def encode_text(self) -> torch.Tensor:
        """Normal and abnormal text feature ``[2, d]``, of unit length."""
        return F.normalize(self.raw_text_features(), dim=-1)

    def raw_text_features(self) -> torch.Tensor:
        """End-of-text tokens of both prompts in the joint space ``[2, d]``, deep prompts on the way."""
        tokens = self.clip.encode_text(self.prompts(), causal=True, before_block=self.prompts.replace)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.clip.project_text(tokens[rows, self.prompts.end_of_text])

    def encode_image(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Frozen tokens of the chosen blocks: CLIP's class token behind the last block, local patch tokens (DPAM).

        Returns:
            list[torch.Tensor]: Each ``[B, 1 + L, D]``; the class token is the same in all.
        """
        tower = two_paths if self.literal else two_paths_together
        return self.clip.encode_image(images, self.feature_layers, partial(tower, local_blocks=self.local_blocks))

    def detect(
        self,
        tokens: Iterable[torch.Tensor],
        text_features: torch.Tensor,
        grid: Grid | None = None,
    ) -> Detection:
        """From the tokens of the blocks to logits.

        Axes: B images, S blocks, L patches, d joint width.

        Args:
            tokens: Tokens of each chosen block ``[B, 1 + L, D]``, see :meth:`encode_image`.
            text_features: ``[2, d]``, of unit length, normal first.
            grid: Not used: patches are scored one by one.
        """
        del grid
        image_logit = None
        logits = []
        for block in tokens:
            if image_logit is None:
                image_logit = self._logit(self.image_feature(block), text_features)  # [B]
            logits.append(self._logit(self.patch_tokens(block), text_features))  # [B, L]
        patch_logit = mean_probability_logit(logits)
        terms = {"image_logit": image_logit, "patch_probability": torch.stack(logits, dim=1).sigmoid()}
        return Detection(torch.cat((image_logit[:, None], patch_logit), dim=1), terms)  # type: ignore[index, arg-type]

    def image_feature(self, block: torch.Tensor) -> torch.Tensor:
        """Class token in the joint space ``[B, d]``; without ``ln_post``, as the released weights were trained."""
        return self.clip.project(block[:, 0])

    def patch_tokens(self, block: torch.Tensor) -> torch.Tensor:
        """Local patch tokens in the joint space ``[B, L, d]``."""
        return self.clip.project(self.clip.visual.ln_post(block[:, 1:]))

    def _logit(self, joint: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Abnormal minus normal logit, whose sigmoid is the softmax over both texts."""
        similarity = self.similarity(joint, text_features)
        return similarity[..., 1] - similarity[..., 0]

    def record(self, tokens: list[torch.Tensor], detection: Detection, grid: Grid | None = None) -> AnomalyCLIPStages:
        """The record of every stage, see :class:`AnomalyCLIPStages`."""
        del grid
        text = self.text_features()
        patches = [self.patch_tokens(block) for block in tokens]
        return AnomalyCLIPStages(
            text_features=text,
            image_tokens=tokens,
            prompt_embeddings=self.prompts(),
            text_features_raw=self.raw_text_features(),
            image_feature=self.image_feature(tokens[0]),
            patch_tokens=patches,
            text_similarity=[self.similarity(each, text) * self.temperature for each in patches],
            patch_probability=list(detection.loss_terms["patch_probability"].unbind(dim=1)),
        )


def mean_probability_logit(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logit of the mean of the blocks' probabilities; in logarithms, where no probability is rounded to 1."""
    if len(logits) == 1:
        return logits[0]
    stacked = torch.stack(list(logits))
    return F.logsigmoid(stacked).logsumexp(dim=0) - F.logsigmoid(-stacked).logsumexp(dim=0)
