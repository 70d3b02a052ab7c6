# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""All text tokens of CLIP's text tower, with CLIP's causal mask or without any."""

from collections.abc import Callable

import torch
from torch import nn

from .transformer import residual_block

BeforeBlock = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of a block, counted from 1, and the tokens ``[P, 77, W]`` that enter it -> the tokens to enter instead."""


def text_tokens(
    text: nn.Module,
    embeddings: torch.Tensor,
    causal: bool,
    before_block: BeforeBlock | None = None,
) -> torch.Tensor:
    """Run the text transformer on prompt embeddings.

    Args:
        text: open_clip ``CLIP`` or ``TextTransformer``: the module that holds ``transformer`` and ``ln_final``.
        embeddings: Word embeddings ``[P, 77, W]`` without positions.
        causal: ``True`` for CLIP's own mask, ``False`` for full attention over all places, padding included, which
            the released FB-CLIP weights were trained with.
        before_block: Changes the tokens before each block, as deep prompts do.

    Returns:
        torch.Tensor: Tokens ``[P, 77, W]`` after ``ln_final``.
    """
    tokens = embeddings + text.positional_embedding[: embeddings.shape[1]].to(embeddings.dtype)
    for number, block in enumerate(text.transformer.resblocks, start=1):
        if before_block is not None:
            tokens = before_block(number, tokens)
        tokens = residual_block(block, tokens, causal)
    return text.ln_final(tokens)
