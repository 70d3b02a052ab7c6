# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures that are not as expected: each works, or is refused with a message that names it."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image


def _write(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 4), dtype=np.uint8)
    if kind == "grey":
        Image.fromarray(noise[..., 0]).save(path)
    elif kind == "rgba":
        Image.fromarray(noise).save(path)
    elif kind == "palette":
        Image.fromarray(noise[..., :3]).convert("P").save(path)
    elif kind == "sixteen_bit":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 200 + 5000).save(path)
    else:
        Image.fromarray(noise[..., :3]).save(path)
    return path


@pytest.mark.parametrize("kind", ["rgb", "grey", "rgba", "palette"])
def test_other_pictures_work(kind: str, model: Callable, engine: Callable, tmp_path: Path) -> None:
    (batch,) = engine().predict(model(), data_path=_write(tmp_path, kind))
    assert torch.isfinite(batch.anomaly_map).all()


def test_sixteen_bits_are_warned_of_once(model, engine, tmp_path, caplog) -> None:
    path = _write(tmp_path, "sixteen_bit")
    with caplog.at_level(logging.WARNING):
        engine().predict(model(), data_path=path)
    assert caplog.text.count("convert them to 8 bit") == 1
    assert "sixteen_bit.png" in caplog.text


def test_nan_is_named(model) -> None:
    images = torch.rand(2, 3, 56, 56)
    images[1, 0, 3, 3] = float("nan")
    batch = ImageBatch(image=images, image_path=["a.png", "b.png"])
    with pytest.raises(ValueError, match=r"\['b.png'\]"):
        model().predict_step(batch, 0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(0, 3, 56, 56), "empty"),
        (torch.rand(1, 3, 56, 64), "square"),
        (torch.rand(1, 1, 56, 56), "RGB"),
        (torch.rand(1, 3, 60, 60), "multiple of the patch size 8"),
        (torch.full((1, 3, 56, 56), float("inf")), "infinite"),
    ],
)
def test_the_torch_model_refuses(images: torch.Tensor, message: str, model: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        model().model(images)


def test_masks_of_another_size_are_resized(model: Callable) -> None:
    fbclip = model(weights=None)
    maps = torch.rand(2, 56, 56)
    arguments = (torch.rand(2), maps, torch.rand(2, 2), torch.tensor([0, 1]))
    small = torch.zeros(2, 28, 28)
    small[1, :14] = 255
    large = torch.zeros(2, 56, 56)
    large[1, :28] = 1
    assert float(fbclip.loss(*arguments, small)["total"]) == pytest.approx(
        float(fbclip.loss(*arguments, large)["total"]),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 60}, "image_size=60"),
        ({"feature_layers": [0, 3]}, "from 1 to 8"),
        ({"feature_layers": [4, 9]}, "from 1 to 8"),
        ({"views": ["side"]}, "side"),
        ({"text_poolings": []}, "text_poolings"),
        ({"bank": "third"}, "third"),
        ({"metrics": "all"}, "all"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"smoothing_sigma": -1.0}, "smoothing_sigma=-1.0"),
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"scr_weight": -1.0}, "scr_weight=-1.0"),
        ({"backbone": "ViT-9"}, "ViT-9"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict, message: str, model: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)
