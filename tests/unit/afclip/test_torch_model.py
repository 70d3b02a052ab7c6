# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""AF-CLIP: fast forms equal literal ones, each argument matters, its memory, its loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anomalib_fbclip.afclip.adaptor import Adaptor
from anomalib_fbclip.afclip.aggregation import WINDOWS, aggregate, mixing
from anomalib_fbclip.afclip.loss import AFCLIPLoss, alignment, pairwise_alignment
from anomalib_fbclip.afclip.torch_model import AFCLIPModel


@pytest.fixture(scope="module")
def clip(small_clip):
    return small_clip()


def build(clip, seed=0, **arguments):
    torch.manual_seed(seed)
    model = AFCLIPModel(clip, **{"feature_layers": (1, 3), "n_ctx": 3, **arguments})
    with torch.no_grad():
        model.prompts.context.mul_(20)
    return model.eval()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    window=st.sampled_from(WINDOWS),
    seed=st.integers(0, 99),
)
def test_aggregation(batch, grid, window, seed):
    tokens = torch.randn(batch, 1 + grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(seed))
    assert_close(mixing(window, grid)(tokens), aggregate(tokens, window, grid), rtol=0, atol=2e-6)


def test_aggregation_by_hand():
    tokens = torch.zeros(1, 10, 1)
    tokens[0, 0], tokens[0, 1] = 7.0, 1.0  # class token, upper left patch
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / 32)
    line /= line.sum()
    expected = torch.zeros(3, 3)
    expected[:2, :2] = torch.outer(line[1:], line[1:])  # no renormalisation at the border
    found = mixing(3)(tokens)[0, :, 0]
    assert found[0] == 7
    assert_close(found[1:].view(3, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaptor_of_all_windows_and_its_gradients(dtype):
    torch.manual_seed(0)
    adaptor = Adaptor(32)
    torch.nn.init.normal_(adaptor.norm.bias)
    tokens = 3 * torch.randn(2, 26, 32) + 1
    slow = [adaptor(aggregate(tokens, window)) for window in WINDOWS]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        fast = list(adaptor.attend(tokens, [mixing(window) for window in WINDOWS]))
    for ours, theirs in zip(fast, slow, strict=True):
        assert_close(ours.float(), theirs, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)
    if dtype == torch.float32:
        weights = torch.randn(2, 26, 32)
        gradients = [
            torch.autograd.grad(sum((each * weights).sum() for each in form), list(adaptor.parameters()))
            for form in (fast, slow)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize(("layers", "size", "batch"), [((1, 2, 4), 40, 2), ((3,), 8, 3), ((2, 4), 56, 1)])
def test_whole_model_its_loss_and_gradients(clip, layers, size, batch):
    images = torch.randn(batch, 3, size, size)
    labels = torch.arange(batch) % 2
    masks = torch.zeros(batch, size, size)
    masks[labels == 1, : size // 2] = 1
    found = []
    for literal in (False, True):
        model = build(clip, feature_layers=layers, literal=literal)
        prediction = model(images)
        scores = model.train().score(images)
        given = {"pred_score": scores.pred_score, "anomaly_map": None, "labels": labels, "masks": masks}
        parts = AFCLIPLoss(literal=literal)(**given, **scores.loss_terms)
        parts["total"].backward()
        found.append((prediction, parts, [p.grad for p in model.parameters() if p.requires_grad]))
    assert_close(found[0][0].anomaly_map, found[1][0].anomaly_map, rtol=0, atol=1e-5)
    assert_close(found[0][0].pred_score, found[1][0].pred_score, rtol=0, atol=1e-5)
    for name, part in found[1][1].items():
        assert_close(found[0][1][name], part, rtol=0, atol=1e-5)
    for ours, theirs in zip(found[0][2], found[1][2], strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6


def test_what_learning_needs_is_not_kept_for_a_prediction(clip):
    model, images = build(clip), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not model.score(images).loss_terms
    assert model.train().score(images).loss_terms["joint_tokens"].shape == (1, 6, 16, 32)


@pytest.mark.parametrize("kind", ["mixed", "normal", "abnormal"])
def test_alignment(kind):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 3, 9, 8, generator=generator) + 1
    defective = {"mixed": (torch.rand(2, 9, generator=generator) > 0.6).float(), "normal": torch.zeros(2, 9)}
    defective = defective.get(kind, torch.ones(2, 9))
    # Draw unlike patches together, so that there is something to lose.
    tokens = (tokens - 3 * defective[:, None, :, None] * tokens.roll(1, dims=2)).requires_grad_()
    values = [form(tokens, defective) for form in (alignment, pairwise_alignment)]
    assert_close(values[0], values[1], rtol=0, atol=1e-6)
    if kind != "mixed":
        assert values[0] == 0
    gradients = [torch.autograd.grad(value, tokens)[0] for value in values]
    assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6)


def test_alignment_grows_when_unlike_patches_look_alike():
    defective = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])[None, None]
    mixed = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])[None, None]
    assert alignment(apart, defective) == 0
    assert alignment(torch.cat((mixed[..., :2, :], mixed[..., [1, 0], :]), dim=2), defective) == 0  # as like as unlike
    assert alignment(mixed[..., [0, 1, 0, 1], :] + 0.0, torch.tensor([[1.0, 0.0, 0.0, 1.0]])) == 0


