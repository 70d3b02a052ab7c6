# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What is damaged, and what counts as a clean end."""

from __future__ import annotations

import inspect
import json
import math
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from anomalib_fbclip import FBCLIP, FiSeCLIP
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.clip.build import EMBEDDED, read_weights
from anomalib_fbclip.clip.openai import build_from_openai_state_dict
from anomalib_fbclip.host.unreadable import read_picture

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

CLEAN = (ValueError, TypeError, FileNotFoundError)
_SIZE = 32
_ODD = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 8, 2**31, -(2**63), 0.0, -0.5, 0.5, 1.0, 1e-30, 1e30, math.nan, math.inf),
    *("", "half", "auto", "none", "qq", "full", "\x00", "ü", "nowhere.safetensors", "hf://", "a" * 300),
    *((), (0,), (1,), (1, 3), (3, 1), (8, 8), (1.5,), ("id",), ("id", "id"), (None,), {}, {"a": 1}),
)
_SETTINGS_LEFT = {"self", "backbone", "pre_processor", "post_processor", "evaluator", "visualizer"}


class Unclean(Exception):  # noqa: N818  # what was found, rather than an error of this program
    """An end that is neither success nor a clean error."""


def expect_clean(action: Callable[[], object], named: tuple[str, ...]) -> str:
    """Run something; ``ok``, or the type of the clean error.

    Raises:
        Unclean: If it fails with another error, or one that says none of ``named``.
    """
    try:
        action()
    except CLEAN as error:
        if not any(name in str(error) for name in named):
            msg = f"{type(error).__name__} that names none of {named}: {error}"
            raise Unclean(msg) from error
        return type(error).__name__
    except Exception as error:
        msg = f"{type(error).__name__}: {error}"
        raise Unclean(msg) from error
    return "ok"


def adapter(rng: random.Random, folder: Path) -> str:
    """An adapter whose metadata, tensors or bytes are changed; its hash is made to match, as an attacker would."""
    tensors, metadata = adapters.read(EMBEDDED["tiny"] / "fbclip.safetensors")
    tensors, metadata = dict(tensors), {**metadata, "thresholds": {"image": 0.4, "pixel": 0.6, "origin": "fixed"}}
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            _change_metadata(rng, metadata)
        else:
            _change_tensor(rng, tensors)
    path = folder / ("a.pth" if rng.random() < 0.3 else "a.safetensors")
    if path.suffix == ".pth":
        torch.save(_published(rng, tensors, metadata), path)
    else:
        if rng.random() < 0.9:
            metadata["sha256"] = adapters.digest(tensors, metadata)
        strings = {key: value if key == "raw" else json.dumps(value) for key, value in metadata.items()}
        path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, strings))
    if rng.random() < 0.3:
        path.write_bytes(_damage(rng, path.read_bytes()))
    # The values may be any finite ones, so the scores need not be: only loading is asked for.
    return expect_clean(lambda: FBCLIP("tiny", image_size=_SIZE, weights=str(path)), (path.name,))


def weights(rng: random.Random, folder: Path) -> str:
    """Backbone weights with changed tensors or bytes."""
    tensors = dict(_embedded_weights())
    for _ in range(rng.randint(1, 2)):
        _change_tensor(rng, tensors)
    path = folder / ("clip.pt" if rng.random() < 0.5 else "clip.safetensors")
    if path.suffix == ".pt":
        torch.save(tensors if rng.random() < 0.8 else _odd(rng), path)
    else:
        path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    if rng.random() < 0.4:
        path.write_bytes(_damage(rng, path.read_bytes()))
    named = (path.name, "CLIP weights", "the given state dict")
    return expect_clean(lambda: build_from_openai_state_dict(read_weights(path)), named)


def settings(rng: random.Random, folder: Path) -> str:
    """Arguments of a constructor, and then one image."""
    del folder
    model = rng.choice((FBCLIP, FiSeCLIP))
    parameters = inspect.signature(model.__init__).parameters
    chosen: dict[str, Any] = {}
    for name in rng.sample(sorted(parameters.keys() - _SETTINGS_LEFT), rng.randint(1, 3)):
        kind = type(parameters[name].default)
        # Wrong types are refused at once, so most values are of the type of the default.
        alike = [value for value in _ODD if type(value) is kind]
        chosen[name] = rng.choice(alike) if alike and rng.random() < 0.8 else _odd(rng)
    return expect_clean(lambda: _score(model, chosen), (*chosen, "adapter", "threshold", "feature_layers"))


