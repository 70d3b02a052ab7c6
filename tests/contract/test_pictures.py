# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Images that are not as expected: each works, or is refused with a message that names it."""

import logging
from collections.abc import Callable

import pytest
import torch
from anomalib.data import ImageBatch
from PIL import Image


def test_one_colour_is_warned_of_once(model, engine, tmp_path, caplog) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (60, 40), "white").save(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        engine().predict(model(), data_path=tmp_path)
    assert caplog.text.count("is one uniform colour") == 1
    assert "a.png" in caplog.text


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
        (torch.rand(1, 3, 56, 60), "60"),
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
        ({"image_size": 2**31}, "image_size=2147483648"),
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
        ({"smoothing_sigma": 1e9}, "to the image size, 56"),
        ({"n_ctx": 0}, "n_ctx=0"),
        ({"scr_weight": -1.0}, "scr_weight=-1.0"),
        ({"backbone": "ViT-9"}, "ViT-9"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict, message: str, model: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)
