# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FBCLIP and FiSeCLIP beside built-in models in one grid of anomalib's benchmark."""

from argparse import Namespace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from anomalib.pipelines import Benchmark

CONFIG = Path(__file__).parents[2] / "configs" / "benchmark" / "side_by_side.yaml"


def test_the_side_by_side_config_ends_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    # The same grid on fewer and smaller images.
    config["benchmark"]["data"]["init_args"].update(image_size=32, num_train=4, num_test=4, root=str(tmp_path))
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    Benchmark().run(Namespace(config=small))
    table = pd.read_csv(next(tmp_path.glob("runs/benchmark/*/results.csv")))
    assert list(table["model.class_path"]) == ["FBCLIP", "FiSeCLIP", "Padim", "Dfm"]
    assert table["image_AUROC"].between(0, 1).all()
