# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A line in one file: setup, and what anomalib does with the file alone; for every adapted model."""

import csv
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.cli import AnomalibCLI
from miniatures import good_and_bad, good_and_bad_folder
from models import ADAPTED, CLASSES, every_adapted_model
from torch.testing import assert_close

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.adapted import adapter_file, sharing
from anomalib_fbclip.adapted.line import Choice, _Survey, set_up
from anomalib_fbclip.adapted.load import load_module
from anomalib_fbclip.commands.cli import main
from anomalib_fbclip.common.files import file_digest
from anomalib_fbclip.host.unreadable import read_picture
from anomalib_fbclip.host.verdicts import Confusion


@pytest.fixture(scope="module")
def folders(surfaces, tmp_path_factory):
    """Eight good images, and four bad ones."""
    data = surfaces()
    data.setup()
    root = tmp_path_factory.mktemp("line")
    bad = data.test_data.samples.query("label_index == 1").image_path
    for kind, files in (("good", data.train_data.samples.image_path), ("bad", bad)):
        (root / kind).mkdir()
        for index, file in enumerate(files):
            shutil.copy(file, root / kind / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: CLASSES[name](backbone="tiny", weights=None, seed=11).save_adapter(folder / f"{name}.safetensors")
        for name in ADAPTED
    }


@pytest.fixture(scope="module")
def lines(adapters, folders, tmp_path_factory):
    """A line file of each model: three good images, 56 pixels, a least area; what was learned does not matter here."""
    root = tmp_path_factory.mktemp("lines")
    settings = {"image_size": 56, "k_shot": 3, "rate": 0.3, "seconds_per_image": 60, "min_area": 12}
    made = {name: set_up(folders / "good", weights=str(adapters[name]), **settings) for name in ADAPTED}
    return {name: (line, line.module.save_line(root / f"{name}.safetensors")) for name, line in made.items()}


@every_adapted_model
def test_the_file_alone_gives_the_model_that_was_set_up(name, lines, folders, engine, tmp_path) -> None:
    line, path = lines[name]
    model = CLASSES[name](weights=path)
    assert model.learning_type is LearningType.FEW_SHOT
    assert (model.hparams["backbone"], model.image_size, model.k_shot) == ("tiny", 56, 3)
    assert model.model.memory.num_images == 3
    assert model.post_processor.min_area == 12
    assert model.thresholds == line.thresholds
    assert model.thresholds["pictures"] == 8
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = line.module.eval()(images)
        assert_close(model.eval()(images), expected)
        # The memory takes part, and a model of the adapter alone has none.
        plain = CLASSES[name](backbone="tiny", image_size=56, weights=line.module.weights)
        assert not torch.allclose(plain.eval()(images).anomaly_map, expected.anomaly_map)

    runner = engine()
    runner.predict(model, data_path=folders / "bad")
    (table,) = tmp_path.rglob("predictions.csv")
    assert len(list(csv.DictReader(table.open()))) == 4
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = CLASSES[name].load_from_checkpoint(tmp_path / "model.ckpt")
    assert (again.model.memory_names, again.thresholds) == (model.model.memory_names, model.thresholds)
    exported = torch.load(engine().export(model, "torch", export_root=tmp_path), weights_only=False)["model"]
    with torch.no_grad():
        assert_close(exported.eval()(images).anomaly_map, model.eval()(images).anomaly_map)


@every_adapted_model
def test_the_command_line_of_anomalib_takes_the_file_alone(name, lines, folders, tmp_path) -> None:
    words = ["--model", name, "--model.weights", str(lines[name][1]), "--default_root_dir", str(tmp_path)]
    cli = AnomalibCLI(["predict", *words, "--data", str(folders / "bad"), "--trainer.accelerator", "cpu"])
    assert cli.engine.model.model.memory.num_images == 3


@every_adapted_model
def test_each_good_image_is_scored_by_the_memory_without_it(name, lines, folders) -> None:
    line, path = lines[name]
    model = CLASSES[name](weights=path).eval()
    files = sorted((folders / "good").iterdir())
    read = {file_digest(file): model.pre_processor.transform(read_picture(file)) for file in files}
    images = torch.stack([read[name] for name in model.model.memory_names])
    scores = dict(zip([file_digest(file) for file in files], model.score_normal(folders / "good").scores, strict=True))
    with torch.no_grad():
        for place, own in enumerate(model.model.memory_names):
            rest = CLASSES[name](weights=path).eval()
            rest.model.remember(images[[other for other in range(3) if other != place]])
            assert_close(scores[own], rest.model(images[place][None]).pred_score[0], atol=1e-3, rtol=0)
            assert scores[own] > model.model(images[place][None]).pred_score[0]
    # The same folder for memory and thresholds costs no images, also without a line file.
    few = CLASSES[name](
        backbone="tiny",
        image_size=56,
        weights=line.module.weights,
        k_shot=3,
        few_shot_source=folders / "good",
    )
    assert few.calibrate(folders / "good")["pictures"] == 8


