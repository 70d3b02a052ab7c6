# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The reduced form of every stage equals its literal form."""

import copy
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

from anomalib_fbclip.common.functional import grid_to_map, map_matrix, pair, upsample
from anomalib_fbclip.fbclip import neighbourhoods, views
from anomalib_fbclip.fbclip.attention import ForegroundBackgroundAttention
from anomalib_fbclip.fbclip.background import background_prototype
from anomalib_fbclip.fbclip.foreground import foreground_mask
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel
from anomalib_fbclip.fbclip.views import semantic_mixing, spatial_mixing


def literal_mask(tokens, previous=None):
    """Eq. 7-8, 38-44, token by token."""
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
            cues[2].append(1 - torch.dot(x[i], c) / (x[i].norm() * c.norm()))
            cues[3].append((x[i] - previous[image, 1 + i]).norm() if previous is not None else x.new_zeros(()))
        score = x.new_zeros(count)
        for weight, cue in zip((0.3, 0.3, 0.3, 0.1), map(torch.stack, cues), strict=True):
            score += weight * (cue - cue.min()) / (cue.max() - cue.min()).clamp(min=1e-6)
        mirrored = [abs(i) if i < count else 2 * (count - 1) - i for i in range(-2, count + 2)]
        smooth = torch.stack([score[mirrored[i : i + 5]].mean() for i in range(count)])
        masks.append(torch.where(smooth > 0.5, 1.0, 0.5))
    return torch.stack(masks).to(tokens.dtype)


TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
MASKS = {"mixed": None, "foreground": 1.0, "background": 0.5}


def tokens_and_mask(batch, grid, kind="mixed", width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(pair(grid))
    tokens = torch.randn(batch, 1 + count, width, generator=generator)
    mask = (torch.rand(batch, count, generator=generator) > 0.5) * 0.5 + 0.5
    return tokens, mask if MASKS[kind] is None else torch.full_like(mask, MASKS[kind])


def banded_spatial_mixing(tokens, mask, grid):
    """The form of GPUs and graphs."""
    with patch.object(neighbourhoods, "_picks", return_value=False):
        return spatial_mixing(tokens, mask, grid)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        (semantic_mixing, views.semantic_view),
        (spatial_mixing, views.spatial_view),
        (banded_spatial_mixing, views.spatial_view),
    ],
)
@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kind=st.sampled_from(list(MASKS)),
    seed=st.integers(0, 99),
)
def test_views(fast, slow, dtype, batch, grid, kind, seed):
    tokens, mask = tokens_and_mask(batch, grid, kind, seed=seed)
    rounded = tokens.to(dtype)
    view = fast(rounded.float(), mask, grid)(rounded)
    assert view.dtype == dtype
    expected = slow(rounded.float(), mask, grid)
    assert_close(view.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)


def test_spatial_view_of_nearly_equal_tokens():
    tokens, mask = tokens_and_mask(1, 7, width=64)
    tokens = 3 + 1e-4 * tokens
    assert_close(spatial_mixing(tokens, mask)(tokens), views.spatial_view(tokens, mask), rtol=0, atol=5e-4)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), grid=st.integers(2, 7), seed=st.integers(0, 99), first=st.booleans())
def test_foreground_mask(batch, grid, seed, first):
    tokens, _ = tokens_and_mask(batch, grid, seed=seed)
    previous = None if first else tokens_and_mask(batch, grid, seed=seed + 100)[0]
    mask = foreground_mask(tokens.double(), previous if first else previous.double())
    assert mask.unique().tolist() in ([0.5], [1.0], [0.5, 1.0])
    assert torch.equal(mask, literal_mask(tokens.double(), previous if first else previous.double()))


