# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds from normal images: the rate that they promise is the rate that they keep."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from anomalib_fbclip.host.calibration import NormalScores, set_thresholds
from anomalib_fbclip.host.components import drop_small, peak_of_area
from anomalib_fbclip.host.post_processing import FIXED, LABELS, NORMAL_PICTURES, ProbabilityPostProcessor
from anomalib_fbclip.host.thresholds import normal_quantile, pictures_needed


@settings(max_examples=60, deadline=None)
@given(number=st.integers(1, 400), rate=st.floats(0.001, 0.999), seed=st.integers(0, 99))
def test_order_statistic_and_its_interval(number, rate, seed):
    scores = torch.rand(number, generator=torch.Generator().manual_seed(seed))
    result = normal_quantile(scores, rate)
    k = max(1, math.floor(rate * (number + 1) + 1e-9))
    assert int((scores.double() > result.threshold).sum()) == k - 1
    assert result.expected_rate == pytest.approx(k / (number + 1))
    assert (result.expected_rate <= rate * (1 + 1e-9)) == (number >= pictures_needed(rate))
    expected = beta.ppf([0.025, 0.975], k, number + 1 - k)
    assert (result.low, result.high) == pytest.approx(expected, abs=1e-6)


def test_new_normal_pictures_exceed_the_threshold_as_promised():
    generator = torch.Generator().manual_seed(1)
    rates, inside = [], 0
    for _ in range(400):
        result = normal_quantile(torch.rand(40, generator=generator), 0.1)
        true_rate = 1 - result.threshold  # of uniform scores
        rates.append(true_rate)
        inside += result.low <= true_rate <= result.high
    assert sum(rates) / 400 == pytest.approx(4 / 41, abs=0.01)
    assert inside / 400 == pytest.approx(0.95, abs=0.04)


def test_thousands_of_pictures_and_refusals():
    result = normal_quantile(torch.linspace(0, 1, 20_000), 0.05)
    assert (result.low, result.high) == pytest.approx(beta.ppf([0.025, 0.975], 1000, 19_001), abs=1e-6)
    for rate in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="false_alarm_rate"):
            normal_quantile(torch.rand(3), rate)
    with pytest.raises(ValueError, match="no scores"):
        normal_quantile(torch.rand(0), 0.1)


def _validate(processor, scores, labels):
    batch = type("Outputs", (), {"gt_label": labels, "pred_score": scores, "gt_mask": None, "anomaly_map": None})
    processor.on_validation_batch_end(None, None, batch)
    processor.on_validation_epoch_end(None, None)


def test_labels_replace_fixed_thresholds_and_not_those_from_normal_pictures():
    scores, labels = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 0, 1, 1])
    processor = ProbabilityPostProcessor()
    assert processor.thresholds == {"image": 0.5, "pixel": 0.5, "origin": FIXED}
    _validate(processor, scores, labels)
    assert 0.2 < processor.thresholds["image"] < 0.8
    assert processor.thresholds["origin"] == LABELS
    processor.set_thresholds(0.3, 0.7, origin=NORMAL_PICTURES, pictures=5)
    _validate(processor, scores, labels)
    assert processor.thresholds["image"] == pytest.approx(0.3)
    other = ProbabilityPostProcessor()
    other.load_state_dict(processor.state_dict())
    other.load_checkpoint_config(processor.checkpoint_config())
    assert other.thresholds == processor.thresholds
    with pytest.raises(ValueError, match=r"pixel threshold 1\.5"):
        processor.set_thresholds(0.5, 1.5)


@settings(max_examples=60, deadline=None)
@given(threshold=st.floats(1e-6, 1 - 1e-6), seed=st.integers(0, 99))
def test_normalisation_bends_at_the_threshold_and_keeps_order_labels_and_ends(threshold, seed):
    processor = ProbabilityPostProcessor()
    processor.set_thresholds(threshold, threshold)
    value = processor.thresholds["image"]
    scores = torch.rand(200, generator=torch.Generator().manual_seed(seed)).sort().values
    scores = torch.cat((torch.zeros(1), scores, torch.tensor([value]), torch.ones(1)))
    bent = processor._normalize(scores, processor.image_min, processor.image_max, processor.image_threshold)
    assert (bent[0], bent[-2], bent[-1]) == (0.0, 0.5, 1.0)
    assert (bent[:-2].diff() >= 0).all()
    assert torch.equal(bent[:-1] > 0.5, scores[:-1] > value)


def _specks(number, seed):
    """Scores and maps that are independent of each other; a speck is higher than a mark of four pixels."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(number, 12, 12)
    maps[:, 2:4, 2:4] = 0.5 * torch.rand(number, 1, 1, generator=generator)
    maps[:, 8, 8] = torch.rand(number, generator=generator)
    return torch.rand(number, generator=generator), maps


def test_a_least_area_lowers_thresholds_and_keeps_the_promised_rate():
    found, rates = {}, {"image": [], "pixel": []}
    for seed in range(60):
        for least in (0, 4):
            scores, maps = _specks(39, seed)
            processor = ProbabilityPostProcessor()
            normal = NormalScores(list(scores), list(maps.amax((1, 2))))
            normal.marks = [peak_of_area(each, least, (12, 12)) for each in maps]
            found[least] = set_thresholds(processor, normal, 0.1)
        assert found[4]["pixel"] < found[0]["pixel"]
        assert found[4]["image"] <= found[0]["image"]
        scores, maps = _specks(200, 1000 + seed)
        marked = maps > found[4]["pixel"]
        kept = torch.stack([drop_small(each, 4, (12, 12)).any() for each in marked])
        rates["pixel"].append(float(kept.float().mean()))
        alarms = (scores > found[4]["image"]) & (kept | ~marked.flatten(1).any(dim=1))
        rates["image"].append(float(alarms.float().mean()))
    for name, each in rates.items():
        assert sum(each) / 60 == pytest.approx(0.1, abs=0.02), name
