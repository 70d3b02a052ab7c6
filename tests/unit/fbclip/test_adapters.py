# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Adapter files: the same model back, or a refusal that leaves the model as it was."""

import json
import pickle
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.common import safe_load
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module")
def clip(small_clip):
    return small_clip()


def build(clip, seed=0, **arguments):
    torch.manual_seed(seed)
    return FBCLIPModel(clip, **{"feature_layers": (1, 3), "n_ctx": 3, **arguments}).eval()


def refuse(model, path, text):
    before = {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}
    with pytest.raises(ValueError, match=text):
        model.load_adapter(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trained_state_dict().items())


def test_round_trip_also_from_the_hub(clip, tmp_path, monkeypatch):
    model, images = build(clip), torch.randn(1, 3, 32, 32)
    path = adapters.save(model, tmp_path / "owner" / "repo" / "a.safetensors", source="Surfaces", epoch=2)
    monkeypatch.setattr("anomalib_fbclip.adapted.hub.hf_hub_download", lambda repo, name, **_: tmp_path / repo / name)
    for place in (path, "hf://owner/repo/a.safetensors"):
        other = build(clip, seed=1)
        metadata = other.load_adapter(place)
        assert (metadata["source"], metadata["epoch"], metadata["feature_layers"]) == ("Surfaces", 2, [1, 3])
        assert torch.equal(other(images).anomaly_map, model(images).anomaly_map)
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_files_of_version_1_are_read_as_before(small_clip):
    """Written by this package before the file named its model."""
    folder = Path(__file__).parents[2] / "golden"
    model = build(small_clip(width=16), seed=1)
    metadata = model.load_adapter(folder / "adapter_version_1.safetensors")
    assert (metadata["format_version"], metadata["model"], metadata["source"]) == (1, "FBCLIP", "Surfaces")
    assert metadata["thresholds"] == {"image": 0.25, "pixel": 0.75, "origin": "labels"}
    expected = load_file(folder / "adapter_version_1_expected.safetensors")
    prediction = model(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    for name, tensor in expected.items():
        torch.testing.assert_close(getattr(prediction, name), tensor, atol=1e-6, rtol=0)


def test_a_file_of_another_model_is_refused_with_both_names(clip, tmp_path, monkeypatch):
    model = build(clip)
    monkeypatch.setattr(FBCLIPModel, "model_name", "Other")
    path = adapters.save(model, tmp_path / "a.safetensors")
    assert adapters.read(path)[1]["model"] == "Other"
    monkeypatch.undo()
    refuse(model, path, "made for the model Other, this is FBCLIP")


def test_refusals(clip, small_clip, tmp_path, monkeypatch):
    model = build(clip)
    path = adapters.save(model, tmp_path / "a.safetensors", source="Surfaces")
    content = path.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for altered in (content[:-1] + bytes([content[-1] ^ 1]), content.replace(b"Surfaces", b"Surfacez")):
        bad.write_bytes(altered)
        refuse(model, bad, "SHA-256")
    bad.write_bytes(content[: len(content) // 2])
    refuse(model, bad, "cannot be used")
    refuse(build(clip, feature_layers=(2,)), path, r"adapter \[1, 3\], model \[2\]")
    refuse(build(small_clip(seed=5)), path, "backbone_fingerprint")
    monkeypatch.setattr(clip, "name", "the same weights from a file")
    assert build(clip).load_adapter(path)["source"] == "Surfaces"
    save_file(load_file(path), bad)
    refuse(model, bad, "not an adapter")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.load_adapter(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match="aaa' does not exist"):
        model.load_adapter("a" * 300)


def test_published_format(golden_model, tmp_path):
    model, path = golden_model(), tmp_path / "a.pth"
    published = safe_load.load(GOLDEN / "fbclip_reference_a.pth")
    weights = published["model_trainable_params"]
    for change, text in (
        ({"scale_weights": torch.full((6,), torch.nan)}, "NaN"),
        ({"scale_weights": 3}, "scale_weights"),
        ({"scale_weights": torch.ones(7)}, r"\(7,\).*\(6,\)"),
        ({"surprise": torch.ones(1)}, "surprise"),
    ):
        torch.save({**published, "model_trainable_params": {**weights, **change}}, path)
        refuse(model, path, text)
    torch.save({**published, "model_trainable_params": {k: v for k, v in weights.items() if "norm" not in k}}, path)
    refuse(model, path, "missing")


@pytest.mark.parametrize("name", ["fbclip_reference_a.pth", "fbclip_reference_a_numpy1.pth"])
def test_the_authors_files_of_both_numpy_versions(golden, golden_model, name):
    metadata = (model := golden_model()).load_adapter(GOLDEN / name)
    assert type(metadata["loss"]) is float
    assert 0 < metadata["loss"] < 1
    torch.testing.assert_close(model.text_features(), golden["expected.text_features"].reshape(2, -1))


def test_the_authors_files_as_people_have_them(golden_model, tmp_path):
    """Trained on several GPUs (``module.``), in half precision, under another suffix."""
    model, published = golden_model(), safe_load.load(GOLDEN / "fbclip_reference_a.pth")
    expected = {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}
    for key in ("prompt_learner", "model_trainable_params"):
        published[key] = {
            f"module.{name}": tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in published[key].items()
        }
    for suffix in (".PTH", ".ckpt", ".pt"):
        torch.save(published, tmp_path / f"a{suffix}")
        model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in expected.items()})
        model.load_adapter(tmp_path / f"a{suffix}")
        torch.testing.assert_close(model.trained_state_dict(), expected, rtol=1e-3, atol=1e-6)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code from a file ran",))


def test_code_in_a_pickle_does_not_run(clip, tmp_path):
    path = tmp_path / "bomb.pth"
    for content in (Bomb(), np.float32(0), np.zeros(2), Path("a"), torch.nn.Linear(1, 1)):
        torch.save({"prompt_learner": content, "model_trainable_params": {}}, path)
        refuse(build(clip), path, r"cannot be used: it holds [\w.]+, which is no tensor .* not run$")
    path.write_bytes(pickle.dumps(Bomb()))
    refuse(build(clip), path, "cannot be used")


def test_no_message_advises_to_load_without_the_check(clip, tmp_path):
    path = tmp_path / "a.pth"
    for write in (
        lambda: torch.save(Bomb(), path),
        lambda: path.write_bytes(pickle.dumps(Bomb())),
        lambda: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path),
    ):
        write()
        with pytest.raises(ValueError, match="cannot be used") as caught:
            build(clip).load_adapter(path)
        assert "weights_only" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("content", [b"", b"e hello", b"hello world"])