def picture(rng: random.Random, folder: Path) -> str:
    """Bytes of an image."""
    kind = rng.choice(("png", "jpeg", "bmp", "tiff", "webp", "ppm", "gif"))
    mode = rng.choice({"jpeg": ("RGB", "L", "CMYK"), "ppm": ("RGB", "L", "1")}.get(kind, ("RGB", "L", "P", "1")))
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (17, 23, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    # Pillow knows a file by its content: the ending need not be right.
    path = folder / f"image.{rng.choice(('png', 'jpg', 'tif'))}"
    path.write_bytes(_damage(rng, buffer.getvalue()))

    def read() -> None:
        image = read_picture(path)
        if image.ndim != 3 or image.shape[0] != 3 or not 0 <= image.min() <= image.max() <= 1:
            msg = f"{path.name}: {tuple(image.shape)}, {image.min()} to {image.max()}"
            raise AssertionError(msg)

    return expect_clean(read, (path.name,))


TARGETS: dict[str, Callable[[random.Random, Path], str]] = {
    "adapter": adapter,
    "weights": weights,
    "settings": settings,
    "picture": picture,
}


@cache
def _embedded_weights() -> dict[str, torch.Tensor]:
    return read_weights(EMBEDDED["tiny"] / "clip.safetensors")


def _score(model: type[FBCLIP | FiSeCLIP], chosen: dict[str, Any]) -> None:
    built = model(**{"backbone": "tiny", "image_size": _SIZE, **chosen})
    if getattr(built, "k_shot", 0):
        return  # It needs images, which only a run reads.
    with torch.no_grad():
        size = built.image_size
        prediction = built.eval().model(torch.rand(2, 3, size, size))
    if not (torch.isfinite(prediction.pred_score).all() and torch.isfinite(prediction.anomaly_map).all()):
        msg = f"{model.__name__}({chosen}) scores {prediction.pred_score.tolist()}"
        raise AssertionError(msg)


def _odd(rng: random.Random) -> Any:  # noqa: ANN401
    value = rng.choice(_ODD)
    return [value, _odd(rng)] if rng.random() < 0.1 else value


def _change_metadata(rng: random.Random, metadata: dict[str, Any]) -> None:
    key = rng.choice([*metadata, "raw", "pretrained", "epoch"])
    if key == "thresholds" and rng.random() < 0.7:
        metadata[key] = {**dict(metadata.get(key) or {}), rng.choice(("image", "pixel", "origin", "x")): _odd(rng)}
    elif rng.random() < 0.3:
        metadata.pop(key, None)
    else:
        metadata[key] = "{" if key == "raw" else _odd(rng)


def _change_tensor(rng: random.Random, tensors: dict[str, Any]) -> None:
    name = rng.choice(list(tensors)) if tensors else "empty"
    tensor = torch.atleast_1d(tensors.get(name, torch.zeros(1)))
    changes: tuple[Callable[[], Any], ...] = (
        lambda: tensor[..., :-1],
        lambda: tensor[None],
        tensor.flatten,
        lambda: tensor.mT if tensor.ndim > 1 else tensor[:0],
        lambda: torch.full_like(tensor.float(), rng.choice((math.nan, math.inf, 3e38, 0.0))),
        lambda: tensor.to(rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool))),
        lambda: torch.zeros(0),
        lambda: torch.zeros((0, 3, 0, 0)),
    )
    choice = rng.randrange(len(changes) + 2)
    if choice < len(changes):
        tensors[name] = changes[choice]()
    elif choice == len(changes):
        tensors.pop(name, None)
    else:
        tensors[rng.choice(("extra", "visual.extra", "", "attention.x"))] = torch.ones(2)


def _published(rng: random.Random, tensors: dict[str, Any], metadata: dict[str, Any]) -> object:
    """Something like the published format: its outer form, with names and types that may be others."""
    names = ("scale_weights", "fb_Attention.gate.weight", "token_selector.weight", "layer_selector.x", "unknown")
    trained: dict[Any, Any] = {rng.choice(names): tensor for tensor in tensors.values()}
    trained[rng.choice((1, "scale_weights"))] = rng.choice((
        torch.zeros(6, device="meta"),
        torch.zeros(1).expand(2**40),
        torch.zeros(6).to_sparse(),
        torch.zeros(6, dtype=torch.complex64),
        "text",
        None,
    ))
    prompts = {"ctx_pos": tensors.get("prompts.normal_context"), "ctx_neg": _odd(rng)}
    whole = {"prompt_learner": prompts, "model_trainable_params": trained, "source_domain": metadata.get("source")}
    return rng.choice((whole, {**whole, "prompt_learner": _odd(rng)}, _odd(rng), trained))


def _damage(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    # Heads say what a file is and how long its parts are, so they are hit more often.
    reach = min(len(changed), rng.choice((16, 64, 512, len(changed))))
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(max(reach, 1))
        if place < len(changed):
            changed[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    if rng.random() < 0.4:
        del changed[rng.randrange(len(changed) + 1) :]
    if rng.random() < 0.1:
        start = rng.randrange(len(changed) + 1)
        changed[start:start] = rng.randbytes(rng.randint(1, 64))
    return bytes(changed)
