# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Streaming metrics against anomalib's exact ones, and thresholds from counts."""

import math

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_fbclip.host.metrics import BINS, ImageScores, ScoreHistogram, bin_to_score, score_to_bin
from anomalib_fbclip.host.post_processing import ProbabilityPostProcessor


@pytest.fixture(scope="module")
def maps() -> ImageBatch:
    """Six maps with defects in five of them, the scores overlapping."""
    torch.manual_seed(0)
    masks = torch.zeros(6, 64, 64, dtype=torch.bool)
    for index in range(5):
        masks[index, 8 * index : 8 * index + 12, 10:30] = True
        masks[index, 50:54, 40 + index : 45 + index] = True
    scores = torch.sigmoid(3 * torch.randn(6, 64, 64) + 4 * masks - 5)
    return ImageBatch(
        image=torch.zeros(6, 3, 64, 64),
        anomaly_map=scores,
        gt_mask=masks,
        pred_score=scores.amax(dim=(1, 2)),
        gt_label=masks.any(dim=2).any(dim=1),
    )


def test_pixel_metrics_equal_the_hosts(maps: ImageBatch) -> None:
    histogram = ScoreHistogram(regions=True)
    for part in (slice(0, 2), slice(2, 6)):
        histogram.update(maps.anomaly_map[part], maps.gt_mask[part])
    values = histogram.compute()
    for host, name in ((AUROC, "AUROC"), (AUPR, "AUPR"), (AUPRO, "AUPRO"), (F1Max, "F1Max")):
        metric = host(fields=["anomaly_map", "gt_mask"])
        metric.update(maps)
        assert values[name] == pytest.approx(float(metric.compute()), abs=1e-3), name


def test_image_metrics_equal_the_hosts(maps: ImageBatch) -> None:
    scores = ImageScores()
    scores.update(maps.pred_score, maps.gt_label)
    values = scores.compute()
    for host, name in ((AUROC, "AUROC"), (AUPR, "AUPR"), (F1Max, "F1Max")):
        metric = host(fields=["pred_score", "gt_label"])
        metric.update(maps)
        assert values[name] == pytest.approx(float(metric.compute()), abs=1e-5), name


def test_image_metrics_of_distances_are_those_of_their_order() -> None:
    distances = torch.tensor([56.4, 35.1, 33.3, 39.4, 39.6, 51.7, 67.3, 39.4])
    labels = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0])
    found = []
    for scores in (distances, distances / 100):
        metric = ImageScores()
        metric.update(scores, labels)
        found.append(metric.compute())
    assert found[0] == found[1]
    assert found[0]["AUROC"] == pytest.approx(14.5 / 16)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_missing_and_not_zero(label: int) -> None:
    for metric, shape in ((ScoreHistogram(regions=True), (2, 8, 8)), (ImageScores(), (4,))):
        metric.update(torch.rand(shape), torch.full(shape, label))
        assert all(math.isnan(value) for value in metric.compute().values())


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20))
@settings(deadline=None, max_examples=100)
def test_bins_keep_the_order(values: list[float]) -> None:
    scores = torch.tensor(sorted(values))
    bins = score_to_bin(scores)
    assert (bins.diff() >= 0).all()
    assert 0 <= int(bins.min()) <= int(bins.max()) < BINS
    # A threshold at a bin's edge has the bin on its upper side.
    assert (scores > bin_to_score(bins)).all()


def _validated(scores: torch.Tensor, masks: torch.Tensor) -> ProbabilityPostProcessor:
    processor = ProbabilityPostProcessor()
    batch = ImageBatch(
        image=torch.zeros(len(scores), 3, *scores.shape[1:]),
        anomaly_map=scores,
        gt_mask=masks,
        pred_score=scores.amax(dim=(1, 2)),
        gt_label=masks.flatten(1).any(dim=1),
    )
    processor.on_validation_batch_end(None, None, batch)
    processor.on_validation_epoch_end(None, None)
    return processor


def test_thresholds_are_usable_before_any_validation_and_exact_at_one_half() -> None:
    processor = ProbabilityPostProcessor()
    scores = torch.rand(3, 8, 8)
    assert [float(processor.image_threshold), float(processor.pixel_threshold)] == pytest.approx([0.5, 0.5])
    batch = ImageBatch(image=torch.zeros(3, 3, 8, 8), anomaly_map=scores.clone(), pred_score=scores.amax(dim=(1, 2)))
    processor.post_process_batch(batch)
    torch.testing.assert_close(batch.anomaly_map, scores, atol=1e-7, rtol=0)
    assert torch.equal(batch.pred_mask, scores > 0.5)


def test_validation_sets_thresholds_and_the_scale_keeps_the_ranking() -> None:
    scores = torch.full((4, 8, 8), 0.01)
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[2:, 2:5, 2:5] = True
    scores[masks] = 0.2
    processor = _validated(scores, masks)
    assert 0.01 <= float(processor.pixel_threshold) < 0.2
    normalized = processor._normalize(
        torch.linspace(0, 1, 1001),
        torch.tensor(0.0),
        torch.tensor(1.0),
        torch.tensor(0.2),
    )
    assert (normalized.diff() > 0).all()
    assert float(normalized[200]) == pytest.approx(0.5, abs=1e-6)


def test_validation_without_anomalies_leaves_the_thresholds() -> None:
    processor = _validated(torch.rand(2, 8, 8), torch.zeros(2, 8, 8, dtype=torch.bool))
    assert [float(processor.image_threshold), float(processor.pixel_threshold)] == pytest.approx([0.5, 0.5])


def test_counts_stay_where_double_precision_is() -> None:
    """As on Apple's devices, which refuse it."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.float64:
            msg = "Cannot convert a MPS Tensor to float64"
            raise TypeError(msg)
        return tensor

    histogram = ScoreHistogram()._apply(move)
    histogram.update(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]))
    assert histogram.compute()["AUROC"] == 1
