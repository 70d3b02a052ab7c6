# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds without labels, through engine, adapter and checkpoint."""

import logging
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.post_processing import PostProcessor
from PIL import Image
from safetensors.torch import save_file

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.adapted.model_card import model_card
from anomalib_fbclip.commands.cli import main


@pytest.fixture(scope="module")
def normal(surfaces, tmp_path_factory) -> Path:
    """Twelve normal images in a folder, and a file that is none."""
    data = surfaces(num_train=12)
    data.setup()
    folder = tmp_path_factory.mktemp("normal")
    for index, path in enumerate(data.train_data.samples.image_path):
        Image.open(path).save(folder / f"{index}.png")
    (folder / "notes.png").write_text("no image")
    return folder


def test_normal_pictures_set_the_thresholds_of_a_prediction(model, engine, normal, surfaces, caplog) -> None:
    fbclip = model(normal_source=normal, false_alarm_rate=0.25)
    with caplog.at_level(logging.INFO):
        batches = engine().predict(fbclip, data_path=normal)
    # Of 12 images, 3 / 13 is the largest rate up to 0.25: two are above the third largest.
    assert sum(bool(batch.pred_label) for batch in batches) == 2
    assert sum(bool(batch.pred_mask.any()) for batch in batches) == 2
    found = fbclip.thresholds
    assert (found["origin"], found["pictures"], found["false_alarm_rate"]) == ("normal pictures", 12, 0.25)
    assert found["expected_rate"] == pytest.approx(3 / 13)
    assert found["interval"][0] < 3 / 13 < found["interval"][1]
    assert "between 5.49 % and 48.4 %" in caplog.text
    assert "notes.png" in caplog.text
    assert caplog.text.count("Thresholds from 12") == 1

    # Another rate, another threshold; labelled validation data do not replace what was asked for.
    strict = model(normal_source=normal, false_alarm_rate=0.08)
    engine().test(strict, datamodule=surfaces())
    assert strict.thresholds["origin"] == "normal pictures"
    assert strict.thresholds["image"] > found["image"]
    assert strict.thresholds["pixel"] > found["pixel"]


def test_adapter_and_checkpoint_carry_the_thresholds(model, engine, normal, tmp_path, caplog) -> None:
    fbclip = model(normal_source=normal, false_alarm_rate=0.01)
    path = fbclip.save_adapter(tmp_path / "a.safetensors")
    assert "give 99 or more" in caplog.text
    stored = adapters.read(path)[1]["thresholds"]
    assert stored == fbclip.thresholds
    other = model(weights=path)
    assert other.thresholds == stored
    (batch,) = engine().predict(other, data_path=normal / "0.png")
    assert bool(batch.pred_label) == (float(batch.pred_score) > 0.5)
    assert model(weights=path, image_size=64).thresholds["origin"] == "fixed"
    assert "image_size=56" in caplog.text
    assert model(weights=path, smoothing_sigma=0.0).thresholds["origin"] == "fixed"
    assert "smoothing_sigma=4.0 and not used with smoothing_sigma=0.0" in caplog.text
    assert model(weights=path, smooth_logits=False).thresholds["origin"] == "fixed"
    assert model(weights=path, k_shot=1).thresholds["origin"] == "fixed"
    assert model(weights=path, threshold=0.4).save_adapter(tmp_path / "b.safetensors")
    assert adapters.read(tmp_path / "b.safetensors")[1]["thresholds"]["image"] == pytest.approx(0.4)

    runner = engine()
    runner.predict(fbclip, data_path=normal / "0.png")
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]["normal_source"] is None
    again = FBCLIP.load_from_checkpoint(tmp_path / "model.ckpt")
    assert again.thresholds == stored


def test_the_command_writes_thresholds_into_an_adapter(model, normal, tmp_path, capsys) -> None:
    small = model(weights=None, views=["id"], image_size=64).save_adapter(tmp_path / "a.safetensors", epoch=3)
    path = tmp_path / "b.safetensors"
    assert main(["calibrate", str(small), str(normal), "--rate", "0.2", "--output", str(path)]) == 0
    assert "from 12 normal images. False-alarm rate to expect 0.154" in capsys.readouterr().out
    metadata = adapters.read(path)[1]
    assert (metadata["epoch"], metadata["views"], metadata["image_size"]) == (3, ["id"], 64)
    assert model(weights=path, views=["id"], image_size=64).thresholds == metadata["thresholds"]
    assert main(["calibrate", str(small), str(tmp_path / "no"), "--output", str(path)]) == 1
    assert "no" in capsys.readouterr().err


