# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Small data and models that run through anomalib's own engine."""

from collections.abc import Callable
from pathlib import Path

import pytest
from anomalib.engine import Engine

from anomalib_fbclip import FBCLIP, ProceduralSurfaces


@pytest.fixture(scope="session")
def surfaces_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("surfaces")


@pytest.fixture(scope="session")
def surfaces(surfaces_root: Path) -> Callable[..., ProceduralSurfaces]:
    """Eight images of wood in each split, half of the tested ones defective."""

    def make(**kwargs) -> ProceduralSurfaces:
        return ProceduralSurfaces(
            **{"root": surfaces_root, "category": "wood", "image_size": 56, "num_train": 8, "num_test": 8, **kwargs},
        )

    return make


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that makes the model zero-shot; what it learned does not matter here."""
    return FBCLIP(backbone="tiny", weights=None, seed=11).save_adapter(tmp_path_factory.mktemp("a") / "a.safetensors")


@pytest.fixture(scope="session")
def model(adapter: Path) -> Callable[..., FBCLIP]:
    """The embedded backbone at 56 pixels, so that a batch takes a fraction of a second."""

    def make(**kwargs) -> FBCLIP:
        return FBCLIP(**{"backbone": "tiny", "image_size": 56, "weights": adapter, **kwargs})

    return make


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., Engine]:
    def make(**kwargs) -> Engine:
        return Engine(**{"default_root_dir": tmp_path / "results", "accelerator": "cpu", "devices": 1, **kwargs})

    return make