def fast_attention(module, tokens):
    """The fast form on one view, the tokens themselves."""
    variance = tokens.float().var(dim=-1, correction=0, keepdim=True)
    return module.attend(tokens, [views.identity_mixing(tokens, None)], [variance])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_forward_and_gradients(dtype):
    torch.manual_seed(0)
    module = ForegroundBackgroundAttention(32)
    tokens = torch.randn(2, 10, 32)
    slow = module(tokens)
    if dtype == torch.bfloat16:
        assert_close(fast_attention(module.to(dtype), tokens.to(dtype)).float(), slow, rtol=0, atol=0.1)
        return
    fast = fast_attention(module, tokens)
    assert_close(fast, slow, rtol=0, atol=1e-5)
    parameters = list(module.parameters())
    weights = torch.randn_like(fast)
    ours = torch.autograd.grad((fast * weights).sum(), parameters)
    theirs = torch.autograd.grad((slow * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5


@pytest.mark.parametrize("bias", [60.0, -120.0])
def test_attention_of_a_saturated_gate(bias):
    torch.manual_seed(0)
    module = ForegroundBackgroundAttention(32)
    torch.nn.init.constant_(module.gate[2].bias, bias)
    tokens = torch.randn(2, 10, 32)
    fast = fast_attention(module, tokens)
    assert_close(fast, module(tokens), rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(fast.square().sum(), list(module.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("logit", [12.0, -12.0])
def test_attention_does_not_round_what_a_nearly_saturated_gate_leaves(logit):
    # 1 - sigmoid(12) in float32 is wrong by half a percent, which large tokens carry into the result.
    torch.manual_seed(0)
    module = ForegroundBackgroundAttention(32)
    torch.nn.init.zeros_(module.gate[2].weight)
    torch.nn.init.constant_(module.gate[2].bias, logit)
    tokens = 100 * torch.randn(2, 10, 32)
    exact = copy.deepcopy(module).double()(tokens.double())
    assert_close(fast_attention(module, tokens).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bank", ["half", "full"])
def test_background_prototype_equals_that_of_the_concatenated_bank(bank):
    features = [torch.randn(2, 10, 16) for _ in range(6)]
    whole = torch.cat([feature[:, :5] if bank == "half" else feature for feature in features], dim=1)
    assert_close(background_prototype(features, bank), 0.5 * whole.mean(dim=1) + 0.5 * whole.amax(dim=1))


@pytest.mark.parametrize(("grid", "size", "sigma"), [(1, 8, 4), (5, 35, 4), (6, 84, 0), (37, 518, 4), (3, 6, 4)])
def test_map_matrix(grid, size, sigma):
    grid_map = torch.rand(2, grid, grid)
    expected = F.interpolate(grid_map[None], size=(size, size), mode="bilinear", align_corners=False)[0].numpy()
    if sigma:
        expected = np.stack([gaussian_filter(m.astype(float), sigma, mode="reflect", truncate=4) for m in expected])
    assert_close(
        grid_to_map(grid_map, map_matrix(grid, size, sigma)).double().numpy(),
        expected.astype(float),
        atol=1e-5,
        rtol=0,
    )


def test_the_patches_of_a_column_do_not_see_those_of_the_next_one():
    # A patch of the spatial view reads two rows and columns around it: on a grid of 3 x 7, and not of 7 x 3.
    tokens, mask = tokens_and_mask(1, (3, 7), "foreground")
    changed = tokens.clone()
    changed[0, 1] += 1  # upper left
    for form in (views.spatial_view, lambda *given: spatial_mixing(*given)(given[0])):
        moved = (form(changed, mask, (3, 7)) - form(tokens, mask, (3, 7))).abs().amax(dim=-1)[0, 1:].view(3, 7) > 1e-4
        assert moved.nonzero().amax(dim=0).tolist() == [2, 2]


@settings(max_examples=15, deadline=None)
@given(grid=st.tuples(st.integers(1, 9), st.integers(1, 9)), sigma=st.sampled_from([0, 2, 4]))
def test_maps_of_any_proportions(grid, sigma):
    grid_map, size = torch.rand(2, *grid), (8 * grid[0], 8 * grid[1])
    expected = F.interpolate(grid_map[None], size=size, mode="bilinear", align_corners=False)[0].numpy()
    if sigma:
        expected = np.stack([gaussian_filter(m.astype(float), sigma, mode="reflect", truncate=4) for m in expected])
    assert_close(upsample(grid_map, size, sigma).double().numpy(), expected.astype(float), atol=1e-5, rtol=0)


class Enlarge(torch.nn.Module):
    def forward(self, grid_map):
        return grid_to_map(grid_map, map_matrix(7, 21, 1.0, grid_map.device))


def test_a_map_matrix_made_in_an_export_or_for_inference_serves_training_later():
    grid_map = torch.rand(1, 7, 7, requires_grad=True)
    with torch.inference_mode():
        expected = Enlarge()(grid_map)
    exported = torch.export.export(Enlarge(), (grid_map,), strict=False).module()
    assert_close(exported(grid_map), expected)
    found = Enlarge()(grid_map)
    found.sum().backward()
    assert type(found) is torch.Tensor
    assert_close(found, expected)
    assert map_matrix(7, 21, 1.0) is map_matrix(7, 21, 1.0)


@pytest.mark.parametrize(
    ("size", "batch", "layers"),
    [(40, 1, (1, 3)), (24, 3, (2,)), (8, 2, (1, 2, 3, 4)), ((16, 40), 2, (1, 3)), ((40, 8), 1, (2, 4))],
)
@pytest.mark.parametrize("arguments", [{}, {"attention": False}, {"suppression": False}, {"views": ("sem",)}], ids=str)
def test_whole_model_and_its_gradients(small_clip, size, batch, layers, arguments):
    settings = {"feature_layers": layers, "n_ctx": 3, **arguments}
    # Where two tokens nearly share a maximum, rounding decides which of them the prototype's gradient goes to. With
    # this seed every maximum is at least 5e-5 above those of tokens that differ.
    torch.manual_seed(8)
    fast = FBCLIPModel(small_clip(), **settings).train()
    literal = FBCLIPModel(fast.clip, literal=True, **settings).train()
    literal.load_state_dict(fast.state_dict())
    images = torch.randn(batch, 3, *pair(size))
    found = []
    for model in (fast, literal):
        scores = model.score(images)
        values = (scores.pred_score, scores.grid_map, scores.loss_terms["similarity"])
        sum(value.sum() for value in values).backward()
        found.append((values, [p.grad for p in model.parameters() if p.requires_grad]))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert_close(ours, theirs, rtol=0, atol=2e-5)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-4