def test_the_command_and_the_card_name_the_backbone_as_the_model_takes_it(normal, tmp_path, capsys) -> None:
    name, weights = "ViT-S-32-alt", tmp_path / "backbone.safetensors"
    torch.manual_seed(0)
    save_file(open_clip.create_model(name).state_dict(), weights)
    small = FBCLIP(backbone=name, pretrained=weights, weights=None, smoothing_sigma=2.0)
    small.save_adapter(tmp_path / "a.safetensors")
    words = ["calibrate", str(tmp_path / "a.safetensors"), str(normal), "--output", str(tmp_path / "b.safetensors")]
    assert main(words) == 0, capsys.readouterr().err
    metadata = adapters.read(tmp_path / "b.safetensors")[1]
    assert (metadata["thresholds"]["pictures"], metadata["smoothing_sigma"]) == (12, 2.0)
    assert f"--model.backbone {name} --model.image_size" in model_card(metadata, "hf://a/b/c")
    tagged = {**metadata, "backbone": "ViT-B-16/laion2b_s34b_b88k", "pretrained": "laion2b_s34b_b88k"}
    assert "--model.backbone ViT-B-16 --model.pretrained laion2b_s34b_b88k" in model_card(tagged, "hf://a/b/c")


@pytest.mark.parametrize("origin", ["fixed", "adapter"])
def test_labelled_data_do_not_replace_what_was_asked_for(origin, model, engine, normal, surfaces, tmp_path) -> None:
    if origin == "fixed":
        fbclip = model(threshold=0.3)
        expected = {"image": pytest.approx(0.3), "pixel": pytest.approx(0.3), "origin": "fixed"}
    else:
        path = model(normal_source=normal).save_adapter(tmp_path / "a.safetensors")
        fbclip = model(weights=path)
        expected = adapters.read(path)[1]["thresholds"]
    for _ in range(2):
        engine().validate(fbclip, datamodule=surfaces())
        assert fbclip.thresholds == expected
    engine().test(fbclip, datamodule=surfaces())
    assert fbclip.thresholds == expected


def test_thresholds_follow_training(model, engine, normal, surfaces) -> None:
    fbclip = model(weights=None, learning_rate=1e-2, normal_source=normal)
    fbclip.calibrate_once()
    before = fbclip.thresholds
    engine(max_epochs=1).fit(fbclip, datamodule=surfaces(train_anomalous=True))
    after = fbclip.thresholds
    assert after["image"] != before["image"]
    with torch.no_grad():
        fbclip.eval()
        images = [fbclip.pre_processor.transform(PredictDataset(normal / f"{i}.png")[0].image[None]) for i in range(12)]
        assert after["image"] == pytest.approx(max(float(fbclip.model(image).pred_score) for image in images), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"false_alarm_rate": 0.0}, "false_alarm_rate=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": 0.5, "normal_source": "good"}, "give one of the two"),
        ({"threshold": 0.5, "post_processor": False}, "post_processor"),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str, model) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"post_processor": False}, "post_processor=NoneType.*post_processor=True"),
        ({"post_processor": PostProcessor()}, "post_processor=PostProcessor"),
        ({"pre_processor": torch.nn.Identity()}, "pre_processor=Identity: it has no transform"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_an_image_is_read(arguments: dict, message: str, model) -> None:
    for few in ({}, {"k_shot": 2}):
        with pytest.raises(TypeError, match=message):
            model(**arguments, **few).calibrate("nowhere")


def test_a_source_without_pictures_is_named(model, normal, tmp_path) -> None:
    with pytest.raises(ValueError, match="no image that can be read"):
        model(normal_source=normal / "notes.png").calibrate_once()
    later = model(normal_source=tmp_path / "later")
    with pytest.raises(FileNotFoundError, match="later"):
        later.calibrate_once()
    # An error is no calibration: with the folder there, it is made up for.
    shutil.copytree(normal, tmp_path / "later")
    later.calibrate_once()
    assert later.thresholds["origin"] == "normal pictures"