@every_adapted_model
def test_what_is_given_wins_over_the_file(name, lines, folders, caplog) -> None:
    path = lines[name][1]
    for given in ({"k_shot": 2, "few_shot_source": folders / "good"}, {"image_size": 64}):
        model = CLASSES[name](weights=path, **given)
        assert (model.k_shot, model.image_size) == (given.get("k_shot", 3), given.get("image_size", 56))
        assert model.model.memory.num_images == 0
        assert model.thresholds["origin"] == "fixed"
        assert "are not used with" in caplog.text
    with pytest.raises(ValueError, match="few_shot=True"):
        CLASSES[name](backbone="tiny", image_size=56).model.load_adapter(path)
    for other in set(ADAPTED) - {name}:
        with pytest.raises(ValueError, match=f"made for the model {name}, this is {other}"):
            CLASSES[other](weights=path)
    # An adapter that is saved from it is not private.
    plain = CLASSES[name](weights=path).save_adapter(folders / f"{name}.safetensors")
    tensors, metadata = adapter_file.read(plain)
    assert not [tensor for tensor in tensors if tensor.startswith("memory")]
    assert "private" not in metadata


def test_the_setup_command_and_what_it_prints(folders, tmp_path, capsys) -> None:
    path = tmp_path / "line.safetensors"
    words = ["setup", str(folders / "good"), "--bad", str(folders / "bad"), "--output", str(path)]
    words += ["--backbone", "tiny", "--image-size", "56", "--rate", "0.2", "--seconds-per-image", "60"]
    words += ["--memory-radius", "0"]
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "from 8 good images" in said
    assert "near their place (memory_radius=0)" in said
    assert "False alarms to expect: 11.1 %, 95 % interval" in said
    assert "of 4 by score" in said
    assert "s per image" in said or "Time per image" in said
    metadata = adapter_file.read(path)[1]
    assert (metadata["private"], metadata["format"], metadata["image_size"]) == (True, "anomalib-fbclip-line", 56)
    stricter = tmp_path / "stricter.safetensors"
    assert main(["calibrate", str(path), str(folders / "good"), "--rate", "0.4", "--output", str(stricter)]) == 0
    again = load_module(str(stricter))
    assert again.model.memory.num_images == metadata["k_shot"]
    assert again.thresholds["image"] < metadata["thresholds"]["image"]


