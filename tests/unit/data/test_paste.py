# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Drawn defects in photographs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_fbclip.data.procedural.paste import draw_patch


def photograph(height, width, seed=0, grey=False):
    image = np.random.default_rng(seed).normal(0.5, 0.02, (height, width, 3)).clip(0, 1).astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(image[..., :1], image.shape)) if grey else image


@settings(deadline=None, max_examples=40)
@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 999), st.sampled_from([0, 50]))
def test_a_defect_lies_in_the_part_and_is_visible(height, width, seed, least) -> None:
    image, part = photograph(height, width, seed), np.zeros((height, width), dtype=bool)
    part[height // 4 : height // 2, width // 4 : width // 2 + 1] = True
    patch = draw_patch(image, part, seed, 64, least)
    side = len(patch.pixels)
    place = np.s_[patch.top : patch.top + side, patch.left : patch.left + side]
    assert patch.pixels.shape == image[place].shape
    changed = np.abs(patch.pixels - image[place]).max(axis=2)
    assert changed.max() > 0.02  # the deviation of the image's own noise
    assert not changed[~part[place]].any()
    assert np.array_equal(draw_patch(image, part, seed, 64, least).pixels, patch.pixels)


def test_sizes_are_those_that_are_asked_for_and_grey_stays_grey() -> None:
    image, part = photograph(400, 700, grey=True), np.ones((400, 700), dtype=bool)
    sides = [len(draw_patch(image, part, seed, 100).pixels) for seed in range(30)]
    assert min(sides) >= 100
    assert min(sides) < 150 < 250 < max(sides) <= 400
    for least in (100, 1000):
        patches = [draw_patch(image, part, seed, 100, least) for seed in range(36)]
        areas = sorted(int(patch.mask.sum()) for patch in patches)
        assert least / 2 < areas[4]
        assert areas[-5] < 8 * least
        assert all(np.ptp(patch.pixels, axis=2).max() < 1e-6 for patch in patches)