def test_loss_parts_follow_the_arguments(clip):
    scores = build(clip).train().score(torch.randn(2, 3, 32, 32))
    given = {"pred_score": scores.pred_score, "anomaly_map": None, "labels": torch.tensor([0, 1]), **scores.loss_terms}
    masks = torch.zeros(2, 32, 32)
    masks[1, :16] = 1
    assert AFCLIPLoss()(**given, masks=None).keys() == {"image", "total"}
    assert AFCLIPLoss()(**given, masks=masks).keys() == {"image", "focal", "l1", "alignment", "total"}
    assert "alignment" not in AFCLIPLoss(alignment_weight=0)(**given, masks=masks)
    assert AFCLIPLoss(focal_gamma=1)(**given, masks=masks)["focal"] > AFCLIPLoss()(**given, masks=masks)["focal"]
    for name in ("focal_gamma", "alignment_weight"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            AFCLIPLoss(**{name: -1})


@pytest.mark.parametrize("argument", [{"feature_layers": (4,)}, {"n_ctx": 5}], ids=str)
def test_each_argument_matters(clip, argument):
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = build(clip, **argument)
    assert (other(images).anomaly_map - build(clip)(images).anomaly_map).abs().max() > 1e-6
    assert other.architecture() != build(clip).architecture()
    with pytest.raises(ValueError, match=r"n_ctx=73: choose between 1 and 72"):
        build(clip, n_ctx=73)


@torch.no_grad()
def test_memory_of_normal_images(clip):
    images = torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    few, text = build(clip, few_shot=True), build(clip)
    with pytest.raises(RuntimeError, match="no normal image"):
        few(images)
    few.remember(images[:2])
    # An image of the memory keeps the text's tenth; another one has a distance, too.
    expected = 0.1 * text.score(images).grid_map
    found = few.score(images).grid_map
    assert_close(found[:2], expected[:2], rtol=0, atol=1e-6)
    assert (found[2] - expected[2]).min() > 0.01
    # One image by another, patch by patch.
    few.remember(images[:1])
    total = torch.zeros(25)
    for tokens in clip.encode_image(images[:2], few.feature_layers):
        for window in WINDOWS:
            sets = torch.nn.functional.normalize(aggregate(tokens, window)[:, 1:], dim=-1)
            total += (1 - (sets[1] @ sets[0].T).amax(dim=-1)) / 2
    assert_close(few.memory.score(few.encode_image(images[1:2]))[0, 1:], total / 6)
    # It is part of the state dict, whatever its size.
    again = build(clip, seed=1, few_shot=True)
    again.load_state_dict(few.state_dict())
    assert torch.equal(again(images).anomaly_map, few(images).anomaly_map)
