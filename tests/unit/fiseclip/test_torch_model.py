# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Company matters, order does not; planted defects are found; every argument changes something."""

import copy
import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anomalib_fbclip import FiSeCLIPModel
from anomalib_fbclip.clip import load_clip
from anomalib_fbclip.fiseclip.bank import Reference, ReferenceBank, content_keys
from anomalib_fbclip.fiseclip.matching import nearest_distance, neighbourhood_average

ABLATIONS = [
    {"feature_layers": (2,)},
    {"class_name": "bottle"},
    {"correlation": "vv"},
    {"correlation": "qq"},
    {"correlation": "kk"},
    {"correlation": "none"},
    {"semantic_blocks": 3},
    {"temperature": 0.3},
    {"refinement": 0.3},
    {"filter_share": 0},
    {"matching": False},
    {"neighbourhoods": (1, 3)},
    {"reference_share": 1.0},
    {"bank_size": 2},
    {"text_weight": 0},
    {"deviations": 2.0},
    {"smoothing_sigma": 0},
]


@pytest.fixture(scope="module")
def clip(small_clip):
    return small_clip()


@pytest.fixture(scope="module")
def tiny():
    return load_clip("tiny")


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))


def cloth(count, seed=0, size=112):
    """Images of one woven cloth, each at another place of it and under other noise."""
    rng = np.random.default_rng(seed)
    place = np.arange(size)
    pictures = []
    for _ in range(count):
        x, y = place + rng.integers(0, 9), place[:, None] + rng.integers(0, 9)
        weave = np.sin(x * 2 * np.pi / 9) + np.sin(y * 2 * np.pi / 9)
        pictures.append(np.stack([weave * 0.3 + 0.05 * rng.standard_normal((size, size))] * 3))
    return torch.tensor(np.stack(pictures), dtype=torch.float32)


def stained(pictures, which, at=(40, 64), side=24):
    pictures = pictures.clone()
    colour = torch.tensor([1.6, -1.0, -1.2])[:, None, None]
    pictures[list(which), :, at[0] : at[0] + side, at[1] : at[1] + side] = colour
    return pictures


def inside(maps, at=(40, 64), side=24):
    return maps[..., at[0] + 4 : at[0] + side - 4, at[1] + 4 : at[1] + side - 4].mean((-1, -2))


@pytest.mark.parametrize("arguments", ABLATIONS, ids=str)
def test_each_argument_matters(clip, images, arguments):
    results = []
    for extra in ({}, arguments):
        model = FiSeCLIPModel(clip, **extra)
        model(images[:4])
        results.append(model(images[4:]).anomaly_map)
    assert (results[0] - results[1]).abs().max() > 1e-6


def test_only_the_embedded_backbones_semantics_are_not_restored(clip, tiny):
    images = cloth(2)
    assert FiSeCLIPModel(clip).correlation == "qq-kk"
    names = ("auto", "none", "qq-kk")
    own, without, restored = (FiSeCLIPModel(tiny, correlation=name).encode(images)[1] for name in names)
    assert torch.equal(own, without)
    assert (own - restored).abs().max() > 0.1


def test_class_weight_moves_the_score_alone(clip, images):
    by_map, by_class = (FiSeCLIPModel(clip, class_weight=weight).analyse(images) for weight in (0, 1))
    assert torch.equal(by_map.grid_map, by_class.grid_map)
    assert torch.equal(by_map.pred_score, by_map.grid_map.amax(1))
    assert torch.equal(by_class.pred_score, by_class.class_probability)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"feature_layers": (9,)}, r"\[9\]"),
        ({"class_name": " "}, "class_name=' '"),
        ({"correlation": "qk"}, "correlation='qk'"),
        ({"semantic_blocks": 0}, "semantic_blocks=0"),
        ({"semantic_blocks": 4}, "semantic_blocks=4"),
        ({"temperature": 0}, "temperature=0"),
        ({"refinement": 1.5}, "refinement=1.5"),
        ({"filter_share": 0.6}, "filter_share=0.6"),
        ({"neighbourhoods": (2,)}, r"neighbourhoods=\[2\]"),
        ({"neighbourhoods": ()}, r"neighbourhoods=\[\]"),
        ({"reference_share": 0}, "reference_share=0"),
        ({"bank_size": -1}, "bank_size=-1"),
        ({"text_weight": 2}, "text_weight=2"),
        ({"class_weight": -1}, "class_weight=-1"),
        ({"deviations": 0}, "deviations=0"),
        ({"smoothing_sigma": -1}, "smoothing_sigma=-1"),
    ],
)
def test_bad_arguments_are_named(clip, arguments, value):
    with pytest.raises(ValueError, match=value):
        FiSeCLIPModel(clip, **arguments)


