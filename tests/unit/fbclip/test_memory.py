# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The memory of normal images against its literal form, and what it may and may not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.adapted.normal_memory import IMAGE_WEIGHT, PATCH_WEIGHT, NormalMemory, choose_radius
from anomalib_fbclip.afclip.memory import WindowMemory
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel
from anomalib_fbclip.host.tiling import WHOLE, Place


def random_tokens(batch, grid, layers=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 1 + grid * grid, width, generator=generator) for _ in range(layers)]


def cosine_distance(a, b):
    return 1 - float(torch.dot(a, b) / (a.norm() * b.norm()))


def literal_distances(patches, references):
    """Distance of each patch of one layer to the nearest of some patches, one pair at a time."""
    return [min(cosine_distance(patch, other) for other in references) for patch in patches]


def literal(tokens, memory, text):
    """Evidence of the first image, by loops over layers, images and patches."""
    count, grid = memory[0].shape[0], round((memory[0].shape[1] - 1) ** 0.5)
    places = [divmod(index, grid) for index in range(grid * grid)]
    normal = []
    for layer in memory:
        rows = []
        for picture in range(count):
            patches = layer[picture, 1:]
            if count > 1:
                others = [p for other in range(count) if other != picture for p in layer[other, 1:]]
                rows.append(literal_distances(patches, others))
            else:
                rows.append([
                    min(
                        cosine_distance(patch, patches[j])
                        for j, b in enumerate(places)
                        if max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 2
                    )
                    for patch, a in zip(patches, places, strict=True)
                ])
        normal.append(torch.tensor(rows))
    scales = [rows.mean() for rows in normal]
    peak = torch.stack([rows / scale for rows, scale in zip(normal, scales, strict=True)]).mean(0).amax(-1).mean()
    distances = [
        torch.tensor(literal_distances(layer[0, 1:], [p for picture in known for p in picture[1:]])) / scale
        for layer, known, scale in zip(tokens, memory, scales, strict=True)
    ]
    distance = torch.stack(distances).mean(0)
    patches = [PATCH_WEIGHT * math.log(max(float(d / peak), 1e-3)) for d in distance]
    image = IMAGE_WEIGHT * max(float(t) + p for t, p in zip(text[0, 1:], patches, strict=True))
    return torch.tensor([image, *patches])


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 3), grid=st.integers(4, 5), other=st.integers(1, 5), seed=st.integers(0, 99))
def test_equals_its_literal_form_for_one_picture_and_many_at_any_grid(count, grid, other, seed):
    known, tokens = random_tokens(count, grid, seed=seed), random_tokens(2, other, seed=seed + 100)
    text = torch.randn(2, 1 + other * other)
    memory = NormalMemory(2, 8)
    memory.fill(known)
    torch.testing.assert_close(memory(tokens, text)[0], literal(tokens, known, text), atol=2e-2, rtol=1e-2)
    in_bfloat16 = memory([layer.bfloat16() for layer in tokens], text.bfloat16())
    assert in_bfloat16.dtype == torch.bfloat16
    torch.testing.assert_close(in_bfloat16.float(), memory(tokens, text), atol=0.2, rtol=0.1)


def test_what_it_knows_is_normal_and_what_it_does_not_is_not():
    known = [
        layer.repeat(3, 1, 1) + 0.05 * noise
        for layer, noise in zip(random_tokens(1, 4), random_tokens(3, 4, seed=1), strict=True)
    ]
    strange = [layer[:1].clone() for layer in known]
    for layer in strange:
        layer[0, 7] = -layer[0, 7]
    memory = NormalMemory(2, 8)
    memory.fill(known)
    evidence = memory(strange, torch.zeros(1, 17))[0]
    assert evidence[7] > 3
    assert (evidence[1:] > 0).sum() == 1
    assert evidence[0] == pytest.approx(IMAGE_WEIGHT * float(evidence[7]))
    # The order of the images does not matter.
    turned = NormalMemory(2, 8)
    turned.fill([layer.flip(0) for layer in known])
    torch.testing.assert_close(turned(strange, torch.zeros(1, 17))[0], evidence)


