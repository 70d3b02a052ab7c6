# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Strips: a fixed scale, the proportions of the image, and text that fits, whatever the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem
from PIL import Image

from anomalib_fbclip.host.post_processing import ProbabilityPostProcessor
from anomalib_fbclip.host.verdicts import ONLY_MAP, ONLY_SCORE, judge
from anomalib_fbclip.host.visualization import PredictionVisualizer, _as_png, _save

PLAIN = {"enable": False}


def make(path: Path, largest: float = 0.95, size=(56, 56), mode: str = "RGB", label: bool = False) -> ImageItem:
    """A prediction on a black image, whose map rises from left to right."""
    Image.new(mode, size).save(path)
    anomaly_map = torch.linspace(0, largest, 56).expand(56, 56)
    return ImageItem(
        image=torch.zeros(3, 56, 56),
        image_path=str(path),
        anomaly_map=anomaly_map,
        pred_mask=anomaly_map > 0.5,
        pred_label=torch.tensor(label),
        pred_score=torch.tensor(largest),
    )


def pixels(strip: Image.Image) -> np.ndarray:
    return np.asarray(strip.convert("RGB")).astype(int)


@pytest.mark.parametrize(("largest", "red"), [(0.1, False), (0.95, True)])
def test_colours_do_not_follow_the_image_at_hand(largest, red, tmp_path):
    strip = pixels(PredictionVisualizer(text_config=PLAIN).visualize(make(tmp_path / "0.png", largest)))
    heat = strip[:, 2 * 320 :]  # behind the image and the outline
    assert bool((heat[..., 0] - heat[..., 2] > 60).any()) == red
    assert (heat[..., 2] - heat[..., 0] > 60).any()  # blue: the low end of the map is in both


@pytest.mark.parametrize(
    ("size", "mode", "panel", "below"),
    [
        ((2700, 964), "RGB", (640, 229), True),
        ((2000, 100), "RGB", (640, 32), True),
        ((100, 2000), "RGBA", (32, 640), False),
        ((30, 30), "RGB", (320, 320), False),
        ((400, 300), "L", (320, 240), False),
        ((1, 1), "1", (320, 320), False),
    ],
)
def test_proportions_are_kept_and_text_fits(size, mode, panel, below, tmp_path):
    item = make(tmp_path / "0.png", size=size, mode=mode)
    (width, height), number = panel, 3
    plain = PredictionVisualizer(text_config=PLAIN).visualize(item)
    assert plain.size == ((width, number * height) if below else (number * width, height))
    strip = pixels(PredictionVisualizer().visualize(item))
    assert strip.shape[1] <= 3 * max(width, 170) + 320
    # White all around: nothing is cut off at the border.
    for edge in (strip[:3], strip[-3:], strip[:, :3], strip[:, -3:]):
        assert (edge == 255).all()


def test_arguments(tmp_path):
    item = make(tmp_path / "0.png")
    assert PredictionVisualizer(size=100, text_config=PLAIN).visualize(item).size == (300, 100)
    with pytest.raises(ValueError, match="size=3"):
        PredictionVisualizer(size=3)
    with pytest.raises(ValueError, match="name_by='rank'"):
        PredictionVisualizer(name_by="rank")


def test_the_line_says_what_the_verdict_rests_on(tmp_path):
    post_processor = ProbabilityPostProcessor()
    item = make(tmp_path / "0.png", label=True)
    uncalibrated = PredictionVisualizer().visualize(item, post_processor)
    post_processor.set_thresholds(0.5, 0.5)
    calibrated = PredictionVisualizer().visualize(item, post_processor)
    assert uncalibrated.width < calibrated.width - 300  # without an outline
    line = pixels(calibrated)[:25]
    assert (line[..., 0] - line[..., 2] > 100).any()  # "anomalous" is red
    line = pixels(uncalibrated)[:25]
    assert (line[..., 0] == line[..., 2]).all()

    assert judge(item, calibrated=False).label == "uncalibrated"
    assert (judge(item).label, judge(item).note) == (1, "")
    item.pred_mask = torch.zeros(56, 56, dtype=torch.bool)
    assert judge(item).note == ONLY_SCORE
    assert PredictionVisualizer().visualize(item).height > calibrated.height  # a second line
    item.pred_label, item.pred_mask = torch.tensor(False), ~item.pred_mask
    assert (judge(item).label, judge(item).note) == (0, ONLY_MAP)


def test_strips_are_png():
    names = [_as_png(Path("a", name)).name for name in ("0.png", "0.jpg", "0.PNG", "x")]
    assert names == ["0.png", "0.jpg.png", "0.PNG", "x.png"]


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    target, save = tmp_path / "0.png", Image.Image.save
    _save(Image.new("L", (9, 9)), target)

    def fail_half_way(image, path, **options):
        save(image, path, **options)
        path.write_bytes(path.read_bytes()[:20])
        msg = "no space left"
        raise OSError(msg)

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(OSError, match="no space"):
        _save(Image.new("L", (5, 5)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    assert Image.open(target).size == (9, 9)
