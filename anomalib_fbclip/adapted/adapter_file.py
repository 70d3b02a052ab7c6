# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Adapter files: the trained tensors of a model, ours (safetensors with metadata) or in a published format.

A line file is an adapter file that also holds the memory of normal images. It is private: features tell of images.
No code from a file is run. A file is read and checked as a whole before the model is touched.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import anomalib_fbclip
from anomalib_fbclip.clip.build import EMBEDDED
from anomalib_fbclip.clip.frozen import CLIP_MEAN, CLIP_STD
from anomalib_fbclip.common import safe_load
from anomalib_fbclip.common.files import replacing
from anomalib_fbclip.common.functional import is_dense
from anomalib_fbclip.host.tiling import Place
from anomalib_fbclip.registration import PUBLISHED_FORMATS

from . import hub

if TYPE_CHECKING:
    from torch import nn

AdapterMetadata = dict[str, Any]

FORMAT = "anomalib-fbclip-adapter"
FORMAT_VERSION = 2
"""Version 1 has no key ``model``: all its files are FB-CLIP's."""

LINE_FORMAT = "anomalib-fbclip-line"
LINE_VERSION = 1
_VERSIONS = {FORMAT: FORMAT_VERSION, LINE_FORMAT: LINE_VERSION}
MEMORY = "memory."
"""Prefix of the tensors that a line file holds beside the trained ones."""

_BESIDE = {"pictures", "false_alarm_rate", "expected_rate", "interval", "part", "parts"}
"""What thresholds may hold beside those of image and pixel and their origin: of normal images, and of parts."""
_BEFORE = {"model": "FBCLIP", "smooth_logits": False}
"""What files say that are from before it was stored."""
_MAY_DIFFER = ("image_size", "smoothing_sigma", "smooth_logits")
_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "backbone": (str,),
    "pretrained": (str, type(None)),
    "source": (str, type(None)),
    "source_domain": (str, type(None)),
    "mean": (list,),
    "std": (list,),
    "image_size": (int, list),
    "smoothing_sigma": (float, int),
    "smooth_logits": (bool,),
    "resize": (str,),
    "tiles": (int, type(None)),
    "overlap": (float, int),
    "tile_batch_size": (int,),
    "min_area": (int,),
    "thresholds": (dict, type(None)),
    "private": (bool,),
    "k_shot": (int,),
    "memory_names": (list,),
    "memory_places": (list,),
    "memory_radius": (int, type(None)),
}
"""What JSON may hold under the names that are read without a model. A SHA-256 finds damage, it is no signature."""

Reader = Callable[[Any, Path], tuple[dict[str, torch.Tensor], AdapterMetadata] | None]
"""Content of a file and its path -> tensors under the model's names and metadata; ``None``: another format."""

_READERS: dict[str, Reader] = {}
_TWO_FILES: dict[str, str] = {}
"""Formats of two files: how the name of the one to give ends -> how the other's does."""


def register_reader(
    model: str,
    main_file: str | None = None,
    beside: str | None = None,
) -> Callable[[Reader], Reader]:
    """Register the reader of a model's published weights.

    Args:
        model: The model's :attr:`AdaptedCLIP.model_name`.
        main_file: Where weights are two files: how the name of the one to give ends; it is also looked for in a folder.
        beside: How the name of the other one ends, which the reader finds beside it.
    """

    def register(reader: Reader) -> Reader:
        _READERS[model] = reader
        if main_file is not None and beside is not None:
            _TWO_FILES[main_file] = beside
        return reader

    return register


