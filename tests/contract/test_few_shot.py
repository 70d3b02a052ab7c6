# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A few normal images through anomalib's engine: where they come from, and what carries them on."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.deploy import ExportType
from safetensors.torch import save_file

from anomalib_fbclip import FBCLIP, AuxiliaryTransfer, LabelledFolder
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.clip.stem import local_features
from anomalib_fbclip.host.unreadable import read_picture


@pytest.fixture
def folder(surfaces, tmp_path):
    """Three normal images, of another size than the model's."""
    data = surfaces()
    data.setup()
    (tmp_path / "normal").mkdir()
    for index, path in enumerate(data.train_data.samples.image_path[:3]):
        cv2.imwrite(str(tmp_path / "normal" / f"{index}.png"), cv2.resize(cv2.imread(path), (90, 70)))
    return tmp_path / "normal"


def test_pictures_of_the_train_split_join_the_score_and_a_checkpoint_carries_them(model, surfaces, engine, tmp_path):
    data = surfaces(train_anomalous=True)
    few = model(k_shot=3, metrics="full")
    assert few.learning_type is LearningType.FEW_SHOT
    assert model(k_shot=3, weights=None).learning_type is LearningType.ONE_CLASS
    runner = engine()
    results = runner.test(few, datamodule=data)
    assert few.model.memory.num_images == 3
    few.load_state_dict(few.state_dict())  # filled in the trainer's inference mode, it can be loaded into
    assert results[0] != engine().test(model(metrics="full"), datamodule=data)[0]

    # Only normal images were taken: each remembered image is one of these.
    normal = data.train_data.samples.query("label_index == 0").image_path
    read = torch.stack([torch.from_numpy(cv2.imread(path)[..., ::-1].copy()).permute(2, 0, 1) for path in normal])
    tokens = local_features(few.model.clip.visual, few.pre_processor.transform(read / 255))[:, 1:]
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    near = (few.model.memory.tokens[0].float()[:, None] - tokens).abs().amax(dim=(2, 3)) < 1e-3
    assert near.any(dim=1).all()

    # The seed chooses them.
    chosen = []
    for seed in (0, 1):
        other = model(k_shot=3, seed=seed)
        engine().validate(other, datamodule=data)
        chosen.append(other.model.memory.tokens)
    assert torch.equal(chosen[0], few.model.memory.tokens)
    assert not torch.equal(chosen[0], chosen[1])

    runner.trainer.save_checkpoint(tmp_path / "few.ckpt")
    for loaded in (FBCLIP.load_from_checkpoint(tmp_path / "few.ckpt"), model(k_shot=1, metrics="full", seed=4)):
        again = engine().test(loaded, datamodule=surfaces(), ckpt_path=tmp_path / "few.ckpt")
        assert torch.equal(loaded.model.memory.tokens, few.model.memory.tokens)
        assert again[0]["pixel_AUROC"] == pytest.approx(results[0]["pixel_AUROC"], abs=1e-4)
    with pytest.raises(ValueError, match="3 normal images: give k_shot=3"):
        engine().test(model(), datamodule=surfaces(), ckpt_path=tmp_path / "few.ckpt")


def test_pictures_of_a_folder_serve_predict_and_exports(model, folder, engine, tmp_path):
    few = model(k_shot=2, few_shot_source=folder)
    batches = engine().predict(few, data_path=folder)
    # Images that the memory holds are less abnormal than the one that it does not.
    maps = [float(batch.anomaly_map.mean()) for batch in batches]
    plain = [float(batch.anomaly_map.mean()) for batch in engine().predict(model(), data_path=folder)]
    assert maps[0] < plain[0]
    assert maps[1] < plain[1]

    # An export that nothing has run before reads the folder, and then needs it no more.
    small = {"k_shot": 2, "few_shot_source": folder, "views": ["id"], "weights": None, "feature_layers": [1]}
    fresh = model(**small)
    torch_path = engine().export(fresh, ExportType.TORCH, export_root=tmp_path)
    options = {"optimize": False}
    onnx_path = engine().export(
        model(**small),
        ExportType.ONNX,
        export_root=tmp_path,
        input_size=(56, 56),
        onnx_kwargs=options,
    )
    shutil.rmtree(folder)
    images = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        expected = fresh.eval()(images)
        got = torch.load(torch_path, weights_only=False)["model"].eval()(images)
    torch.testing.assert_close(got.anomaly_map, expected.anomaly_map)
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    for name in ("pred_score", "anomaly_map"):
        value = getattr(expected, name).squeeze()
        torch.testing.assert_close(torch.tensor(found[name]).squeeze(), value, atol=1e-4, rtol=0)


