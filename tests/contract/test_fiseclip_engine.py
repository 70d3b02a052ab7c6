# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FiSeCLIP through anomalib's engine and CLI: nothing is trained, every run is a new stream of images."""

import json
import logging
import shutil

import pytest
import torch

from anomalib_fbclip import FiSeCLIP

TINY = {"backbone": "tiny", "image_size": 56}


@pytest.fixture(scope="module")
def normal(surfaces, tmp_path_factory):
    """Eight normal images that no run tests."""
    data = surfaces()
    data.setup()
    folder = tmp_path_factory.mktemp("normal")
    for index, path in enumerate(data.train_data.samples.image_path):
        shutil.copy(path, folder / f"{index}.png")
    return folder


def _pixels(batches):
    return torch.cat([batch.anomaly_map.flatten() for batch in batches])


def test_each_run_begins_without_the_images_of_the_one_before(surfaces, engine, caplog) -> None:
    model = FiSeCLIP(**TINY)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with caplog.at_level(logging.INFO):
        results = engine().test(model, datamodule=surfaces())
    assert "Prompts speak of: wood" in caplog.text
    assert engine().test(model, datamodule=surfaces())[0] == pytest.approx(results[0], abs=1e-6)


def test_categories_of_one_data_module_are_matched_each_by_itself(surfaces, engine) -> None:
    stream = {**TINY, "threshold": 0.5, "shuffle": False}
    both = FiSeCLIP(**stream)  # one that is found on the images would differ, and bend the scale
    mixed = engine().predict(both, datamodule=surfaces(category=["wood", "leather"], num_test=4))
    assert {path.split("/")[-3] for batch in mixed for path in batch.image_path} >= {"test"}
    assert len(both.model.bank.get("wood")) == len(both.model.bank.get("leather")) == 4
    alone = engine().predict(FiSeCLIP(**stream), datamodule=surfaces(category="wood", num_test=4))
    maps = {path: one for batch in mixed for path, one in zip(batch.image_path, batch.anomaly_map, strict=True)}
    for batch in alone:
        for path, one in zip(batch.image_path, batch.anomaly_map, strict=True):
            torch.testing.assert_close(maps[path], one, atol=1e-5, rtol=0)


def test_predict_on_a_folder_and_on_one_picture(surfaces, engine, tmp_path, caplog) -> None:
    data = surfaces()
    data.setup()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, path in enumerate(data.test_data.samples.image_path):
        shutil.copy(path, folder / f"{index}.png")
    model = FiSeCLIP(**TINY, bank_size=3, shuffle=False)
    with caplog.at_level(logging.WARNING):
        batches = engine().predict(model, data_path=folder)
    # anomalib predicts a folder image by image: the first has no reference, the others have the bank.
    assert caplog.text.count("no reference") == 1
    assert len(batches) == 8
    assert len(model.model.bank) == 3
    for batch in batches:
        assert 0 <= float(batch.pred_score) <= 1
        assert batch.anomaly_map.shape[-2:] == (56, 56)
    (single,) = engine().predict(FiSeCLIP(**TINY), data_path=folder / "0.png")
    torch.testing.assert_close(_pixels([single]), _pixels(batches[:1]))


def test_a_shuffled_run_depends_neither_on_order_nor_on_batches(surfaces, engine, tmp_path) -> None:
    def maps(data, **settings):
        model = FiSeCLIP(**TINY, bank_size=3, threshold=0.5, **settings)
        batches = engine().predict(model, **data)
        paths = [path for batch in batches for path in batch.image_path]
        return paths, torch.cat([batch.anomaly_map for batch in batches])

    whole = {"datamodule": surfaces(eval_batch_size=8)}
    paths, expected = maps(whole)
    assert paths == sorted(paths)
    for size in (1, 3):
        again, found = maps({"datamodule": surfaces(eval_batch_size=size)})
        assert again == paths
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(maps(whole, seed=1)[1], expected, atol=1e-3)
    assert not torch.allclose(maps(whole, shuffle=False)[1], expected, atol=1e-3)

    # A folder is predicted image by image; a file that cannot be read is nobody's reference.
    data = surfaces()
    data.setup()
    folder = tmp_path / "images"
    folder.mkdir()
    for index, path in enumerate(data.test_data.samples.image_path[:4]):
        shutil.copy(path, folder / f"{index}.png")
    (folder / "a.png").write_text("no image")
    assert len(maps({"data_path": folder})[0]) == 4


