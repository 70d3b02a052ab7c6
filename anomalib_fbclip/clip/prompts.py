# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Learnable normal and abnormal prompts: context tokens in front of fixed words."""

import torch
from torch import nn

from .frozen import FrozenCLIP

FILLER = "X"
"""Word that keeps the place of a context token when a prompt is tokenised."""


class PromptLearner(nn.Module):
    """Two prompts ``"X ... X <words>"``, normal and abnormal, whose X are learnable context tokens.

    Start token, words and padding keep CLIP's frozen embeddings.

    Args:
        clip: Backbone that embeds the words.
        n_ctx: Number of context tokens in front of the words.
        states: Words of the normal and of the abnormal prompt.

    Raises:
        ValueError: If the prompts would not fit into CLIP's context.
    """

    token_ids: torch.Tensor
    word_embeddings: torch.Tensor

    def __init__(self, clip: FrozenCLIP, n_ctx: int, states: tuple[str, str]) -> None:
        super().__init__()
        from open_clip import tokenizer

        if not 1 <= n_ctx <= clip.context_length - 8:
            msg = f"n_ctx={n_ctx}: choose between 1 and {clip.context_length - 8} context tokens."
            raise ValueError(msg)
        self.n_ctx = n_ctx
        prompts = [" ".join([FILLER] * n_ctx + [state]) for state in states]
        token_ids = tokenizer.tokenize(prompts, context_length=clip.context_length)
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.register_buffer("word_embeddings", clip.embed_text(token_ids).detach(), persistent=False)
        self.normal_context = nn.Parameter(0.02 * torch.randn(1, n_ctx, clip.text_width))
        self.abnormal_context = nn.Parameter(0.02 * torch.randn(1, n_ctx, clip.text_width))

    @property
    def end_of_text(self) -> torch.Tensor:
        """Index of the end-of-text token in each prompt ``[2]``: the largest token id."""
        return self.token_ids.argmax(dim=-1)

    def forward(self) -> torch.Tensor:
        """Prompt embeddings ``[2, 77, W]``, normal first, without positions."""
        context = torch.cat((self.normal_context, self.abnormal_context))
        start, words = self.word_embeddings[:, :1], self.word_embeddings[:, 1 + self.n_ctx :]
        return torch.cat((start, context, words), dim=1)