TILES = [WHOLE, *(Place(number, 2, 1) for number in (1, 2))]


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    radius=st.integers(0, 6),
    count=st.integers(1, 3),
    batch=st.integers(1, 3),
    tiled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_near_its_place_is_a_comparison_of_all_pairs_behind_a_mask(grid, radius, count, batch, tiled, seed):
    generator, patches = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    places = TILES if tiled else [WHOLE]
    query, known = (
        torch.nn.functional.normalize(torch.randn(len(places), number, patches, 6, generator=generator), dim=-1)
        for number in (batch, count)
    )
    memory = NormalMemory(1, 6, radius)
    memory.grid = grid
    memory.places = tuple(place for place in places for _ in range(count)) if tiled else ()
    found = memory.closest(query.flatten(0, 1), known.flatten(0, 1), grid, places if tiled else ())
    at = torch.cartesian_prod(*map(torch.arange, grid)).reshape(-1, 2)
    far = (at[:, None] - at).abs().amax(dim=-1) > radius
    cosine = torch.einsum("tbld,tkmd->tblkm", query, known).masked_fill(far[None, None, :, None], -1)
    torch.testing.assert_close(found, cosine.amax(dim=(3, 4)).flatten(0, 1))


@pytest.mark.parametrize("kind", [NormalMemory, WindowMemory])
@pytest.mark.parametrize("radius", [None, 1])
def test_a_part_is_the_memory_of_these_images_alone(kind, radius):
    grid, generator = (3, 5), torch.Generator().manual_seed(0)
    tokens = [torch.randn(9, 16, 8, generator=generator) for _ in range(2)]
    names, places = [str(index // 3) for index in range(9)], TILES * 3
    memory, asked = kind(2, 8, radius=radius), [torch.randn(6, 16, 8, generator=generator) for _ in range(2)]
    memory.fill(tokens, grid, names, places)
    for images in ([0, 2], [1]):
        rows = [row for row in range(9) if row // 3 in images]
        alone = kind(2, 8, radius=radius)
        alone.fill([block[rows] for block in tokens], grid, [names[row] for row in rows], places[: len(rows)])
        part = memory.part(rows)
        assert (part.places, part.names) == (alone.places, alone.names)
        text = torch.zeros(6, 16)
        torch.testing.assert_close(*(each(asked, text, grid, TILES) for each in (part, alone)), atol=2e-2, rtol=1e-2)


def test_images_of_another_size_have_no_places():
    memory = NormalMemory(2, 8, radius=1)
    memory.fill(random_tokens(3, 4), places=TILES)
    text = torch.zeros(1, 17)
    with pytest.raises(ValueError, match="5 x 5 of them where the normal images have 4 x 4"):
        memory(random_tokens(1, 5), torch.zeros(1, 26))
    with pytest.raises(ValueError, match="3 x 1 of them where the normal images have 2 x 1"):
        memory(random_tokens(1, 4), text, places=[Place(2, 3, 1)])
    # A tile that a region hid in all normal images is compared with all of them.
    part = memory.part([0, 1])
    every = NormalMemory(2, 8)
    every.load_state_dict(part.state_dict())
    torch.testing.assert_close(*(each(random_tokens(1, 4, seed=3), text, places=TILES[2:]) for each in (part, every)))


def test_images_that_are_alike_at_each_place_choose_to_be_compared_there():
    alike = [
        layer.repeat(4, 1, 1) + 0.3 * noise
        for layer, noise in zip(random_tokens(1, 6), random_tokens(4, 6, seed=1), strict=True)
    ]
    assert choose_radius(alike, (6, 6)) == 1
    assert choose_radius([layer[:3] for layer in alike], (6, 6)) is None
    elsewhere = [torch.stack([image.roll(shift, 0) for shift, image in enumerate(layer)]) for layer in alike]
    assert choose_radius(elsewhere, (6, 6)) == 1
    elsewhere = [torch.stack([image.roll(7 * shift, 0) for shift, image in enumerate(layer)]) for layer in alike]
    assert choose_radius(elsewhere, (6, 6)) is None
    # A texture that repeats itself says nothing of places.
    plain = [
        layer[:, :2].repeat(1, 19, 1)[:, :37] + 0.3 * noise
        for layer, noise in zip(alike, random_tokens(4, 6, seed=2), strict=True)
    ]
    assert choose_radius(plain, (6, 6)) is None


@pytest.fixture(scope="module")
def build(small_clip):
    clip = small_clip()

    def make(**arguments):
        torch.manual_seed(0)
        return FBCLIPModel(clip, feature_layers=(1, 3), n_ctx=3, **arguments).eval()

    return make


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_without_it_the_model_is_the_paper_s_and_with_it_only_the_scores_move(build, images):
    plain, few = build(), build(few_shot=True)
    assert plain.memory is None
    assert plain.state_dict().keys() == {name for name in few.state_dict() if not name.startswith("memory.")}
    with pytest.raises(RuntimeError, match="holds no normal image"):
        few(images)
    few.remember(images[:2])
    before, stages_before = plain(images, return_stages=True)
    after, stages = few(images, return_stages=True)
    assert torch.equal(stages_before.text_similarity[-1], stages.text_similarity[-1])
    assert not torch.allclose(before.pred_score, after.pred_score)
    # Known images become less abnormal beside the unknown one.
    moved = torch.logit(after.anomaly_map, 1e-6) - torch.logit(before.anomaly_map, 1e-6)
    assert moved[:2].mean() < moved[2].mean()
    # Training is the paper's, whatever the memory holds.
    assert torch.equal(few.train().score(images).grid_map, plain.train().score(images).grid_map)
    with pytest.raises(RuntimeError, match="few_shot=True"):
        plain.remember(images)
    with pytest.raises(ValueError, match="NaN"):
        few.remember(images * float("nan"))


@torch.no_grad()
def test_state_dicts_carry_it_and_adapters_do_not(build, images, tmp_path):
    few = build(few_shot=True)
    few.remember(images)
    expected = few(images).anomaly_map
    other = build(few_shot=True)
    other.load_state_dict(few.state_dict())
    assert other.memory.num_images == 3
    assert torch.equal(other(images).anomaly_map, expected)

    from anomalib_fbclip.adapted import adapter_file as adapters

    path = adapters.save(few, tmp_path / "a.safetensors")
    assert not [name for name in adapters.read(path)[0] if "memory" in name]
    few.load_adapter(path)
    assert few.memory.num_images == 3
    plain = build()
    plain.load_adapter(path)
    assert plain.memory is None


def test_on_the_embedded_backbone_it_compares_features_of_the_network():
    model = FBCLIP(backbone="tiny", image_size=56, k_shot=1).eval().model
    images = torch.rand(2, 3, 56, 56)
    with pytest.raises(ValueError, match="multiple of the patch size"):
        model.remember(torch.rand(1, 3, 60, 60))
    model.remember(images[:1])
    (features,) = model.memory.compared(model.clip.visual, images, pytest.fail)
    assert features.shape == (2, 1 + 7 * 7, 152)
    fine, coarse = model.clip.visual.conv1.features(images)
    # A patch inside: the mean of the nine places around it.
    torch.testing.assert_close(features[:, 1 + 3 * 7 + 3, :40], fine[:, :, 2:5, 2:5].mean((2, 3)))
    torch.testing.assert_close(features.norm(dim=-1)[:, 0], torch.zeros(2))
    _, stages = model(images, return_stages=True)
    assert stages.memory_evidence[0, 1:].amax() < stages.memory_evidence[1, 1:].amax()
    assert coarse.shape[1] == 112


def test_a_memory_of_tokens_is_refused_by_a_model_that_compares_features():
    model, tokens = FBCLIP(backbone="tiny", image_size=56, k_shot=1).model, NormalMemory(4, 128)
    tokens.fill([torch.randn(1, 50, 128) for _ in range(4)])
    with pytest.raises(RuntimeError, match="let the model read the good images again"):
        model.memory.load_state_dict(tokens.state_dict())
