# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Components of masks, and what is done with small ones."""

import numpy as np
import torch
from anomalib.data import ImageBatch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_fbclip.host.components import drop_small, drop_small_in_graph, find_components, peak_of_area
from anomalib_fbclip.host.post_processing import ProbabilityPostProcessor
from anomalib_fbclip.host.verdicts import ONLY_SCORE, TOO_SMALL, judge


def flood(mask):
    """Components by hand, as sets of places."""
    left, found = {tuple(place) for place in mask.nonzero().tolist()}, []
    while left:
        edge = [left.pop()]
        component = set(edge)
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            component |= near
            edge += near
        found.append(component)
    return found


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 4))
def test_components_are_those_of_a_flood_fill(height, width, seed, least, scale) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(height, width, generator=generator) > 0.6
    values = torch.rand(height, width, generator=generator)
    size = (height * scale, width * scale)
    expected = flood(mask)
    found = find_components(mask, values, size)
    assert sorted(one.area for one in found) == sorted(len(one) * scale**2 for one in expected)
    for one in found:
        left, top, right, bottom = one.box
        assert 0 <= left < right <= size[1]
        assert 0 <= top < bottom <= size[0]
        assert left <= one.centre[0] < right
    assert [one.peak for one in found] == sorted((one.peak for one in found), reverse=True)
    kept = drop_small(mask, least, size)
    wanted = np.zeros((height, width), bool)
    for component in expected:
        for place in component:
            wanted[place] = len(component) * scale**2 >= least
    assert (kept.numpy() == wanted).all()
    assert torch.equal(drop_small_in_graph(torch.stack((mask, ~mask)), least, size)[0], kept)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31), st.integers(0, 12), st.integers(1, 3))
def test_the_peak_of_an_area_is_the_least_threshold_that_marks_none_of_it(height, width, seed, least, scale) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 20, (height, width), generator=generator) / 20  # with ties
    size = (height * scale, width * scale)
    peak = peak_of_area(values, least, size)
    marking = [each for each in values.flatten() if drop_small(values >= each, least, size).any()]
    assert peak == max(marking, default=torch.tensor(0.0))
    assert not drop_small(values > peak, least, size).any()


def test_rounds_of_a_graph_suffice_for_the_longest_ways() -> None:
    snake = torch.ones(259, 259, dtype=torch.bool)
    snake[1::2] = False
    snake[1::4, -1] = snake[3::4, 0] = True
    for mask in (snake, snake.T):
        area = int(mask.sum())
        for least in (area, area + 1):
            expected = drop_small(mask, least, (259, 259))
            assert torch.equal(drop_small_in_graph(mask[None], least, (259, 259))[0], expected)


def test_small_components_are_no_reason_for_an_alarm() -> None:
    processor = ProbabilityPostProcessor()
    processor.set_thresholds(0.5, 0.5)
    maps = torch.zeros(3, 10, 10)
    maps[0, 2, 2] = 0.9  # 1 pixel, which is 4 of an image of twice the size
    maps[1, 2:4, 2:4] = 0.9
    scores = torch.tensor([0.9, 0.9, 0.9])

    def run(min_area):
        processor.min_area = min_area
        batch = ImageBatch(image=torch.rand(3, 3, 20, 20), anomaly_map=maps.clone(), pred_score=scores.clone())
        processor.post_process_batch(batch)
        return batch

    assert run(0).pred_label.tolist() == run(4).pred_label.tolist() == [True, True, True]
    batch = run(5)
    # The third has no component at all: its score alone speaks.
    assert batch.pred_label.tolist() == [False, True, True]
    assert batch.pred_mask.flatten(1).sum(1).tolist() == [0, 4, 0]
    assert torch.equal(batch.pred_score, scores)
    notes = [judge(item, post_processor=processor).note for item in batch]
    assert notes == [TOO_SMALL, "", ONLY_SCORE]