def test_good_images_of_a_folder_are_references_of_all(engine, normal, tmp_path) -> None:
    batch = {}
    for shuffle in (True, False):
        plain, joined = (
            FiSeCLIP(**TINY, shuffle=shuffle, reference_share=0.9, reference_source=source) for source in (None, normal)
        )
        for model in (plain, joined):
            batch[model] = engine().predict(model, data_path=normal / "0.png")[0]
        # One image alone has no reference but the good ones, and is none of its own.
        assert not torch.allclose(batch[plain].anomaly_map, batch[joined].anomaly_map, atol=1e-3)
        assert len(joined.model.trusted) == 8
        assert joined.model.trusted.kept.all()
        # The same defect again and again is normal to itself, and far from the good images.
        images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1).clone()
        images[:, 0, 0, 0] += torch.arange(3) * 0.01
        distances = []
        for model in (plain, joined):
            model.model.reset()
            distances.append(float(model.model.analyse(images).distances.mean()))
        assert distances[1] > 5 * distances[0]
    model = joined
    exported = torch.load(engine().export(model, "torch", export_root=tmp_path), weights_only=False)["model"]
    assert len(exported.model.trusted) == 8
    with pytest.raises(FileNotFoundError, match="reference_source='nowhere' does not exist"):
        FiSeCLIP(**TINY, reference_source="nowhere")
    with pytest.raises(ValueError, match="is not used with matching=False"):
        FiSeCLIP(**TINY, reference_source=normal, matching=False)


def test_a_run_whose_matching_contradicts_the_text_is_called_its_own_outlier(caplog) -> None:
    model = FiSeCLIP(**TINY)
    for distances, warned in (([9, 8, 7, 6, 5, 4, 3, 2], True), ([1, 2, 3, 4, 5, 6, 8, 7], False), ([9, 8, 7], False)):
        caplog.clear()
        # Text, distance and number of references of each image; those without references say nothing.
        found = torch.stack((torch.arange(len(distances)) / 10, torch.tensor(distances), torch.ones(len(distances))))
        model._evidence = [found[:, :2], found[:, 2:], torch.zeros(3, 9)]  # nine without a reference do not count
        model.on_test_epoch_end()
        assert ("their own outliers" in caplog.text) == warned
    assert not model._evidence


def test_checkpoints_hold_neither_backbone_nor_images(surfaces, engine, tmp_path) -> None:
    model = FiSeCLIP(**TINY, filter_share=0.3, class_name="plank")
    expected = engine().predict(model, datamodule=surfaces())
    path = tmp_path / "model.ckpt"
    model.trainer.save_checkpoint(path)
    assert path.stat().st_size < 100_000
    loaded = FiSeCLIP.load_from_checkpoint(path)
    assert (loaded.model.filter_share, loaded.model.class_name, len(loaded.model.bank)) == (0.3, "plank", 0)
    found = engine().predict(loaded, datamodule=surfaces())
    torch.testing.assert_close(_pixels(found), _pixels(expected))
    found = engine().predict(FiSeCLIP(**TINY, filter_share=0.3, class_name="plank"), None, surfaces(), ckpt_path=path)
    torch.testing.assert_close(_pixels(found), _pixels(expected))
    # Another noun in the prompts is another result.
    other = engine().predict(FiSeCLIP(**TINY, filter_share=0.3, class_name="screw"), datamodule=surfaces())
    assert (_pixels(other) - _pixels(expected)).abs().max() > 1e-4


