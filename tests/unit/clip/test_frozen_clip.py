# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The frozen backbone: the right activation on every path, no network for a file, clear refusals."""

import json
import socket

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from anomalib_fbclip.clip import FrozenCLIP, load_clip
from anomalib_fbclip.clip.vision import resize_position_embedding


@pytest.fixture(scope="module")
def state(small_state):
    return small_state()


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "ViT-test-8.json"
    vision = {"image_size": 32, "layers": 4, "width": 64, "head_width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    path.write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        msg = "no network"
        raise OSError(msg)

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def literal_tokens(state, images, layers, activation):
    x = F.conv2d(images, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat((state["visual.class_embedding"].expand(len(x), 1, -1), x), 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (64,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    for i in range(layers):
        part = {
            k.split(f"resblocks.{i}.")[1]: v
            for k, v in state.items()
            if k.startswith(f"visual.transformer.resblocks.{i}.")
        }
        y = F.layer_norm(x, (64,), part["ln_1.weight"], part["ln_1.bias"])
        q, k, v = (y @ part["attn.in_proj_weight"].T + part["attn.in_proj_bias"]).chunk(3, -1)
        y = (q @ k.transpose(1, 2) / 8).softmax(-1) @ v
        x = x + y @ part["attn.out_proj.weight"].T + part["attn.out_proj.bias"]
        y = F.layer_norm(x, (64,), part["ln_2.weight"], part["ln_2.bias"])
        y = activation(y @ part["mlp.c_fc.weight"].T + part["mlp.c_fc.bias"])
        x = x + y @ part["mlp.c_proj.weight"].T + part["mlp.c_proj.bias"]
    return x


@pytest.mark.usefixtures("offline")
def test_quick_gelu_on_every_path_without_network(state, named, tmp_path):
    torch.save(state, tmp_path / "clip.pt")
    save_file(state, tmp_path / "clip.safetensors")
    images = torch.randn(2, 3, 32, 32)
    quick = literal_tokens(state, images, 2, lambda x: x * torch.sigmoid(1.702 * x))
    exact = literal_tokens(state, images, 2, F.gelu)
    clips = [FrozenCLIP.from_state_dict(state)]
    clips += [load_clip(named, tmp_path / name) for name in ("clip.pt", "clip.safetensors")]
    for clip in clips:
        tokens = clip.encode_image(images, (2,))[0]
        torch.testing.assert_close(tokens, quick, rtol=0, atol=1e-4)
        assert (tokens - exact).abs().max() > 1e-3
    plain = load_clip(named, tmp_path / "clip.pt", quick_gelu=False).encode_image(images, (2,))[0]
    torch.testing.assert_close(plain, exact, rtol=0, atol=1e-4)


def test_layers_sizes_and_positions(small_clip):
    clip = small_clip(image_size=40)
    tokens = clip.encode_image(torch.zeros(1, 3, 40, 40), (1, 4))
    assert [t.shape for t in tokens] == [(1, 26, 64)] * 2
    for layers in ((), (0,), (5,), (2, 1), (1, 1)):
        with pytest.raises(ValueError, match="from 1 to 4"):
            clip.check_layers(layers)
    with pytest.raises(ValueError, match="image_size=41"):
        small_clip(image_size=41)
    positions = torch.randn(17, 6)
    grid = F.interpolate(positions[1:].T.view(1, 6, 4, 4), size=(7, 7), mode="bilinear")
    torch.testing.assert_close(resize_position_embedding(positions, 7)[1:], grid[0].flatten(1).T)


def test_stays_frozen(small_clip):
    clip = small_clip()
    torch.nn.ModuleList([clip]).train()
    assert not any(module.training for module in clip.modules())
    assert not any(parameter.requires_grad for parameter in clip.parameters())
    assert clip.fingerprint() == small_clip().fingerprint() != small_clip(seed=1).fingerprint()


def test_fingerprint_of_a_tensor_past_float32(small_clip, monkeypatch):
    clip = small_clip()
    large = torch.zeros(49408 * 768, dtype=torch.uint8)
    monkeypatch.setattr(clip, "state_dict", lambda: {"large": large})
    assert len(clip.fingerprint()) == 16


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code from a file ran",))


@pytest.mark.usefixtures("offline")
def test_bad_weights(state, named, tmp_path):
    path = tmp_path / "clip.pt"
    with pytest.raises(FileNotFoundError, match=r"clip\.pt"):
        load_clip(named, path)
    torch.save(state, path)
    content = path.read_bytes()
    for damaged in (b"", b"no weights", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"clip\.pt"):
            load_clip(named, path)
    for wrong in (Bomb(), {"a": 1}, [1], {k: v for k, v in state.items() if "proj" not in k}):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=r"clip\.pt"):
            load_clip(named, path)
    with pytest.raises(ValueError, match="ViT-none"):
        load_clip("ViT-none")
    with pytest.raises(ValueError, match="nothing"):
        load_clip("ViT-B-32", "nothing")


def test_no_network_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        msg = "no network"
        raise OSError(msg)

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ConnectionError, match=r"(?s)ViT-L-14-336/openai.*fetch.*ViT-L-14-336px.*pretrained="):
        load_clip()
