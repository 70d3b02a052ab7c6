# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Network, loss and pasted defects of a student."""

import re
from traceback import format_exception

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anomalib_fbclip import Student, StudentModel
from anomalib_fbclip.clip import load_clip
from anomalib_fbclip.student.lightning_model import flip, photograph
from anomalib_fbclip.student.loss import StudentLoss
from anomalib_fbclip.student.targets import paste_defect


def test_the_network_is_cut_behind_stride_16_and_gives_score_and_map_of_any_size() -> None:
    model = StudentModel().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 < 3e6  # bytes
    with torch.no_grad():
        found = model(torch.rand(2, 3, 64, 96))
    assert found.pred_score.shape == (2,)
    assert found.anomaly_map.shape == (2, 64, 96)
    assert StudentModel(width=8).map_head.in_channels == 8


def test_the_map_of_a_place_depends_on_the_whole_image_beyond_the_reach_of_the_convolutions() -> None:
    model = StudentModel().eval()
    image = torch.rand(1, 3, 64, 512, generator=torch.Generator().manual_seed(0))
    other = image.clone()
    other[..., 448:] = 0

    @torch.no_grad()
    def far_change() -> float:
        maps = [model.decode(model.encode(each))[1] for each in (image, other)]
        return float((maps[0] - maps[1])[..., 0].abs().max())

    assert far_change() > 1e-4
    torch.nn.init.zeros_(model.whole_in.weight)
    assert far_change() == 0


def test_the_embedded_network_is_the_one_of_the_clip_and_is_trained() -> None:
    model, patches = StudentModel(), load_clip("tiny").visual.conv1
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(model.encode(images), patches.features(images), strict=True):
            assert_close(ours, theirs)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_of_a_file_are_used(tmp_path) -> None:
    file = tmp_path / "resnet18.pth"
    import timm

    whole = timm.create_model("resnet18")
    torch.save(whole.state_dict(), file)
    model = StudentModel("resnet18", file)
    assert_close(model.encoder.network.conv1.weight, whole.conv1.weight)
    assert not torch.equal(StudentModel("resnet18").encoder.network.conv1.weight, whole.conv1.weight)
    with pytest.raises(ValueError, match="which has its own"):
        StudentModel(backbone_weights=file)
    for content in ({"state_dict": whole}, timm.create_model("resnet10t").state_dict()):
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"resnet18\.pth' cannot be used for resnet18") as refused:
            StudentModel("resnet18", file)
        assert "weights_only" not in "".join(format_exception(refused.value))


def test_compiled_as_one_graph_it_gives_the_same() -> None:
    model, images = StudentModel().eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
        assert_close(compiled.anomaly_map, model(images).anomaly_map)


