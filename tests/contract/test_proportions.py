# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Images that are not square: ``image_size`` of two numbers, and ``resize="keep"``."""

import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import good_and_bad, good_and_bad_folder
from models import ADAPTED, CLASSES
from torch.testing import assert_close

from anomalib_fbclip import AFCLIP, FBCLIP, FiSeCLIP
from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.host.pre_processing import KeepProportions, _nearest_grid

HEIGHT, WIDTH = 40, 120


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    """Four good and four bad strips of 40 x 120 pixels, with masks."""
    return good_and_bad(tmp_path_factory.mktemp("strips"), HEIGHT, WIDTH, slice(10, 25), across=20, step=10)


@pytest.mark.parametrize("arguments", [{"image_size": [24, 72]}, {"image_size": 40, "resize": "keep"}], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_tests_predicts_and_resumes_on_strips(name, arguments, strips, engine, tmp_path):
    model = CLASSES[name](backbone="tiny", metrics="full", **arguments)
    runner = engine()
    results = runner.test(model, datamodule=good_and_bad_folder(strips))[0]
    assert all(np.isfinite(value) for value in results.values())
    found = engine().predict(model, data_path=strips / "bad")
    assert {tuple(batch.anomaly_map.shape[-2:]) for batch in found} == {(24, 72)}  # 3 x 9 patches, about 5 x 5
    runner.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CLASSES[name].load_from_checkpoint(tmp_path / "a.ckpt")
    assert engine().test(loaded, datamodule=good_and_bad_folder(strips))[0] == pytest.approx(results, abs=1e-5)


@pytest.mark.parametrize("name", ADAPTED)
def test_strips_train_and_are_remembered(name, strips, engine, tmp_path):
    settings = {"backbone": "tiny", "image_size": [24, 72]}
    # Sharp logits of random first values, which AF-CLIP sums, leave no gradient on so few patches.
    model = CLASSES[name](weights=None, learning_rate=1e-2, temperature=1.0, **settings)
    before = {key: value.clone() for key, value in model.model.trained_state_dict().items()}
    engine(max_epochs=1, limit_train_batches=1).fit(model, datamodule=good_and_bad_folder(strips))
    after = model.model.trained_state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)

    few = CLASSES[name](k_shot=1, few_shot_source=strips / "good", **settings)
    line = few.save_line(tmp_path / "line.safetensors")
    assert few.model.memory.grid == (3, 9)
    tensors, metadata = adapter_file.read(line)
    assert (tensors["memory.tokens"].shape[2:4], metadata["image_size"]) == ((3, 9), [24, 72])
    again = CLASSES[name](backbone="tiny", weights=line).eval()
    assert (again.image_size, again.model.memory.grid) == ((24, 72), (3, 9))
    images = torch.rand(2, 3, HEIGHT, WIDTH)
    with torch.no_grad():
        assert torch.equal(again(images).anomaly_map, few.eval()(images).anomaly_map)
        zero_shot = CLASSES[name](**settings).eval()(images).anomaly_map
    assert not torch.equal(again(images).anomaly_map, zero_shot)


