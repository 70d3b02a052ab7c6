# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Regions: what is outside does not reach the model, whatever the sizes; what cannot be right is refused by name."""

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from anomalib_fbclip.host.regions import FILLS, Regions, crop_to, make_view, read_region

BICUBIC = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}


def save(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(mask, np.uint8) * 255).save(path)
    return path


@settings(deadline=None, max_examples=40)
@given(
    st.integers(24, 90),
    st.integers(24, 90),
    st.sampled_from([(16, 16), (40, 40), (24, 48)]),
    st.booleans(),
    st.sampled_from(FILLS),
    st.integers(0, 2**31),
)
def test_what_is_outside_reaches_neither_input_nor_map(height, width, size, crop, fill, seed) -> None:
    generator = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    top, left = generator.integers(0, height // 5), generator.integers(0, width // 5)
    mask[top : height - height // 6, left : width - width // 7] = True
    mask[top : top + 2, left : left + 3] = False  # no rectangle
    regions = Regions(mask, crop, fill)
    image = torch.from_numpy(generator.random((1, 3, height, width), dtype=np.float32))
    other = torch.where(torch.from_numpy(mask), image, 1 - image)
    try:
        seen = [regions.fill(resize(regions.crop_raw(each), list(size), **BICUBIC), [None]) for each in (image, other)]
    except ValueError as error:
        assert "nothing is left of it" in str(error)  # noqa: PT017  # for some sizes alone
        return
    torch.testing.assert_close(seen[0], seen[1])
    # Cropped images may have other proportions than whole ones; maps have those of whole ones.
    maps, whole = torch.ones(1, *size), (size[0] + 8, size[1]) if crop else size
    found = regions.cut(InferenceBatch(pred_score=torch.zeros(1), anomaly_map=maps), [None], whole).anomaly_map[0]
    shown = regions.inside(whole, [None])[0]
    assert found.shape == shown.shape == whole
    assert not found[~shown].any()
    # A constant map stays constant, also where it is put back.
    inside = found[shown]
    assert inside.max() == pytest.approx(1, abs=1e-6)
    assert inside[inside > 0].min() == pytest.approx(1, abs=1e-6)


def test_what_is_outside_is_the_nearest_pixel_or_the_mean() -> None:
    mask = np.zeros((40, 40), bool)
    mask[:, :20] = True
    images = torch.rand(1, 3, 40, 40)
    near, flat = (Regions(mask, fill=fill).fill(images, [None]) for fill in FILLS)
    inside = Regions(mask).view((40, 40)).source.reshape(40, 40)[0].unique()  # columns that the resize does not mix
    assert torch.equal(near[..., 20:], near[..., int(inside.max()), None].expand(-1, -1, -1, 20))
    assert torch.equal(flat[..., : int(inside.max())], images[..., : int(inside.max())])
    assert not flat[..., 20:].any()
    with pytest.raises(ValueError, match="region_fill='black'"):
        Regions(mask, fill="black")


def test_a_map_is_put_back_to_where_the_crop_was() -> None:
    mask = np.zeros((80, 40), bool)
    mask[20:60, 10:30] = True
    regions = Regions(mask, crop=True)
    maps = torch.zeros(1, 40, 40)
    maps[0, 19:21, 9:11] = 1  # middle of the crop's height, a quarter of its width
    found = regions.cut(InferenceBatch(pred_score=torch.zeros(1), anomaly_map=maps), [None]).anomaly_map[0]
    axis = torch.arange(40.0)
    assert (found.sum(1) * axis).sum() / found.sum() == pytest.approx(19.5, abs=1e-3)  # half of the image's height
    assert (found.sum(0) * axis).sum() / found.sum() == pytest.approx(14.5, abs=1e-3)  # (10 + 5) / 40 of its width
    assert crop_to(torch.zeros(1, 3, 160, 80), mask).shape == (1, 3, 80, 40)


def test_a_mask_is_scaled_by_rule_or_refused_with_both_sizes(tmp_path) -> None:
    image = save(tmp_path / "image.png", np.ones((50, 100)))
    mask = np.ones((25, 50))
    mask[:, 30:] = 0
    regions = Regions(save(tmp_path / "mask.png", mask))
    assert regions.view((20, 20), image).shown.float().mean() == pytest.approx(0.6)
    other = save(tmp_path / "other.png", np.ones((50, 90)))
    with pytest.raises(ValueError, match=r"mask.png' is 50 x 25 pixels, .*other.png is 90 x 50"):
        regions.view((20, 20), other)


def test_empty_missing_narrow_and_unreadable_masks_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"empty.png' is empty"):
        Regions(save(tmp_path / "empty.png", np.zeros((9, 9))))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Regions(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no masks"):
        Regions(tmp_path / "none")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png' cannot be read"):
        Regions(tmp_path / "text.png")
    narrow = np.zeros((400, 400), bool)
    narrow[100:102] = True
    with pytest.raises(ValueError, match="crop_to_region"):
        make_view(narrow, (32, 32))
    regions = Regions(narrow, crop=True)
    maps = InferenceBatch(pred_score=torch.zeros(1), anomaly_map=torch.ones(1, 32, 32))
    assert regions.cut(maps, [None]).anomaly_map[0, 8].min() == 1


def test_a_folder_finds_masks_by_the_longest_end_of_the_path(tmp_path) -> None:
    full, half = np.ones((8, 8)), np.tri(8)
    save(tmp_path / "regions" / "0.png", full)
    save(tmp_path / "regions" / "line2" / "0.png", half)
    regions = Regions(tmp_path / "regions")
    first, second = (tmp_path / "images" / name / "0.jpg" for name in ("line1", "line2"))
    for path in (first, second):
        save(path, full)
    inside = regions.inside((8, 8), [first, second])
    assert inside[0].all()
    assert not inside[1].all()
    with pytest.raises(FileNotFoundError, match=r"9.jpg.*add masks"):
        regions.check([first, tmp_path / "9.jpg"])
    with pytest.raises(ValueError, match="one mask for all images"):
        regions.crop_raw(torch.rand(1, 3, 8, 8))


def test_any_two_values_make_a_mask(tmp_path) -> None:
    values = np.eye(9, dtype=np.uint8)
    for number, high in enumerate((1, 128, 255)):
        Image.fromarray(values * high).save(tmp_path / f"{number}.png")
        assert (read_region(tmp_path / f"{number}.png") == (values > 0)).all()