def test_bad_images(clip):
    model = FiSeCLIPModel(clip)
    for shape, text in (((0, 3, 32, 32), "empty"), ((1, 3, 32, 42), "42"), ((1, 3, 33, 33), "33")):
        with pytest.raises(ValueError, match=text):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images \[1\]"):
        model(torch.stack((torch.zeros(3, 32, 32), torch.full((3, 32, 32), torch.nan))))
    with pytest.raises(ValueError, match="1 categories for 2 images"):
        model(torch.zeros(2, 3, 32, 32), ["wood"])
    assert len(model.bank) == 0
    model(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"reset\(\)"):
        model(torch.rand(2, 3, 40, 40))
    model.reset()
    model(torch.rand(2, 3, 40, 40))


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), later=st.permutations(range(3)))
def test_order_within_a_batch_changes_nothing_now_or_later(clip, images, order, later):
    one, other = FiSeCLIPModel(clip, bank_size=4), FiSeCLIPModel(clip, bank_size=4)
    expected, got = one(images), other(images[list(order)])
    assert_close(got.anomaly_map, expected.anomaly_map[list(order)], rtol=0, atol=1e-5)
    assert_close(got.pred_score, expected.pred_score[list(order)], rtol=0, atol=1e-5)
    # Six images do not fit into a bank of four: which ones stay must not depend on the order either.
    following = images[:3].flip(-1)
    expected, got = one(following), other(following[list(later)])
    assert_close(got.anomaly_map, expected.anomaly_map[list(later)], rtol=0, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=8), size=st.integers(0, 7))
def test_the_bank_holds_the_last_images(cuts, size):
    bank, number = ReferenceBank(size), 0
    for cut in cuts:
        keys = torch.arange(number, number + cut)
        rows = keys[:, None].float()
        images = Reference(keys, rows[:, None, None], rows > -1, rows)
        bank.add("a", images[torch.randperm(cut)])
        number += cut
    kept = bank.get("a")
    assert len(bank) == min(size, number)
    if size:
        # The newest batch entirely or its lowest keys; then whole older batches, and of the oldest the lowest keys.
        assert set(kept.keys.tolist()) <= set(range(number))
        newest = range(number - cuts[-1], number)
        assert kept.keys[: min(size, cuts[-1])].tolist() == list(newest)[:size]
        assert torch.equal(kept.distances[:, 0].long(), kept.keys)


def test_every_image_gets_its_references(clip, images):
    model = FiSeCLIPModel(clip, bank_size=4)
    assert model.analyse(images[:2]).num_references.tolist() == [1, 1]
    assert model.analyse(images[2:3]).num_references.tolist() == [2]
    assert model.analyse(images[3:4]).num_references.tolist() == [3]
    assert model.analyse(images[4:6]).num_references.tolist() == [4, 4]  # one of the batch, three of the bank
    assert model.analyse(images[:1].flip(-1)).num_references.tolist() == [4]
    assert model.analyse(images.flip(-2)).num_references.tolist() == [5] * 6  # the batch is enough
    assert len(model.bank) == 4
    model.reset()
    assert len(model.bank) == 0


def test_an_image_is_no_reference_of_its_double(clip, images):
    model = FiSeCLIPModel(clip)
    stages = model.analyse(images[[0, 0, 1]])
    assert stages.num_references.tolist() == [1, 1, 2]
    assert model.analyse(images[:1]).num_references.tolist() == [1]
    assert len(set(content_keys(images).tolist())) == len(images)
    nudged = images.clone()
    nudged[0, 0, 0, 0] += 1e-6
    assert content_keys(nudged)[0] != content_keys(images)[0]


@pytest.mark.parametrize("literal", [False, True])
def test_the_tiles_of_an_image_are_one_reference_and_none_of_their_own(clip, images, literal):
    model = FiSeCLIPModel(clip, bank_size=4, reference_share=1.0, literal=literal)
    owners = torch.tensor([7, 7, 7, 8, 8, 9])
    for owner in (7, 8, 9):
        model.add_tiles(images[owners == owner], owners[owners == owner])
    stages = model.analyse(images, owners=owners, tiles=True)
    assert stages.num_references.tolist() == [3, 3, 3, 4, 4, 5]
    # Of the last: the mean over two images of the distance to the nearest of their tiles.
    patches, total = model.encode(images)[0], 0
    for layer in patches.unbind(dim=1):
        for size in model.neighbourhoods:
            tokens = neighbourhood_average(layer, size)
            each = [nearest_distance(tokens[5], tokens[other], stages.kept[other]) for other in range(5)]
            total += (torch.stack(each[:3]).amin(dim=0) + torch.stack(each[3:]).amin(dim=0)) / 2
    expected = total / (patches.shape[1] * len(model.neighbourhoods))
    assert_close(stages.distances[5], expected, atol=1e-3, rtol=0)  # tiles are kept in half precision
    # Whole images are matched with whole images.
    assert model.analyse(images[:1]).num_references.tolist() == [0]
    # Without a bank, the tiles of one batch count.
    alone = FiSeCLIPModel(clip, bank_size=0, literal=literal)
    for name, batch, number in (("nut", slice(None), 6), ("wood", slice(None), 12), ("wood", slice(3, None), 9)):
        alone.add_tiles(images[batch], owners[batch], name)
        assert len(alone.tiles.bank) == number


