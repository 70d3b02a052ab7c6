# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A line in one file: setup, and what anomalib does with the file alone; for every adapted model."""

import csv
import shutil

import pytest
import torch
from anomalib import LearningType
from anomalib.cli import AnomalibCLI
from models import ADAPTED, CLASSES, every_adapted_model
from torch.testing import assert_close

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.adapted import adapter_file, sharing
from anomalib_fbclip.adapted.line import set_up
from anomalib_fbclip.adapted.load import load_module
from anomalib_fbclip.commands.cli import main
from anomalib_fbclip.common.files import file_digest
from anomalib_fbclip.host.unreadable import read_picture


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
    """A line file of each model with three good images at 56 pixels; what the adapter learned does not matter here."""
    root = tmp_path_factory.mktemp("lines")
    settings = {"image_size": 56, "k_shot": 3, "rate": 0.3, "seconds_per_image": 60}
    made = {name: set_up(folders / "good", weights=str(adapters[name]), **settings) for name in ADAPTED}
    return {name: (line, line.module.save_line(root / f"{name}.safetensors")) for name, line in made.items()}


@every_adapted_model
def test_the_file_alone_gives_the_model_that_was_set_up(name, lines, folders, engine, tmp_path) -> None:
    line, path = lines[name]
    model = CLASSES[name](weights=path)
    assert model.learning_type is LearningType.FEW_SHOT
    assert (model.hparams["backbone"], model.image_size, model.k_shot) == ("tiny", 56, 3)
    assert model.model.memory.num_images == 3
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
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "from 8 good images" in said
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
    def times(_, model, transform):
        return [(transform.transforms[0].size[0] / 224) ** 2 * (1 + 0.1 * model.memory.num_images)]

    monkeypatch.setattr("anomalib_fbclip.adapted.line._Survey.times", times)
    monkeypatch.setattr("anomalib_fbclip.adapted.line._Survey._by_good_images", lambda _, choices: choices[-1])
    monkeypatch.setattr("anomalib_fbclip.adapted.line.SIZES", (1 / 3, 2 / 3))
    weights = str(adapters["FBCLIP"])
    found = {}
    for allowed in (0.15, 0.3, 0.6):
        chosen = set_up(folders / "good", weights=weights, seconds_per_image=allowed).module
        found[allowed] = (chosen.image_size, chosen.k_shot)
    assert found == {0.15: (72, 4), 0.3: (72, 8), 0.6: (152, 2)}
    with pytest.raises(ValueError, match=r"takes 0\.124 s here, more than seconds_per_image=0\.1"):
        set_up(folders / "good", weights=weights, seconds_per_image=0.1)


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