def test_a_file_of_another_kind_is_called_so(content, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth.*damaged, or no file of torch\.save"):
        adapters.read(path)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".pth", ".pt", ".safetensors", ""]))
def test_random_bytes(tmp_path, content, suffix):
    path = tmp_path / f"random{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be used"):
        adapters.read(path)


def _rewrite(path, tensors, metadata):
    """An adapter whose hash fits again, as someone would write who means harm."""
    metadata = {**metadata, "sha256": adapters.digest(tensors, metadata)}
    save_file(tensors, path, {key: json.dumps(value) for key, value in metadata.items()})
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop("scale_weights"), r"missing tensors \['scale_weights'\]"),
        (lambda tensors: tensors.update(surprise=torch.ones(1)), r"unexpected \['surprise'\]"),
        (lambda tensors: tensors.update(scale_weights=torch.ones(7)), r"scale_weights is \(7,\) there and \(6,\)"),
        (lambda tensors: tensors["scale_weights"].fill_(torch.nan), "scale_weights holds NaN"),
        (lambda tensors: tensors.update(scale_weights=torch.full((6,), 1e300, dtype=torch.double)), "infinite"),
        (lambda tensors: tensors.update(scale_weights=torch.ones(6, dtype=torch.int)), "no dense tensor"),
    ],
)
def test_altered_tensors_with_a_fitting_hash(clip, tmp_path, change, text):
    model = build(clip)
    tensors, metadata = adapters.read(adapters.save(model, tmp_path / "a.safetensors"))
    change(tensors)
    refuse(model, _rewrite(tmp_path / "a.safetensors", tensors, metadata), rf"a\.safetensors.*{text}")


