# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Backbone weights, checkpoints and few-shot memories that are damaged or belong to something else."""

import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from traceback import format_exception

import pytest
import torch
from anomalib.engine import Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.adapted.normal_memory import NormalMemory
from anomalib_fbclip.clip.build import EMBEDDED, load_clip, read_weights
from anomalib_fbclip.clip.openai import build_from_openai_state_dict
from anomalib_fbclip.host.checkpoints import NamingCheckpointIO

BACKBONE = "ViT-B-32"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code from a file ran",))


def _full_of(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_full_of(math.nan), "visual.proj holds NaN"),
        (_full_of(math.inf), "visual.proj holds NaN or infinite"),
        (torch.Tensor.int, "visual.proj is no dense tensor of floating-point"),
        (lambda tensor: tensor[:-1], "does not fit the backbone, give the name"),
        (None, "does not fit the backbone"),
    ],
)
def test_altered_backbone_weights(change, message: str, suffix: str, small_state, tmp_path, monkeypatch) -> None:
    state, path = small_state(), tmp_path / f"clip{suffix}"
    # As if open_clip had a tower of this size.
    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: build_from_openai_state_dict(state))
    write = save_file if suffix == ".safetensors" else torch.save
    write(state, path)
    assert load_clip(BACKBONE, path).embed_dim == 32
    altered = dict(state)
    if change is None:
        del altered["visual.proj"]
    else:
        altered["visual.proj"] = change(altered["visual.proj"]).contiguous()
    write(altered, path)
    with pytest.raises(ValueError, match=rf"(?s)clip\{suffix}'.*{message}"):
        load_clip(BACKBONE, path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, {"a": "text"}, {"a": None}, torch.zeros(2), "text"])
def test_files_that_hold_something_else(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip\.pt' (cannot be read|hold something else)"):
        read_weights(tmp_path / "clip.pt")


@pytest.mark.parametrize("tensor", [torch.zeros(6, device="meta"), torch.zeros(6).to_sparse()])
def test_tensors_that_are_not_there(tensor: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"visual.proj": tensor}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"clip\.pt'.*(no dense tensor|cannot be read)"):
        read_weights(tmp_path / "clip.pt")


@pytest.mark.parametrize(
    "change",
    [{"token_embedding.ids": torch.tensor([70000])}, {"token_embedding.rows": torch.ones(2, 3)}],
)
def test_a_damaged_vocabulary(change: dict, tmp_path: Path) -> None:
    tensors = {
        "token_embedding.ids": torch.tensor([3]),
        "token_embedding.rows": torch.ones(1, 4),
        "token_embedding.unknown": torch.zeros(4),
    }
    save_file(tensors, tmp_path / "clip.safetensors")
    assert read_weights(tmp_path / "clip.safetensors")["token_embedding.weight"][3].sum() == 4
    save_file({**tensors, **change}, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match=r"clip\.safetensors' cannot be read"):
        read_weights(tmp_path / "clip.safetensors")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("visual.positional_embedding", (0, 64), "empty tensor"),
        ("visual.conv1.weight", (0, 3, 0, 0), "empty tensor"),
        ("visual.conv1.weight", (64,), "another number of axes"),
        ("text_projection", (64,), "another number of axes"),
        ("visual.positional_embedding", (14, 64), "does not fit"),
        ("token_embedding.weight", (64, 49408), "widths do not fit"),
        ("visual.positional_embedding", (17, 63), "widths do not fit"),
    ],
)
def test_sizes_that_no_backbone_has(name: str, shape: tuple[int, ...], message: str, small_state) -> None:
    with pytest.raises(ValueError, match=message):
        build_from_openai_state_dict({**small_state(), name: torch.zeros(shape)})


