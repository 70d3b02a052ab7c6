# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Tensors of a pickled module, read without its classes and without running anything from the file.

``torch.save(module)`` writes the names of the module's classes, and what pickle would call to build them. Here a pickle
may name three things only: what builds a tensor, an ``OrderedDict`` or a set; and classes of ``torch.nn`` and of
packages that the caller allows, for which an inert holder of their state stands in. Everything else is refused by name,
before it is looked up. Nothing is imported.
"""

import io
import pickle  # noqa: S403  # its find_class is replaced by an allow-list
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}
_DEEPEST = 32


def read_module_tensors(path: str | Path, packages: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a pickled module, by the names that its state dict would have.

    Args:
        path: File of ``torch.save(module, path)``, in the zip format of torch 1.6 and later.
        packages: Modules of Python whose classes may occur beside those of ``torch.nn``.

    Raises:
        ValueError: If the file is of another kind, or its pickle names anything else; the name is in the message.
        OSError: If the file cannot be opened.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            module = _Unpickler(_Archive(archive), tuple(packages)).load()
    except _RefusedError as error:
        msg = f"{path.name!r} {error}; nothing of it was run"
        raise ValueError(msg) from None
    except zipfile.BadZipFile as error:
        msg = f"{path.name!r} is no file of torch.save, or it was cut off ({error})"
        raise ValueError(msg) from error
    except OSError:
        raise
    except Exception as error:  # damage shows as errors of many kinds
        msg = f"{path.name!r} is no pickled module, or it is damaged ({error})"
        raise ValueError(msg) from error
    if not isinstance(module, _Holder):
        msg = f"{path.name!r} holds {type(module).__name__} and not a module"
        raise ValueError(msg)  # noqa: TRY004  # of the file's content, not of an argument
    tensors: dict[str, torch.Tensor] = {}
    _collect(module, "", tensors, _DEEPEST)
    return tensors


class _RefusedError(Exception):
    """A pickle asks for more than tensors and holders."""


class _Archive:
    """Parts of a file of ``torch.save``."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.sizes = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in self.sizes if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            msg = f"expected one data.pkl, found {pickles}"
            raise pickle.UnpicklingError(msg)
        self.folder = pickles[0].removesuffix("data.pkl")

    def read(self, name: str) -> bytes:
        entry = self.sizes[self.folder + name]
        if entry.compress_type != zipfile.ZIP_STORED:
            # torch never compresses; a compressed part may be a million times as large as the file.
            msg = f"{name} is compressed"
            raise pickle.UnpicklingError(msg)
        return self.archive.read(entry)


class _Holder:
    """Stands in for an object of a class that is not ours, and holds its state."""

    state: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            msg = f"state of a module is {type(state).__name__}"
            raise pickle.UnpicklingError(msg)
        self.state = state


class _Rebuild:
    """Builds a tensor or a parameter. No function, for pickle can overwrite a function's attributes."""

    __slots__ = ("_parameter",)

    def __init__(self, parameter: bool) -> None:
        self._parameter = parameter

    def __call__(self, source: object, *arguments: Any) -> torch.Tensor:  # noqa: ANN401  # of a pickle
        if not isinstance(source, torch.Tensor):
            msg = f"a tensor is built from {type(source).__name__}"
            raise pickle.UnpicklingError(msg)
        if self._parameter:
            return source
        offset, size, stride = arguments[:3]
        return source.as_strided(size, stride, offset)

    def __setstate__(self, state: object) -> NoReturn:
        msg = "alters what builds its tensors"
        raise _RefusedError(msg)


class _Unpickler(pickle.Unpickler):  # noqa: S301
    """Knows the names of the module's docstring and no others."""

    def __init__(self, parts: _Archive, packages: tuple[str, ...]) -> None:
        super().__init__(io.BytesIO(parts.read("data.pkl")), encoding="utf-8")
        self.parts = parts
        self.packages = packages
        self.storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  # what a pickle may name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild(parameter=False)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Rebuild(parameter=True)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in {"builtins", "__builtin__"} and name == "set":
            return set
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module.startswith("torch.nn.modules.") or module in self.packages:
            # A class of its own for each name: what one file does to it, no other file sees.
            return type(name, (_Holder,), {})
        msg = f"names {module}.{name}, which no tensor needs"
        raise _RefusedError(msg)

    def persistent_load(self, pid: Any) -> torch.Tensor:  # noqa: ANN401  # a name in the file
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            msg = f"unknown kind of storage {pid!r}"
            raise pickle.UnpicklingError(msg)
        if key not in self.storages:
            content = bytearray(self.parts.read(f"data/{key}"))
            little = (
                self.parts.folder + "byteorder" not in self.parts.sizes or self.parts.read("byteorder") == b"little"
            )
            if little != (sys.byteorder == "little"):
                msg = "its numbers are in another byte order than this machine's"
                raise pickle.UnpicklingError(msg)
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if len(self.storages[key]) != count or self.storages[key].dtype != dtype:
            msg = f"storage {key} has {len(self.storages[key])} numbers, expected {count}"
            raise pickle.UnpicklingError(msg)
        return self.storages[key]


def _collect(module: _Holder, prefix: str, tensors: dict[str, torch.Tensor], depth: int) -> None:
    if depth == 0:
        msg = f"its modules are nested more than {_DEEPEST} deep"
        raise ValueError(msg)
    for part in ("_parameters", "_buffers"):
        for name, tensor in dict(module.state.get(part) or {}).items():
            if isinstance(tensor, torch.Tensor):
                tensors[f"{prefix}{name}"] = tensor
    for name, child in dict(module.state.get("_modules") or {}).items():
        if isinstance(child, _Holder):
            _collect(child, f"{prefix}{name}.", tensors, depth - 1)
