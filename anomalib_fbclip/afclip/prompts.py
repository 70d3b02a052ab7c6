# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""State prompts with shared learnable vectors (AF-CLIP, https://arxiv.org/abs/2507.19949).

Axes: two prompts, normal first, of 77 text tokens; W width of the text tokens. The literal form is fast as it is: it
runs once for any number of images.
"""

import torch
from torch import nn

from anomalib_fbclip.clip import FrozenCLIP

STATES = ("without defect.", "with defect.")
"""Words of the normal and of the abnormal prompt."""


class StatePrompts(nn.Module):
    """Learnable vectors, shared by both prompts, in front of the tokenised words, the start of text included.

    Args:
        clip: Backbone that embeds the words.
        n_ctx: Number of learnable vectors.

    Raises:
        ValueError: If the prompts would not fit into CLIP's context.
    """

    token_ids: torch.Tensor
    word_embeddings: torch.Tensor

    def __init__(self, clip: FrozenCLIP, n_ctx: int) -> None:
        super().__init__()
        from open_clip import tokenizer

        token_ids = tokenizer.tokenize(list(STATES), context_length=clip.context_length)
        largest = clip.context_length - 1 - int(token_ids.argmax(dim=-1).max())
        if not 1 <= n_ctx <= largest:
            msg = f"n_ctx={n_ctx}: choose between 1 and {largest} learnable vectors."
            raise ValueError(msg)
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.register_buffer("word_embeddings", clip.embed_text(token_ids).detach(), persistent=False)
        self.context = nn.Parameter(0.02 * torch.randn(1, n_ctx, clip.text_width))

    @property
    def n_ctx(self) -> int:
        """Number of learnable vectors."""
        return self.context.shape[1]

    @property
    def end_of_text(self) -> torch.Tensor:
        """Index of the end-of-text token in each prompt ``[2]``."""
        return self.n_ctx + self.token_ids.argmax(dim=-1)

    def forward(self) -> torch.Tensor:
        """Prompt embeddings ``[2, 77, W]``, normal first, without positions; padding is cut off at the end."""
        words = self.word_embeddings[:, : self.word_embeddings.shape[1] - self.n_ctx]
        return torch.cat((self.context.expand(len(words), -1, -1), words), dim=1)
