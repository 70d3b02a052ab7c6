# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Object-agnostic prompts and deep prompts (AnomalyCLIP, https://arxiv.org/abs/2310.18961).

Axes: two prompts, normal first, of 77 text tokens; W width of the text tokens. The literal form is fast as it is: it
runs once for any number of images.
"""

import torch
from torch import nn

from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.clip.prompts import PromptLearner

STATES = ("object.", "damaged object.")
"""Words behind the context tokens of the normal and of the abnormal prompt."""


class DeepPromptLearner(PromptLearner):
    """Prompts "X ... X object." and "X ... X damaged object." with learnable X, and learnable tokens inside the tower.

    Args:
        clip: Backbone that embeds the words.
        n_ctx: Learnable context tokens of each prompt.
        depth: Blocks of the text tower whose input holds learnable tokens; 1: the prompts themselves alone.
        deep_tokens: Learnable tokens before each of the blocks 2 to ``depth``, the same for both prompts.

    Raises:
        ValueError: If an argument does not fit the text tower.
    """

    deep_prompts: nn.Parameter | None

    def __init__(self, clip: FrozenCLIP, n_ctx: int, depth: int, deep_tokens: int) -> None:
        super().__init__(clip, n_ctx, STATES)
        if not 1 <= depth <= clip.num_text_layers:
            msg = f"prompt_depth={depth}: choose between 1 and {clip.num_text_layers}, the blocks of the text tower."
            raise ValueError(msg)
        if not 1 <= deep_tokens < clip.context_length:
            msg = f"deep_tokens={deep_tokens}: choose between 1 and {clip.context_length - 1}."
            raise ValueError(msg)
        self.depth = depth
        self.deep_tokens = deep_tokens
        deep = nn.Parameter(0.02 * torch.randn(depth - 1, deep_tokens, clip.text_width)) if depth > 1 else None
        self.register_parameter("deep_prompts", deep)

    def replace(self, block: int, tokens: torch.Tensor) -> torch.Tensor:
        """Put the learnable tokens of a block in the place of those behind the start of text.

        Args:
            block: Number of the block, counted from 1.
            tokens: What enters it ``[2, 77, W]``.

        Returns:
            torch.Tensor: ``[2, 77, W]``.
        """
        if self.deep_prompts is None or not 2 <= block <= self.depth:
            return tokens
        learned = self.deep_prompts[block - 2].to(tokens.dtype).expand(len(tokens), -1, -1)
        return torch.cat((tokens[:, :1], learned, tokens[:, 1 + self.deep_tokens :]), dim=1)