def test_built_in_inference_mode_it_can_be_trained() -> None:
    with torch.inference_mode():
        model = Student(image_size=64)
    score, grid_map = model.model.decode(model.model.encode(torch.rand(2, 3, 64, 64)))
    (score.sum() + grid_map.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backbone": "tf_efficientnet_lite9"}, "no network of timm"),
        ({"backbone": "vit_tiny_patch16_224"}, "strides 8 and 16"),
        ({"width": 0}, "width=0"),
        ({"image_size": 250}, "use 240 or 256"),
        ({"image_size": [64, 250]}, "use 240 or 256"),
        ({"held_out": 0.6}, "held_out=0.6"),
        ({"pasted": -1}, "pasted=-1"),
        ({"patience": 0}, "patience=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"weight_decay": -1.0}, "weight_decay=-1"),
        ({"top_weight": -1.0}, "top_weight=-1"),
        ({"rank_weight": -1.0}, "rank_weight=-1"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, words) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Student(**arguments)


def test_a_missing_weights_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        Student("FBCLIP", backbone="resnet18", backbone_weights=str(tmp_path / "absent.pth"))


def test_the_seed_draws_the_first_values_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, same, other = (Student(seed=seed).model.map_head.weight for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_loss_is_zero_where_student_and_teacher_agree_and_counts_the_top_more() -> None:
    target = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    score = torch.tensor([0.3, -1.0])
    loss = StudentLoss()
    assert_close(loss(score, target, score, target)["total"], torch.tensor(0.0), atol=1e-6, rtol=0)

    high, low = target.clone(), target.clone()
    high.view(2, -1)[:, target.view(2, -1).argmax(1)] += 0.5
    low.view(2, -1)[:, target.view(2, -1).argmin(1)] += 0.5
    weighted, plain = StudentLoss(top_weight=1.0), StudentLoss(top_weight=0.0)
    assert weighted(score, high, score, target)["map"] > weighted(score, low, score, target)["map"]
    assert_close(plain(score, high, score, target)["map"], plain(score, low, score, target)["map"])


def test_the_order_of_the_highest_pixels_counts_as_much_as_it_is_told() -> None:
    target = torch.linspace(-2, 2, 64).view(1, 8, 8)
    parts = {}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        parts[weight] = StudentLoss(rank_weight=weight)(torch.zeros(1), -target, torch.zeros(1), target)
    assert "rank" not in parts[0.0]
    assert_close(parts[1.0]["rank"], 2 * parts[0.5]["rank"])
    assert parts[1.0]["rank"] > 0
    with pytest.raises(ValueError, match="top_share=0"):
        StudentLoss(top_share=0)


@settings(max_examples=20, deadline=None)
@given(height=st.integers(16, 90), width=st.integers(16, 90), seed=st.integers(0, 99))
def test_a_pasted_defect_is_seen_and_keeps_size_and_type(height, width, seed) -> None:
    image = np.random.default_rng(seed).integers(90, 110, (height, width, 3)).astype(np.uint8)
    pasted = paste_defect(image, np.random.default_rng(seed))
    assert pasted.shape == image.shape
    assert pasted.dtype == np.uint8
    assert np.array_equal(pasted, paste_defect(image, np.random.default_rng(seed)))
    assert (pasted == image).any()
    # A faint defect may be lost, but few are.
    others = [paste_defect(image, np.random.default_rng((seed, other))) for other in range(10)]
    assert sum(np.abs(other.astype(int) - image).max() > 5 for other in others) >= 5


@given(way=st.integers(0, 7))
def test_images_and_maps_are_turned_alike(way) -> None:
    images = torch.arange(3 * 64.0).view(1, 3, 8, 8)
    turned, maps = flip(images, images[:, 0, ::2, ::2], way)
    assert turned.shape == images.shape
    assert turned[:, 0].sum() == images[:, 0].sum()
    corner = {float(turned[0, 0, row, column]) for row in (0, 1) for column in (0, 1)}
    assert float(maps[0, 0, 0]) in corner


def test_eight_ways_differ_and_photographs_change_little() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert len({flip(images, images[:, 0], way)[0].numpy().tobytes() for way in range(8)}) == 8
    wide = images[..., :4, :]
    assert all(flip(wide, wide[:, 0], way)[0].shape == wide.shape for way in range(8))
    assert len({flip(wide, wide[:, 0], way)[0].numpy().tobytes() for way in range(8)}) == 4
    smooth = torch.linspace(0.2, 0.8, 32).expand(2, 3, 32, 32)
    first = photograph(smooth)
    assert not torch.equal(first, photograph(smooth))
    assert (first - smooth).abs().mean() < 0.2


def test_a_photograph_may_be_out_of_focus_without_colours_and_has_noise() -> None:
    torch.manual_seed(0)
    checks = torch.zeros(200, 3, 16, 16)
    checks[:, 0, ::2, ::2] = checks[:, 0, 1::2, 1::2] = 0.6  # red and black
    seen = photograph(checks + 0.2)
    contrast = (seen[:, 0, ::2, ::2].mean((1, 2)) - seen[:, 0, ::2, 1::2].mean((1, 2))).abs()
    colour = (seen[:, 0] - seen[:, 1]).abs().mean((1, 2))
    noise = seen[:, 1].flatten(1).std(1)
    assert 0.1 < (colour < 0.1).float().mean() < 0.3
    assert 0.35 < (contrast < 0.4).float().mean() < 0.65
    assert 0.005 < noise.median() < 0.04


def test_the_distance_of_an_image_grows_with_what_is_unusual() -> None:
    model = StudentModel()
    pooled = torch.zeros(3, len(model.pooled_mean))
    assert torch.equal(model.distance(pooled), torch.zeros(3))
    model.pooled_whitening.copy_(torch.eye(len(model.pooled_mean)))
    model.usual_distance.fill_(2.0)
    pooled[1, 0], pooled[2, 0] = 1.0, 4.0
    assert model.distance(pooled).tolist() == [0.0, 0.5, 2.0]
