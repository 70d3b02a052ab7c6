# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FBCLIP through anomalib's engine: train, test, predict, checkpoints, adapters, exports."""

import logging
from pathlib import Path

import pytest
import torch
from anomalib import LearningType
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from safetensors import safe_open

from anomalib_fbclip import FBCLIP, AuxiliaryTransfer

TRAIN = {"weights": None, "learning_rate": 1e-3}


def _files(root: Path, pattern: str) -> list[Path]:
    return sorted(root.rglob(pattern))


@pytest.fixture(scope="module")
def trained(model, surfaces, tmp_path_factory) -> tuple[FBCLIP, Path, list[dict[str, float]]]:
    """A model trained for one epoch, its results folder and its test metrics."""
    root = tmp_path_factory.mktemp("trained")
    fbclip = model(**TRAIN, max_epochs=1, metrics="full")
    results = Engine(default_root_dir=root, accelerator="cpu").train(fbclip, datamodule=surfaces(train_anomalous=True))
    return fbclip, root, results


def test_training_ends_with_metrics_pictures_checkpoint_and_adapter(trained, surfaces, engine) -> None:
    fbclip, root, results = trained
    assert fbclip.learning_type is LearningType.ONE_CLASS
    expected = {f"{level}_{name}" for level in ("image", "pixel") for name in ("AUROC", "AUPR", "F1Max")}
    assert results[0].keys() == expected | {"pixel_AUPRO"}
    assert all(0 <= value <= 1 for value in results[0].values())
    assert len(_files(root, "images/**/*.png")) == 8
    (checkpoint,) = _files(root, "*.ckpt")
    (adapter,) = _files(root, "adapter.safetensors")

    content = torch.load(checkpoint, weights_only=True)
    assert content["epoch"] == 0, "one epoch, counted from 0; another test may have given the model another trainer"
    stored = content["state_dict"]
    assert not [name for name in stored if ".clip." in name or name.startswith("evaluator")]

    # The adapter alone gives the same test metrics, without any training.
    zero_shot = FBCLIP(backbone="tiny", image_size=56, weights=adapter, metrics="full")
    assert zero_shot.learning_type is LearningType.ZERO_SHOT
    again = engine().test(zero_shot, datamodule=surfaces())
    for name in ("image_AUROC", "image_AUPR", "pixel_AUROC", "pixel_AUPR", "pixel_AUPRO"):
        assert again[0][name] == pytest.approx(results[0][name], abs=1e-4)
    with safe_open(adapter, framework="pt") as file:
        assert "ProceduralSurfaces" in file.metadata()["source"]

    # So does the checkpoint, by each way anomalib has.
    for way in ("load_from_checkpoint", "ckpt_path"):
        if way == "ckpt_path":
            other = FBCLIP(backbone="tiny", image_size=56, weights=None, metrics="full", seed=5)
            again = engine().test(other, datamodule=surfaces(), ckpt_path=checkpoint)
        else:
            other = FBCLIP.load_from_checkpoint(checkpoint)
            again = engine().test(other, datamodule=surfaces())
        assert again[0]["pixel_AUROC"] == pytest.approx(results[0]["pixel_AUROC"], abs=1e-4), way

    # And an export from the checkpoint carries its tensors.
    other = FBCLIP(backbone="tiny", image_size=56, weights=None, seed=5)
    path = engine().export(other, ExportType.TORCH, export_root=root / "exported", ckpt_path=checkpoint)
    exported = torch.load(path, weights_only=False)["model"].model.trained_state_dict()
    for name, tensor in fbclip.model.trained_state_dict().items():
        assert torch.equal(exported[name], tensor), name


def test_a_model_that_learned_nothing_says_so(trained, model, surfaces, engine, caplog) -> None:
    fbclip, root, _ = trained
    (checkpoint,) = _files(root, "*.ckpt")
    picture = _files(root, "images/**/*.png")[0]
    engine().test(fbclip, datamodule=surfaces())
    engine().predict(FBCLIP.load_from_checkpoint(checkpoint), data_path=picture)
    engine().predict(model(weights=None), data_path=picture, ckpt_path=checkpoint)
    engine().predict(model(), data_path=picture)
    assert "scores and maps mean nothing" not in caplog.text
    engine().predict(model(weights=None), data_path=picture)
    engine().test(model(weights=None), datamodule=surfaces())
    assert caplog.text.count("scores and maps mean nothing") == 2


def test_an_adapter_is_looked_at_before_the_backbone(adapter, tmp_path) -> None:
    """Which may be a download of a gigabyte, and does not exist here."""
    nowhere = {"backbone": "ViT-L-14-336", "pretrained": "/nowhere/clip.pt"}
    with pytest.raises(ValueError, match=r"adapter tiny, model ViT-L-14-336\. Give backbone='tiny'"):
        FBCLIP(**nowhere, weights=adapter)
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors' does not exist"):
        FBCLIP(**nowhere, weights=tmp_path / "a.safetensors")
    (tmp_path / "notes.safetensors").write_text("no adapter")
    with pytest.raises(ValueError, match="it is no adapter"):
        FBCLIP(**nowhere, weights=tmp_path / "notes.safetensors")
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        FBCLIP(backbone="tinny")


