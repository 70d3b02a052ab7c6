# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The pipeline equals its literal form, and its parts keep what they promise on any input."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from anomalib_fbclip.fiseclip import matching
from anomalib_fbclip.fiseclip.filtering import reference_mask, refine
from anomalib_fbclip.fiseclip.fusion import MIN_DISTANCE, normal_limit, to_probability, weigh_by_text
from anomalib_fbclip.fiseclip.text import class_text_features
from anomalib_fbclip.fiseclip.torch_model import FiSeCLIPModel

SPEC = importlib.util.spec_from_file_location("literal", Path(__file__).parents[2] / "reference/fiseclip_literal.py")
literal = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(literal)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("batch", "arguments"),
    [
        (4, {"neighbourhoods": (1, 3, 5), "refinement": 0.1}),
        (2, {"correlation": "vv", "semantic_blocks": 2, "refinement": 0.2, "reference_share": 1.0}),
        (3, {"correlation": "none", "filter_share": 0.5, "neighbourhoods": (3,), "text_weight": 1.0}),
        (3, {"correlation": "kk", "filter_share": 0, "feature_layers": (2,), "class_weight": 0.9, "deviations": 2}),
    ],
    ids=str,
)
def test_whole_model(small_clip, batch, arguments):
    model = FiSeCLIPModel(small_clip(), **arguments)
    text = torch.nn.functional.normalize(noise(2, model.clip.embed_dim), dim=-1)
    model._text_features["object"] = text
    images = noise(batch, 3, 40, 40)
    stages = model.analyse(images)
    score, grid_map = literal.forward(model, images, text)
    assert_close(stages.grid_map.double(), grid_map.double(), rtol=0, atol=2e-5)
    assert_close(stages.pred_score.double(), score.double(), rtol=0, atol=2e-5)
    anomaly_map = model(images).anomaly_map
    assert anomaly_map.shape == (batch, 40, 40)


def test_text_features_leave_only_padding_out(small_clip):
    from anomalib.models.image.winclip.prompting import create_prompt_ensemble
    from open_clip import tokenizer

    clip = small_clip()
    means = []
    for prompts in create_prompt_ensemble("metal nut"):
        ids = tokenizer.tokenize(prompts)
        tokens = clip.encode_text(clip.embed_text(ids), causal=True)
        features = clip.project_text(tokens[torch.arange(len(ids)), ids.argmax(-1)])
        means.append((features / features.norm(dim=-1, keepdim=True)).mean(0))
    means = torch.stack(means)
    assert_close(class_text_features(clip, "metal_nut"), means / means.norm(dim=-1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("grid", "sizes"), [(37, (1, 3, 5)), (24, (1, 3)), (14, (1,)), (74, (1, 5, 9)), (1, (1,))])
def test_neighbourhoods_keep_their_share_of_the_grid(grid, sizes):
    assert matching.relative_neighbourhoods(grid) == sizes


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 4), bank=st.integers(0, 3), grid=st.integers(1, 4), chunk=st.integers(1, 999))
def test_nearest_distances(batch, bank, grid, chunk):
    length = grid * grid
    patches = matching.neighbourhood_average(noise(batch + bank, length, 8), 1)
    kept = reference_mask(torch.rand(batch + bank, length), 0.4)
    whole, matching.BLOCK_ELEMENTS = matching.BLOCK_ELEMENTS, chunk
    try:
        found = matching.nearest_distances(patches[:batch], kept[:batch], patches[batch:], kept[batch:])
    finally:
        matching.BLOCK_ELEMENTS = whole
    expected = matching.nearest_distances_literal(patches[:batch], kept[:batch], patches[batch:], kept[batch:])
    assert_close(found, expected, rtol=0, atol=1e-6)
    assert all(found[query, query].isinf().all() for query in range(batch))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 40), share=st.sampled_from([0.1, 0.3, 0.5, 1.0]), hidden=st.integers(0, 3))
def test_mean_of_smallest(count, share, hidden):
    distances, valid = torch.rand(1, count, 5), torch.ones(1, count, dtype=torch.bool)
    valid[0, :hidden] = False
    left = distances[0, hidden:].sort(dim=0).values
    taken = max(1, math.ceil(round(share * len(left), 6)))
    expected = left[:taken].mean(0) if len(left) else torch.zeros(5)
    assert_close(matching.mean_of_smallest(distances, valid, share)[0], expected)


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 0.5), length=st.integers(1, 60), seed=st.integers(0, 99))
def test_filter_keeps_half_and_drops_the_top(share, length, seed):
    probability = torch.rand(3, length, generator=torch.Generator().manual_seed(seed))
    kept = reference_mask(probability, share)
    for row, mask in zip(probability, kept, strict=True):
        assert int((~mask).sum()) == int(share * length) <= length / 2
        if not mask.all():
            assert row[~mask].min() >= row[mask].max()


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_refinement_stays_within_the_map_and_calms_it(share, seed):
    probability = torch.rand(2, 25, generator=torch.Generator().manual_seed(seed))
    refined = refine(probability, noise(2, 25, 6, seed=seed), share)
    assert (refined >= probability.amin(1, keepdim=True) - 1e-6).all()
    assert (refined <= probability.amax(1, keepdim=True) + 1e-6).all()
    if share == 1:
        assert_close(refined, probability.mean(1, keepdim=True).expand_as(refined))


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-6, 1), weight=st.floats(0, 1), seed=st.integers(0, 99))
def test_scale(scale, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    distances, text = scale * torch.rand(2, 50, generator=generator), torch.rand(2, 50, generator=generator)
    distances[0, 0] = 0
    weighted = weigh_by_text(distances, text, weight)
    assert weighted[0, 0] == 0  # whatever the text says
    limit = normal_limit(weighted, 3.0)
    assert limit >= MIN_DISTANCE
    found = to_probability(weighted, limit)
    assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(found > 0.5, weighted > limit)
    ordered = found.flatten()[weighted.flatten().argsort()]
    assert (ordered.diff() >= 0).all()
