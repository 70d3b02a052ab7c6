# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A student through anomalib's engine and command line: teacher, training, checkpoint, export, unfamiliar images."""

import csv
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.models import get_model, list_models
from PIL import Image
from torch.testing import assert_close

from anomalib_fbclip import FBCLIP, PictureFolder, Student
from anomalib_fbclip.data.procedural.generator import generate
from anomalib_fbclip.student.lightning_model import UNFAMILIAR
from anomalib_fbclip.student.targets import TeacherTargets, load_target

TEACHER = {"backbone": "tiny", "image_size": 56, "k_shot": 2}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    cache = tmp_path_factory.mktemp("targets")

    def make(**arguments):
        small = {"image_size": 64, "pasted": 1, "max_epochs": 2, "held_out": 0.25, "target_cache": str(cache)}
        return Student(**{"teacher": "FBCLIP", "teacher_arguments": TEACHER, **small, **arguments})

    return make


@pytest.fixture
def trained(build, surfaces, engine):
    model = build(metrics="full")
    results = engine().train(model, datamodule=surfaces())
    return model, results[0]


def maps_of(model, size=64):
    with torch.no_grad():
        return model.eval()(torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))).anomaly_map


def test_training_needs_no_labels_and_says_how_student_and_teacher_agree(trained, engine, surfaces, tmp_path) -> None:
    model, results = trained
    assert model.learning_type is LearningType.ONE_CLASS
    assert {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"} <= results.keys()
    assert set(model.agreement) == {"score_rank", "pixel_rank", "score_auroc"}
    assert len(model._held) == 2
    (path,) = (tmp_path / "results").rglob("v0/**/model.ckpt")
    loaded = Student.load_from_checkpoint(path)
    assert loaded.agreement == model.agreement
    assert_close(maps_of(loaded), maps_of(model))
    (again,) = engine().test(Student(image_size=64, metrics="full"), datamodule=surfaces(), ckpt_path=path)
    assert again == pytest.approx(results, abs=1e-4)


def test_what_the_teacher_said_is_computed_once_and_goes_on_after_an_interruption(
    build,
    surfaces,
    engine,
    tmp_path,
    monkeypatch,
) -> None:
    asked = []
    score = TeacherTargets._ask

    def ask(self, images, file):
        asked.append(file)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(self, images, file)

    monkeypatch.setattr(TeacherTargets, "_ask", ask)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        engine().fit(build(target_cache=str(tmp_path), max_epochs=1), datamodule=surfaces())
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    engine().fit(build(target_cache=str(tmp_path), max_epochs=1), datamodule=surfaces())
    assert len(asked) == 3 + 6
    engine().fit(build(target_cache=str(tmp_path), max_epochs=1), datamodule=surfaces())
    assert len(asked) == 3 + 6
    (file, *_) = sorted(tmp_path.rglob("*.safetensors"))
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="remove it"):
        load_target(file)


def test_targets_are_the_teachers_maps_and_its_memory_does_not_know_the_image_itself(surfaces, tmp_path) -> None:
    data = surfaces()
    data.setup()
    files = [*map(str, data.train_data.samples.image_path)]
    folder = tmp_path / "good"
    folder.mkdir()
    for file in files[:2]:
        shutil.copy(file, folder)
    teacher = FBCLIP(**TEACHER, few_shot_source=folder).eval()
    teacher.fill_memory()
    targets = TeacherTargets(teacher, tmp_path / "cache", image_size=(64, 96), pasted=0, seed=0)
    place = targets.compute([next(folder.iterdir())])
    ((found,),) = place.values()
    target = load_target(found)
    assert target.image.shape == (3, 64, 96)
    assert target.map_logit.shape == (8, 12)
    image = PictureFolder(folder)[0].image[None]
    image = teacher.pre_processor.transform(image)
    with torch.no_grad():
        knows, asks = teacher.score_images(image), teacher.score_unseen(image, next(folder.iterdir()))
    assert_close(target.score_logit, asks.pred_score.logit()[0], rtol=0, atol=1e-4)
    assert abs(float(target.score_logit - knows.pred_score.logit()[0])) > 1e-3

    other = TeacherTargets(teacher, tmp_path / "cache", image_size=(80, 96), pasted=0, seed=0)
    assert other.folder != targets.folder
    teacher.model.memory.tokens.mul_(1.1)
    assert TeacherTargets(teacher, tmp_path / "cache", (64, 96), 0, 0).folder != targets.folder


