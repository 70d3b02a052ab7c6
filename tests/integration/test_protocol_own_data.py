# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The commands for one's own data (docs/protocol.md, predict.md and training.md), in a folder that holds such data."""

import math
import shlex
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from miniatures import mask, picture

MODEL = "--model FBCLIP --model.backbone tiny"
FOLDER = "--data LabelledFolder --data.root parts --data.normal_dir good"
SOURCE = "--data.source LabelledFolder --data.source.root other --data.source.normal_dir good"
TARGET = "--data.target LabelledFolder --data.target.root parts --data.target.normal_dir good"
LINES = {
    "without labels": f"predict {MODEL} --data parts/new",
    "with labels": f"test {MODEL} {FOLDER} --data.abnormal_dir bad",
    "with masks": f"test {MODEL} {FOLDER} --data.abnormal_dir bad --data.mask_dir masks",
    "several types of defect": f"test {MODEL} {FOLDER} "
    '--data.abnormal_dir "[scratch,dent]" --data.mask_dir "[masks/scratch,masks/dent]"',
    "an auxiliary folder": f"train {MODEL} --model.weights null --data AuxiliaryTransfer {SOURCE} "
    f"--data.source.abnormal_dir bad --data.source.mask_dir masks {TARGET} --data.target.abnormal_dir bad",
}


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for root, kinds in (("parts", ("bad", "scratch", "dent")), ("other", ("bad",))):
        for number in range(2):
            picture(tmp_path / root / "good" / f"{number}.png")
            picture(tmp_path / root / "new" / f"{number}.png")
            for kind in kinds:
                picture(tmp_path / root / kind / f"{number}.png", defect=True)
                mask(tmp_path / root / "masks" / ("" if kind == "bad" else kind) / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", LINES)
def test_line(what: str, own_data: Path) -> None:
    # Smaller and shorter than in the README, else the same.
    small = ["--model.image_size", "56", "--model.metrics", "full", "--trainer.accelerator", "cpu"]
    cli = AnomalibCLI([
        *shlex.split(LINES[what]),
        *small,
        *(["--trainer.max_epochs", "1"] if "train" in LINES[what] else []),
    ])
    metrics = {name: float(value) for name, value in cli.engine.trainer.callback_metrics.items()}
    pictures = len(list((own_data / "results").rglob("*.png")))
    expected = {"without labels": 2, "several types of defect": 6}.get(what, 4)
    assert pictures == expected
    if what == "without labels":
        assert not metrics
        return
    assert 0 <= metrics["image_AUROC"] <= 1
    masked = what in {"with masks", "several types of defect"}
    assert ("pixel_AUPRO" in metrics) == masked
    assert not masked or not math.isnan(metrics["pixel_AUPRO"])
    assert bool(list((own_data / "results").rglob("adapter.safetensors"))) == (what == "an auxiliary folder")
