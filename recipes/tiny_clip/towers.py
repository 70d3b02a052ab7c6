# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The two towers, fresh, with a short token table: open_clip's modules, so that the keys are OpenAI's."""

from __future__ import annotations

import math

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn import functional

from anomalib_fbclip.clip.stem import StemmedPatches
from anomalib_fbclip.clip.text import text_tokens
from recipes.tiny_clip.captions import vocabulary_texts

PATCH, IMAGE_SIZE, WIDTH, LAYERS, TEXT_LAYERS, JOINT, LENGTH = 8, 224, 128, 8, 3, 128, 77
TAPS = (1, 2, 4, 6, 8)
"""Blocks, counted from 1, that FB-CLIP reads."""


class Vocabulary:
    """CLIP's tokenizer with its ids mapped onto the rows of a short table; the last row is for unknown words.

    Attributes:
        ids: CLIP's ids of the rows, int64 ``[V]``, sorted.
        unknown: Number of the row for every other id.
    """

    def __init__(self) -> None:
        self.tokenizer = SimpleTokenizer()
        found = {0, self.tokenizer.sot_token_id, self.tokenizer.eot_token_id}
        for text in vocabulary_texts():
            found.update(self.tokenizer.encode(text))
        self.ids = torch.tensor(sorted(found))
        self.unknown = len(self.ids)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Rows ``[T, 77]`` and the end-of-text positions ``[T]``."""
        tokens = self.tokenizer(texts, context_length=LENGTH)
        rows = torch.searchsorted(self.ids, tokens).clamp(max=self.unknown - 1)
        rows = torch.where(self.ids[rows] == tokens, rows, self.unknown)
        return rows, tokens.argmax(dim=-1)


def build(vocabulary: Vocabulary) -> CLIP:
    """A fresh model whose token table has ``V + 1`` rows, patches started as cosines and positions as sines.

    The convolutional network beside the patches is frozen and holds random weights until :mod:`stem` fills it.
    """
    vision = CLIPVisionCfg(layers=LAYERS, width=WIDTH, patch_size=PATCH, image_size=IMAGE_SIZE)
    text = CLIPTextCfg(vocab_size=vocabulary.unknown + 1, width=WIDTH, heads=WIDTH // 64, layers=TEXT_LAYERS)
    model = CLIP(JOINT, vision, text, quick_gelu=True)
    patches = StemmedPatches(WIDTH)
    for frozen in (patches.first, patches.blocks):
        frozen.requires_grad_(requires_grad=False)
    model.visual.conv1 = patches
    with torch.no_grad():
        patches.fine.weight.zero_()
        patches.coarse.weight.zero_()
        model.visual.conv1.weight.copy_(_cosine_patches())
        model.visual.positional_embedding[1:] = _sine_positions(IMAGE_SIZE // PATCH)
    return model


def _cosine_patches() -> Tensor:
    """Patch embedding from the lowest 2-D cosines of brightness and of two colour differences, ``[W, 3, P, P]``."""
    place = (np.arange(PATCH) + 0.5) * np.pi / PATCH
    colours = np.array([[1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5]]) / np.array([[3**0.5], [2**0.5], [1.5**0.5]])
    bases = []
    for rank in range(PATCH * PATCH * 3):
        colour, down, across = rank % 3, rank // 3 // PATCH, rank // 3 % PATCH
        wave = np.outer(np.cos(down * place), np.cos(across * place))
        cost = (down + across) * (1 if colour == 0 else 2) + (0 if colour == 0 else 2)
        bases.append((cost, rank, colours[colour][:, None, None] * wave / np.linalg.norm(wave)))
    chosen = [basis for _, _, basis in sorted(bases, key=lambda item: item[:2])[:WIDTH]]
    return torch.tensor(np.stack(chosen), dtype=torch.float32) * 0.35


def _sine_positions(side: int) -> Tensor:
    """2-D sines, ``[side * side, W]``, of small size."""
    rates = torch.exp(-math.log(100.0) * torch.arange(WIDTH // 4) / (WIDTH // 4))
    angle = torch.arange(side)[:, None] * rates[None]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    down = wave[:, None].expand(side, side, -1)
    return 0.2 * torch.cat([down, wave[None].expand(side, side, -1)], dim=-1).reshape(side * side, WIDTH)


def text_features(
    model: CLIP,
    rows: Tensor,
    ends: Tensor,
    causal: bool,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Text vectors in both readings, L2-normalised.

    Args:
        model: The towers.
        rows: Row numbers ``[T, 77]``.
        ends: End-of-text positions ``[T]``.
        causal: CLIP's own mask, or full attention over all 77 positions.
        context: ``[C, 12, W]`` to put in the places 1..12 of the first ``C`` texts.

    Returns:
        End-of-text feature and (mean + 0.5 end-of-text), ``[T, d]`` each.
    """
    x = model.token_embedding(rows)
    if context is not None:
        x = x.clone()
        x[: len(context), 1 : 1 + context.shape[1]] = context
    x = text_tokens(model, x, causal)
    end = x[torch.arange(len(x)), ends] @ model.text_projection
    mean = x.mean(dim=1) @ model.text_projection
    return functional.normalize(end, dim=-1), functional.normalize(mean + 0.5 * end, dim=-1)