def test_size_and_memory_follow_the_time_that_is_allowed(folders, adapters, monkeypatch) -> None:
    def times(_, module, transform):
        return [(transform.transforms[0].size[0] / 224) ** 2 * (1 + 0.1 * module.model.memory.num_images)]

    def score(_, choices):
        for choice in choices:
            choice.auroc = choice.k_shot / 100

    monkeypatch.setattr("anomalib_fbclip.adapted.line._Survey.times", times)
    monkeypatch.setattr("anomalib_fbclip.adapted.line._Survey._score", score)
    monkeypatch.setattr("anomalib_fbclip.adapted.line.SIZES", (1 / 3, 2 / 3))
    weights = str(adapters["FBCLIP"])
    found = {}
    for allowed in (0.15, 0.3, 0.6):
        chosen = set_up(folders / "good", weights=weights, seconds_per_image=allowed).module
        found[allowed] = (chosen.image_size, chosen.k_shot)
    assert found == {0.15: (72, 4), 0.3: (72, 8), 0.6: (152, 2)}
    with pytest.raises(ValueError, match=r"takes 0\.124 s here, more than seconds_per_image=0\.1"):
        set_up(folders / "good", weights=weights, seconds_per_image=0.1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four good and four bad images of 90 x 150 pixels."""
    return good_and_bad(tmp_path_factory.mktemp("large"), 90, 150, slice(40, 48), across=8, step=15)


def test_tiles_are_tried_where_images_are_large_and_time_allows(large, adapters, monkeypatch) -> None:
    def times(_, module, __):
        return [0.1 if module.tiling is None else 0.9]

    def score(_, choices):
        for choice in choices:
            choice.auroc = 0.9 if choice.tiles else 0.7

    settings = {"weights": str(adapters["FBCLIP"]), "image_size": 40, "k_shot": 2, "rate": 0.3}
    monkeypatch.setattr("anomalib_fbclip.adapted.line._Survey.times", times)
    monkeypatch.setattr("anomalib_fbclip.adapted.line._Survey._score", score)
    found = {}
    for name, given in {
        "chosen": {},
        "too slow": {"seconds_per_image": 0.5},
        "none": {"tiles": 0},
        "given": {"tiles": 60},
        "small": {"image_size": 80},
    }.items():
        line = set_up(large / "good", **{**settings, "seconds_per_image": 1, **given})
        found[name] = ([choice.tiles for choice in line.tried], line.module.hparams["tiles"])
    assert found == {
        "chosen": ([None, 45], 45),
        "too slow": ([None, 45], None),
        "none": ([None], None),
        "given": ([60], 60),
        "small": ([None], None),
    }
    with pytest.raises(ValueError, match=r"40 pixels in tiles of 60 takes 0\.9 s here"):
        set_up(large / "good", **settings, seconds_per_image=0.5, tiles=60)


def test_with_a_radius_memories_that_hold_all_tiles_are_tried(large, adapters, monkeypatch) -> None:
    monkeypatch.setattr("anomalib_fbclip.adapted.line._Survey.times", lambda *_: [0.1])
    monkeypatch.setattr("anomalib_fbclip.adapted.line.PLACED_TILES", 27)  # seven of each image
    settings = {"weights": str(adapters["FBCLIP"]), "image_size": 40, "tiles": 60, "rate": 0.3}
    for radius, tried in ((1, [2]), (None, [2, 4])):
        line = set_up(large / "good", large / "bad", **settings, memory_radius=radius)
        assert [choice.k_shot for choice in line.tried] == tried


def test_good_images_of_several_sizes_choose_no_radius(folders, adapters, tmp_path) -> None:
    image = cv2.imread(str(folders / "good" / "0.png"))
    for index in range(5):
        noise = np.random.default_rng(index).normal(0, 4, image.shape)
        cv2.imwrite(str(tmp_path / f"{index}.png"), (image + noise).clip(0, 255).astype(np.uint8))
    settings = {"weights": str(adapters["FBCLIP"]), "image_size": 56, "k_shot": 4, "rate": 0.3}
    assert set_up(tmp_path, **settings).module.model.memory_radius == 1
    cv2.imwrite(str(tmp_path / "5.png"), cv2.resize(image, (70, 90)))
    assert set_up(tmp_path, **settings).module.model.memory_radius is None


@pytest.mark.parametrize("bad", [True, False])
def test_a_survey_tries_sizes_of_tiles_and_memory(bad, large, adapters, caplog) -> None:
    settings = {"weights": str(adapters["FBCLIP"]), "image_size": 40, "rate": 0.3, "seconds_per_image": 60}
    caplog.set_level("INFO")
    line = set_up(large / "good", large / "bad" if bad else None, **settings)
    assert {(choice.tiles, choice.k_shot) for choice in line.tried} == {(t, k) for t in (None, 45) for k in (2, 4)}
    assert ("drawn defects in 4 good ones" in caplog.text) != bad


def test_a_survey_scores_as_the_model_will(large, adapters) -> None:
    settings = {"weights": str(adapters["FBCLIP"])}
    good = [*(large / "good").iterdir()]
    survey = _Survey(load_module(settings["weights"], image_size=40, k_shot=1).eval(), good, [], 60)
    for choice in (Choice(40, 2, 0.0), Choice(40, 3, 0.0, tiles=45)):
        module = load_module(settings["weights"], image_size=40, k_shot=choice.k_shot, tiles=choice.tiles).eval()
        members, transform = good[: choice.k_shot], module.pre_processor.transform
        module.remember([survey.read(file, transform) for file in members], members)
        with torch.no_grad():
            own = survey._set(40, choice.tiles)
            memory = survey._memory(choice.k_shot, own)
            for file in good:
                image = survey.read(file, transform)
                assert_close(survey.read(file, own), image)
                expected = module.score_unseen(image[None], file).pred_score
                assert_close(survey._scores(image, file, [memory]), expected)
            # A drawn defect changes the image, the same way each time.
            drawn = [survey.read(good[0], own, 3) for _ in range(2)]
            assert torch.equal(*drawn)
            assert not torch.equal(drawn[0], survey.read(good[0], own))


@pytest.mark.parametrize("crop", [False, True])
def test_drawn_defects_lie_inside_of_the_region(crop, large, adapters, tmp_path) -> None:
    mask = np.zeros((90, 150), np.uint8)
    mask[20:70, 30:110] = 255
    cv2.imwrite(str(tmp_path / "region.png"), mask)
    region = {"region": tmp_path / "region.png", "crop_to_region": crop}
    module = load_module(str(adapters["FBCLIP"]), image_size=40, k_shot=1, **region)
    good = sorted((large / "good").iterdir())
    survey = _Survey(module.eval(), good, [], 60)
    changed = 0
    for seed, file in enumerate(good):
        before, after = (survey.read(file, torch.nn.Identity(), each) for each in (None, seed))
        assert before.shape == ((3, 50, 80) if crop else (3, 90, 150))
        changed += not torch.equal(before, after)
    assert changed == len(good)


def test_every_way_to_use_a_line_file_gives_the_verdicts_of_the_setup(
    large,
    adapters,
    engine,
    tmp_path,
    capsys,
) -> None:
    settings = {"image_size": 40, "k_shot": 2, "tiles": 60, "rate": 0.3, "seconds_per_image": 60, "min_area": 40}
    settings["memory_radius"] = 1
    line = set_up(large / "good", large / "bad", weights=str(adapters["FBCLIP"]), **settings)
    path, found = line.module.save_line(tmp_path / "line.safetensors"), line.thresholds
    expected = {
        Path(file).name: int(label)
        for file, label in zip(line.bad.files, line.bad.counted_scores(found["pixel"]) > found["image"], strict=True)
    }

    def rows(table):
        return {Path(row["path"]).name: int(row["label"]) for row in csv.DictReader(table.open())}

    model = FBCLIP(weights=path)
    assert (model.post_processor.min_area, model.tiling.side, model.thresholds) == (40, 60, found)
    assert model.model.memory.radius == 1
    assert model.resize == "squash"
    runner = engine()
    runner.predict(model, data_path=large / "bad")
    (table,) = tmp_path.rglob("predictions.csv")
    assert rows(table) == expected
    words = [str(large / "bad"), "--weights", str(path), "--output", str(tmp_path / "watched.csv"), "--once"]
    assert main(["watch", *words]) == 0, capsys.readouterr().err
    assert rows(tmp_path / "watched.csv") == expected
    confusion = next(callback for callback in model.configure_callbacks() if isinstance(callback, Confusion))
    engine(callbacks=[confusion]).test(model, datamodule=good_and_bad_folder(large, batch=1))
    assert confusion.counts["hits"] == sum(expected.values())
    exported = torch.load(engine().export(FBCLIP(weights=path), "torch", export_root=tmp_path), weights_only=False)
    with torch.no_grad():
        labels = {
            name: int(exported["model"].eval()(read_picture(large / "bad" / name)[None]).pred_label)
            for name in expected
        }
    assert labels == expected


def test_a_least_area_changes_what_setup_promises_and_thresholds_hold_for_larger_ones(lines, folders, caplog) -> None:
    line, path = lines["FBCLIP"]
    plain = set_up(folders / "good", weights=line.module.weights, image_size=56, k_shot=3, rate=0.3, min_area=0)
    assert plain.thresholds["pixel"] > line.thresholds["pixel"]
    larger = FBCLIP(weights=path, min_area=30)
    assert (larger.thresholds, larger.post_processor.min_area) == (line.thresholds, 30)
    smaller = FBCLIP(weights=path, min_area=5)
    assert smaller.thresholds["origin"] == "fixed"
    assert "min_area=12 and not used with min_area=5" in caplog.text


def test_setup_says_what_is_missing(folders, tmp_path, capsys) -> None:
    good = folders / "good"
    for arguments, said in (
        ({"model": "FiSeCLIP"}, "model FiSeCLIP has no adapter and no memory"),
        ({"backbone": "ViT-S-32-alt", "pretrained": small_file(tmp_path)}, "has no adapter for backbone"),
        ({"backbone": "tiny", "rate": 1.5}, "false_alarm_rate=1.5"),
        ({"backbone": "tiny", "seconds_per_image": 0}, "seconds_per_image=0"),
        ({"backbone": "tiny", "k_shot": 9}, "k_shot=9"),
        ({"backbone": "tiny", "bad": good}, "give separate folders"),
    ):
        with pytest.raises(ValueError, match=said):
            set_up(good, **arguments)
    assert main(["setup", str(tmp_path / "no"), "--backbone", "tiny", "--output", str(tmp_path / "a.safetensors")]) == 1
    assert "does not exist" in capsys.readouterr().err


def small_file(folder):
    import open_clip
    from safetensors.torch import save_file

    save_file(open_clip.create_model("ViT-S-32-alt").state_dict(), folder / "backbone.safetensors")
    return str(folder / "backbone.safetensors")


def test_a_line_file_is_shared_only_when_told(lines, monkeypatch, capsys) -> None:
    path = lines["FBCLIP"][1]
    uploaded = []
    monkeypatch.setattr(sharing.hub, "upload", lambda *words, **_: uploaded.append(words))
    assert main(["share", str(path), "owner/name"]) == 1
    assert "it holds features of 3 of the line's images" in capsys.readouterr().err
    assert not uploaded
    assert main(["share", str(path), "owner/name", "--include-private"]) == 0
    assert uploaded
    assert FBCLIP(weights=path).model.memory.num_images == 3
