# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A threshold from normal images alone, at a wanted rate of false alarms, and how sure it is."""

import math
from typing import NamedTuple

import torch

_CONFIDENCE = 0.95


class NormalQuantile(NamedTuple):
    """A threshold from the scores of normal images.

    Attributes:
        threshold: An anomaly is what is greater.
        expected_rate: False-alarm rate to expect on new normal images.
        low: Lower end of the 95 % interval of that rate.
        high: Upper end of it.
    """

    threshold: float
    expected_rate: float
    low: float
    high: float


def normal_quantile(scores: torch.Tensor, false_alarm_rate: float) -> NormalQuantile:
    """Threshold that normal images exceed at a wanted rate.

    Of n independent scores, the k-th largest is exceeded by a new one with a probability that follows
    Beta(k, n + 1 - k) whatever the distribution of the scores, of mean k / (n + 1). k is the largest number that keeps
    the mean at or below the wanted rate. Where even the largest score (k = 1) is exceeded more often, n being too
    small, it is taken.

    Args:
        scores: Scores of n normal images ``[n]``.
        false_alarm_rate: Wanted share of normal images above the threshold, between 0 and 1.

    Returns:
        NormalQuantile: Threshold, rate to expect, and the interval in which the true rate lies for 95 of 100 such sets.

    Raises:
        ValueError: If there is no score, or the rate is not between 0 and 1.

    Example:
        >>> normal_quantile(torch.linspace(0, 1, 99), false_alarm_rate=0.05).expected_rate
        0.05
    """
    check_rate(false_alarm_rate)
    if scores.numel() == 0:
        msg = "no scores: give one normal image or more."
        raise ValueError(msg)
    ordered = scores.detach().double().flatten().sort(descending=True).values
    number = len(ordered)
    # A hair above: 0.05 * 100 must count as 5.
    k = max(1, math.floor(false_alarm_rate * (number + 1) * (1 + 1e-12)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = (_beta_quantile(probability, k, number) for probability in (tail, 1 - tail))
    return NormalQuantile(float(ordered[k - 1]), k / (number + 1), low, high)


def pictures_needed(false_alarm_rate: float) -> int:
    """Normal images from which on a wanted rate can be kept."""
    return math.ceil(1 / false_alarm_rate - 1 - 1e-9)


def check_rate(false_alarm_rate: float) -> None:
    """Refuse a rate that is none.

    Raises:
        ValueError: If the rate is not between 0 and 1.
    """
    if not 0 < false_alarm_rate < 1:
        msg = f"false_alarm_rate={false_alarm_rate}: give a share between 0 and 1, such as 0.05."
        raise ValueError(msg)


def share_interval(hits: int, number: int) -> tuple[float, float]:
    """95 % interval of a share that was counted (Clopper and Pearson).

    Args:
        hits: How many of ``number`` were counted.
        number: One or more.

    Example:
        >>> low, high = share_interval(9, 10)
        >>> round(low, 3), round(high, 3)
        (0.555, 0.997)
    """
    tail = (1 - _CONFIDENCE) / 2
    low = _beta_quantile(tail, hits, number) if hits else 0.0
    high = _beta_quantile(1 - tail, hits + 1, number) if hits < number else 1.0
    return low, high


def _beta_quantile(probability: float, k: int, number: int) -> float:
    """Quantile of Beta(k, number + 1 - k): P(Beta <= x) is P(Binomial(number, x) >= k)."""
    # log of the binomial coefficients, as their values leave the range of floats from about 1000 images on
    j = torch.arange(k, dtype=torch.float64)
    total = torch.tensor(float(number), dtype=torch.float64)
    choose = torch.lgamma(total + 1) - torch.lgamma(j + 1) - torch.lgamma(total - j + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        x = (low + high) / 2
        below = float((choose + j * math.log(x) + (number - j) * math.log1p(-x)).exp().sum())
        low, high = (x, high) if 1 - below < probability else (low, x)
    return (low + high) / 2
