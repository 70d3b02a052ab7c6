# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The README's first command, on fewer pictures."""

import logging
from pathlib import Path

import pytest
from anomalib.cli.cli import AnomalibCLI

from anomalib_fbclip.data.procedural.families import TEST_ONLY_FAMILIES

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def arguments(root: Path, **more: object) -> list[str]:
    out = [
        "train",
        "--config",
        str(CONFIG),
        "--default_root_dir",
        str(root / "results"),
        "--data.root",
        str(root / "d"),
    ]
    return [*out, *(f"--{name}={value}" for name, value in more.items())]


def test_the_config_is_what_the_command_line_reads(tmp_path):
    config = AnomalibCLI(arguments(tmp_path), run=False).config["train"]
    assert config.model.class_path.endswith("FBCLIP")
    assert config.data.init_args.category == "test"


def test_ends_with_numbers_and_one_picture_for_each_image(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="anomalib_fbclip"):
        cli = AnomalibCLI(arguments(tmp_path, **{"data.num_test": 2, "data.image_size": 64}))
    names = {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"}
    assert names <= {name.split("/")[0] for name in cli.engine.trainer.callback_metrics}
    folder = Path(cli.engine.model.visualizer.output_dir)
    assert len(list(folder.rglob("*.png"))) == 2 * len(TEST_ONLY_FAMILIES)
    assert f"Pictures: {folder}" in caplog.text


@pytest.mark.parametrize("folder_of_pictures", [3])
def test_predicts_on_any_folder(tmp_path, folder_of_pictures):
    import cv2
    import numpy as np

    for number in range(folder_of_pictures):
        picture = np.random.default_rng(number).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
    words = ["predict", "--model", "FBCLIP", "--model.backbone", "tiny", "--data", str(tmp_path)]
    cli = AnomalibCLI([*words, "--default_root_dir", str(tmp_path / "results")])
    assert len(list(Path(cli.engine.model.visualizer.output_dir).rglob("*.png"))) == folder_of_pictures