def test_targets_of_teachers_that_score_otherwise_lie_apart(tmp_path) -> None:
    others = ({}, {"tiles": 100}, {"tiles": 100, "overlap": 0.5}, {"resize": "keep"}, {"smoothing_sigma": 2.0})
    teachers = [FBCLIP(backbone="tiny", image_size=56, **other) for other in others]
    assert len({TeacherTargets(teacher, tmp_path, (64, 64), 0, 0).folder for teacher in teachers}) == len(others)


@pytest.mark.parametrize("crop", [False, True])
def test_a_teacher_with_a_region_is_asked_about_what_is_inside(crop, tmp_path) -> None:
    (tmp_path / "good").mkdir()
    Image.fromarray(generate("fabric", "good", 96, (0, 0), 0.5).image).save(tmp_path / "good" / "0.png")
    mask = np.zeros((96, 96), dtype=np.uint8)
    mask[:, :48] = 255
    Image.fromarray(mask).save(tmp_path / "region.png")
    arguments = {"backbone": "tiny", "image_size": 56, "visualizer": False}
    whole = FBCLIP(**arguments).eval()
    inside = FBCLIP(**arguments, region=tmp_path / "region.png", crop_to_region=crop).eval()
    (file,) = (tmp_path / "good").iterdir()
    found = [
        [load_target(path) for path in next(iter(targets.compute([file]).values()))]
        for teacher in (whole, inside)
        for targets in (TeacherTargets(teacher, tmp_path / "cache", image_size=(64, 64), pasted=1, seed=0),)
    ]
    for of_whole, of_inside in zip(*found, strict=True):
        assert torch.equal(of_whole.image, of_inside.image)
        assert not torch.allclose(of_whole.score_logit, of_inside.score_logit)
        right = of_inside.map_logit[:, 5:]
        assert_close(right, right.amin().expand_as(right))
        assert of_inside.map_logit[:, :3].std() > 0
    assert not torch.allclose(found[1][0].map_logit, found[1][1].map_logit), "the crop has the pasted defect"
    with torch.no_grad():
        raw = PictureFolder(tmp_path / "good")[0].image[None]
        assert_close(inside(raw).pred_score[0].logit(), found[1][0].score_logit, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "changed",
    [
        {"flip": False},
        {"pasted": 2},
        {"held_out": 0.5},
        {"seed": 1},
        {"learning_rate": 1e-2},
        {"weight_decay": 10.0},
        {"rank_weight": 0.0},
        {"top_weight": 5.0},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_each_argument_of_training_changes_what_is_learned(changed, build, surfaces, engine, trained) -> None:
    model = build(**changed)
    engine().fit(model, datamodule=surfaces())
    assert not torch.allclose(maps_of(model), maps_of(trained[0]), atol=1e-6)


def test_training_repeats_and_stops_where_held_out_images_are_no_longer_met_better(
    build,
    surfaces,
    engine,
    trained,
) -> None:
    again = build()
    engine().fit(again, datamodule=surfaces())
    assert_close(maps_of(again), maps_of(trained[0]))
    stuck = build(learning_rate=1e-12, weight_decay=0.0, patience=1, max_epochs=50)
    engine().fit(stuck, datamodule=surfaces())
    assert stuck.trainer.current_epoch < 50


def test_a_batch_of_held_out_images_alone_trains_on_another(build, surfaces, engine, recwarn) -> None:
    model = build(max_epochs=1)
    engine().fit(model, datamodule=surfaces(train_batch_size=1))
    assert len(model._held) == 2
    assert not set(model._held) & set(model._learned)
    assert not [warning for warning in recwarn if "returned `None`" in str(warning.message)]


def test_exports_agree_and_know_no_teacher(trained, engine, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained[0].eval()
    # After one epoch noise may score 1e-9, where a runtime's sigmoid has no digits left.
    model.model.score_scale.fill_(0.1)
    model.model.score_offset.fill_(0.0)
    model.post_processor.set_thresholds(0.5, 0.5)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    path = engine().export(model, "onnx", export_root=tmp_path, input_size=(64, 64))
    assert path.stat().st_size < 5e6
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["model"]) == "Student"
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    with torch.no_grad():
        expected = model(images)
    assert_close(torch.tensor(found["anomaly_map"]).reshape(2, 64, 64), expected.anomaly_map, rtol=0, atol=1e-4)
    assert_close(torch.tensor(found["pred_score"]).flatten(), expected.pred_score.flatten(), rtol=0, atol=1e-4)


def test_images_unlike_those_of_the_training_are_marked_and_counted(build, engine, tmp_path, caplog) -> None:
    good, strange = tmp_path / "good", tmp_path / "strange"
    good.mkdir()
    strange.mkdir()
    for number in range(40):
        grain = torch.randint(90, 110, (56, 56, 3), generator=torch.Generator().manual_seed(number)).byte()
        Image.fromarray(grain.numpy()).save(good / f"{number}.png")
    for number in range(4):
        Image.linear_gradient("L").resize((56, 56)).rotate(90 * number).save(strange / f"{number}.png")
    engine().fit(build(max_epochs=1, pasted=0), datamodule=Folder("grain", root=tmp_path, normal_dir="good", seed=0))
    (path,) = tmp_path.rglob("model.ckpt")
    model = Student(image_size=64)
    with caplog.at_level(logging.WARNING, "anomalib_fbclip"):
        engine().predict(model, dataset=PictureFolder(strange), ckpt_path=path)
    assert "was not trained" not in caplog.text
    assert f"4 of 4 images are {UNFAMILIAR}" in caplog.text
    (table,) = tmp_path.rglob("predictions.csv")
    with table.open() as file:
        assert all(UNFAMILIAR in row["note"] for row in csv.DictReader(file))
    engine().predict(model, dataset=PictureFolder(good))
    assert sum(model._unfamiliar.values()) <= 4  # of 40, eight of which were not trained on
    with caplog.at_level(logging.WARNING, "anomalib_fbclip"):
        engine().predict(Student(image_size=64), dataset=PictureFolder(strange))
    assert "was not trained" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"teacher": None}, "give teacher"),
        ({"teacher": "FiSeCLIP"}, "model FiSeCLIP has no adapter"),
        ({"teacher_arguments": {"backbone": "tiny", "weights": None}}, "was not trained"),
        ({"teacher_arguments": {"backbone": "tiny", "kshot": 2}}, r"teacher_arguments=.*'kshot'"),
        ({"held_out": 0.1}, "give more images"),
    ],
)
def test_what_no_student_learns_from_is_refused(arguments, words, build, surfaces, engine) -> None:
    with pytest.raises(ValueError, match=words):
        engine().fit(build(**arguments), datamodule=surfaces())


def test_command_line_and_get_model_know_it(tmp_path) -> None:
    words = ["train", "--model", "Student", "--model.teacher", "FBCLIP", "--model.teacher_arguments.backbone", "tiny"]
    words += ["--data", "ProceduralSurfaces", "--data.category", "wood", "--default_root_dir", str(tmp_path)]
    model = AnomalibCLI(words, run=False).model
    assert isinstance(model, Student)
    assert model.teacher_arguments == {"backbone": "tiny"}
    assert "Student" in list_models(case="pascal")
    assert get_model("Student", teacher="FBCLIP", teacher_arguments={"backbone": "tiny"}).teacher == "FBCLIP"
