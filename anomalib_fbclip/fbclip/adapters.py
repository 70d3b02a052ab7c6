# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Adapter files: ours (safetensors with metadata) and the published ``.pth`` format.

Files of ``torch.save`` go through :mod:`anomalib_fbclip.safe_load`. A file is read and checked as a whole before the
model is touched.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import anomalib_fbclip
from anomalib_fbclip import safe_load
from anomalib_fbclip.clip.build import EMBEDDED
from anomalib_fbclip.clip.frozen import CLIP_MEAN, CLIP_STD
from anomalib_fbclip.functional import is_dense

if TYPE_CHECKING:
    from .torch_model import FBCLIPModel

AdapterMetadata = dict[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "backbone": (str,),
    "backbone_fingerprint": (str,),
    "pretrained": (str, type(None)),
    "source": (str, type(None)),
    "source_domain": (str, type(None)),
    "feature_layers": (list,),
    "n_ctx": (int,),
    "text_poolings": (list,),
    "views": (list,),
    "attention": (bool,),
    "suppression": (bool,),
    "bank": (str,),
    "causal_text": (bool,),
    "temperature": (float, int),
    "mean": (list,),
    "std": (list,),
    "quick_gelu": (bool,),
    "image_size": (int,),
    "smoothing_sigma": (float, int),
    "thresholds": (dict, type(None)),
}
"""What JSON may hold under the names that something reads again. A SHA-256 tells damage, it is no signature."""

FORMAT = "anomalib-fbclip-adapter"
FORMAT_VERSION = 1

_PUBLISHED = (
    (r"^fb_Attention\.([fb]g)_(norm|to_q|to_k|to_v)\.(.+)$", r"attention.\1.\2.\3"),
    (r"^fb_Attention\.([fb]g)_to_out\.0\.(.+)$", r"attention.\1.to_out.\2"),
    (r"^fb_Attention\.([fb]g)_scale$", r"attention.\1.scale"),
    (r"^fb_Attention\.(gate|norm)\.(.+)$", r"attention.\1.\2"),
    (r"^token_selector\.(.+)$", r"text_fusion.token_selector.\1"),
    (r"^text_projection_mlp\.(.+)$", r"text_fusion.projection.\1"),
    (r"^scale_weights$", r"scale_weights"),
    (r"^prompt_learner\.ctx_pos$", r"prompts.normal_context"),
    (r"^prompt_learner\.ctx_neg$", r"prompts.abnormal_context"),
)
_PUBLISHED_UNUSED = re.compile(
    r"^(layer_selector|fusion_weights?|gate_network)\b"
    r"|^prompt_learner\.(token_(prefix|suffix)|tokenized_prompts|compound_prompts_text|compound_prompt_projections)",
)


def our_name(published: str) -> str | None:
    """Translate a parameter name of the published format; ``None`` for one that its method never uses.

    Raises:
        ValueError: If the name belongs to neither.
    """
    for pattern, replacement in _PUBLISHED:
        if re.match(pattern, published):
            name = re.sub(pattern, replacement, published)
            return name.replace(".fg.", ".foreground.").replace(".bg.", ".background.")
    if _PUBLISHED_UNUSED.match(published):
        return None
    msg = f"unknown tensor {published!r}"
    raise ValueError(msg)


def architecture(model: "FBCLIPModel") -> AdapterMetadata:
    """What a model and an adapter must have in common, plus image size and smoothing, which may differ."""
    return {
        "backbone": model.clip.name,
        "backbone_fingerprint": model.clip.fingerprint(),
        "feature_layers": list(model.feature_layers),
        "n_ctx": model.prompts.n_ctx,
        "text_poolings": sorted(model.text_fusion.poolings),
        "views": list(model.views),
        "attention": model.attention is not None,
        "suppression": model.suppression,
        "bank": model.bank,
        "causal_text": model.causal_text,
        "temperature": model.temperature,
        "mean": list(model.clip.mean),
        "std": list(model.clip.std),
        "quick_gelu": model.clip.quick_gelu,
        "image_size": model.clip.image_size,
        "smoothing_sigma": model.smoothing_sigma,
    }


