# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Slow, literal forms of every stage, written from the formulas of the method and from nothing else."""

import torch
from torch.nn import functional as F  # noqa: N812


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-8)


def foreground_mask(tokens, previous=None):
    """Eq. 7-8, 38-44: four cues, token by token."""
    masks = []
    for image in range(tokens.shape[0]):
        c, x = tokens[image, 0], tokens[image, 1:]
        count = len(x)
        zero = torch.zeros_like(c)
        cues = [[], [], [], []]
        for i in range(count):
            average = ((x[i - 1] if i else zero) + x[i] + (x[i + 1] if i + 1 < count else zero)) / 3
            cues[0].append((x[i] - average).norm())
            cues[1].append((x[i] - x.mean(0)).norm())
            cues[2].append(1 - cosine(x[i], c))
            cues[3].append((x[i] - previous[image, 1 + i]).norm() if previous is not None else x.new_zeros(()))
        score = x.new_zeros(count)
        for weight, cue in zip((0.3, 0.3, 0.3, 0.1), map(torch.stack, cues), strict=True):
            score += weight * (cue - cue.min()) / (cue.max() - cue.min()).clamp(min=1e-6)
        mirrored = [abs(i) if i < count else 2 * (count - 1) - i for i in range(-2, count + 2)]
        smooth = torch.stack([score[mirrored[i : i + 5]].mean() for i in range(count)])
        masks.append(torch.where(smooth > 0.5, 1.0, 0.5))
    return torch.stack(masks).to(tokens.dtype)


def semantic_view(tokens, p):
    """Eq. 9-14 with both L x L matrices."""
    c, x = tokens[:, :1], tokens[:, 1:]
    similarity = cosine(x, c)
    fg = ((1 - similarity)[..., None] * p[..., None] * p[:, None]).softmax(-1)
    bg = (similarity[..., None] * (1 - p)[..., None] * (1 - p)[:, None]).softmax(-1)
    aggregated = p[..., None] * (fg @ x) + (1 - p)[..., None] * (bg @ x)
    return torch.cat((c, 0.6 * aggregated + 0.4 * x), 1)


def spatial_view(tokens, p):
    """Eq. 15-21 with the 25 copies of the tokens."""
    c, x = tokens[:, :1], tokens[:, 1:]
    batch, count, width = x.shape
    grid = round(count**0.5)
    window = F.unfold(x.transpose(1, 2).reshape(batch, width, grid, grid), 5, padding=2)
    window = window.view(batch, width, 25, count).permute(0, 3, 2, 1)
    q = F.unfold(p.view(batch, 1, grid, grid), 5, padding=2).transpose(1, 2)
    a, b = window * q[..., None], window * (1 - q)[..., None]
    c_ = c[:, None]
    background = (cosine(b, c_) * b.norm(dim=-1)).softmax(-1)
    foreground = ((1 - cosine(a, c_)) * (a - a.mean(2, keepdim=True)).norm(dim=-1)).softmax(-1)
    view = (foreground[..., None] * a).sum(2) / q.sum(-1, keepdim=True).clamp(min=1e-8)
    view = view + (background[..., None] * b).sum(2) / (1 - q).sum(-1, keepdim=True).clamp(min=1e-8)
    return torch.cat((c, view), 1)


def attention(module, tokens):
    """Eq. 22-23: gate, two streams, head by head."""
    gate = module.gate(tokens)
    total = 0
    for stream, gated in ((module.foreground, tokens * gate), (module.background, tokens * (1 - gate))):
        x = stream.norm(gated)
        heads = []
        for head in range(8):
            of_head = slice(64 * head, 64 * head + 64)
            q, k, v = (x @ part.weight[of_head].T for part in (stream.to_q, stream.to_k, stream.to_v))
            heads.append((q @ k.transpose(1, 2) * stream.scale).softmax(-1) @ v)
        total = total + stream.to_out(torch.cat(heads, -1))
    return module.norm(total)


def prototype(features, bank="half"):
    """Eq. 24-26 on the concatenated bank."""
    count = features[0].shape[1]
    bank = torch.cat([f[:, : count // 2] if bank == "half" else f for f in features], 1)
    return 0.5 * bank.mean(1) + 0.5 * bank.max(1).values


def suppress(feature, proto):
    """Eq. 27-31."""
    proto = proto[:, None]
    return 0.5 * feature + 0.5 * (feature - proto) * (1 - cosine(feature, proto))[..., None]


def text_features(model):
    """Eq. 1-6, prompt by prompt."""
    clip, fusion = model.clip, model.text_fusion
    tokens = clip.encode_text(model.prompts(), causal=model.causal_text)
    rows = []
    for ids, t in zip(model.prompts.token_ids.tolist(), tokens, strict=True):
        weights = fusion.token_selector(t)[:, 0].softmax(0)
        attended = fusion.projection(sum(w * token for w, token in zip(weights, t, strict=True)))
        projection = clip.text.text_projection
        fused = t.mean(0) @ projection + 0.5 * attended + 0.5 * (t[ids.index(max(ids))] @ projection)
        rows.append(fused / fused.norm())
    return torch.stack(rows)


def forward(model, images):
    """The whole default model: image score and patch map."""
    texts, previous, features = text_features(model), None, []
    for tokens in model.clip.encode_image(images, model.feature_layers):
        p = foreground_mask(tokens, previous)
        features += [attention(model.attention, v) for v in (tokens, semantic_view(tokens, p), spatial_view(tokens, p))]
        previous = tokens
    proto = prototype(features)
    weights = model.scale_weights.softmax(0)
    logits = 0
    for index, feature in enumerate(features):
        joint = suppress(feature, proto) @ model.clip.visual.proj
        logits = logits + weights[index // 3] * cosine(joint[:, :, None], texts) / 0.07
    abnormal = logits.softmax(-1)[..., 1]
    grid = round((abnormal.shape[1] - 1) ** 0.5)
    return abnormal[:, 0], abnormal[:, 1:].reshape(-1, grid, grid)