def test_alone_it_is_the_text_map_and_one_warning(clip, images, caplog):
    model = FiSeCLIPModel(clip, bank_size=0)
    with caplog.at_level(logging.WARNING):
        stages = model.analyse(images[:1])
        model.analyse(images[1:2])
    assert torch.equal(stages.grid_map, stages.refined_map)
    assert caplog.text.count("no reference") == 1
    text = FiSeCLIPModel(clip, matching=False).analyse(images[:1])
    assert torch.equal(text.pred_score, stages.pred_score)


def test_categories_do_not_mix(clip, images):
    both, one, other = (FiSeCLIPModel(clip) for _ in range(3))
    names = ["wood", "nut", "wood", "wood", "nut", "wood"]
    wood, nut = ([place for place, name in enumerate(names) if name == which] for which in ("wood", "nut"))
    mixed = both(images, names).anomaly_map
    assert_close(mixed[wood], one(images[wood], ["wood"] * 4).anomaly_map, rtol=0, atol=1e-5)
    assert_close(mixed[nut], other(images[nut], ["nut"] * 2).anomaly_map, rtol=0, atol=1e-5)
    assert both.analyse(images.flip(-1), names).num_references.tolist() == [7, 3, 7, 7, 3, 7]


def test_copies_are_other_streams(clip, images):
    model = FiSeCLIPModel(clip)
    model(images)
    other = copy.deepcopy(model)
    assert (len(model.bank), len(other.bank)) == (6, 0)
    assert torch.equal(other(images).anomaly_map, FiSeCLIPModel(clip)(images).anomaly_map)
    assert not [name for name in model.state_dict() if not name.startswith("clip.")]


def test_a_planted_defect_is_found_and_a_good_picture_stays_dark(tiny):
    pictures = stained(cloth(10), [3])
    found = FiSeCLIPModel(tiny)(pictures)
    assert inside(found.anomaly_map)[3] > 0.5
    good = [place for place in range(10) if place != 3]
    assert found.anomaly_map[good].amax() < inside(found.anomaly_map)[3]
    assert found.pred_score[3] > 0.5 > found.pred_score[good].median()
    assert found.pred_score[3] > found.pred_score[good].max()


def test_a_defect_in_a_few_pictures_stays_one_and_in_all_is_none(tiny):
    few = FiSeCLIPModel(tiny).analyse(stained(cloth(10), [2, 5]))
    peak = few.weighted.amax(1) / few.limit
    assert peak[[2, 5]].min() > 1
    # Of nine references one shows the same: it is among the nearest three, and the other two are far.
    assert (few.distances.amax(1)[[2, 5]] > 2 * few.distances.median()).all()
    everywhere = FiSeCLIPModel(tiny, filter_share=0, text_weight=0)(stained(cloth(10), range(10)))
    assert inside(everywhere.anomaly_map).max() < 0.5


def test_the_filter_keeps_a_defect_that_is_in_all_pictures(tiny):
    pictures = stained(cloth(10), range(10))
    assert inside(FiSeCLIPModel(tiny)(pictures).anomaly_map).min() > 0.5


def test_the_text_cannot_overrule_what_matches_everywhere(tiny):
    model = FiSeCLIPModel(tiny, text_weight=1.0)
    same = cloth(1).expand(4, -1, -1, -1) + torch.tensor([0, 1e-6, 2e-6, 3e-6])[:, None, None, None]
    assert model.analyse(same).grid_map.max() < 0.01


def test_how_a_set_is_cut_matters_little_once_the_bank_is_full(tiny):
    earlier, pictures = cloth(12, seed=1), stained(cloth(12, seed=2), [1, 6, 11])
    found = []
    for size in (12, 5, 1):
        model = FiSeCLIPModel(tiny, bank_size=12)
        model(earlier)
        parts = [model(part) for part in pictures.split(size)]
        found.append((torch.cat([p.pred_score for p in parts]), torch.cat([p.anomaly_map for p in parts])))
    for score, anomaly_map in found[1:]:
        assert (score - found[0][0]).abs().mean() < 0.1  # last digits differ between processors
        assert (anomaly_map - found[0][1]).abs().mean() < 0.1
        assert torch.equal(score > 0.5, found[0][0] > 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny, dtype):
    pictures = stained(cloth(6), [3])
    expected = FiSeCLIPModel(tiny).analyse(pictures)
    with torch.autocast("cpu", dtype=dtype):
        found = FiSeCLIPModel(tiny).analyse(pictures)
    assert found.grid_map.dtype == torch.float32
    assert_close(found.distances, expected.distances, rtol=0.1, atol=5e-3)
    assert found.pred_score.argmax() == expected.pred_score.argmax() == 3
    assert (found.grid_map - expected.grid_map).abs().mean() < 0.03


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_keys_of_images_are_the_same_in_a_compiled_graph() -> None:
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.compile(content_keys, fullgraph=True)(images).tolist() == content_keys(images).tolist()