def save(model: "FBCLIPModel", path: str | Path, **extra: Any) -> Path:  # noqa: ANN401  # what JSON holds
    """Write the trained tensors and what they were made for.

    The file is written aside and renamed, so no half-written adapter is ever seen under its name.

    Args:
        model: Model to save.
        path: File to write, ``.safetensors``.
        **extra: Further metadata, such as ``source`` (the dataset trained on) and ``epoch``.

    Returns:
        Path: The file written.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    if path.suffix != ".safetensors":
        msg = f"adapter path {str(path)!r}: use the suffix .safetensors."
        raise ValueError(msg)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained_state_dict().items()}
    metadata = {
        **architecture(model),
        **extra,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"anomalib_fbclip": anomalib_fbclip.__version__, "torch": str(torch.__version__)},
    }
    metadata["sha256"] = digest(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(to_bytes(tensors, {key: json.dumps(value) for key, value in metadata.items()}))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def load_into(model: "FBCLIPModel", path: str | Path) -> AdapterMetadata:
    """Load an adapter into a model, all of it or nothing.

    Returns:
        AdapterMetadata: The file's metadata; for the published format its ``epoch``, ``loss``, ``source_domain``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, altered, or does not fit the model; both sides are named.
    """
    tensors, metadata = read(path)
    _check_architecture(model, metadata, str(path))
    expected = model.trained_state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        msg = f"adapter {str(path)!r} does not fit this model: missing tensors {missing}, unexpected {unexpected}."
        raise ValueError(msg)
    fitted = {}
    for name, tensor in tensors.items():
        if not is_dense(tensor):
            msg = f"adapter {str(path)!r} is damaged: {name} is no dense tensor of floating-point numbers."
            raise ValueError(msg)
        target = expected[name]
        # Before any copy: a view of a few bytes may claim to be larger than the memory.
        same_context = tensor.numel() == target.numel() and "context" in name
        if tensor.shape != target.shape and not same_context:
            msg = (
                f"adapter {str(path)!r} was made for another backbone: {name} is {tuple(tensor.shape)} there and "
                f"{tuple(target.shape)} in a model on {model.clip.name!r} with n_ctx={model.prompts.n_ctx}."
            )
            raise ValueError(msg)
        value = tensor.float().reshape(target.shape)
        if not torch.isfinite(value).all():
            msg = f"adapter {str(path)!r} is damaged: {name} holds NaN or infinite values."
            raise ValueError(msg)
        fitted[name] = value
    model.load_state_dict(fitted)
    return metadata


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata]:
    """Read an adapter's tensors, under our names, and its metadata."""
    path = resolve(path)
    if not _is_file(path):
        msg = f"adapter {str(path)!r} does not exist: give a file, or hf://owner/repo/file to download one."
        raise FileNotFoundError(msg)
    try:
        published = path.suffix.lower() in {".pth", ".pt", ".ckpt"}
        tensors, metadata = _read_published(path) if published else _read_ours(path)
        _check_metadata(metadata)
    except Exception as error:
        msg = f"adapter {str(path)!r} cannot be used: {error}"
        raise ValueError(msg) from error
    return tensors, metadata


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def resolve(path: str | Path) -> Path:
    """A local path for ``path``; ``hf://owner/repo/file`` is fetched into the hub's cache."""
    from anomalib_fbclip import hub

    return hub.download(str(path)) if str(path).startswith(hub.SCHEME) else Path(path).expanduser()


def backbone_name(metadata: AdapterMetadata) -> str | None:
    """The backbone of an adapter as the model's ``backbone`` takes it, without the name of its weights."""
    name = metadata.get("backbone")
    return None if name is None else str(name).partition("/")[0]


def check_backbone(path: str | Path, backbone: str) -> None:
    """Refuse an adapter of an embedded backbone for another one, and the other way round.

    What open_clip's names stand for is told by the backbone's fingerprint alone, when it has been built.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be used.
    """
    theirs = backbone_name(read(path)[1])
    if theirs is not None and theirs != backbone and {theirs, backbone} & EMBEDDED.keys():
        msg = f"adapter {str(path)!r} was made for another model. backbone: adapter {theirs}, model {backbone}. "
        msg += f"Give backbone={theirs!r} (--model.backbone {theirs})."
        raise ValueError(msg)


