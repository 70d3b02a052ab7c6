# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The zero-shot protocol from two auxiliary data sets to one table, on miniatures, and the recipes behind it."""

import csv
import logging
import math
import os
import weakref
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import anomalib.models
import pytest
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD, Visa
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.pipelines import Benchmark
from miniatures import write
from safetensors import safe_open

from anomalib_fbclip import FBCLIP, AuxiliaryTransfer, FBCLIPModel, FrozenCLIP, LabelledFolder
from anomalib_fbclip.common.arguments import argument_names
from anomalib_fbclip.pipelines.table import main, run
from anomalib_fbclip.pipelines.table.plan import ModelSpec, make_plan

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "experiment").glob("*.yaml"))
TINY = {"backbone": "tiny", "image_size": 56, "max_epochs": 1}
NOT_OF_THE_MODEL = {"backbone", "image_size", "k_shot", "max_epochs", "scr_weight"}
MINIATURES = {
    "MVTecAD": ("MVTec", ("bottle", "cable")),
    "visa": ("VisA", ("candle",)),
    "HeadCT": ("HeadCT", ()),
    "ISIC": ("ISIC", ()),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    for name, (benchmark, categories) in MINIATURES.items():
        write(benchmark, folder / name, categories)
    return folder


@pytest.fixture
def paper_table(tmp_path: Path) -> Path:
    """The recipe of the paper's table, with the embedded backbone, other models and the miniatures."""
    config = yaml.safe_load((CONFIGS / "experiment" / "paper_table.yaml").read_text(encoding="utf-8"))
    table = config["table"]
    ours = table["models"][0]
    ours["init_args"] = dict(TINY)
    ours["auxiliary"] = {"name": "MVTec", "categories": ["bottle", "cable"]}
    ours["per_dataset"]["MVTec"] = {"auxiliary": {"name": "VisA", "categories": ["candle"]}}
    table["models"] = [
        ours,
        {"class_path": "Padim", "init_args": {"backbone": "resnet18", "pre_trained": False, "n_features": 20}},
        {"name": "broken", "class_path": "Padim", "init_args": {"backbone": "no_such_net", "pre_trained": False}},
    ]
    table["datasets"] = [
        {"name": "MVTec", "categories": ["bottle", "cable"]},
        {"name": "VisA", "categories": ["candle"]},
        "HeadCT",
        "ISIC",
    ]
    table.update(loader={"num_workers": 0}, accelerator="cpu", pictures=True)
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _rows(results: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (results / "table.csv").open(encoding="utf-8") as file:
        return {(row["model"], row["dataset"], row["category"]): row for row in csv.DictReader(file)}


def test_from_two_data_sets_to_one_table(
    paper_table: Path,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    built: list[str] = []
    get_model = run.get_model
    alive: list[weakref.ref] = []

    def building(config: dict) -> AnomalibModule:
        built.append(config["class_path"])
        model = get_model(config)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run, "get_model", building)
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    words = ["--config", str(paper_table), "--root", str(root), "--results", str(results)]
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(["table", *words])
    assert stop.value.code == 1
    rows = _rows(results)
    assert set(rows) == {
        (model, *cell)
        for model in ("FB-CLIP", "Padim", "broken")
        for cell in (
            ("MVTec", "bottle"),
            ("MVTec", "cable"),
            ("MVTec", "mean"),
            ("VisA", "candle"),
            ("VisA", "mean"),
            ("HeadCT", "mean"),
            ("ISIC", "mean"),
        )
    }

    # Zero-shot models are built once for each adapter, and trained ones for each category.
    assert built.count("FBCLIP") == 2
    # No model outlives its row, though models and trainers know each other.
    assert len(alive) > 5
    assert not [reference for reference in alive if reference() is not None]
    # Both adapters are kept; each knows its source.
    sources = set()
    for path in (results / "adapters").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sources.add(file.metadata()["source"])
    assert sources == {'"MVTecAD-bottle-cable"', '"Visa-candle"'}

    # What the data do not define is missing and not zero.
    head, skin = rows["FB-CLIP", "HeadCT", "mean"], rows["FB-CLIP", "ISIC", "mean"]
    assert (head["pixel_AUROC"], skin["image_AUROC"], head["note"], skin["note"]) == ("", "", "", "")
    assert 0 <= float(head["image_AUROC"]) <= 100
    assert 0 <= float(skin["pixel_AUPRO"]) <= 100
    assert float(rows["Padim", "MVTec", "bottle"]["image_AUROC"]) > 50
    assert rows["FB-CLIP", "MVTec", "bottle"]["image_AUROC_paper"]
    assert float(rows["FB-CLIP", "MVTec", "bottle"]["seconds_per_image"]) > 0
    assert "no train split" in rows["Padim", "HeadCT", "mean"]["note"]
    assert rows["broken", "VisA", "candle"]["note"].startswith("failed: ")
    # One image for each image of each category: none was overwritten by another.
    pictures = results / "pictures" / "FB-CLIP"
    assert len(list((pictures / "MVTec").rglob("*.png"))) == 12
    assert len(list((pictures / "ISIC").rglob("*.jpg.png"))) == 3

    # A second run does what is left or lost an image, and no more; a category alone has the same numbers as before.
    table = yaml.safe_load(paper_table.read_text(encoding="utf-8"))["table"]
    plan = make_plan(table, str(results), str(root))
    key = next(cell.key for cell in plan.cells if cell.category == "cable")
    (results / "cells" / f"{key}.json").unlink()
    next((pictures / "ISIC").rglob("*.jpg.png")).unlink()
    built.clear()
    assert main(words) == 1
    assert built.count("FBCLIP") == 2  # with one adapter for the cell that is gone, with the other for its images
    again = _rows(results)
    assert again["FB-CLIP", "MVTec", "cable"]["pixel_AUROC"] == rows["FB-CLIP", "MVTec", "cable"]["pixel_AUROC"]
    assert len(list((pictures / "ISIC").rglob("*.jpg.png"))) == 3
    assert "failed; run the command again" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_understood_and_their_models_can_be_built(recipe: Path, tmp_path: Path, small_clip) -> None:
    config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if "table" not in config:
        words = ["fit", "--config", str(recipe), "--model.backbone", "tiny", "--default_root_dir", str(tmp_path)]
        cli = AnomalibCLI(words, run=False)
        assert isinstance(cli.model, FBCLIP)
        assert isinstance(cli.datamodule, AuxiliaryTransfer)
        assert cli.datamodule.source_name.endswith("-all")
        return
    plan = make_plan(config["table"])
    clip = small_clip()
    different = {str(replace(cell.model, name="")): cell.model for cell in plan.cells}
    for model in different.values():
        assert hasattr(anomalib.models, model.class_path)
        if model.class_path == "FBCLIP":
            _assert_part_is_switched(model, clip)
    # Rows differ in their parts, and none is there twice.
    assert len(different) >= len(plan.models)


def _assert_part_is_switched(model: ModelSpec, clip: FrozenCLIP) -> None:
    arguments = model.init_args
    assert set(arguments) <= argument_names(FBCLIP)
    parts = {name: value for name, value in arguments.items() if name not in NOT_OF_THE_MODEL}
    part = FBCLIPModel(clip, feature_layers=(2, 4), **parts)
    assert sorted(part.text_fusion.poolings) == sorted(arguments.get("text_poolings", ("global", "attention", "eot")))
    assert tuple(part.views) == tuple(arguments.get("views", ("id", "sem", "spa")))
    assert (part.attention is not None) == arguments.get("attention", True)
    assert (part.suppression, part.bank) == (arguments.get("suppression", True), arguments.get("bank", "half"))


def test_an_ablation_runs_end_to_end(root: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / "experiment" / "ablation_table5.yaml").read_text(encoding="utf-8"))
    table = config["table"]
    for model in table["models"]:
        model["init_args"] = {**model["init_args"], **TINY}
        model["auxiliary"] = {"name": "MVTec", "categories": ["bottle"]}
    table.update(datasets=[{"name": "VisA", "categories": ["candle"]}], loader={"num_workers": 0}, accelerator="cpu")
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["--config", str(path), "--root", str(root), "--results", str(tmp_path / "r")]) == 0
    rows = _rows(tmp_path / "r")
    assert len(rows) == 4
    values = {rows[model, "VisA", "mean"]["pixel_AUROC"] for model in ("L", "L/2")}
    assert len(values) == 2
    assert not any(math.isnan(float(value)) for value in values)