def test_a_radius_compares_with_the_same_place(model, folder, engine, tmp_path):
    few, every = (model(k_shot=2, few_shot_source=folder, memory_radius=radius) for radius in (0, None))
    image = read_picture(min(folder.iterdir()))[None]
    means = []
    for module in (few, every):
        module.fill_memory()
        with torch.no_grad():
            means.append([float(module.eval()(each).anomaly_map.mean()) for each in (image, image.roll(32, dims=-1))])
    (near, far), (_, known) = means
    assert far > max(near, known)
    runner = engine()
    runner.predict(few, data_path=folder)
    runner.trainer.save_checkpoint(tmp_path / "few.ckpt")
    assert FBCLIP.load_from_checkpoint(tmp_path / "few.ckpt").model.memory.radius == 0
    with pytest.raises(ValueError, match="memory_radius=0, this model has None: give memory_radius=0"):
        engine().predict(every, data_path=folder, ckpt_path=tmp_path / "few.ckpt")


def test_the_normal_images_choose_the_radius(model, folder, tmp_path):
    image = cv2.imread(str(folder / "0.png"))
    (tmp_path / "alike").mkdir()
    for index in range(4):
        noise = np.random.default_rng(index).normal(0, 4, image.shape)
        cv2.imwrite(str(tmp_path / "alike" / f"{index}.png"), (image + noise).clip(0, 255).astype(np.uint8))
    few = model(k_shot=4, few_shot_source=tmp_path / "alike", memory_radius="auto")
    path = few.save_line(tmp_path / "line.safetensors")
    assert (few.model.memory_radius, few.model.memory.radius) == (1, 1)
    assert FBCLIP(weights=path).model.memory.radius == 1
    checkpoint = {"state_dict": few.state_dict(), "hyper_parameters": dict(few.hparams)}
    few.on_save_checkpoint(checkpoint)
    again = model(k_shot=4, memory_radius="auto")
    again.on_load_checkpoint(checkpoint)
    assert again.model.memory.radius == 1
    other = model(k_shot=3, few_shot_source=folder, memory_radius="auto")
    other.fill_memory()
    assert other.model.memory_radius is None


def test_a_line_file_from_before_logits_were_smoothed_keeps_its_maps_and_thresholds(model, folder, tmp_path):
    few = model(k_shot=2, few_shot_source=folder, normal_source=folder, smooth_logits=False)
    tensors, metadata = adapters.read(few.save_line(tmp_path / "line.safetensors"))
    del metadata["smooth_logits"]
    metadata["sha256"] = adapters.digest(tensors, metadata)
    save_file(tensors, tmp_path / "old.safetensors", {key: json.dumps(value) for key, value in metadata.items()})
    old = FBCLIP(weights=tmp_path / "old.safetensors")
    assert not old.model.smooth_logits
    assert old.thresholds == few.thresholds


def test_thresholds_are_found_with_the_memory_and_stay_out_of_adapters(model, folder, tmp_path, caplog):
    few = model(k_shot=2, few_shot_source=folder, normal_source=folder)
    path = few.save_adapter(tmp_path / "a.safetensors")
    assert adapters.read(path)[1]["thresholds"] is None
    first = few.calibrate(folder)
    # Images of the memory would find themselves in it: each is scored by the others, a single one is left out.
    assert first["pictures"] == 3
    assert model(k_shot=1, few_shot_source=folder).calibrate(folder)["pictures"] == 2
    assert "1 of the 3 images of normal_source are all that the few-shot memory holds" in caplog.text
    with pytest.raises(ValueError, match="is not all of the few-shot memory"):
        model(k_shot=1, few_shot_source=folder).calibrate(folder / "0.png")
    assert few.model.memory.num_images == 2
    assert first["image"] != model().calibrate(folder)["image"]
    # Other images in the memory are other thresholds.
    few.calibrate_once()
    assert few.thresholds == first
    few.model.remember(torch.randn(2, 3, 56, 56))
    few.calibrate_once()
    assert few.thresholds["image"] != first["image"]


def test_what_cannot_be_is_said(model, surfaces, folder, engine):
    with pytest.raises(ValueError, match="k_shot=-1"):
        model(k_shot=-1)
    with pytest.raises(ValueError, match="is not used with k_shot=0"):
        model(few_shot_source=folder)
    with pytest.raises(ValueError, match="memory_radius=1 is not used with k_shot=0"):
        model(memory_radius=1)
    with pytest.raises(ValueError, match="memory_radius=-1"):
        model(k_shot=1, memory_radius=-1)
    with pytest.raises(ValueError, match="memory_radius='near'"):
        model(k_shot=1, memory_radius="near")
    with pytest.raises(ValueError, match=r"k_shot=5, but few_shot_source=.*has 3 normal images"):
        engine().predict(model(k_shot=5, few_shot_source=folder), data_path=folder)
    with pytest.raises(ValueError, match="k_shot=9, but the train split of ProceduralSurfaces has 8"):
        engine().test(model(k_shot=9), datamodule=surfaces())
    with pytest.raises(ValueError, match="give few_shot_source"):
        engine().predict(model(k_shot=1), data_path=folder)
    with pytest.raises(ValueError, match="give few_shot_source"):
        engine().test(model(k_shot=1), datamodule=LabelledFolder(folder.parent, folder.name))
    data = AuxiliaryTransfer(surfaces(category="tiles"), surfaces())
    with pytest.raises(ValueError, match="auxiliary data set"):
        engine().test(model(k_shot=1), datamodule=data)
