# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What anomalib's engine and command line do with every model of the package, and with one from outside."""

import copy
import csv
import json
import logging
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch
from anomalib.models import get_model, list_models
from models import ADAPTED, CLASSES, every_adapted_model, every_model
from PIL import Image
from torch.testing import assert_close

import anomalib_fbclip
from anomalib_fbclip import StageMaps
from anomalib_fbclip.adapted import adapter_file, hub
from anomalib_fbclip.commands import calibrate
from anomalib_fbclip.host.verdicts import Confusion
from anomalib_fbclip.pipelines.table.measure import Measure
from anomalib_fbclip.pipelines.table.pipeline import write
from anomalib_fbclip.pipelines.table.plan import make_plan
from anomalib_fbclip.pipelines.table.run import run_plan
from anomalib_fbclip.registration import MODELS


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """For each model an adapter that makes it zero-shot; what it learned does not matter here."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: CLASSES[name](backbone="tiny", weights=None, seed=11).save_adapter(folder / f"{name}.safetensors")
        for name in ADAPTED
    }


@pytest.fixture(scope="module")
def build(adapters):
    def make(name, **arguments):
        weights = {"weights": adapters[name]} if name in ADAPTED else {}
        return CLASSES[name](**{"backbone": "tiny", "image_size": 56, **weights, **arguments})

    return make


@pytest.fixture(scope="module")
def folder(surfaces, tmp_path_factory) -> Path:
    """The eight normal images of the train split."""
    data = surfaces()
    data.setup()
    path = tmp_path_factory.mktemp("images")
    for index, file in enumerate(data.train_data.samples.image_path):
        shutil.copy(file, path / f"{index}.png")
    return path


def maps_of(model, images=None):
    images = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0)) if images is None else images
    if hasattr(model.model, "reset"):
        model.model.reset()
    with torch.no_grad():
        return model.eval()(images).anomaly_map


@every_model
def test_zero_shot_train_test_and_checkpoint(name, build, surfaces, engine, tmp_path) -> None:
    model = build(name, metrics="full")
    assert model.learning_type is LearningType.ZERO_SHOT
    before = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
    (results,) = engine().train(model, datamodule=surfaces())
    assert model.trainer.global_step == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.model.state_dict().items())
    assert {"image_AUROC", "image_F1Max", "pixel_AUROC", "pixel_AUPRO"} <= results.keys()
    assert all(0 <= value <= 1 for value in results.values())
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 8

    path = tmp_path / "model.ckpt"
    model.trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert not [key for key in stored["state_dict"] if ".clip." in key or key.startswith("evaluator")]
    loaded = CLASSES[name].load_from_checkpoint(path)
    assert_close(maps_of(loaded), maps_of(model))
    (again,) = engine().test(build(name, metrics="full"), datamodule=surfaces(), ckpt_path=path)
    assert again == pytest.approx(results, abs=1e-6)


@every_adapted_model
def test_training_moves_the_trained_part_and_its_adapter_gives_the_same_numbers(
    name,
    build,
    surfaces,
    engine,
    tmp_path,
) -> None:
    model = build(name, weights=None, learning_rate=1e-3, max_epochs=1, metrics="full")
    assert model.learning_type is LearningType.ONE_CLASS
    before = {key: tensor.clone() for key, tensor in model.model.trained_state_dict().items()}
    fingerprint = model.model.clip.fingerprint()
    (results,) = engine().train(model, datamodule=surfaces(train_anomalous=True))
    assert model.trainer.current_epoch == 1
    assert model.model.clip.fingerprint() == fingerprint
    after = model.model.trained_state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in after.items())

    (adapter,) = tmp_path.rglob("adapter.safetensors")
    assert adapter_file.read(adapter)[1]["model"] == name
    zero_shot = build(name, weights=adapter, metrics="full")
    assert "ProceduralSurfaces" in zero_shot.source
    (again,) = engine().test(zero_shot, datamodule=surfaces())
    assert {key: again[key] for key in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")} == pytest.approx(
        {key: results[key] for key in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")},
        abs=1e-4,
    )


@every_adapted_model
def test_normal_images_alone_and_labels_alone_train_too(name, build, surfaces, engine) -> None:
    only_normal = build(name, weights=None)
    engine(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(only_normal, datamodule=surfaces())
    assert only_normal.supervision.value == "normal images only"
    labels = torch.tensor([0, 1, 1])
    scores = only_normal.model.train().score(torch.rand(3, 3, 56, 56))
    arguments = {"pred_score": scores.pred_score, "anomaly_map": None, "labels": labels, "masks": None}
    arguments["anomaly_map"] = only_normal.model.upsample(scores.grid_map, 56, 0)
    assert only_normal.loss(**arguments, **scores.loss_terms)["total"].isfinite()


@every_adapted_model
def test_an_adapter_of_another_model_is_refused_with_both_names(name, build, adapters) -> None:
    for other in set(ADAPTED) - {name}:
        with pytest.raises(ValueError, match=f"made for the model {other}, this is {name}"):
            build(name, weights=adapters[other])


@every_model
def test_the_literal_form_gives_the_same_maps(name, build) -> None:
    assert_close(maps_of(build(name, literal=True)), maps_of(build(name)), rtol=0, atol=2e-5)


@every_adapted_model
def test_the_literal_form_and_a_compiled_model_train_the_same(name, build) -> None:
    losses, weights = [], []
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 56, 56, generator=generator)
    batch = ImageBatch(image=images, gt_label=torch.tensor([0, 1, 0, 1]), gt_mask=images[:, 0] > 0.5)
    for form in ("fast", "literal", "compiled"):
        model = build(name, weights=None, literal=form == "literal", learning_rate=1e-3).train()
        model.log = model.log_dict = lambda *_, **__: None
        if form == "compiled":
            model.model.compile(fullgraph=True, backend="eager")
        optimizer = model.configure_optimizers()
        for _ in range(3):
            optimizer.zero_grad()
            loss = model.training_step(batch)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
        weights.append(model.model.encode_text().detach())
    for loss, weight in zip(losses[1:], weights[1:], strict=True):
        assert_close(loss, losses[0], rtol=1e-3, atol=1e-4)
        assert_close(weight, weights[0], rtol=0, atol=1e-3)


@every_adapted_model
def test_text_features_are_computed_once_and_again_when_a_parameter_changed(name, build, monkeypatch) -> None:
    model = build(name).eval().model
    calls, encode_text = [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda: calls.append(1) or encode_text())
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(1, 3, 56, 56))
        assert len(calls) == 1
        next(parameter for parameter in model.parameters() if parameter.requires_grad).mul_(1.5)
        model(torch.rand(1, 3, 56, 56))
    assert len(calls) == 2


@every_model
def test_a_model_built_in_inference_mode_works_and_trains(name, build, engine, surfaces) -> None:
    with torch.inference_mode():
        model = build(name, **({"weights": None} if name in ADAPTED else {}))
        model.eval().model(torch.rand(2, 3, 56, 56))
    engine(max_epochs=1, num_sanity_val_steps=0).train(model, datamodule=surfaces(train_anomalous=True))
    assert 0 < model.thresholds["image"] < 1


@every_model
def test_compiled_as_one_graph_it_gives_the_same(name, build) -> None:
    model = build(name).eval()
    batches = torch.rand(3, 2, 3, 56, 56).unbind()  # one after the other, for a model that remembers
    with torch.no_grad():
        expected = [model.model(batch) for batch in batches]
        model = build(name).eval()
        compiled = torch.compile(model.model, fullgraph=True, backend="eager")
        for batch, (score, _, grid_map, _) in zip(batches, expected, strict=True):
            found = compiled(batch)
            assert_close(found.pred_score, score, rtol=0, atol=1e-5)
            assert_close(found.anomaly_map, grid_map, rtol=0, atol=1e-5)
        # A graph cannot raise, so the module, which is not compiled, looks at the pixels.
        model.model = compiled
        with pytest.raises(ValueError, match="NaN"):
            model.predict_step(ImageBatch(image=batch / 0), 0)


@every_adapted_model
def test_compiled_in_place_it_gives_the_same_and_sees_what_a_graph_cannot(name, build) -> None:
    model, graphs = build(name).eval().model, []
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
        copied = copy.deepcopy(model)
        before = model(images).anomaly_map
        assert len(graphs) == 1
        assert_close(before, copied(images).anomaly_map, rtol=1e-3, atol=0)
        with pytest.raises(ValueError, match="NaN"):
            model(images / 0)
        for tensor in model.trained_state_dict().values():
            tensor.mul_(1.1)
        changed = model(images).anomaly_map
        assert not torch.allclose(changed, before, rtol=1e-3, atol=0)
        assert_close(copied(images).anomaly_map, before, rtol=1e-3, atol=0)
        copied.load_state_dict(model.state_dict())
        assert_close(copied(images).anomaly_map, changed, rtol=1e-3, atol=0)
        assert len(graphs) == 1


@every_model
def test_predict_gives_a_row_and_an_image_for_each_file(name, build, folder, engine, tmp_path) -> None:
    batches = engine().predict(build(name, threshold=0.4), data_path=folder)
    assert len(batches) == 8
    for batch in batches:
        assert 0 <= float(batch.anomaly_map.min()) <= float(batch.anomaly_map.max()) <= 1
        assert bool(batch.pred_label) == (float(batch.pred_score) > 0.5)
    (table,) = tmp_path.rglob("predictions.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(list(table.parent.rglob("*.png"))) == 8
    assert all(0 <= float(row["score"]) <= 1 for row in rows)


@every_model
def test_a_test_scores_each_image_once_and_names_what_it_confused(
    name,
    build,
    surfaces,
    engine,
    monkeypatch,
    caplog,
) -> None:
    scored = []

    def run(callbacks=(), **arguments):
        model = build(name, metrics="full", visualizer=False, **arguments)
        predict = model._predict
        monkeypatch.setattr(model, "_predict", lambda batch: scored.extend(batch.image_path) or predict(batch))
        (results,) = engine(callbacks=list(callbacks)).test(model, datamodule=surfaces(eval_batch_size=3))
        (confusion,) = (item for item in model.trainer.callbacks if isinstance(item, Confusion))
        return model, results, confusion.counts

    # Thresholds from the labels of the same images: a first pass finds them, its scores are used again.
    with caplog.at_level(logging.INFO, logger="anomalib_fbclip"):
        model, results, counts = run()
    assert len(scored) == len(set(scored)) == 8
    assert model.thresholds["origin"] == "labels"
    assert sum(counts.values()) == 8
    assert counts["hits"] + counts["misses"] == 4
    assert "best F1 on these same images, so that all numbers here are too good" in caplog.text
    assert f"Misses: {counts['misses'] or 'none'}" in caplog.text
    # Timings need each image scored anew: twice, with the same result.
    assert run(callbacks=[Measure()])[1:] == (pytest.approx(results, abs=1e-6), counts)
    assert len(scored) == 8 + 16
    # A given threshold learns nothing from labels: there is no first pass.
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="anomalib_fbclip"):
        model, _, counts = run(threshold=1.0)
    assert len(scored) == 8 + 16 + 8
    assert model.trainer.limit_val_batches > 0
    assert counts["misses"] == 4
    assert "1.0000 (as given)" in caplog.text
    assert "Misses: 4\n" in caplog.text


@every_model
def test_normal_images_set_the_thresholds(name, build, folder, engine) -> None:
    model = build(name, normal_source=folder, false_alarm_rate=0.3)
    engine().predict(model, data_path=folder / "0.png")
    assert model.thresholds["origin"] == "normal pictures"
    assert model.thresholds["pictures"] == 8
    assert model.thresholds["expected_rate"] == pytest.approx(2 / 9)


@every_model
@pytest.mark.parametrize("crop", [False, True])
def test_what_is_outside_of_a_region_changes_nothing(name, crop, build, folder, engine, tmp_path) -> None:
    inside = np.zeros((56, 56), bool)
    inside[8:48, 12:52] = True
    Image.fromarray(inside).save(tmp_path / "region.png")
    plain = build(name, threshold=0.5, visualizer=False)
    maps = []
    for number, change in enumerate((0, 90)):
        images = tmp_path / str(number)
        images.mkdir()
        for file in sorted(folder.iterdir())[:3]:
            values = np.asarray(Image.open(file))
            Image.fromarray(np.where(inside[..., None], values, values // 2 + change)).save(images / file.name)
        few = {"k_shot": 1, "few_shot_source": folder} if name in ADAPTED else {}
        model = build(
            name,
            region=tmp_path / "region.png",
            crop_to_region=crop,
            visualizer=False,
            normal_source=images,
            **few,
        )
        batches = engine().predict(model, data_path=images)
        maps.append(torch.cat([batch.anomaly_map for batch in batches]))
        assert model.thresholds["origin"] == "normal pictures"
    assert_close(maps[0], maps[1])
    assert not maps[0][:, ~torch.from_numpy(inside)].any()
    other = torch.cat([batch.anomaly_map for batch in engine().predict(plain, data_path=images)])
    assert not torch.allclose(other, maps[0])


@every_adapted_model
def test_few_normal_images_join_the_score_and_stay_out_of_adapters(name, build, folder, engine, tmp_path) -> None:
    few = build(name, k_shot=2, few_shot_source=folder)
    assert few.learning_type is LearningType.FEW_SHOT
    engine().predict(few, data_path=folder)
    assert few.model.memory.num_images == 2
    assert (maps_of(few) - maps_of(build(name))).abs().max() > 1e-4
    tensors, metadata = adapter_file.read(few.save_adapter(tmp_path / "few.safetensors"))
    assert not [key for key in tensors if "memory" in key]
    assert metadata["thresholds"] is None


@every_model
def test_exports_agree_and_say_what_they_are(name, build, engine, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    light = {"weights": None, "feature_layers": [1]} if name in ADAPTED else {"matching": False}
    model = build(name, **light).eval()
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    expected = maps_of(model, images)
    path = engine().export(model, "torch", export_root=tmp_path)
    loaded = torch.load(path, weights_only=False)["model"]
    assert loaded.export_metadata["model"] == name
    assert_close(maps_of(loaded, images), expected)
    path = engine().export(model, "onnx", export_root=tmp_path, input_size=(56, 56))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["model"]) == name
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    assert_close(torch.tensor(found["anomaly_map"]).reshape(expected.shape), expected, rtol=0, atol=1e-4)


@every_model
@pytest.mark.parametrize("command", ["train", "fit", "validate", "test", "predict", "export"])
def test_every_command_of_the_cli_takes_the_model(name, command, tmp_path) -> None:
    # Where it lies is the same for all commands.
    for path in (name, f"{CLASSES[name].__module__}.{name}") if command == "train" else (name,):
        words = [command, "--model", path, "--model.backbone", "tiny", "--default_root_dir", str(tmp_path)]
        if command == "export":
            words += ["--export_type", "torch"]
        else:
            words += ["--data", "ProceduralSurfaces", "--data.category", "wood"]
        assert isinstance(AnomalibCLI(words, run=False).model, CLASSES[name])


@every_model
def test_get_model_takes_it_by_name_and_by_dictionary(name) -> None:
    assert name in list_models(case="pascal")
    assert isinstance(get_model(name, backbone="tiny"), CLASSES[name])
    config = {"class_path": name, "init_args": {"backbone": "tiny", "feature_layers": [2, 8]}}
    arguments = {**config["init_args"], "weights": None} if name in ADAPTED else config["init_args"]
    assert get_model({**config, "init_args": arguments}).model.feature_layers == (2, 8)


@every_adapted_model
def test_stages_are_recorded_and_drawn(name, build, surfaces, engine, tmp_path) -> None:
    model = build(name).eval()
    prediction, stages = model.model(torch.rand(2, 3, 56, 56), return_stages=True)
    assert_close(stages.anomaly_map_smoothed, prediction.anomaly_map)
    assert stages.anomaly_map_grid.shape == (2, 7, 7)
    for group in stages.panels():
        assert len(group.grids) == len(group.columns) * len(model.model.feature_layers)
    engine(callbacks=[StageMaps(num_images=1)]).test(model, datamodule=surfaces())
    assert len(list(tmp_path.rglob("stages/**/*.png"))) == 1


@every_adapted_model
def test_a_shared_adapter_has_a_card_that_names_its_model(name, build, monkeypatch) -> None:
    cards = []

    def upload(folder, *_, **__):
        cards.append(Path(folder, "README.md").read_text(encoding="utf-8"))

    monkeypatch.setattr(hub, "upload", upload)
    place = build(name).push_to_hub("owner/name")
    assert f"# {name} adapter, tiny at 56" in cards[0]
    assert f"anomalib predict --model {name} --model.backbone tiny --model.image_size 56" in cards[0]
    assert place in cards[0]


@pytest.mark.parametrize("name", [name for name in ADAPTED if name in MODELS])
def test_the_calibrate_command(name, adapters, folder, tmp_path, capsys) -> None:
    words = [str(adapters[name]), str(folder), "--rate", "0.3", "--output", str(tmp_path / "c.safetensors")]
    assert calibrate.main(words) == 0, capsys.readouterr().err
    assert adapter_file.read(tmp_path / "c.safetensors")[1]["thresholds"]["pictures"] == 8


def test_a_table_has_a_row_for_each_model(adapters, tmp_path, surfaces_root) -> None:
    rows = []
    for name in CLASSES:
        weights = {"weights": str(adapters[name])} if name in ADAPTED else {}
        tiles = {"tiles": 40} if name == "AFCLIP" else {}
        rows.append({"class_path": name, "init_args": {"backbone": "tiny", "image_size": 56, **weights, **tiles}})
    data = {"root": str(surfaces_root), "image_size": 56, "num_train": 8, "num_test": 8}
    datasets = [{"class_path": "ProceduralSurfaces", "init_args": data, "categories": ["wood"]}]
    results = {}
    plan = make_plan({"models": rows, "datasets": datasets, "aupimo": True}, str(tmp_path))
    failed = run_plan(plan, lambda cell, result, _: results.update({cell.model.name: result}))
    assert not failed
    assert len(results) == len(CLASSES)
    for name in ("pixel_AUPRO", "pixel_AUPR"):
        assert all(0 <= result["metrics"][name] <= 100 for result in results.values()), name
    assert all("pixel_AUPIMO" in result["metrics"] for result in results.values())
    write(plan, {cell.key: results[cell.model.name] for cell in plan.cells}, {})
    lines = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert [line["image_AUROC_low"] != "" for line in lines[::2]] == [False, *[True] * (len(CLASSES) - 1)]


def test_each_registered_class_is_where_the_table_says() -> None:
    for name, module in anomalib_fbclip.registration.EXPORTS.items():
        assert getattr(import_module(module), name) is getattr(anomalib_fbclip, name)