def save(model: "nn.Module", path: str | Path, memory: bool = False, **extra: Any) -> Path:  # noqa: ANN401  # what JSON holds
    """Write the trained tensors and what they were made for.

    The file is written aside and renamed, so no half-written adapter is ever seen under its name.

    Args:
        model: An :class:`AdaptedCLIP`.
        path: File to write, with suffix ``.safetensors``; its folder is made if it does not exist.
        memory: Write a line file: the memory of normal images, too. It is marked as private.
        **extra: Further metadata that JSON can hold, such as ``source`` (the data set) and ``epoch``.

    Returns:
        Path: The file.

    Raises:
        ValueError: If the suffix is another.
    """
    from safetensors.torch import save as to_bytes

    path = Path(path)
    if path.suffix != ".safetensors":
        msg = f"adapter path {str(path)!r}: use the suffix .safetensors."
        raise ValueError(msg)
    state = model.trained_state_dict()
    file_format, of_memory = FORMAT, {}
    if memory:
        file_format, of_memory = LINE_FORMAT, {"private": True, "k_shot": model.memory.num_images}
        state |= {MEMORY + name: tensor for name, tensor in model.memory.state_dict().items()}
        of_memory["memory_names"] = list(model.memory_names)
        if model.memory_radius is not None:
            of_memory |= {"memory_radius": model.memory_radius, "memory_places": [*map(list, model.memory.places)]}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {
        **model.architecture(),
        **extra,
        **of_memory,
        "format": file_format,
        "format_version": _VERSIONS[file_format],
        "model": model.model_name,
        "versions": {"anomalib_fbclip": anomalib_fbclip.__version__, "torch": str(torch.__version__)},
    }
    metadata["sha256"] = digest(tensors, metadata)
    with replacing(path) as file:
        file.write_bytes(to_bytes(tensors, {key: json.dumps(value) for key, value in metadata.items()}))
    return path


def load_into(model: "nn.Module", path: str | Path, memory: bool = True) -> AdapterMetadata:
    """Load an adapter into a model, all of it or nothing.

    Args:
        model: An :class:`AdaptedCLIP`.
        path: See :func:`read`.
        memory: Also fill the model's memory, where the file is a line file.

    Returns:
        AdapterMetadata: The file's metadata; for a published format what it holds beside the tensors.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, altered, or does not fit the model; both sides are named.
    """
    tensors, metadata = read(path)
    _check_architecture(model, metadata, str(path))
    remembered = {name: tensors.pop(name) for name in list(tensors) if name.startswith(MEMORY)}
    if remembered and memory:
        _check_memory(model, remembered, str(path))
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
                f"adapter {str(path)!r} was made for another backbone or architecture: {name} is "
                f"{tuple(tensor.shape)} there and {tuple(target.shape)} in this model on {model.clip.name!r}."
            )
            raise ValueError(msg)
        value = tensor.float().reshape(target.shape)
        if not torch.isfinite(value).all():
            msg = f"adapter {str(path)!r} is damaged: {name} holds NaN or infinite values."
            raise ValueError(msg)
        fitted[name] = value
    model.load_state_dict(fitted)
    if remembered and memory:
        model.memory.load_state_dict({name.removeprefix(MEMORY): tensor for name, tensor in remembered.items()})
        model.memory_names = tuple(metadata.get("memory_names", ()))
        model.memory.places = tuple(Place(*place) for place in metadata.get("memory_places", ()))
    return metadata


