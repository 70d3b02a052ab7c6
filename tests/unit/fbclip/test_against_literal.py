# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The reduced form of every stage equals its literal form."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F  # noqa: N812
from torch.testing import assert_close

from anomalib_fbclip.fbclip.attention import ForegroundBackgroundAttention
from anomalib_fbclip.fbclip.background import background_prototype, suppress_background
from anomalib_fbclip.fbclip.foreground import foreground_mask
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel
from anomalib_fbclip.fbclip.views import semantic_mixing, spatial_mixing
from anomalib_fbclip.functional import grid_to_map, map_matrix

SPEC = importlib.util.spec_from_file_location("literal", Path(__file__).parents[2] / "reference" / "literal.py")
literal = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(literal)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
MASKS = {"mixed": None, "foreground": 1.0, "background": 0.5}


def tokens_and_mask(batch, grid, kind="mixed", width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, 1 + grid * grid, width, generator=generator)
    mask = (torch.rand(batch, grid * grid, generator=generator) > 0.5) * 0.5 + 0.5
    return tokens, mask if MASKS[kind] is None else torch.full_like(mask, MASKS[kind])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("fast", "slow"),
    [(semantic_mixing, literal.semantic_view), (spatial_mixing, literal.spatial_view)],
)
@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), grid=st.integers(1, 9), kind=st.sampled_from(list(MASKS)), seed=st.integers(0, 99))
def test_views(fast, slow, dtype, batch, grid, kind, seed):
    tokens, mask = tokens_and_mask(batch, grid, kind, seed=seed)
    view = fast(tokens.to(dtype), mask.to(dtype))(tokens.to(dtype))
    assert view.dtype == dtype
    expected = slow(tokens.to(dtype).float(), mask)
    assert_close(view.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)


def test_spatial_view_of_nearly_equal_tokens():
    tokens, mask = tokens_and_mask(1, 7, width=64)
    tokens = 3 + 1e-4 * tokens
    assert_close(spatial_mixing(tokens, mask)(tokens), literal.spatial_view(tokens, mask), rtol=0, atol=5e-4)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 3), grid=st.integers(2, 7), seed=st.integers(0, 99), first=st.booleans())
def test_foreground_mask(batch, grid, seed, first):
    tokens, _ = tokens_and_mask(batch, grid, seed=seed)
    previous = None if first else tokens_and_mask(batch, grid, seed=seed + 100)[0]
    mask = foreground_mask(tokens.double(), previous if first else previous.double())
    assert mask.unique().tolist() in ([0.5], [1.0], [0.5, 1.0])
    assert torch.equal(mask, literal.foreground_mask(tokens.double(), previous if first else previous.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_forward_and_gradients(dtype):
    torch.manual_seed(0)
    module = ForegroundBackgroundAttention(32)
    tokens = torch.randn(2, 10, 32)
    slow = literal.attention(module, tokens)
    if dtype == torch.bfloat16:
        assert_close(module.to(dtype)(tokens.to(dtype)).float(), slow, rtol=0, atol=0.1)
        return
    fast = module(tokens)
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
    fast = module(tokens)
    assert_close(fast, literal.attention(module, tokens), rtol=0, atol=1e-5)
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
    exact = literal.attention(copy.deepcopy(module).double(), tokens.double())
    assert_close(module(tokens).double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bank", ["half", "full"])
def test_background(bank):
    features = [torch.randn(2, 10, 16, requires_grad=True) for _ in range(6)]
    fast, slow = background_prototype(features, bank), literal.prototype(features, bank)
    assert_close(fast, slow)
    assert_close(suppress_background(features[0], fast), literal.suppress(features[0], slow), rtol=0, atol=1e-5)
    ours = torch.autograd.grad(suppress_background(features[0], fast).square().sum(), features)
    theirs = torch.autograd.grad(literal.suppress(features[0], slow).square().sum(), features)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize(("size", "batch", "layers"), [(40, 1, (1, 3)), (24, 3, (2,)), (8, 2, (1, 2, 3, 4))])
def test_whole_model(small_clip, size, batch, layers):
    torch.manual_seed(1)
    model = FBCLIPModel(small_clip(), feature_layers=layers, n_ctx=3).eval()
    images = torch.randn(batch, 3, size, size)
    scores = model.score(images)
    if size == 8:  # one patch: the literal mirror and the half bank do not exist
        assert scores.grid_map.shape == (batch, 1, 1)
        assert torch.isfinite(scores.grid_map).all()
        return
    score, grid_map = literal.forward(model, images)
    assert_close(scores.pred_score, score, rtol=0, atol=2e-5)
    assert_close(scores.grid_map, grid_map, rtol=0, atol=2e-5)