def test_a_test_on_its_own_source_warns(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": tmp_path}
    source = MVTecAD(root / "MVTecAD", category="bottle", num_workers=0)
    other = Visa(root / "visa", category="candle", num_workers=0)
    trained = FBCLIP(**TINY, weights=None, visualizer=False)
    # Without a target there is nothing to validate or to test on.
    Engine(**engine).fit(trained, datamodule=AuxiliaryTransfer(source, train_batch_size=2))
    assert trained.trainer.global_step == 3
    with pytest.raises(ValueError, match="target=None"):
        AuxiliaryTransfer(source).test_dataloader()
    path = trained.save_adapter(tmp_path / "a.safetensors")

    adapted = FBCLIP(**TINY, weights=path, visualizer=False)
    targets = {
        "too good": [source, AuxiliaryTransfer(other, source)],
        "": [LabelledFolder(root / "ISIC", abnormal_dir="ISBI2016_ISIC_Part1_Test_Data")],
    }
    for said, datamodules in targets.items():
        for datamodule in datamodules:
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="anomalib_fbclip"):
                Engine(**engine, limit_test_batches=1).test(adapted, datamodule=datamodule)
            assert ("too good" in caplog.text) == bool(said)


def test_zero_shot_models_fit_into_one_grid_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS / "benchmark" / "zero_shot.yaml"
    grid = yaml.safe_load(config.read_text(encoding="utf-8"))["benchmark"]["model"]["grid"]
    assert [model["class_path"] for model in grid] == ["FBCLIP", "FiSeCLIP", "WinClip"]
    assert all(hasattr(anomalib.models, model["class_path"]) and len(model) == 1 for model in grid)
    if os.environ.get("ANOMALIB_FBCLIP_DOWNLOADS") != "1":
        pytest.skip("the run itself downloads weights; ANOMALIB_FBCLIP_DOWNLOADS=1 allows it")
    monkeypatch.chdir(tmp_path)
    Benchmark().run(Namespace(config=config))
    with next(tmp_path.glob("runs/benchmark/*/results.csv")).open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3