def digest(tensors: Mapping[str, torch.Tensor], metadata: AdapterMetadata) -> str:
    """SHA-256 over names, shapes, types and bytes of all tensors, and over the metadata."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    sha.update(json.dumps({key: value for key, value in metadata.items() if key != "sha256"}, sort_keys=True).encode())
    return sha.hexdigest()


def _read_ours(path: Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata]:
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        msg = f"it is no adapter (.safetensors, or the published .pth), or it was cut off ({error})"
        raise ValueError(msg) from error
    with opened as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        if metadata.get("format") != FORMAT:
            msg = "it is a safetensors file, but not an adapter of this package"
            raise ValueError(msg)
        if metadata.get("format_version") != FORMAT_VERSION:
            msg = f"format version {metadata.get('format_version')}, this package reads {FORMAT_VERSION}: upgrade it"
            raise ValueError(msg)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    if digest(tensors, metadata) != metadata.get("sha256"):
        msg = "its SHA-256 does not match its content, the file was altered or swapped: fetch it again"
        raise ValueError(msg)
    return tensors, metadata


def _read_published(path: Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata]:
    loaded = safe_load.load(path)
    if not isinstance(loaded, dict) or not {"prompt_learner", "model_trainable_params"} <= loaded.keys():
        msg = "it has no 'prompt_learner' and 'model_trainable_params', as the published FB-CLIP weights have; "
        msg += "a checkpoint of Lightning goes into ckpt_path (--ckpt_path)"
        raise ValueError(msg)
    prompts, trained = (safe_load.without_prefix(loaded[key]) for key in ("prompt_learner", "model_trainable_params"))
    tensors = {}
    for published, tensor in {**{f"prompt_learner.{name}": prompts[name] for name in prompts}, **trained}.items():
        name = our_name(published)
        if name is not None:
            tensors[name] = tensor
    metadata = {key: loaded[key] for key in ("epoch", "loss", "source_domain") if key in loaded}
    if "loss" in metadata:
        metadata["loss"] = float(metadata["loss"])  # a NumPy scalar there
    return tensors, metadata


def _check_metadata(metadata: AdapterMetadata) -> None:
    for key, types in _TYPES.items():
        # In Python, but not in JSON, True is a number.
        if key in metadata and type(metadata[key]) not in types:
            msg = f"{key}={metadata[key]!r} in its metadata, expected {' or '.join(t.__name__ for t in types)}"
            raise ValueError(msg)
    for key in ("mean", "std"):
        colours = metadata.get(key, [0.5, 0.5, 0.5])
        if len(colours) != 3 or not all(type(value) is float and 0 <= value <= 1 for value in colours):
            msg = f"{key}={colours!r} in its metadata, expected three numbers from 0 to 1, one for each colour"
            raise ValueError(msg)
    thresholds = metadata.get("thresholds")
    if thresholds is None:
        return
    numbers = [thresholds.get(name) for name in ("image", "pixel")]
    fine = all(isinstance(number, (int, float)) and 0 <= number <= 1 for number in numbers)
    if not fine or not isinstance(thresholds.get("origin"), str) or "image_size" not in metadata:
        msg = f"thresholds={thresholds!r} in its metadata: expected image, pixel from 0 to 1, origin, and an image_size"
        raise ValueError(msg)


def _check_architecture(model: "FBCLIPModel", metadata: AdapterMetadata, path: str) -> None:
    ours = architecture(model)
    for free in ("image_size", "smoothing_sigma"):
        ours.pop(free)
    theirs = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD), **metadata}  # files that do not say are for OpenAI's
    different = {key: (theirs[key], value) for key, value in ours.items() if theirs.get(key, value) != value}
    if "backbone_fingerprint" not in different:
        # The same weights go by another name when they come from a file instead of a tag.
        different.pop("backbone", None)
    if different:
        both = "; ".join(f"{key}: adapter {given}, model {mine}" for key, (given, mine) in different.items())
        msg = f"adapter {path!r} was made for another model. {both}."
        raise ValueError(msg)
