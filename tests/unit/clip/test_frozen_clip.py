# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The frozen backbone: the right activation on every path, no network for a file, clear refusals."""

import json
import math
import re
import socket

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from anomalib_fbclip import FBCLIP, FiSeCLIP
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.clip import FrozenCLIP, load_clip
from anomalib_fbclip.clip.build import tag_needs_quick_gelu
from anomalib_fbclip.clip.frozen import CLIP_MEAN
from anomalib_fbclip.clip.openai import build_from_openai_state_dict
from anomalib_fbclip.clip.vision import resize_position_embedding


@pytest.fixture(scope="module")
def state(small_state):
    return small_state()


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    vision = {"image_size": 32, "layers": 4, "width": 64, "head_width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    variants = {
        "": {},
        "-quickgelu": {"quick_gelu": True},
        "-custom": {"custom_text": True},
        "-worldwide": {"text_cfg": {**text, "vocab_size": 901629}},
    }
    for variant, change in variants.items():
        (folder / f"ViT-test-8{variant}.json").write_text(json.dumps({**config, **change}))
    open_clip.add_model_config(folder)
    return "ViT-test-8"


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


class Archive(torch.nn.Module):
    """As OpenAI's: a scripted module whose state dict holds the weights and three numbers."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            *parts, leaf = name.split(".")
            place = self
            for part in parts:
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.register_buffer(leaf, tensor)


NUMBERS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(49408)}


@pytest.mark.usefixtures("offline")
def test_the_activation_follows_the_weights_without_network(state, named, tmp_path, caplog):
    images = torch.randn(2, 3, 32, 32)
    quick = literal_tokens(state, images, 2, lambda x: x * torch.sigmoid(1.702 * x))
    exact = literal_tokens(state, images, 2, F.gelu)
    assert (quick - exact).abs().max() > 1e-3

    def check(expected, backbone, path=None, warns=False, **arguments):
        caplog.clear()
        clip = FrozenCLIP.from_state_dict(state) if path is None else load_clip(backbone, path, **arguments)
        torch.testing.assert_close(clip.encode_image(images, (2,))[0], expected, rtol=0, atol=1e-4)
        assert clip.quick_gelu == (expected is quick)
        assert ["quick_gelu" in record.getMessage() for record in caplog.records] == ([True] if warns else [])

    torch.save(state, tmp_path / "clip.pt")
    save_file(state, tmp_path / "clip.safetensors")
    torch.save({**state, **NUMBERS}, tmp_path / "openai.pt")
    torch.jit.script(Archive({**state, **NUMBERS})).save(tmp_path / "archive.pt")
    torch.save(state, tmp_path / "vit-quickgelu-laion400m.PT")
    check(quick, None)
    for shows in ("openai.pt", "archive.pt", "vit-quickgelu-laion400m.PT"):
        check(quick, named, tmp_path / shows)
    check(quick, f"{named}-quickgelu", tmp_path / "clip.pt")
    for silent in ("clip.pt", "clip.safetensors"):
        check(exact, named, tmp_path / silent, warns=True)
    check(exact, named, tmp_path / "openai.pt", quick_gelu=False)
    check(exact, f"{named}-quickgelu", tmp_path / "clip.pt", quick_gelu=False)
    check(quick, named, tmp_path / "clip.pt", quick_gelu=True)


@pytest.mark.parametrize(
    ("backbone", "tag", "quick_gelu", "mean"),
    [
        ("ViT-L-14", "openai", True, CLIP_MEAN),
        ("ViT-L-14", "laion2b_s32b_b82k", False, (0.5, 0.5, 0.5)),
        ("ViT-L-14-quickgelu", "metaclip_400m", True, CLIP_MEAN),
        ("ViT-B-32", "laion400m_e32", True, CLIP_MEAN),  # its file is named vit_b_32-quickgelu
        ("ViT-B-32", "laion2b_s34b_b79k", False, CLIP_MEAN),
    ],
)
def test_a_tag_brings_its_activation_and_statistics(state, tmp_path, monkeypatch, backbone, tag, quick_gelu, mean):
    torch.save(state, tmp_path / "clip.pt")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: str(tmp_path / "clip.pt"))
    monkeypatch.setattr(
        open_clip,
        "create_model",
        lambda *_, quick_gelu, **__: build_from_openai_state_dict(state, quick_gelu),
    )
    clip = load_clip(backbone, tag)
    assert (clip.quick_gelu, clip.mean) == (quick_gelu, mean)
    fbclip = FBCLIP(backbone, tag, weights=None)
    for model in (fbclip, FiSeCLIP(backbone, tag)):
        assert tuple(model.pre_processor.transform.transforms[1].mean) == mean
        assert f"mean={list(mean)}" in str(model.describe()["pre_processing"])
    assert fbclip.synthesis.mean.flatten().tolist() == pytest.approx(mean)
    metadata = adapters.read(fbclip.save_adapter(tmp_path / "a.safetensors"))[1]
    assert (metadata["mean"], metadata["quick_gelu"]) == (list(mean), quick_gelu)

    # The same weights from a file, which does not show how images are normalised.
    same = {"backbone": backbone, "pretrained": str(tmp_path / "clip.pt"), "quick_gelu": quick_gelu}
    told = FBCLIP(**same, weights=tmp_path / "a.safetensors", pre_processor=fbclip.pre_processor)
    assert told.model.clip.mean == mean
    assert told.synthesis.mean.flatten().tolist() == pytest.approx(mean)
    if mean != CLIP_MEAN:
        with pytest.raises(ValueError, match="give the weights by their tag, or a pre_processor"):
            FBCLIP(**same, weights=tmp_path / "a.safetensors")


def test_two_tags_need_quick_gelu_whatever_the_version_of_open_clip_says():
    tags = ("openai", "dfn2b", "laion2b_s34b_b79k")
    assert [tag_needs_quick_gelu(tag, {}, {}) for tag in tags] == [True, True, False]


def _custom_text(state):
    mine = ("visual.", "logit_scale")
    return {name if name.startswith(mine) else f"text.{name}": tensor for name, tensor in state.items()}


def _transformers(state):
    """OpenAI's names and shapes to those of transformers' ``CLIPModel``."""
    fixed = {
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms |= {"ln_final": "text_model.final_layer_norm"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts |= {"attn.out_proj": "self_attn.out_proj"}
    theirs = {"text_model.embeddings.position_ids": torch.arange(77)}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if name in fixed:
            theirs[fixed[name]] = (tensor.T if name in {"visual.proj", "text_projection"} else tensor).contiguous()
        elif stem in norms:
            theirs[f"{norms[stem]}.{leaf}"] = tensor
        else:
            tower, number, part = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name).groups()
            at = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
            if part.startswith("attn.in_proj"):
                for letter, share in zip("qkv", tensor.chunk(3), strict=True):
                    theirs[f"{at}self_attn.{letter}_proj.{part.removeprefix('attn.in_proj_')}"] = share.clone()
            else:
                stem, _, leaf = part.rpartition(".")
                theirs[f"{at}{parts[stem]}.{leaf}"] = tensor
    return theirs


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_the_files_that_people_have(state, named, custom, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    backbone = f"{named}-custom" if custom else named
    trained = {f"module.{name}": tensor.half() for name, tensor in state.items()}
    mask = torch.full((77, 77), -math.inf).triu(1)
    files = {
        "plain.pt": state,
        "custom_text.pth": _custom_text(state),
        "training.ckpt": {"epoch": 3, "name": "run", "state_dict": trained, "optimizer": {"state": {0: {"step": 1}}}},
        "mask.PTH": {**state, "attn_mask": mask, "logit_bias": torch.zeros(())},
        "transformers.bin": _transformers(state),
    }
    images, texts = torch.randn(1, 3, 32, 32), torch.randint(1, 999, (2, 77))
    wanted = None
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        clip = load_clip(backbone, f"~/{name}", quick_gelu=True)
        got = [
            clip.project(clip.encode_image(images, (4,))[0]),
            clip.project_text(clip.encode_text(clip.embed_text(texts))),
        ]
        wanted = got if wanted is None else wanted
        for value, expected in zip(got, wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0.05 if name == "training.ckpt" else 1e-5)
    # One projection missing, as in a file that was cut by hand.
    torn = _transformers(state)
    del torn["vision_model.encoder.layers.0.self_attn.k_proj.weight"]
    torch.save(torn, tmp_path / "torn.bin")
    with pytest.raises(ValueError, match=r"torn\.bin' cannot be read"):
        load_clip(backbone, tmp_path / "torn.bin")


@pytest.mark.usefixtures("offline", "named")
@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        ("ViT-H-14-CLIPA", r"another tokenizer than CLIP's \(bert-base-uncased\)"),
        ("xlm-roberta-base-ViT-B-32", r"another tokenizer than CLIP's \(xlm-roberta-base\)"),
        ("ViT-B-16-SigLIP", r"timm/ViT-B-16-SigLIP\); its image tower is timm's vit_base_patch16_siglip_224"),
        ("ViT-test-8-worldwide", r"another tokenizer than CLIP's \(of 901629 tokens\)"),
        ("coca_ViT-B-32", "pools its tokens by attention"),
        ("RN50-quickgelu", "convolutional"),
        ("EVA02-B-16", "timm's eva02_base_patch16_clip_224"),
        ("convnext_base", "timm's convnext_base"),
    ],
)
def test_unsuitable_backbones_are_refused_by_name_before_anything_is_built(backbone, why, monkeypatch):
    for name in ("create_model", "download_pretrained"):
        monkeypatch.setattr(open_clip, name, lambda *_, **__: pytest.fail("built or downloaded"))
    monkeypatch.setattr("anomalib_fbclip.adapted.hub.download", lambda *_: pytest.fail("downloaded"))
    for build_model in (
        lambda: load_clip(backbone, None),
        lambda: load_clip(backbone, "openai"),
        lambda: FBCLIP(backbone, "openai", weights="hf://owner/repo/a.safetensors"),
        lambda: FiSeCLIP(backbone, "openai"),
    ):
        with pytest.raises(ValueError, match=rf"backbone='{backbone}' cannot be used: .*{why}.*docs/backbones\.md"):
            build_model()


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

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(ConnectionError, match=r"(?s)ViT-L-14-336/openai.*fetch.*ViT-L-14-336px.*pretrained="):
        load_clip()
