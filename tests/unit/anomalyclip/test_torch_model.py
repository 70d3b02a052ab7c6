# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""AnomalyCLIP: the fast form equals the literal one, each argument matters, its own published format."""

import pytest
import torch
from published import write_anomalyclip
from torch.testing import assert_close

from anomalib_fbclip.anomalyclip.loss import AnomalyCLIPLoss
from anomalib_fbclip.anomalyclip.torch_model import AnomalyCLIPModel, mean_probability_logit
from anomalib_fbclip.clip import TokenCache


@pytest.fixture(scope="module")
def clip(small_clip):
    return small_clip(text_layers=3)


def build(clip, seed=0, **arguments):
    torch.manual_seed(seed)
    model = AnomalyCLIPModel(clip, **{"feature_layers": (2, 4), "n_ctx": 3, "prompt_depth": 2, **arguments})
    with torch.no_grad():
        for parameter in model.prompts.parameters():
            parameter.mul_(20)
    return model.eval()


def losses(model, images, masks=True):
    scores = model.train().score(images)
    size = images.shape[-1]
    labels = torch.arange(len(images)) % 2
    planted = torch.zeros(len(images), size, size)
    planted[labels == 1, : size // 2] = 1
    return AnomalyCLIPLoss()(
        pred_score=scores.pred_score,
        anomaly_map=model.upsample(scores.grid_map, size, 0),
        labels=labels,
        masks=planted if masks else None,
        **scores.loss_terms,
    )


@pytest.mark.parametrize(
    ("layers", "local_blocks", "size", "batch"),
    [((4,), 3, 32, 1), ((1, 2, 4), 2, 40, 3), ((2,), 4, 24, 2), ((1,), 1, 8, 2), ((3, 4), 1, 32, 1)],
)
def test_fast_form_and_its_gradients(clip, layers, local_blocks, size, batch):
    images = torch.randn(batch, 3, size, size)
    found = []
    for literal in (False, True):
        model = build(clip, feature_layers=layers, local_blocks=local_blocks, literal=literal)
        tokens = model.encode_image(images)
        total = losses(model, images)["total"]
        total.backward()
        found.append((tokens, total, [parameter.grad for parameter in model.prompts.parameters()]))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[0][2], found[1][2], strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_the_class_token_is_that_of_the_whole_tower_whatever_blocks_are_read(clip):
    images = torch.randn(2, 3, 32, 32)
    expected = clip.encode_image(images, [4])[0][:, 0]
    for layers in ((1,), (2, 3), (4,)):
        for tokens in build(clip, feature_layers=layers).encode_image(images):
            assert_close(tokens[:, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "argument",
    [{"feature_layers": (4,)}, {"local_blocks": 1}, {"prompt_depth": 3}, {"deep_tokens": 2}, {"n_ctx": 4}],
    ids=str,
)
def test_each_argument_matters(clip, argument):
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = build(clip, **argument)
    assert (other(images).anomaly_map - build(clip)(images).anomaly_map).abs().max() > 1e-5
    assert other.architecture() != build(clip).architecture()


def test_defaults_are_the_papers_shares_of_the_towers(small_clip):
    model = AnomalyCLIPModel(small_clip(layers=24, width=64, text_layers=12))
    assert (model.feature_layers, model.local_blocks, model.prompts.depth, model.prompts.n_ctx) == ((24,), 19, 9, 12)
    assert model.prompts.deep_prompts.shape == (8, 4, 64)
    assert AnomalyCLIPModel(small_clip(layers=1, text_layers=1)).local_blocks == 1


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"local_blocks": 5}, "local_blocks=5: choose between 1 and 4"),
        ({"local_blocks": 0}, "local_blocks=0"),
        ({"prompt_depth": 4}, "prompt_depth=4: choose between 1 and 3"),
        ({"deep_tokens": 77}, "deep_tokens=77"),
        ({"n_ctx": 0}, "n_ctx=0"),
    ],
)
def test_what_does_not_fit_the_towers_is_refused(clip, argument, text):
    with pytest.raises(ValueError, match=text):
        build(clip, **argument)


