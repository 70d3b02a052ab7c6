# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Types of constructor arguments: an error names the argument."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from anomalib_fbclip import FBCLIP, FiSeCLIP
from anomalib_fbclip.common.arguments import check_arguments


def function(
    count: int = 1,
    share: float = 0.5,
    name: str | Path | None = None,
    layers: Sequence[int] | None = None,
    betas: tuple[float, float] = (0.5, 0.9),
    on: bool = True,
) -> None:
    del count, share, name, layers, betas, on


@pytest.mark.parametrize(
    "values",
    [
        {"count": np.int64(3), "share": 1, "name": Path("x"), "layers": OmegaConf.create([1, 2]), "betas": [0, 1]},
        {"share": np.float32(0.5), "name": "x", "layers": (), "on": False, "unknown": object()},
        {"name": None, "layers": None},
    ],
)
def test_what_fits(values: dict) -> None:
    check_arguments(function, values)


@pytest.mark.parametrize(
    ("values", "error", "expected"),
    [
        ({"count": 1.5}, TypeError, "count=1.5: expected int"),
        ({"count": True}, TypeError, "count=True: expected int"),
        ({"share": "half"}, TypeError, "share='half': expected float"),
        ({"share": math.nan}, ValueError, "share=nan: give a finite number"),
        ({"name": 3}, TypeError, "name=3: expected str"),
        ({"layers": "12"}, TypeError, r"layers='12': expected Sequence\[int\] \| None"),
        ({"layers": [1, None]}, TypeError, "layers="),
        ({"betas": (0.5,)}, TypeError, "betas="),
        ({"betas": (0.5, math.inf)}, ValueError, "betas="),
        ({"on": 1}, TypeError, "on=1: expected bool"),
    ],
)
def test_what_does_not(values: dict, error: type, expected: str) -> None:
    with pytest.raises(error, match=f"^{expected}"):
        check_arguments(function, values)


@pytest.mark.parametrize("model", [FBCLIP, FiSeCLIP])
def test_the_models_use_it(model: type) -> None:
    with pytest.raises(TypeError, match="feature_layers=3"):
        model(backbone="tiny", feature_layers=3)
    with pytest.raises(ValueError, match="temperature=nan"):
        model(backbone="tiny", temperature=math.nan)