def test_normal_pictures_set_the_thresholds_and_are_no_references(surfaces, engine, normal, caplog) -> None:
    strict = FiSeCLIP(**TINY, normal_source=normal, false_alarm_rate=0.12, shuffle=False)
    with caplog.at_level(logging.WARNING):
        batches = engine().predict(strict, datamodule=surfaces())
    assert "no reference" not in caplog.text
    found = strict.thresholds
    assert (found["origin"], found["pictures"]) == ("normal pictures", 8)
    assert found["expected_rate"] == pytest.approx(1 / 9)
    assert len(strict.model.bank) == 8  # the images of this run alone
    for batch in batches:
        assert torch.equal(batch.pred_label, batch.pred_score > 0.5)
    # The prompts of the thresholds speak of what the run shows.
    lax = FiSeCLIP(**TINY, normal_source=normal, false_alarm_rate=0.5, class_name="wood")
    engine().predict(lax, data_path=normal / "0.png")
    assert "no reference" in caplog.text
    assert lax.thresholds["image"] < found["image"]
    again = lax.calibrate(normal, 0.12)
    assert (again["image"], again["pixel"]) == pytest.approx((found["image"], found["pixel"]), abs=1e-5)
    other = FiSeCLIP(**TINY, class_name="screw").calibrate(normal, 0.12)
    assert other["image"] != pytest.approx(again["image"], abs=1e-4)

    fixed = FiSeCLIP(**TINY, threshold=0.4)
    engine().predict(fixed, data_path=normal / "0.png")
    assert fixed.thresholds == {"image": pytest.approx(0.4), "pixel": pytest.approx(0.4), "origin": "fixed"}
    with pytest.raises(ValueError, match="give two or more"):
        fixed.calibrate(normal / "0.png")
    with pytest.raises(ValueError, match="bank_size=0"):
        FiSeCLIP(**TINY, normal_source=normal, bank_size=0)


def test_exports_keep_the_method_in_torch_and_the_text_map_in_onnx(
    engine,
    normal,
    tmp_path,
    caplog,
    monkeypatch,
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = FiSeCLIP(**TINY, normal_source=normal).eval()
    alone = FiSeCLIP(**TINY, matching=False, normal_source=normal).eval()
    for each in (model, alone):
        each.calibrate_once()
    matched = model.thresholds["image"]
    assert matched != pytest.approx(alone.thresholds["image"], abs=1e-4)
    images = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, text = model(images), alone(images)
    path = engine().export(model, "torch", export_root=tmp_path)
    with torch.no_grad():
        got = torch.load(path, weights_only=False)["model"](images)
    torch.testing.assert_close(got.anomaly_map, expected.anomaly_map, atol=1e-5, rtol=0)
    with caplog.at_level(logging.WARNING):
        path = engine().export(model, "onnx", export_root=tmp_path, input_size=(56, 56))
    assert "text side alone" in caplog.text
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["thresholds"]) == alone.thresholds
    model.calibrate_once()
    assert model.thresholds["image"] == pytest.approx(matched, abs=1e-6)
    # Labels set the thresholds of the whole method; those of the graph are found by normal images or stay at 0.5.
    labelled = FiSeCLIP(**TINY)
    labelled.post_processor.set_thresholds(0.2, 0.4, origin="labels")
    # The graph from before stands in: none depends on the thresholds.
    monkeypatch.setattr(torch.onnx, "export", lambda f, **_: shutil.copy(path, f))
    path = engine().export(labelled, "onnx", export_root=tmp_path / "labelled", input_size=(56, 56))
    written = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["thresholds"]
    assert json.loads(written) == {"image": 0.5, "pixel": 0.5, "origin": "fixed"}
    assert "the graph gets 0.5" in caplog.text
    assert labelled.thresholds["origin"] == "labels"
    names = [output.name for output in session.get_outputs()]
    got = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    torch.testing.assert_close(torch.tensor(got["anomaly_map"]).squeeze(), text.anomaly_map, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(got["pred_score"]).flatten(), text.pred_score, atol=1e-4, rtol=0)