def test_the_mean_of_the_blocks_does_not_saturate():
    logits = torch.tensor([[80.0, -90.0, 1.0], [70.0, -95.0, -2.0]])
    found = mean_probability_logit(list(logits))
    expected = logits.double().sigmoid().mean(dim=0).logit()
    assert found[0] == pytest.approx(70.7, abs=0.1)  # 1 - p is the mean of e^-80 and e^-70
    assert found[1] == pytest.approx(-90.7, abs=0.1)
    assert_close(found[2].double(), expected[2])


def test_without_masks_the_local_losses_are_left_out_and_gradients_still_reach_every_parameter(clip):
    model = build(clip)
    parts = losses(model, torch.randn(2, 3, 32, 32), masks=False)
    assert parts.keys() == {"image", "total"}
    parts["total"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.prompts.parameters())


def test_a_loss_weight_of_zero_switches_the_local_losses_off_and_a_negative_one_is_refused():
    given = {"labels": torch.tensor([1]), "masks": torch.ones(1, 8, 8), "pred_score": None}
    terms = {"image_logit": torch.zeros(1), "patch_probability": torch.full((1, 1, 4), 0.5)}
    found = AnomalyCLIPLoss(local_weight=0)(anomaly_map=torch.zeros(1, 8, 8), **given, **terms)
    assert found["total"] == found["image"]
    for name in ("focal_gamma", "local_weight"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            AnomalyCLIPLoss(**{name: -1})


def test_the_cache_holds_the_local_path(clip, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    model, plain = build(clip), TokenCache(clip, (2, 4), tmp_path)
    plain.encode_image(images)
    cache = TokenCache(clip, (2, 4), tmp_path, encode=model.encode_image, key=model.token_key)
    for cached, exact in zip(cache.encode_image(images), model.encode_image(images), strict=True):
        assert_close(cached, exact, rtol=1e-3, atol=1e-3)
    assert len(list(tmp_path.iterdir())) == 2
    assert_close(
        model.score(images, tokens=cache.encode_image(images)).grid_map,
        model.score(images).grid_map,
        atol=1e-2,
        rtol=0,
    )


def test_published_file(clip, tmp_path):
    model, images = build(clip), torch.randn(1, 3, 32, 32)
    path = write_anomalyclip(model, tmp_path / "epoch_15.pth")
    other = build(clip, seed=1)
    metadata = other.load_adapter(path)
    assert (metadata["model"], metadata["n_ctx"], metadata["prompt_depth"], metadata["deep_tokens"]) == (
        "AnomalyCLIP",
        3,
        2,
        4,
    )
    assert torch.equal(other(images).anomaly_map, model(images).anomaly_map)
    # Without deep prompts the number of their tokens is not in the file and does not matter.
    shallow = write_anomalyclip(build(clip, prompt_depth=1), tmp_path / "a.pth")
    assert build(clip, prompt_depth=1, deep_tokens=2).load_adapter(shallow)["prompt_depth"] == 1


@pytest.mark.parametrize(
    ("arguments", "changes", "text"),
    [
        ({"n_ctx": 4}, {}, "n_ctx: adapter 3, model 4"),
        ({"prompt_depth": 3}, {}, "prompt_depth: adapter 2, model 3"),
        ({"deep_tokens": 2}, {}, "deep_tokens: adapter 4, model 2"),
        ({}, {"ctx_pos": torch.zeros(1, 1, 3, 32)}, r"normal_context is \(1, 3, 32\) there and \(1, 3, 64\)"),
        ({}, {"ctx_pos": torch.zeros(3, 64)}, r"ctx_pos is \(3, 64\)"),
        ({}, {"compound_prompts_text.2": torch.zeros(4, 64)}, "not numbered from 0"),
        ({}, {"surprise": torch.zeros(1)}, r"unknown tensors \['surprise'\]"),
        ({}, {"ctx_neg": torch.full((1, 1, 3, 64), torch.nan)}, "NaN"),
    ],
)
def test_a_published_file_that_does_not_fit_is_refused_with_both_sizes(clip, tmp_path, arguments, changes, text):
    path = write_anomalyclip(build(clip), tmp_path / "epoch_15.pth", **changes)
    model = build(clip, **arguments)
    before = {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}
    with pytest.raises(ValueError, match=text):
        model.load_adapter(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trained_state_dict().items())