def _check_memory(model: "nn.Module", tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Refuse a memory that the model cannot take, before anything is changed."""
    number = tensors[f"{MEMORY}tokens"].shape[1] if f"{MEMORY}tokens" in tensors else 0
    if model.memory is None:
        msg = f"line file {path!r} holds a memory of {number} normal images: build the model with few_shot=True."
        raise ValueError(msg)
    own = {MEMORY + name: tensor for name, tensor in model.memory.state_dict().items()}
    wrong = sorted(own.keys() ^ tensors.keys())
    for name in own.keys() & tensors.keys():
        given, expected = tensors[name], own[name]
        same = given.shape == expected.shape
        if name == f"{MEMORY}tokens":  # [S, K, L, D] or [S, K, g_h, g_w, D], any number of images and patches
            grid = given.ndim == 5 or (given.ndim == 4 and math.isqrt(given.shape[2]) ** 2 == given.shape[2])
            same = grid and given.numel() > 0 and (given.shape[0], given.shape[-1]) == expected.shape[::3]
        if not (same and is_dense(given) and torch.isfinite(given).all()):
            wrong.append(name)
    if wrong:
        msg = f"line file {path!r} is damaged or of another model: {', '.join(wrong)} does not fit its memory. "
        msg += "Set the line up again (anomalib-fbclip setup)."
        raise ValueError(msg)


def is_line(metadata: AdapterMetadata) -> bool:
    """Whether a file holds the memory of a line."""
    return metadata.get("format") == LINE_FORMAT


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata]:
    """Read an adapter's tensors, under our names, and its metadata, whose key ``model`` names the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be used.
    """
    path = resolve(path)
    if not _exists(path):
        msg = f"adapter {str(path)!r} does not exist: give a file, or hf://owner/repo/file to download one."
        raise FileNotFoundError(msg)
    try:
        ours = path.suffix.lower() in {".safetensors", ""} and not path.is_dir()
        tensors, metadata = _read_ours(path) if ours else _read_published(path)
        _check_metadata(metadata)
    except Exception as error:
        msg = f"adapter {str(path)!r} cannot be used: {error}"
        raise ValueError(msg) from error
    return tensors, metadata


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def resolve(path: str | Path) -> Path:
    """A local path for ``path``; ``hf://owner/repo/file`` is fetched into the hub's cache, and what belongs to it."""
    place = str(path)
    if not place.startswith(hub.SCHEME):
        return Path(path).expanduser()
    _import_readers()
    for main_file, beside in _TWO_FILES.items():
        if place.endswith(main_file):
            hub.download(place.removesuffix(main_file) + beside)
    return hub.download(place)


def backbone_name(metadata: AdapterMetadata) -> str | None:
    """The backbone of an adapter as the model's ``backbone`` takes it, without the name of its weights."""
    name = metadata.get("backbone")
    return None if name is None else str(name).partition("/")[0]


def check_backbone(path: str | Path, backbone: str, model: str) -> None:
    """Refuse an adapter of another model, or of an embedded backbone for another one, and the other way round.

    What open_clip's names stand for is told by the backbone's fingerprint alone, when it has been built.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be used.
    """
    metadata = read(path)[1]
    check_model(metadata, model, str(path))
    theirs = backbone_name(metadata)
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
        msg = f"it is no adapter (.safetensors, or a published .pth), or it was cut off ({error})"
        raise ValueError(msg) from error
    with opened as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
        newest = _VERSIONS.get(str(metadata.get("format")))
        if newest is None:
            msg = "it is a safetensors file, but not an adapter of this package"
            raise ValueError(msg)
        version = metadata.get("format_version")
        if version not in range(1, newest + 1):
            msg = f"format version {version}, this package reads 1 to {newest}: upgrade it"
            raise ValueError(msg)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    if digest(tensors, metadata) != metadata.get("sha256"):
        msg = "its SHA-256 does not match its content, the file was altered or swapped: fetch it again"
        raise ValueError(msg)
    return tensors, {**_BEFORE, **metadata}


def _read_published(path: Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata]:
    _import_readers()
    path = _main_file(path)
    loaded = safe_load.load(path)
    for model, reader in _READERS.items():
        found = reader(loaded, path)
        if found is not None:
            tensors, metadata = found
            return tensors, {"model": model, **metadata}
    msg = "a checkpoint of Lightning goes into ckpt_path (--ckpt_path); "
    msg += f"it is in none of the published formats that are known, those of {', '.join(sorted(_READERS))}"
    raise ValueError(msg)


def _import_readers() -> None:
    for module in PUBLISHED_FORMATS:
        import_module(module)


def _main_file(path: Path) -> Path:
    """The file to read where published weights are two files, or a folder of them."""
    if path.is_dir():
        found = sorted(file for main_file in _TWO_FILES for file in path.glob(f"*{main_file}"))
        if len(found) != 1:
            names = [file.name for file in found]
            wanted = [f"*{main_file}" for main_file in _TWO_FILES]
            msg = f"it is a folder with {names or 'none'} of {wanted}: give one file"
            raise ValueError(msg)
        return found[0]
    for main_file, beside in _TWO_FILES.items():
        if path.name.endswith(beside):
            msg = f"it is one of two files: give the other, *{main_file}, which finds it"
            raise ValueError(msg)
    return path


def _check_metadata(metadata: AdapterMetadata) -> None:
    for key, types in _TYPES.items():
        # In Python, but not in JSON, True is a number.
        if key in metadata and type(metadata[key]) not in types:
            msg = f"{key}={metadata[key]!r} in its metadata, expected {' or '.join(t.__name__ for t in types)}"
            raise ValueError(msg)
    sides = metadata.get("image_size", 1)
    if isinstance(sides, list) and (len(sides) != 2 or not all(type(side) is int for side in sides)):
        msg = f"image_size={sides!r} in its metadata, expected one number, or height and width"
        raise ValueError(msg)
    for key in ("mean", "std"):
        colours = metadata.get(key, [0.5, 0.5, 0.5])
        if len(colours) != 3 or not all(type(value) is float and 0 <= value <= 1 for value in colours):
            msg = f"{key}={colours!r} in its metadata, expected three numbers from 0 to 1, one for each colour"
            raise ValueError(msg)
    _check_thresholds(metadata)


def _check_thresholds(metadata: AdapterMetadata) -> None:
    """Refuse thresholds that the post-processor could not take, by the name of what is wrong with them."""
    thresholds = metadata.get("thresholds")
    if thresholds is None:
        return
    wrong = []
    for name in ("image", "pixel"):
        number = thresholds.get(name)
        if not _is_number(number) or not 0 <= number <= 1:
            wrong.append(f"{name}={number!r} is no number from 0 to 1")
    if not isinstance(thresholds.get("origin"), str):
        wrong.append(f"origin={thresholds.get('origin')!r} is no text")
    for name in sorted(thresholds.keys() - {"image", "pixel", "origin"}):
        value = thresholds[name]
        if name not in _BESIDE:
            wrong.append(f"{name}={value!r} is not known")
        elif name == "interval":
            if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
                wrong.append(f"{name}={value!r} is no pair of numbers")
        elif not _is_number(value):
            wrong.append(f"{name}={value!r} is no number")
    if "image_size" not in metadata:
        wrong.append("image_size is missing beside them")
    if wrong:
        msg = f"thresholds in its metadata: {'; '.join(wrong)}"
        raise ValueError(msg)


def _is_number(value: object) -> bool:
    return type(value) in {int, float}  # in Python, but not in JSON, True is a number


def check_model(metadata: AdapterMetadata, model: str, path: str) -> None:
    """Refuse the adapter of another model.

    Raises:
        ValueError: If it is one; both are named.
    """
    if metadata["model"] != model:
        msg = f"adapter {path!r} was made for the model {metadata['model']}, this is {model}: give an adapter of it, "
        msg += f"or use --model {metadata['model']}."
        raise ValueError(msg)


def _check_architecture(model: "nn.Module", metadata: AdapterMetadata, path: str) -> None:
    check_model(metadata, model.model_name, path)
    ours = {key: value for key, value in model.architecture().items() if key not in _MAY_DIFFER}
    theirs = {"mean": list(CLIP_MEAN), "std": list(CLIP_STD), **metadata}  # files that do not say are for OpenAI's
    different = {key: (theirs[key], value) for key, value in ours.items() if theirs.get(key, value) != value}
    if "backbone_fingerprint" not in different:
        # The same weights go by another name when they come from a file instead of a tag.
        different.pop("backbone", None)
    if different:
        both = "; ".join(f"{key}: adapter {given}, model {mine}" for key, (given, mine) in different.items())
        msg = f"adapter {path!r} was made for another model. {both}."
        if different.keys() <= {"mean", "std"}:
            msg += " A file of weights does not show mean and std: give the weights by their tag, or a pre_processor "
            msg += "that normalises with the adapter's."
        raise ValueError(msg)
