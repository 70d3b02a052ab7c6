# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Killed runs that go on, and two processes that share one: as a user would start them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from anomalib.engine import Engine
from safetensors.torch import load_file

from anomalib_fbclip import FBCLIP, ProceduralSurfaces

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path) -> None:
    text = start(tmp_path, "recipes.faults", "--tries", "1", "--only", "training")
    assert "'tries': 1, 'killed': 1" in text
    assert "'damaged files': 0, 'same result': 1" in text


DATA = {"category": "wood", "image_size": 56, "num_train": 8, "num_test": 9, "train_anomalous": True}
MODEL = {"backbone": "tiny", "image_size": 56, "metrics": "full", "max_epochs": 3}
SHARED = """train --model FBCLIP --model.weights null --data ProceduralSurfaces --data.root {root}/drawn
    --trainer.callbacks anomalib_fbclip.StageMaps --trainer.callbacks.num_images 3
    --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp --data.train_batch_size 4"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, float], Path, dict[str, float]]:
    """The same training, three times all eight images at once, then nine images to test: alone, and shared by two.

    For both the run's folder and the metrics.
    """
    root = tmp_path_factory.mktemp("processes")
    alone = Engine(default_root_dir=root / "alone", accelerator="cpu", devices=1)
    (metrics,) = alone.train(
        FBCLIP(**MODEL, weights=None),
        datamodule=ProceduralSurfaces(**DATA, root=root / "drawn", train_batch_size=8),
    )
    words = SHARED.format(root=root).split()
    words += [f"--model.{name}={value}" for name, value in MODEL.items()]
    words += [f"--data.{name}={str(value).lower()}" for name, value in DATA.items()]
    text = start(root, "anomalib.cli.cli", *words)
    shared = {name: float(value) for name, value in re.findall(r"((?:image|pixel)_\w+)\W+([\d.e-]+)", text)}
    place = Path("FBCLIP", "ProceduralSurfaces", "wood")
    return root / "alone" / place, metrics, root / "results" / place, shared


def test_two_processes_give_the_weights_and_metrics_of_one(runs) -> None:
    alone, metrics, shared, shared_metrics = runs
    one, other = (load_file(folder / "v0/weights/adapter/adapter.safetensors") for folder in (alone, shared))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4
    assert len(metrics) == 7
    assert shared_metrics == pytest.approx(metrics, abs=5e-3)


def test_two_processes_share_one_folder(runs) -> None:
    folder = runs[2]
    assert [entry.name for entry in sorted(folder.iterdir())] == ["latest", "v0"]
    assert (folder / "latest").resolve() == (folder / "v0").resolve()
    assert len(list((folder / "v0" / "images").rglob("*.png"))) == 9
    assert len(list((folder / "v0" / "stages").rglob("*.png"))) == 3