def test_code_in_backbone_weights_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    for content in (lambda: torch.save({"a": Bomb()}, path), lambda: path.write_bytes(pickle.dumps(Bomb()))):
        content()
        with pytest.raises(ValueError, match=r"clip\.pt' cannot be read") as refused:
            read_weights(path)
        assert "weights_only" not in "".join(format_exception(refused.value))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_cut_or_altered_backbone_weights(data: st.DataObject, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    write = save_file if suffix == ".safetensors" else torch.save
    write({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content[:cut] if data.draw(st.booleans()) else content)
    if changed:
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        read = read_weights(path)
    except ValueError as error:
        assert f"clip{suffix}" in str(error)  # noqa: PT017  # most files are refused, a changed digit is not
    else:
        assert all(torch.isfinite(tensor).all() for tensor in read.values())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A few-shot model's checkpoint, and a folder of images."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.linear_gradient("L").save(folder / "pictures" / name)
    engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1, logger=False)
    model = FBCLIP("tiny", image_size=56, k_shot=1, few_shot_source=folder / "pictures")
    engine.predict(model, data_path=folder / "pictures", return_predictions=False)
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt", folder / "pictures"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.memory.tokens", _full_of(math.nan), "holds NaN or infinite values in model.memory.tokens"),
        ("model.memory.peak", _full_of(math.inf), "model.memory.peak"),
        ("model.memory.tokens", lambda tensor: tensor[0], "size mismatch for tokens|model.memory.tokens"),
        ("model.memory.tokens", lambda tensor: tensor[..., :-1], "model.memory.tokens"),
        ("model.scale_weights", _full_of(math.nan), "NaN or infinite values in model.scale_weights"),
        ("model.scale_weights", lambda tensor: tensor[:-1], "scale_weights"),
        ("model.scale_weights", None, "scale_weights"),
        ("model.scale_weights", torch.Tensor.int, "damaged: model.scale_weights is no dense floating-point tensor"),
        ("model.scale_weights", torch.Tensor.to_sparse, "model.scale_weights is no dense"),
        ("model.scale_weights", lambda _: "text", "model.scale_weights is no dense"),
        ("model.extra", lambda _: torch.ones(1), "extra"),
    ],
)
def test_altered_checkpoints(name: str, change, message: str, checkpoint, tmp_path: Path) -> None:
    path, pictures = checkpoint
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    if change is None:
        del state[name]
    else:
        state[name] = change(state.get(name, torch.ones(1)))
    torch.save(content, tmp_path / "altered.ckpt")
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    with pytest.raises((ValueError, RuntimeError), match=message):
        engine.predict(FBCLIP("tiny", image_size=56, k_shot=1), data_path=pictures, ckpt_path=tmp_path / "altered.ckpt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off or of another kind"),
        (b"epochs: 3", "another kind"),
        (lambda path: path.read_bytes()[:-100], "cut off"),
        (lambda path: path.read_bytes()[:2000] + b"?" + path.read_bytes()[2001:], "is altered"),
        (lambda _: (EMBEDDED["tiny"] / "fbclip.safetensors").read_bytes(), "goes into weights"),
        (lambda path: torch.save({**torch.load(path, weights_only=True), "hyper_parameters": Bomb()}, path), "not run"),
    ],
)
def test_unreadable_checkpoints_are_named(content, message: str, checkpoint, tmp_path: Path) -> None:
    path, pictures = tmp_path / "altered.ckpt", checkpoint[1]
    shutil.copyfile(checkpoint[0], path)
    altered = content(path) if callable(content) else content
    if altered is not None:
        path.write_bytes(altered)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    with pytest.raises(ValueError, match=rf"altered\.ckpt'.*{message}"):
        engine.predict(FBCLIP("tiny", image_size=56, k_shot=1), data_path=pictures, ckpt_path=path)
    with pytest.raises(ValueError, match=rf"altered\.ckpt'.*{message}"):
        FBCLIP.load_from_checkpoint(path)


@pytest.mark.parametrize("said", [{}, [], {"fingerprint": "x"}], ids=str)
def test_a_checkpoint_that_does_not_know_its_backbone_is_refused(said, checkpoint, tmp_path: Path) -> None:
    torch.save({**torch.load(checkpoint[0], weights_only=True), "anomalib_fbclip": said}, tmp_path / "altered.ckpt")
    with pytest.raises(ValueError, match="damaged: what it says of its backbone"):
        FBCLIP.load_from_checkpoint(tmp_path / "altered.ckpt")


def test_weights_that_are_no_checkpoint_are_named(tmp_path: Path) -> None:
    torch.save({"prompts.normal_context": torch.ones(3)}, tmp_path / "published.pth")
    with pytest.raises(ValueError, match=r"published\.pth'.*has no state_dict.*goes into weights"):
        NamingCheckpointIO().load_checkpoint(tmp_path / "published.pth")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_byte_of_a_checkpoint_is_found(data: st.DataObject, tmp_path: Path) -> None:
    path, state = tmp_path / "small.ckpt", {"state_dict": {"a": torch.arange(6.0), "b": torch.ones(2, 2)}, "epoch": 1}
    torch.save(state, path)
    changed = bytearray(path.read_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        read = NamingCheckpointIO().load_checkpoint(path)
    except ValueError as error:
        assert "small.ckpt" in str(error)  # noqa: PT017  # most files are refused, padding means nothing
    else:
        assert read["epoch"] == 1
        assert all(torch.equal(read["state_dict"][name], tensor) for name, tensor in state["state_dict"].items())


def test_the_checkpoint_itself_works(checkpoint, tmp_path: Path) -> None:
    path, pictures = checkpoint
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    assert len(engine.predict(FBCLIP("tiny", image_size=56, k_shot=1), data_path=pictures, ckpt_path=path)) == 2


def test_a_memory_of_another_model_is_refused() -> None:
    memory, other = NormalMemory(2, 8), NormalMemory(3, 8)
    other.fill([torch.randn(1, 5, 8) for _ in range(3)])
    with pytest.raises(RuntimeError, match="tokens"):
        memory.load_state_dict(other.state_dict())
    assert memory.num_images == 0
