# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments matter, nothing is dead, text features are cached only as long as they hold."""

import copy
import pickle

import pytest
import torch

from anomalib_fbclip.adapted import torch_model
from anomalib_fbclip.clip.prompts import PromptLearner
from anomalib_fbclip.common.functional import upsample
from anomalib_fbclip.fbclip.loss import FBCLIPLoss
from anomalib_fbclip.fbclip.text_fusion import STATES
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel

ABLATIONS = [
    {"text_poolings": ("eot",)},
    {"text_poolings": ("global",)},
    {"text_poolings": ("attention",)},
    {"views": ("id",)},
    {"views": ("sem", "spa")},
    {"attention": False},
    {"suppression": False},
    {"bank": "full"},
    {"causal_text": True},
    {"temperature": 0.2},
    {"feature_layers": (2,)},
    {"n_ctx": 4},
]


@pytest.fixture(scope="module")
def clip(small_clip):
    return small_clip()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(clip, **arguments):
    torch.manual_seed(0)
    model = FBCLIPModel(clip, **{"feature_layers": (1, 3), "n_ctx": 3, **arguments})
    with torch.no_grad():
        model.prompts.abnormal_context.mul_(20)
    return model.eval()


@pytest.mark.parametrize("arguments", ABLATIONS, ids=str)
def test_each_argument_matters_and_leaves_no_dead_parameter(clip, images, arguments):
    model = build(clip, **arguments)
    base = build(clip)
    shared = base.state_dict()
    own = model.state_dict()
    model.load_state_dict({k: shared[k] if k in shared and shared[k].shape == v.shape else v for k, v in own.items()})
    assert (model.score(images).grid_map - base.score(images).grid_map).abs().max() > 1e-6
    scores = model.train().score(images)
    (scores.pred_score.sum() + scores.grid_map.sum() + scores.loss_terms["similarity"].sum()).backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name, p in trained if p.grad is None]
    assert all(p.grad is None for p in clip.parameters())


def test_smoothing(clip, images):
    rough = build(clip, smoothing_sigma=0)(images).anomaly_map
    assert build(clip)(images).anomaly_map.std() < rough.std()


def test_logits_are_smoothed_on_request(clip, images):
    paper, other = build(clip), build(clip, smooth_logits=True)
    grid = paper.score(images).grid_map
    expected = upsample(grid.logit(), 32, paper.smoothing_sigma).sigmoid()
    torch.testing.assert_close(other(images).anomaly_map, expected, atol=1e-4, rtol=0)
    assert torch.equal(other(images).pred_score, paper(images).pred_score)
    sure = torch.tensor([[[0.999, 0.1], [0.1, 0.1]]])
    assert (other.smooth(sure, 32, 4.0) - paper.smooth(sure, 32, 4.0)).amax() > 0.1
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # exported files may compute in half precision
        assert other.smooth(sure.round().to(dtype), 32, 4.0).isfinite().all()
    ordered = torch.tensor([0.0, 1e-6, 0.5, 0.9999, 1.0])[:, None, None]
    assert (other.smooth(ordered, 1, 0.0).flatten().diff() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"views": ("xyz",)}, "xyz"),
        ({"views": ()}, "[]"),
        ({"text_poolings": ("max",)}, "max"),
        ({"bank": "third"}, "third"),
        ({"temperature": 0}, "temperature=0"),
        ({"smoothing_sigma": -1}, "smoothing_sigma=-1"),
        ({"feature_layers": (0,)}, "[0]"),
        ({"feature_layers": ()}, "[]"),
        ({"feature_layers": (5,)}, "[5]"),
        ({"n_ctx": 70}, "n_ctx=70"),
    ],
)
def test_bad_arguments_are_named(clip, arguments, value):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build(clip, **arguments)
    assert value in str(caught.value)


def test_bad_images(clip):
    model = build(clip)
    for shape, text in (
        ((0, 3, 32, 32), "empty"),
        ((1, 3, 32, 42), "42"),
        ((1, 3, 33, 33), "33"),
        ((1, 1, 8, 8), "RGB"),
    ):
        with pytest.raises(ValueError, match=text):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images \[1\]"):
        model(torch.stack((torch.zeros(3, 32, 32), torch.full((3, 32, 32), torch.nan))))


@pytest.mark.parametrize("few_shot", [False, True])
def test_a_large_batch_in_parts_is_the_same(clip, monkeypatch, few_shot):
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = FBCLIPModel(clip, few_shot=few_shot).eval()
    if few_shot:
        model.remember(images[:2] + 0.1)
    parts = []
    score_blocks = model._score_blocks
    monkeypatch.setattr(
        model,
        "_score_blocks",
        lambda blocks, *a: parts.append(len(blocks[0])) or score_blocks(blocks, *a),
    )
    with torch.no_grad():
        together = model(images)
        monkeypatch.setattr(torch_model, "TOKENS_AT_ONCE", 2 * 17)
        apart = model(images)
    assert parts == [5, 2, 2, 1]
    torch.testing.assert_close(apart.pred_score, together.pred_score, atol=1e-6, rtol=0)
    torch.testing.assert_close(apart.anomaly_map, together.anomaly_map, atol=1e-6, rtol=0)


def test_losses():
    probability, target = torch.full((2, 4, 4), 0.3), torch.zeros(2, 4, 4)
    similarity, labels = torch.tensor([[0.2, 0.1], [1.0, 3.0]]), torch.tensor([0, 1])
    target[1, 0] = 1

    def total(**arguments):
        return FBCLIPLoss(**arguments)(torch.tensor([0.2, 0.6]), probability, similarity, labels, target)["total"]

    for argument in ("focal_gamma", "dice_weight", "scr_weight"):
        assert total(**{argument: 0}) != total()
        with pytest.raises(ValueError, match=f"{argument}=-1"):
            FBCLIPLoss(**{argument: -1})
    parts = FBCLIPLoss(scr_weight=0)(torch.tensor([0.2, 0.6]), probability, similarity, labels, None)
    assert set(parts) == {"focal_image", "total"}


def test_prompts(clip):
    prompts = PromptLearner(clip, n_ctx=5, states=STATES)
    assert prompts().shape == (2, 77, 64)
    assert prompts.end_of_text.tolist() == [10, 10]
    assert torch.equal(prompts()[0, 1:6], prompts.normal_context[0])


def test_text_cache(clip, images, monkeypatch):
    model = build(clip)
    calls = []
    original = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda *a: calls.append(1) or original(*a))
    with torch.no_grad():
        first = model(images).pred_score
        model(images)
        assert len(calls) == 1
        model.prompts.normal_context.neg_()
        assert not torch.equal(model(images).pred_score, first)
        assert len(calls) == 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(images)
        assert len(calls) == 3
        model(images)
        assert len(calls) == 4
        model.load_state_dict(build(clip).trained_state_dict())
        assert torch.equal(model(images).pred_score, first)


def test_copies(clip, images):
    model = build(clip)
    with torch.no_grad():
        expected = model(images).anomaly_map
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images).anomaly_map, expected)
