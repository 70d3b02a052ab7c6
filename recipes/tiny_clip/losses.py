# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What the backbone is asked: tell good from bad in the class token and in every patch, and match captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from anomalib_fbclip.clip.vision import block_tokens
from recipes.tiny_clip.captions import (
    ANOMALOUS_STATES,
    CONTEXT_LENGTH,
    FBCLIP_PROMPTS,
    NORMAL_STATES,
    PLAIN_PROMPTS,
    kind_captions,
    prompt_pair,
)
from recipes.tiny_clip.towers import PATCH, TAPS, WIDTH, Vocabulary, text_features

if TYPE_CHECKING:
    import numpy as np
    from open_clip.model import CLIP

    from recipes.tiny_clip.batches import Batch

TEMPERATURE = 0.07
BLOCK_WEIGHTS = (0.15, 0.25, 0.35, 0.5, 1.0)
CAPTIONS_A_STEP = 14
WORD_DROP = 0.06


def _drop_words(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Replace random words by the unknown one, but never those that say good or bad."""
    keep = set(vocabulary.tokenizer.encode(" ".join((*NORMAL_STATES, *ANOMALOUS_STATES)).replace("{}", "")))
    keep |= {0, vocabulary.tokenizer.sot_token_id, vocabulary.tokenizer.eot_token_id}
    kept = torch.isin(vocabulary.ids, torch.tensor(sorted(keep)))
    kept = torch.cat([kept, torch.ones(1, dtype=torch.bool)])
    return torch.where((torch.rand(rows.shape) < WORD_DROP) & ~kept[rows], vocabulary.unknown, rows)


def patch_targets(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Per patch: 1 above 6 % defect pixels; weight 0 for smaller, non-zero shares. ``[B, L]`` each."""
    share = functional.avg_pool2d(masks[:, None], PATCH).flatten(1)
    return (share > 0.06).float(), ((share == 0) | (share > 0.06)).float()


def dense_loss(cosines: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """BCE (positives threefold) + 0.5 dice of (anomalous - normal) / 0.07.

    Args:
        cosines: Cosine differences ``[V, B, L]`` for V pairs of text vectors.
        targets: ``[B, L]``.
        weights: ``[B, L]``.
    """
    logits = cosines / TEMPERATURE
    bce = functional.binary_cross_entropy_with_logits(
        logits,
        targets.expand_as(logits),
        weights,
        pos_weight=logits.new_tensor(3.0),
    )
    chance = logits.sigmoid() * weights
    overlap = (chance * targets).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (chance.sum((1, 2)) + targets.sum() + 1)
    return bce + 0.5 * dice.mean()


def compute(
    model: CLIP,
    vocabulary: Vocabulary,
    batch: Batch,
    rng: np.random.Generator,
    step: int,
) -> dict[str, Tensor]:
    """All losses of one step, by name; their sum is minimised. Even steps match captions, odd steps name the kinds."""
    matching = step % 2 == 0
    chosen = torch.from_numpy(rng.permutation(len(batch.captions))[:CAPTIONS_A_STEP])
    device = model.logit_scale.device
    batch = batch._replace(
        **{name: getattr(batch, name).to(device, non_blocking=True) for name in ("images", "masks", "kinds")},
    )
    extra = [batch.captions[i] for i in chosen] if matching else kind_captions()
    prompts = [*FBCLIP_PROMPTS, *prompt_pair(rng), *(PLAIN_PROMPTS if rng.random() < 0.3 else ())]
    rows, ends = vocabulary([*prompts, *extra])
    context = torch.randn(2, CONTEXT_LENGTH, WIDTH, device=device) * 0.02 if rng.random() < 0.75 else None
    # The towers alone in bfloat16: cosines over 0.07 need float32.
    with torch.autocast(device.type, torch.bfloat16):
        rows, causal = _drop_words(rows, vocabulary).to(device), bool(rng.random() < 0.5)
        texts = text_features(model, rows, ends.to(device), causal, context)
        tokens = [x.float() for x in block_tokens(model.visual, batch.images, TAPS)]
    end, mean = (functional.normalize(text.float(), dim=-1) for text in texts)
    pairs = torch.cat([feature[: len(prompts)] for feature in (end, mean)])
    contrast = pairs[1::2] - pairs[0::2]

    targets, weights = patch_targets(batch.masks)
    bad = (batch.kinds > 0).float()
    losses = {"dense": torch.zeros((), device=device), "score": torch.zeros((), device=device)}
    for share, x in zip(BLOCK_WEIGHTS, tokens, strict=True):
        joint = functional.normalize(x @ model.visual.proj, dim=-1)
        cosines = torch.einsum("bnd,vd->vbn", joint, contrast)
        losses["dense"] = losses["dense"] + share * dense_loss(cosines[:, :, 1:], targets, weights)
        logits = cosines[:, :, 0] / TEMPERATURE
        score = functional.binary_cross_entropy_with_logits(logits, bad.expand_as(logits))
        losses["score"] = losses["score"] + 0.4 * share * score
    whole = functional.normalize(model.visual.ln_post(tokens[-1][:, 0]) @ model.visual.proj, dim=-1)
    logits = whole @ contrast.T / TEMPERATURE
    losses["score"] = losses["score"] + 0.3 * functional.binary_cross_entropy_with_logits(
        logits,
        bad[:, None].expand_as(logits),
    )
    words = end[len(prompts) :]
    if matching:
        numbers = batch.kinds.tolist()
        names = [f"{batch.families[i]} {numbers[i]}" for i in chosen.tolist()]
        same = torch.tensor([[float(one == other) for other in names] for one in names], device=device)
        same = same / same.sum(1, keepdim=True)
        match = model.logit_scale.exp().clamp(max=100) * whole[chosen] @ words.T
        losses["caption"] = 0.2 * (functional.cross_entropy(match, same) + functional.cross_entropy(match.T, same))
    else:
        hit = targets.bool()
        kinds = batch.kinds[:, None].expand_as(targets)[hit]
        losses["kind"] = 0.3 * functional.cross_entropy(joint[:, 1:][hit] @ words.T / TEMPERATURE, kinds)
    losses["dense"] = 1.5 * losses["dense"]
    return losses
