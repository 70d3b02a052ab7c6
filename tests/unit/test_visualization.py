# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Heat maps on a fixed scale: a good picture stays dark, whatever its largest value."""

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem
from PIL import Image

from anomalib_fbclip.host.visualization import PredictionVisualizer, _save


@pytest.mark.parametrize(("largest", "red"), [(0.1, False), (0.95, True)])
def test_colours_do_not_follow_the_picture_at_hand(largest, red, tmp_path):
    path = tmp_path / "0.png"
    Image.new("RGB", (56, 56)).save(path)
    item = ImageItem(
        image=torch.zeros(3, 56, 56),
        image_path=str(path),
        anomaly_map=torch.linspace(0, largest, 56).expand(56, 56),
        pred_mask=torch.zeros(56, 56, dtype=torch.bool),
        pred_label=torch.tensor(False),
        pred_score=torch.tensor(largest),
    )
    plain = PredictionVisualizer(text_config={"enable": False}).visualize(item)
    strip = np.asarray(plain.convert("RGB")).astype(int)
    assert bool((strip[..., 0] - strip[..., 2] > 60).any()) == red
    assert (strip[..., 2] - strip[..., 0] > 60).any()  # blue: the low end of the map is in both

    # Score and verdict stand at the bottom of the first panel, and captions end within their panels.
    written = {}
    for label in (False, True):
        item.pred_label = torch.tensor(label)
        written[label] = np.asarray(PredictionVisualizer().visualize(item).convert("RGB")).astype(int)
    changed = np.argwhere((written[True] != written[False]).any(axis=-1))
    assert changed[:, 0].min() > 200
    assert changed[:, 1].max() < 256
    captions = np.argwhere((written[False] != strip).any(axis=-1))
    assert not {255, 511} & set(captions[:, 1])
    item.pred_score = None
    assert (np.asarray(PredictionVisualizer().visualize(item).convert("RGB"))[200:] == strip[200:]).all()


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    target, save = tmp_path / "0.png", Image.Image.save
    _save(Image.new("L", (9, 9)), target)

    def fail_half_way(image, path):
        save(image, path)
        path.write_bytes(path.read_bytes()[:20])
        msg = "no space left"
        raise OSError(msg)

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(OSError, match="no space"):
        _save(Image.new("L", (5, 5)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    assert Image.open(target).size == (9, 9)
