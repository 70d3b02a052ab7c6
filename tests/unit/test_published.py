# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Published weights in a pickled module: its tensors are read, and nothing in the file is run."""

import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import pickle_as, write_afclip
from torch import nn

from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.adapted.pickled_module import read_module_tensors
from anomalib_fbclip.afclip.torch_model import AFCLIPModel

GOLDEN = Path(__file__).parents[1] / "golden"
PACKAGES = ("clip.adaptor",)


def explode():
    pytest.fail("code from a file ran")


class Bomb:
    """What it calls when it is read is named by an instance."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def archive(path, content):
    """A file of torch.save around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", content)
        file.writestr("a/byteorder", "little")
    return path


def test_the_fixture_and_every_kind_of_module(tmp_path):
    found = read_module_tensors(GOLDEN / "afclip_reference_a_adaptor.pt", PACKAGES)
    assert found["attention.attn.to_out.0.bias"].shape == (64,)
    assert "clip.adaptor" not in sys.modules

    def build(own):
        module = own()
        module.layers = nn.ModuleList([nn.Linear(3, 2).half(), nn.BatchNorm1d(2)])
        module.register_buffer("table", torch.arange(6).view(2, 3).T)
        build.expected = module.state_dict()
        return module

    path = pickle_as(tmp_path / "a.pt", ("Own",), build)
    found = read_module_tensors(path, PACKAGES)
    assert found.keys() == build.expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in build.expected.items())
    assert found["layers.0.weight"].dtype == torch.half
    with pytest.raises(ValueError, match=r"names clip\.adaptor\.Own, which no tensor needs"):
        read_module_tensors(path)


@pytest.mark.parametrize(
    ("bomb", "name"),
    [
        (Bomb(explode), r"test_published\.explode"),
        (Bomb(eval, "explode()"), r"eval"),
        (Bomb(getattr, int, "from_bytes"), r"getattr"),
        (Bomb(torch.load, "x"), r"torch\.serialization\.load"),
    ],
)
def test_code_is_refused_by_name(tmp_path, bomb, name):
    def build(own):
        module = own()
        module.surprise = bomb
        return module

    path = pickle_as(tmp_path / "a_adaptor.pt", ("Own",), build)
    with pytest.raises(ValueError, match=rf"{name}.*nothing of it was run"):
        read_module_tensors(path, PACKAGES)
    archive(path, pickle.dumps(bomb))
    with pytest.raises(ValueError, match=name):
        read_module_tensors(path, PACKAGES)


def test_what_builds_a_tensor_cannot_be_altered(tmp_path):
    # Protocol 2, look up the target, {"__call__": 1}, BUILD with it as the target's state, end.
    for target in ("torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "clip.adaptor\nOwn"):
        content = b"\x80\x02c" + target.encode() + b"\n}X\x08\0\0\0__call__K\x01sb."
        with pytest.raises(ValueError, match=r"a\.pt"):
            read_module_tensors(archive(tmp_path / "a.pt", content), PACKAGES)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_gives_tensors_or_a_value_error(tmp_path, place, flip, cut):
    content = bytearray((GOLDEN / "afclip_reference_a_adaptor.pt").read_bytes())
    # Nearly all bytes are numbers: the pickle is at the beginning.
    index = int(place * 6000)
    if cut:
        del content[index:]
    else:
        content[index] ^= flip
    (tmp_path / "a.pt").write_bytes(content)
    try:
        found = read_module_tensors(tmp_path / "a.pt", PACKAGES)
    except ValueError as error:
        assert "a.pt" in str(error) or "nested" in str(error)  # noqa: PT017  # both ends are right
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())


@pytest.fixture
def clip(small_clip):
    return small_clip()


def build(clip, seed=0):
    torch.manual_seed(seed)
    return AFCLIPModel(clip, feature_layers=(1, 3), n_ctx=3).eval()


def test_prompt_file_or_folder_or_hub(clip, tmp_path, monkeypatch):
    model, images = build(clip), torch.randn(1, 3, 32, 32)
    path = write_afclip(model, tmp_path / "weight", "visa")
    fetched = []
    fetch = "anomalib_fbclip.adapted.hub.hf_hub_download"
    monkeypatch.setattr(fetch, lambda _, name, **__: fetched.append(name) or tmp_path / name)
    for place in (path, path.parent, "hf://owner/repo/weight/visa_prompt.pt"):
        other = build(clip, seed=1)
        metadata = other.load_adapter(place)
        assert (metadata["model"], metadata["n_ctx"]) == ("AFCLIP", 3)
        assert torch.equal(other(images).anomaly_map, model(images).anomaly_map)

    assert set(fetched) == {"weight/visa_prompt.pt", "weight/visa_adaptor.pt"}

    with pytest.raises(ValueError, match=r"visa_adaptor\.pt.*one of two files: give the other, \*prompt\.pt"):
        model.load_adapter(path.with_name("visa_adaptor.pt"))
    write_afclip(model, path.parent, "mvtec")
    with pytest.raises(ValueError, match=r"\['mvtec_prompt\.pt', 'visa_prompt\.pt'\].*give one file"):
        model.load_adapter(path.parent)
    path.with_name("visa_adaptor.pt").unlink()
    with pytest.raises(ValueError, match=r"missing beside it: expected 'visa_adaptor\.pt'"):
        model.load_adapter(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder with none"):
        model.load_adapter(tmp_path / "empty")


def test_files_that_do_not_fit_are_refused_with_both_sizes(clip, small_clip, tmp_path):
    path = write_afclip(build(clip), tmp_path, "visa")
    with pytest.raises(ValueError, match="n_ctx: adapter 3, model 5"):
        AFCLIPModel(clip, n_ctx=5).load_adapter(path)
    with pytest.raises(ValueError, match=r"is \(64,\) there and \(32,\)|is \(.*64.*\) there and \(.*32.*\)"):
        build(small_clip(width=32)).load_adapter(path)
    torch.save(torch.zeros(3, 64), path)
    with pytest.raises(ValueError, match=r"the prompt is \(3, 64\)"):
        build(clip).load_adapter(path)


def test_code_in_the_adaptor_does_not_run_when_weights_are_loaded(clip, tmp_path):
    model = build(clip)
    path = write_afclip(model, tmp_path, "visa")
    archive(path.with_name("visa_adaptor.pt"), pickle.dumps(Bomb(explode)))
    before = {name: tensor.clone() for name, tensor in model.trained_state_dict().items()}
    with pytest.raises(ValueError, match="nothing of it was run"):
        model.load_adapter(path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.trained_state_dict().items())


def test_each_format_is_told_from_the_others(tmp_path):
    names = {"afclip_reference_a_prompt.pt": "AFCLIP", "anomalyclip_reference_a.pth": "AnomalyCLIP"}
    for name, model in {**names, "fbclip_reference_a.pth": "FBCLIP"}.items():
        assert adapter_file.read(GOLDEN / name)[1]["model"] == model
    shutil.copy(GOLDEN / "afclip_reference_a_prompt.pt", tmp_path / "renamed.pt")
    with pytest.raises(ValueError, match="adaptor is missing"):
        adapter_file.read(tmp_path / "renamed.pt")