FIXED = {"image": 0.5, "pixel": 0.5, "origin": "fixed"}
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just({"a": 1})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"source": ["a"]}, "source"),
        ({"image_size": "56"}, "image_size='56'.*expected int"),
        ({"pretrained": 3}, "pretrained=3.*expected str"),
        ({"thresholds": [0.5]}, "thresholds"),
        ({"thresholds": {**FIXED, "image": 2}}, "from 0 to 1"),
        ({"thresholds": {**FIXED, "pixel": float("nan")}}, "from 0 to 1"),
        ({"thresholds": {"image": 0.5, "pixel": 0.5}}, "origin"),
        ({"thresholds": {**FIXED, "image": True}}, "image=True is no number"),
        ({"thresholds": {**FIXED, "score": 0.5}}, r"score=0\.5 is not known"),
        ({"thresholds": {**FIXED, "pictures": False}}, "pictures=False is no number"),
        ({"thresholds": {**FIXED, "interval": [0, "1"]}}, r"interval=\[0, '1'\] is no pair of numbers"),
        ({"thresholds": {**FIXED, "interval": []}}, r"interval=\[\] is no pair of numbers"),
        ({"mean": [0.5, 0.5]}, r"mean=\[0.5, 0.5\].*expected three numbers"),
        ({"std": [0.5, 0.5, "0.5"]}, "std=.*expected three numbers"),
        ({"mean": 0.5}, "mean=0.5.*expected list"),
        ({"mean": [0.5, 0.5, 0.5]}, r"mean: adapter \[0.5, 0.5, 0.5\], model \[0.48145466, 0.4578275, 0.40821073\]"),
        ({"quick_gelu": False}, "quick_gelu: adapter False, model True"),
        ({"format_version": 3}, "upgrade"),
        ({"format": "another"}, "not an adapter"),
    ],
)
def test_altered_metadata_with_a_fitting_hash(clip, tmp_path, change, text):
    model = build(clip)
    tensors, metadata = adapters.read(adapters.save(model, tmp_path / "a.safetensors", thresholds=FIXED))
    assert metadata["thresholds"] == FIXED
    refuse(model, _rewrite(tmp_path / "a.safetensors", tensors, {**metadata, **change}), rf"a\.safetensors.*{text}")


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_metadata_is_refused_by_name_or_fits(clip, tmp_path, data):
    model = build(clip)
    tensors, metadata = adapters.read(adapters.save(model, tmp_path / "a.safetensors", thresholds=FIXED, source="x"))
    key = data.draw(st.sampled_from(sorted(metadata)))
    path = _rewrite(tmp_path / "a.safetensors", tensors, {**metadata, key: data.draw(ODD)})
    try:
        read = model.load_adapter(path)
    except ValueError as error:
        assert "a.safetensors" in str(error)  # noqa: PT017  # both ends are right for some values
    else:
        ours = model.architecture()
        same = ours.keys() - {"image_size", "smoothing_sigma", "smooth_logits", "backbone"}
        assert all(read.get(name, ours[name]) == ours[name] for name in same)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(6, device="meta"),
        torch.zeros(6).to_sparse(),
        torch.zeros(1).expand(2**40),
        torch.zeros(6, dtype=torch.complex64),
    ],
)
def test_tensors_that_are_not_there(golden_model, tmp_path, tensor):
    published = safe_load.load(GOLDEN / "fbclip_reference_a.pth")
    trained = {**published["model_trainable_params"], "scale_weights": tensor}
    torch.save({**published, "model_trainable_params": trained}, tmp_path / "a.pth")
    refuse(golden_model(), tmp_path / "a.pth", r"a\.pth.*(scale_weights|cannot be used)")


def test_files_that_do_not_say_are_read_as_for_openais_statistics(clip, tmp_path, monkeypatch):
    tensors, metadata = adapters.read(adapters.save(build(clip), tmp_path / "a.safetensors"))
    for key in ("mean", "std", "quick_gelu"):
        del metadata[key]
    path = _rewrite(tmp_path / "a.safetensors", tensors, metadata)
    build(clip).load_adapter(path)
    monkeypatch.setattr(clip, "std", (0.5, 0.5, 0.5))
    refuse(build(clip), path, r"std: adapter \[0.26862954, 0.26130258, 0.27577711\], model \[0.5, 0.5, 0.5\]")


def test_a_swapped_file_does_not_fit_another_backbone(clip, small_clip, tmp_path):
    mine = adapters.save(build(clip), tmp_path / "mine.safetensors")
    adapters.save(build(small_clip(seed=5)), tmp_path / "theirs.safetensors").replace(mine)
    refuse(build(clip), mine, "backbone_fingerprint: adapter .* model")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_any_changed_byte_is_noticed(clip, tmp_path, place, flip, cut):
    model = build(clip)
    path = adapters.save(model, tmp_path / "a.safetensors", source="Surfaces")
    content = bytearray(path.read_bytes())
    index = int(place * len(content))
    if cut:
        del content[index:]
    else:
        content[index] ^= flip
    path.write_bytes(content)
    refuse(model, path, "cannot be used")
