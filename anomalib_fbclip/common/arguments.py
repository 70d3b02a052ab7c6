# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Checks that the arguments of a constructor are of the types that it says, so that an error names the argument."""

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_PLAIN: dict[type, tuple[type, ...]] = {int: (Integral,), float: (Real,), str: (str, PathLike), Path: (str, PathLike)}


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Compare values with the annotations of a function: plain types, unions and sequences of them.

    anomalib's command line has done this before; ``get_model``, benchmark grids and Python have not.

    Args:
        function: Whose annotations count.
        values: By name, such as ``locals()`` in the function's first line.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If a number is not finite.
    """
    for name, hint in get_type_hints(function).items():
        if name not in values:
            continue
        value = values[name]
        if not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
            msg = f"{name}={value!r}: expected {expected.replace('collections.abc.', '')}."
            raise TypeError(msg)
        numbers = value if isinstance(value, Sequence) else [value]
        if any(isinstance(number, Real) and not math.isfinite(number) for number in numbers):
            msg = f"{name}={value!r}: give a finite number."
            raise ValueError(msg)


def argument_names(cls: type) -> set[str]:
    """Names of all arguments of a class, those included that its bases take from ``**kwargs``."""
    signatures = (signature(base.__init__) for base in cls.__mro__ if "__init__" in vars(base))  # type: ignore[misc]
    return {name for parameters in signatures for name in parameters.parameters} - {"self", "args", "kwargs"}


def default_values(cls: type) -> dict[str, Any]:
    """Default of each argument of a class, those included that its bases take from ``**kwargs``."""
    signatures = (signature(base.__init__) for base in reversed(cls.__mro__) if "__init__" in vars(base))  # type: ignore[misc]
    given = (parameter for parameters in signatures for parameter in parameters.parameters.values())
    return {parameter.name: parameter.default for parameter in given if parameter.default is not parameter.empty}


def plain(value: Any) -> Any:  # noqa: ANN401  # any argument
    """A value in types that a checkpoint admits: paths as strings, sequences of any kind as tuples."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(plain(item) for item in value)
    return value


def _fits(value: Any, hint: Any) -> bool:  # noqa: ANN401  # values and annotations of any kind
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        return any(_fits(value, choice) for choice in inner)
    if origin in {Sequence, tuple}:
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        return (origin is Sequence or len(value) == len(inner)) and all(_fits(item, inner[0]) for item in value)
    if hint in _PLAIN:
        # In Python a truth value is a number.
        return isinstance(value, _PLAIN[hint]) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True