def test_a_memory_of_strips_is_compared_window_by_window():
    few = AFCLIP(backbone="tiny", image_size=[24, 72], k_shot=1).eval().model
    images = torch.randn(1, 3, 24, 72, generator=torch.Generator().manual_seed(0))
    few.remember(images)
    tokens = few.encode_image(images)
    # Windows of the image's own grid find each other, those of another grid of as many patches do not.
    assert few.memory.score(tokens, (3, 9)).amax() < 1e-5
    assert few.memory.score(tokens, (9, 3)).amax() > 1e-3


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 8000),
    width=st.integers(1, 8000),
    grid=st.integers(2, 40),
    patch=st.sampled_from([8, 14, 16]),
)
def test_kept_proportions(height, width, grid, patch):
    resize = KeepProportions((grid * patch, grid * patch), patch)
    kept = resize.fit(height, width)
    rows, columns = (side // patch for side in kept)
    assert (rows * patch, columns * patch) == kept
    assert 0.8 <= rows * columns / grid**2 <= 1.2
    assert resize.fit(*kept) == kept  # resized where it is read and again in the batch
    if height == width:
        assert (rows, columns) == (grid, grid)
    # No grid of one row or column more or less, with a number of patches as near, has better proportions.
    wanted = abs(np.log(rows / columns * width / height))
    for other in ((rows + 1, columns), (rows, columns + 1), (rows - 1, columns), (rows, columns - 1)):
        if min(other) and 0.8 <= other[0] * other[1] / grid**2 <= 1.2:
            assert wanted <= abs(np.log(other[0] / other[1] * width / height)) + 1e-6


def test_a_square_image_keeps_its_square_to_the_digit():
    images = torch.rand(1, 3, 70, 70)
    with torch.no_grad():
        maps = [FBCLIP(backbone="tiny", resize=resize).eval()(images).anomaly_map for resize in ("keep", "squash")]
    assert torch.equal(*maps)
    assert _nearest_grid(1 / 3, 27) == (3, 9)


@pytest.mark.parametrize("name", ["FBCLIP", "FiSeCLIP"])  # the graphs of the others differ in nothing that matters here
def test_exports_of_strips(name, engine, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    light = {"weights": None, "feature_layers": [1]} if name in ADAPTED else {"matching": False}
    light |= {"views": ["spa"]} if name == "FBCLIP" else {}
    model = CLASSES[name](backbone="tiny", image_size=40, resize="keep", **light).eval()
    images = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        loaded = torch.load(engine().export(model, "torch", export_root=tmp_path), weights_only=False)["model"]
        assert_close(loaded(images).anomaly_map, expected.anomaly_map)
        assert_close(loaded(torch.rand(1, 3, 100, 50)).anomaly_map.shape[-2:], torch.Size([56, 32]))
    with pytest.raises(ValueError, match="give input_size"):
        model.to_onnx(tmp_path)
    path = engine().export(model, "onnx", export_root=tmp_path, input_size=(HEIGHT, WIDTH))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert (json.loads(told["resize"]), json.loads(told["input_size"])) == ("keep", [HEIGHT, WIDTH])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    result = compiled(images.numpy())
    for key in ("pred_score", "anomaly_map"):
        wanted = getattr(expected, key).flatten()
        assert_close(torch.tensor(found[key]).flatten(), wanted, rtol=0, atol=1e-4)
        assert_close(torch.tensor(result[key]).flatten(), wanted, rtol=0, atol=1e-4)


def test_a_batch_of_several_proportions_is_refused_with_names(strips, engine, tmp_path):
    mixed = tmp_path / "mixed"
    for folder in ("good", "bad", "masks"):
        (mixed / folder).mkdir(parents=True)
        for index, file in enumerate(sorted((strips / folder).iterdir())):
            image = cv2.imread(str(file))
            cv2.imwrite(str(mixed / folder / file.name), image[:, : WIDTH // (1 + index % 2)])
    model = FBCLIP(backbone="tiny", image_size=40, resize="keep", metrics="full")
    with pytest.raises(ValueError, match=r"\.png.*and .*\.png.*different sizes.*eval_batch_size 1"):
        engine().test(model, datamodule=good_and_bad_folder(mixed))
    assert engine().test(model, datamodule=good_and_bad_folder(mixed, 1))[0]["pixel_AUPRO"] >= 0
    # Squashed, as ever.
    engine().test(FBCLIP(backbone="tiny", image_size=40), datamodule=good_and_bad_folder(mixed))


def test_thresholds_are_for_one_way_of_resizing(strips, tmp_path, caplog):
    model = FBCLIP(backbone="tiny", image_size=40, resize="keep", normal_source=str(strips / "good"))
    path = model.save_adapter(tmp_path / "a.safetensors")
    caplog.clear()
    same = FBCLIP(backbone="tiny", image_size=40, resize="keep", weights=path)
    assert same.thresholds == model.thresholds
    other = FBCLIP(backbone="tiny", image_size=40, weights=path)
    assert other.thresholds["origin"] == "fixed"
    assert "resize=keep" in caplog.text


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="resize='crop': choose one of"):
        FBCLIP(backbone="tiny", resize="crop")
    with pytest.raises(ValueError, match="own pre-processor"):
        FBCLIP(backbone="tiny", resize="keep", pre_processor=False)
    with pytest.raises(ValueError, match="two, height and width"):
        FBCLIP(backbone="tiny", image_size=[56, 56, 56])
    with pytest.raises(ValueError, match="use 48 or 56 for 50"):
        FBCLIP(backbone="tiny", image_size=[56, 50])
    model = FiSeCLIP(backbone="tiny").eval().model
    model(torch.rand(2, 3, 16, 32))
    with pytest.raises(ValueError, match=r"reset\(\) before"):
        model(torch.rand(2, 3, 32, 16))