def test_training_resumes(trained, model, surfaces, engine) -> None:
    fbclip, root, _ = trained
    before = {name: tensor.clone() for name, tensor in fbclip.model.trained_state_dict().items()}
    (checkpoint,) = _files(root, "*.ckpt")
    resumed = model(**TRAIN, seed=3)
    runner = engine(max_epochs=2)
    runner.fit(resumed, datamodule=surfaces(train_anomalous=True), ckpt_path=checkpoint)
    assert runner.trainer.current_epoch == 2
    after = resumed.model.trained_state_dict()
    moved = {name: float((before[name] - after[name]).abs().max()) for name in before}
    # Another seed started elsewhere; one epoch at this rate cannot bring it this near.
    assert 0 < max(moved.values()) < 0.05


def test_checkpoint_of_another_backbone_or_size(trained, engine, surfaces, caplog) -> None:
    _, root, _ = trained
    (checkpoint,) = _files(root, "*.ckpt")
    other = FBCLIP(backbone="ViT-S-32-alt", pretrained=None, image_size=64, weights=None)
    with pytest.raises(ValueError, match=r"'tiny'.*ViT-S-32-alt"):
        engine().test(other, datamodule=surfaces(), ckpt_path=checkpoint)
    larger = FBCLIP(backbone="tiny", image_size=64, weights=None)
    with caplog.at_level(logging.WARNING):
        engine().test(larger, datamodule=surfaces(), ckpt_path=checkpoint)
    assert "image_size=56" in caplog.text
    assert larger.pre_processor.transform.transforms[0].size == [64, 64]


def test_zero_shot_needs_no_training_and_test_may_come_before_train(model, surfaces, engine, tmp_path) -> None:
    zero_shot = model()
    assert zero_shot.learning_type is LearningType.ZERO_SHOT
    first = engine().test(zero_shot, datamodule=surfaces())
    assert first[0].keys() == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
    engine().train(model(), datamodule=surfaces())
    latest = next((tmp_path / "results").rglob("latest"))
    assert latest.is_symlink()


def test_normal_images_alone_train_with_synthetic_anomalies_and_say_so(model, surfaces, engine, caplog) -> None:
    fbclip = model(**TRAIN)
    with caplog.at_level(logging.WARNING):
        engine(max_epochs=1).fit(fbclip, datamodule=surfaces())
    assert caplog.text.count("anomalies are synthesised") == 1
    assert "auxiliary" in caplog.text
    assert {
        "train_focal_image",
        "train_focal_pixel",
        "train_dice",
        "train_scr",
    } <= fbclip.trainer.callback_metrics.keys()


def test_labels_without_masks_drop_the_pixel_losses_and_say_so(model, surfaces, engine, caplog) -> None:
    data = surfaces(train_anomalous=True)
    data.setup()
    samples = data.train_data.samples.assign(mask_path="")
    samples.attrs["task"] = "classification"
    data.train_data.samples = samples
    data._is_setup = True
    fbclip = model(**TRAIN)
    with caplog.at_level(logging.WARNING):
        engine(max_epochs=1).fit(fbclip, datamodule=data)
    assert caplog.text.count("without pixel losses") == 1
    assert "train_focal_image" in fbclip.trainer.callback_metrics
    assert "train_dice" not in fbclip.trainer.callback_metrics


def test_anomalous_images_alone_are_refused(model, surfaces, engine) -> None:
    data = surfaces(train_anomalous=True)
    data.setup()
    samples = data.train_data.samples
    data.train_data.samples = samples[samples.label_index == 1].reset_index(drop=True)
    data._is_setup = True
    with pytest.raises(ValueError, match="add normal ones"):
        engine(max_epochs=1).fit(model(**TRAIN), datamodule=data)


def test_epochs_follow_the_trainer_then_the_argument_then_the_paper(model, surfaces, engine) -> None:
    for trainer, argument, expected in (({"max_epochs": 3}, 1, 3), ({}, 1, 1), ({}, None, 2)):
        runner = engine(**trainer, limit_train_batches=1, limit_val_batches=0)
        fbclip = model(**TRAIN, max_epochs=argument, attention=False)
        runner.fit(fbclip, datamodule=surfaces(train_anomalous=True, train_batch_size=2))
        assert runner.trainer.current_epoch == expected


def test_equal_seeds_give_equal_runs(model, surfaces, engine) -> None:
    weights = []
    for seed, noise in ((1, 7), (1, 8), (2, 7)):
        torch.manual_seed(noise)
        fbclip = model(**TRAIN, seed=seed, views=["id"])
        runner = engine(max_epochs=1, limit_val_batches=0)
        runner.fit(fbclip, datamodule=surfaces(train_anomalous=True, train_batch_size=4))
        weights.append(torch.cat([p.flatten() for p in fbclip.model.trained_state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_auxiliary_transfer_trains_on_the_source_and_tests_on_the_target(model, surfaces, engine) -> None:
    data = AuxiliaryTransfer(surfaces(category="tiles"), surfaces(), train_batch_size=4)
    fbclip = model(**TRAIN, max_epochs=1)
    engine().train(fbclip, datamodule=data)
    assert set(data.train_data.samples.label_index) == {0, 1}
    assert fbclip.source == "ProceduralSurfaces-tiles"
    with pytest.raises(ValueError, match="share 8 images"):
        AuxiliaryTransfer(surfaces(), surfaces()).setup()
