# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""All text tokens of CLIP's text tower, with CLIP's causal mask or without any."""

import torch
from torch import nn

from .transformer import residual_block


def text_tokens(text: nn.Module, embeddings: torch.Tensor, causal: bool) -> torch.Tensor:
    """Run the text transformer on prompt embeddings.

    Args:
        text: open_clip ``CLIP`` or ``TextTransformer``: the module that holds ``transformer`` and ``ln_final``.
        embeddings: Word embeddings ``[P, 77, W]`` without positions.
        causal: ``True`` for CLIP's own mask, ``False`` for full attention over all places, padding included, which
            the released FB-CLIP weights were trained with.

    Returns:
        torch.Tensor: Tokens ``[P, 77, W]`` after ``ln_final``.
    """
    tokens = embeddings + text.positional_embedding[: embeddings.shape[1]].to(embeddings.dtype)
    for block in text.transformer.resblocks:
        tokens = residual_block(block, tokens, causal)
    return text.ln_final(tokens)
