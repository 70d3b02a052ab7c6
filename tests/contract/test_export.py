# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Exported files give the eager model's answer on the raw photograph, and say what they are."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from PIL import Image

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.host.export import is_layer, quantize

onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

# Tracing takes nearly all of the time: two early blocks, and for what does not test the method a part of it.
FULL = {"feature_layers": (2, 3), "views": ("sem", "spa"), "weights": None}
LIGHT = {"feature_layers": (1,), "views": ("id",), "weights": None}
TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.02  # of an untrained adapter; a trained one turns the same rounding into larger steps
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""Without it OpenVINO computes in bfloat16 where the processor can."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Images with fine detail, of which a resize without antialiasing makes something else."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for index, (width, height) in enumerate(((180, 130), (180, 130), (70, 240))):
        noise = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        noise[height // 3 : height // 2, width // 4 : width // 2] //= 3
        paths.append(folder / f"{index}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths


@pytest.fixture(autouse=True)
def _one_class_of_the_name():
    """anomalib's command line finds models by name: no trace of an export may be left under it."""
    yield
    assert "FBCLIP" not in [subclass.__name__ for subclass in FBCLIP.__subclasses__()]


def _calibrated(fbclip: FBCLIP) -> FBCLIP:
    # Near what an untrained adapter gives, so that both sides of the bend are exercised.
    fbclip.post_processor.set_thresholds(0.45, 0.55, origin="labels")
    return fbclip.eval()


def _engine(root: Path) -> Engine:
    return Engine(default_root_dir=root, accelerator="cpu", devices=1)


def _openvino(fbclip: FBCLIP, root: Path, **arguments) -> openvino.Model:
    size = (130, 180)
    path = _engine(root).export(fbclip, ExportType.OPENVINO, export_root=root, input_size=size, **arguments)
    return openvino.Core().read_model(path)


def _agree(got: dict[str, np.ndarray], expected: list, tolerance: float = TOLERANCE) -> None:
    for name in ("pred_score", "anomaly_map"):
        value = torch.as_tensor(np.asarray(got[name])).reshape(len(expected), -1)
        wanted = torch.stack([getattr(batch, name).flatten() for batch in expected])
        torch.testing.assert_close(value, wanted, atol=tolerance, rtol=0)
    assert torch.as_tensor(np.asarray(got["pred_label"])).flatten().tolist() == [bool(b.pred_label) for b in expected]


def _run_onnx(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


def _named(result: "openvino.utils.data_helpers.wrappers.OVDict") -> dict[str, np.ndarray]:
    return {next(iter(names)): value for names, value in zip(result.names(), result.to_tuple(), strict=True)}


def _read(*paths: Path) -> np.ndarray:
    return np.stack([read_image(path, as_tensor=True).numpy() for path in paths])


@pytest.fixture(scope="module")
def full(model: Callable, photos, tmp_path_factory) -> tuple[FBCLIP, list, Path]:
    """A model, what its engine predicts for each photograph, and its ONNX file."""
    root = tmp_path_factory.mktemp("full")
    fbclip = _calibrated(model(**FULL))
    expected = [_engine(root).predict(fbclip, data_path=photo)[0] for photo in photos]
    path = _engine(root).export(fbclip, ExportType.ONNX, export_root=root, input_size=(130, 180))
    return fbclip, expected, path


def test_onnx_agrees_on_photographs_in_batches_of_any_size(full, photos) -> None:
    _, expected, path = full
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx"]
    _agree(_run_onnx(path, _read(photos[0])), expected[:1])
    _agree(_run_onnx(path, _read(*photos[:2], photos[0])), [*expected[:2], expected[0]])


def test_the_hosts_inferencers_agree(full, photos, tmp_path, monkeypatch) -> None:
    fbclip, expected, path = full
    monkeypatch.chdir(tmp_path)  # anomalib makes a cache folder where it stands
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    _agree(vars(OpenVINOInferencer(path, device="CPU", config=EXACT).predict(photos[0])), expected[:1])
    torch_path = _engine(tmp_path).export(fbclip, ExportType.TORCH, export_root=tmp_path)
    inferencer = TorchInferencer(torch_path, device="cpu")
    with torch.no_grad():
        for photo, wanted in zip(photos, expected, strict=True):
            _agree(vars(inferencer.predict(photo)), [wanted], tolerance=1e-6)
    assert inferencer.model.export_metadata["thresholds"]["image"] == pytest.approx(0.45)


def test_the_file_says_what_it_is(full) -> None:
    fbclip, _, path = full
    onnx_model = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_modelmeta()
    metadata = {key: json.loads(value) for key, value in onnx_model.custom_metadata_map.items()}
    assert metadata == fbclip.describe((130, 180))
    assert (metadata["backbone"], metadata["image_size"], metadata["input_size"]) == ("tiny", 56, [130, 180])
    assert metadata["thresholds"] == {"image": pytest.approx(0.45), "pixel": pytest.approx(0.55), "origin": "labels"}
    assert metadata["versions"].keys() == {"anomalib_fbclip", "anomalib", "torch"}
    assert b"site-packages" not in path.read_bytes()  # no traces of the machine that exported it


@pytest.fixture(scope="module")
def any_size(model: Callable, photos, tmp_path_factory) -> tuple[dict[Path, list], Path]:
    """What the engine predicts for photographs of two sizes, and one ONNX file for images of any size."""
    root = tmp_path_factory.mktemp("any_size")
    fbclip = _calibrated(model(**LIGHT))
    expected = {photo: _engine(root).predict(fbclip, data_path=photo) for photo in (photos[0], photos[2])}
    return expected, _engine(root).export(fbclip, ExportType.ONNX, export_root=root)


def test_a_graph_for_images_of_any_size(any_size) -> None:
    every, path = any_size
    compiled = openvino.Core().compile_model(path, "CPU", EXACT)
    for photo, expected in every.items():
        _agree(_run_onnx(path, _read(photo)), expected)
        _agree(_named(compiled(_read(photo))), expected)


def test_openvino_in_bfloat16(any_size) -> None:
    """What processors with bfloat16 do by default; others emulate it or take float32, and are as near or nearer."""
    every, path = any_size
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    for photo, expected in every.items():
        _agree(_named(compiled(_read(photo))), expected, tolerance=BFLOAT16_TOLERANCE)


def test_openvino_in_half_precision_with_a_fixed_batch(model, photos, tmp_path) -> None:
    fbclip = _calibrated(model(**LIGHT))
    expected = _engine(tmp_path).predict(fbclip, data_path=photos[0])
    read = _openvino(fbclip, tmp_path, compression_type=CompressionType.FP16, onnx_kwargs={"dynamic_axes": {}})
    assert list(read.input(0).shape) == [1, 3, 130, 180]
    _agree(_named(openvino.Core().compile_model(read, "CPU", EXACT)(_read(photos[0]))), expected, tolerance=0.01)
    assert json.loads(read.get_rt_info(["framework", "thresholds"]).astype(str))["origin"] == "labels"


def test_openvino_with_weights_and_activations_of_8_bit(model, surfaces, photos, tmp_path) -> None:
    fbclip = _calibrated(model(**LIGHT))
    expected = _engine(tmp_path).predict(fbclip, data_path=photos[0])
    read = _openvino(fbclip, tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=surfaces())
    axes = {len(op.output(0).partial_shape) for op in read.get_ops() if op.get_type_name() == "FakeQuantize"}
    assert axes == {3, 4}, "in five axes, rounding takes a fifth of the whole time"
    _agree(_named(openvino.Core().compile_model(read, "CPU", EXACT)(_read(photos[0]))), expected, tolerance=0.05)


@pytest.fixture
def graph():
    """A layer behind a resize, as at the input; cosines with two texts and a map's matrix, as at the output."""
    ops = pytest.importorskip("openvino.opset13")
    image = ops.parameter([-1, 3, 40, 60], np.float32)
    tokens = ops.reshape(
        ops.matmul(ops.constant(np.ones((6, 40), np.float32)), image, False, False),
        [-1, 3, 360],
        False,
    )
    layer = ops.matmul(tokens, ops.constant(np.eye(64, 360, dtype=np.float32)), False, True)
    texts = ops.matmul(layer, ops.constant(np.ones((2, 64), np.float32)), False, True)
    enlarged = ops.matmul(ops.constant(np.ones((9, 3), np.float32)), texts, False, False)
    return openvino.Model([enlarged], [image])


def test_of_all_products_layers_alone_are_quantised(graph) -> None:
    products = [op for op in graph.get_ordered_ops() if op.get_type_name() == "MatMul"]
    assert [is_layer(op) for op in products] == [False, True, False, False]
    quantised = quantize(graph, torch.rand(2, 3, 40, 60))
    left, layer, texts, right = (op for op in quantised.get_ordered_ops() if op.get_type_name() == "MatMul")
    types = [[source.get_node().get_type_name() for source in op.input_values()] for op in (left, layer, texts, right)]
    assert types[1][1] == "Multiply"  # weights of 8 bit and their scale
    assert not {"FakeQuantize", "Multiply"} & {*types[0], *types[2], *types[3]}
    assert "FakeQuantize" in [op.get_type_name() for op in quantised.get_ops()]
    openvino.Core().compile_model(quantised, "CPU")


@pytest.mark.parametrize("source", ["normal_source", "datamodule", "none"])
def test_int8_is_calibrated_on_normal_images(source, graph, model, surfaces, photos, monkeypatch) -> None:
    seen: list = []
    monkeypatch.setattr("anomalib_fbclip.host.export.quantize", lambda _, images: seen.extend(images))
    fbclip = model(normal_source=photos[0].parent if source == "normal_source" else None)
    if source == "none":
        with pytest.raises(ValueError, match="give normal_source, or a data module"):
            fbclip._post_training_quantization_ov(graph)
        return
    fbclip._post_training_quantization_ov(graph, surfaces() if source == "datamodule" else None)
    assert len(seen) == (len(photos) if source == "normal_source" else 8 + 4)  # trained and tested good images
    assert {image.shape for image in seen} == {(3, 40, 60)}
