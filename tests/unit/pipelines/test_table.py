# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Plan, store, metrics of any range, published numbers and rows of the table, without running a model."""

import csv
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import anomalib.models
import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from anomalib.models import Padim
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_fbclip.host.metrics import (
    AnyScoreHistogram,
    ImageScores,
    ScoreHistogram,
    any_bin_to_score,
    any_score_to_bin,
)
from anomalib_fbclip.pipelines.table import run
from anomalib_fbclip.pipelines.table.bootstrap import RESAMPLED, ImageCounts, compare
from anomalib_fbclip.pipelines.table.measure import METRICS, Measure
from anomalib_fbclip.pipelines.table.plan import ModelSpec, make_plan, with_seed
from anomalib_fbclip.pipelines.table.published import published
from anomalib_fbclip.pipelines.table.report import make_rows, to_csv, to_latex, to_markdown
from anomalib_fbclip.pipelines.table.store import CellStore

OWN = {"class_path": "LabelledFolder", "init_args": {"root": "parts", "normal_dir": "good"}, "name": "own_parts"}
PROTOCOL = {
    "models": [
        {
            "name": "ours",
            "class_path": "FBCLIP",
            "init_args": {"max_epochs": 2},
            "auxiliary": "MVTec",
            "per_dataset": {"MVTec": {"auxiliary": "VisA", "init_args": {"max_epochs": 3}}},
        },
        "WinClip",
    ],
    "datasets": ["MVTec", "VisA", {"name": "BTAD", "categories": ["01"]}, OWN],
}


def test_plan_has_a_cell_for_each_category_and_the_papers_sources() -> None:
    plan = make_plan(PROTOCOL, root="/data")
    assert len(plan.cells) == 2 * (15 + 12 + 1 + 1)
    assert plan.models == ("ours", "WinClip")
    ours = {cell.data.name: cell.model for cell in plan.cells if cell.model.name == "ours"}
    assert ours["MVTec"].auxiliary["name"] == "VisA"
    assert ours["MVTec"].init_args == {"max_epochs": 3}
    assert ours["VisA"].auxiliary["init_args"]["root"] == "/data/MVTecAD"
    assert len(ours["VisA"].auxiliary["categories"]) == 15
    assert (ours["own_parts"].published, plan.cells[-1].model.published) == ("FB-CLIP", "WinCLIP")
    # Folders of your own stay where they are.
    assert plan.datasets[-1].init_args["root"] == "parts"
    assert len(make_plan({"models": ["FBCLIP"], "datasets": "all"}).datasets) == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"models": ["FBCLIP"]}, "datasets is missing"),
        ({**PROTOCOL, "modles": []}, r"\['modles'\]"),
        ({**PROTOCOL, "datasets": ["MVTek"]}, "'MVTek'"),
        ({**PROTOCOL, "models": ["Padim", "Padim"]}, "two models are called 'Padim'"),
        ({**PROTOCOL, "models": [{"name": "x"}]}, "no class_path"),
        ({**PROTOCOL, "models": [{"class_path": "FBCLIP", "args": {}}]}, r"\['args'\]"),
        ({**PROTOCOL, "models": [{"class_path": "Padim", "normal_images": 0}]}, "normal_images=0: .*at least 1"),
    ],
)
def test_plan_names_what_it_does_not_understand(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(config)


def test_key_follows_everything_that_the_result_depends_on(tmp_path: Path) -> None:
    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(b"one")
    config = {"models": [{"class_path": "FBCLIP", "init_args": {"weights": str(adapter)}}], "datasets": [OWN]}

    def key(**change: object) -> str:
        return make_plan({**config, **change}).cells[0].key

    first = key()
    renamed = {**config["models"][0], "name": "another name", "published": None}
    assert key(models=[renamed]) == first == key()
    others = {
        key(seed=1),
        key(models=[{"class_path": "FBCLIP", "init_args": {"weights": None}}]),
        key(models=[{**config["models"][0], "auxiliary": "MVTec"}]),
        key(datasets=[{**OWN, "init_args": {"root": "parts", "abnormal_dir": "bad"}}]),
        key(loader={"eval_batch_size": 2}),
        replace(make_plan(config).cells[0], versions={"torch": "0"}).key,
    }
    adapter.write_bytes(b"two")
    others.add(key())
    assert len(others | {first}) == 8


def _write_many(folder: Path, number: int) -> None:
    for step in range(25):
        CellStore(folder).write("cell", {"metrics": {"writer": number, "step": step}, "padding": "x" * 20000})


def test_runs_side_by_side_never_see_half_a_result(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    assert store.read("cell") is None
    (tmp_path / "broken.json").write_text('{"metrics": {')
    assert store.read("broken") is None
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        result = store.read("cell")
        if seen:
            assert result is not None
        seen += result is not None
    assert seen
    assert all(writer.exitcode == 0 for writer in writers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "cell.json"]


def test_published_numbers_come_with_the_package() -> None:
    assert published("FB-CLIP", "MVTec", None)["image_AUROC"] == pytest.approx(92.4)
    assert published("WinCLIP", "MVTec", None)["image_AUPR"] == pytest.approx(96.5)
    assert set(published("FB-CLIP", "Real-IAD", "zipper")) == {
        "image_AUROC",
        "image_AUPR",
        "pixel_AUROC",
        "pixel_AUPRO",
    }
    assert set(published("FB-CLIP", "ISIC", None)) == {"pixel_AUROC", "pixel_AUPRO"}
    assert published("WinCLIP", "MVTec", "bottle") == published(None, "MVTec", None) == {}


def _result(value: float) -> dict:
    metrics = dict.fromkeys(METRICS, value) | {"pixel_F1Max": math.nan}
    return {"metrics": metrics, "images": 10, "seconds_per_image": value / 1000, "peak_memory_mb": value, "note": ""}


def test_rows_have_means_published_numbers_and_differences() -> None:
    plan = make_plan({"models": ["FBCLIP"], "datasets": ["BTAD", OWN]})
    cells = plan.cells
    results = {cell.key: _result(value) for cell, value in zip(cells, (90.0, 80.0, 70.0, 60.0), strict=True)}
    rows = make_rows(plan, results, {})
    assert [row.category for row in rows] == ["01", "02", "03", "mean", "mean"]
    mean, own = rows[3], rows[4]
    assert (mean.metrics["image_AUROC"], mean.images, mean.peak_memory_mb) == (80.0, 30, 90.0)
    assert math.isnan(mean.metrics["pixel_F1Max"])
    paper = published("FB-CLIP", "BTAD", None)["image_AUROC"]
    assert mean.difference("image_AUROC") == pytest.approx(80.0 - paper)
    assert own.paper == {}

    # A mean over fewer categories is said to be one, and not set beside the paper's.
    del results[cells[1].key]
    rows = make_rows(plan, results, {cells[1].key: "OSError: no such file"})
    assert rows[1].note == "failed: OSError: no such file"
    assert (rows[3].metrics["image_AUROC"], rows[3].paper, rows[3].note) == (80.0, {}, "mean of 2 of 3")

    # Nor is one of which a category has no value.
    odd = dict(results) | {cells[1].key: _result(80.0)}
    odd[cells[1].key]["metrics"]["image_AUROC"] = math.nan
    mean = make_rows(plan, odd, {})[3]
    assert (mean.metrics["image_AUROC"], mean.note) == (80.0, "not of every category: image_AUROC")
    assert "image_AUROC" not in mean.paper
    assert "pixel_AUROC" in mean.paper

    table = list(csv.DictReader(to_csv(rows, plan).splitlines()))
    assert len(table) == 5
    assert table[0]["image_AUROC_paper"] == str(published("FB-CLIP", "BTAD", "01")["image_AUROC"])
    assert (table[1]["image_AUROC"], table[0]["pixel_F1Max"], table[0]["seed"]) == ("", "", "0")
    assert table[0]["anomalib"] == cells[0].versions["anomalib"]
    markdown = to_markdown(rows, plan).splitlines()
    assert len({line.count("|") for line in markdown[:7]}) == 1
    assert "- FBCLIP, BTAD, 02: failed: OSError: no such file" in markdown
    latex = to_latex(rows, plan)
    assert latex.count("\\\\\n") == 6
    assert "own\\_parts" in latex
    assert "\\begin{tabular}" in latex


def test_seeds_give_mean_and_deviation_of_rows_that_are_trained() -> None:
    config = {"models": [{"class_path": "FBCLIP", "auxiliary": "MVTec"}, "FiSeCLIP"], "datasets": ["BTAD"]}
    plan = make_plan({**config, "seeds": [0, 1, 2]})
    assert len(plan.cells) == 3 * 3 + 3
    values = {0: 80.0, 1: 90.0, 2: 100.0}
    results = {cell.key: _result(values[cell.seed]) for cell in plan.cells}
    rows = {(row.model, row.category): row for row in make_rows(plan, results, {})}
    trained, free = rows["FBCLIP", "mean"], rows["FiSeCLIP", "mean"]
    assert (trained.metrics["image_AUROC"], trained.deviation["image_AUROC"]) == (90.0, 10.0)
    assert trained.seeds == (0, 1, 2)
    assert (free.metrics["image_AUROC"], dict(free.deviation), free.seeds) == (80.0, {}, (0,))
    text = to_markdown(make_rows(plan, results, {}), plan)
    assert "| 90.0 ± 10.0 |" in text
    assert "seeds 0, 1, 2" in text
    # A seed that failed is left out, and reported.
    first = plan.cells[0]
    del results[first.key]
    row = make_rows(plan, results, {first.key: "OSError: gone"})[0]
    assert (row.metrics["image_AUROC"], row.note) == (95.0, "2 of 3 seeds; failed: OSError: gone")
    for wrong in ({"seeds": []}, {"seeds": 3}, {"seeds": [0.5]}, {"seed": 1, "seeds": [1]}, {"bootstrap": -1}):
        with pytest.raises(ValueError, match=r"seed|bootstrap"):
            make_plan({**config, **wrong})


def _counts(strength: float, number: int = 40) -> ImageCounts:
    """Images of which half have a defect that stands out by ``strength``."""
    generator = torch.Generator().manual_seed(0)
    counts, histogram = ImageCounts(), ScoreHistogram(regions=True)
    labels = torch.arange(number) % 2
    masks = torch.zeros(number, 24, 24, dtype=torch.bool)
    masks[1::2, 4:9, 5:12] = True
    masks[1::2, 15:18, 15:18] = True
    maps = (0.4 * torch.rand(number, 24, 24, generator=generator) + strength * masks).clamp(0, 1)
    scores = (0.3 * torch.rand(number, generator=generator) + strength * labels).clamp(0, 1)
    for part in torch.arange(number).split(16):
        paths = [f"{index}.png" for index in part.tolist()]
        counts.update(paths, scores[part], labels[part], maps[part], masks[part], histogram)
        histogram.update(maps[part], masks[part])
    image = ImageScores()
    image.update(scores, labels)
    counts.expected = {"image": image.compute(), "pixel": histogram.compute()}
    return counts


def test_one_draw_of_every_image_gives_the_metrics_themselves(tmp_path: Path) -> None:
    counts = _counts(0.1)
    counts.save(tmp_path / "cell.npz")
    found = ImageCounts.load(tmp_path / "cell.npz").resample(np.ones((1, 40)))
    for name in RESAMPLED:
        level, _, metric = name.partition("_")
        assert found[name][0] == pytest.approx(100 * counts.expected[level][metric], abs=0.3), name


def test_aupimo_where_it_is_asked_for_and_defined() -> None:
    torch.manual_seed(0)
    masks = torch.zeros(4, 400, 400, dtype=torch.bool)
    masks[1::2, 50:90, 50:90] = True
    for size, defined in ((400, True), (20, False)):
        measure = Measure(aupimo=True)
        batch = ImageBatch(
            image=torch.zeros(4, 3, size, size),
            anomaly_map=0.4 * torch.rand(4, size, size) + 0.6 * masks[:, :size, :size],
            gt_mask=masks[:, :size, :size],
            gt_label=torch.tensor([0, 1, 0, 1]),
            pred_score=torch.rand(4),
            image_path=list("abcd"),
        )
        measure.on_test_batch_end(None, None, None, batch, 0)
        value = measure.results()["pixel_AUPIMO"]
        assert (value == pytest.approx(100, abs=1)) if defined else math.isnan(value)
    assert "pixel_AUPIMO" not in Measure().results()


def test_a_difference_is_larger_than_chance_or_not() -> None:
    plan = make_plan({"models": ["FBCLIP", "FiSeCLIP", "WinClip"], "datasets": [OWN], "bootstrap": 200})
    weak, strong = _counts(0.05), _counts(0.3)
    by_name = {"FBCLIP": weak, "FiSeCLIP": strong, "WinClip": weak}
    found = compare(plan, lambda cell: by_name[cell.model.name])
    better, same = found["FiSeCLIP", "own_parts", "mean"], found["WinClip", "own_parts", "mean"]
    assert set(same.values()) == {(0.0, 0.0)}
    assert all(low > 0 for low, _ in better.values())
    results = {cell.key: _result(80.0) for cell in plan.cells}
    rows = {row.model: row for row in make_rows(plan, results, {}, found)}
    assert rows["FiSeCLIP"].differs("pixel_AUPRO")
    assert not rows["WinClip"].differs("pixel_AUPRO")
    assert not rows["FBCLIP"].intervals
    assert to_markdown(list(rows.values()), plan).count("80.0*") == len(RESAMPLED)
    assert compare(replace(plan, bootstrap=0), lambda cell: by_name[cell.model.name]) == {}
    # Another list of images is not compared.
    strong.paths = strong.paths[::-1]
    assert ("FiSeCLIP", "own_parts", "mean") not in compare(plan, lambda cell: by_name[cell.model.name])


def test_a_missing_data_set_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def missing(datamodule: object) -> None:
        asked.append(datamodule.name)
        msg = "not there"
        raise ConnectionError(msg)

    monkeypatch.setattr(run, "prepare", missing)
    datasets = [
        {"name": "MVTec", "categories": ["bottle", "cable", "hazelnut"]},
        {"name": "BTAD", "categories": ["01"]},
    ]
    plan = make_plan({"models": ["FiSeCLIP"], "datasets": datasets}, str(tmp_path))
    failed = run.run_plan(plan, lambda *_: None)
    assert asked == ["MVTecAD", "BTech"]
    assert list(failed.values()) == ["ConnectionError: not there"] * 4


def test_the_seed_reaches_models_that_take_one() -> None:
    config = {"models": ["FBCLIP", "Padim", {"class_path": "FBCLIP", "name": "own", "init_args": {"seed": 4}}]}
    plan = make_plan({**config, "datasets": ["HeadCT"], "seed": 7})
    assert [with_seed(cell.model, cell.seed) for cell in plan.cells] == [{"seed": 7}, {}, {"seed": 4}]
    unknown = ModelSpec("x", "nowhere.Model", {"a": 1})
    assert with_seed(unknown, 7) == {"a": 1}


def test_a_row_learns_from_as_many_normal_images_as_it_says(tmp_path, monkeypatch) -> None:
    learned = {}

    class Counting(Padim):
        def on_train_start(self) -> None:
            learned[self.trainer.datamodule.category] = [item.image_path for item in self.trainer.datamodule.train_data]
            super().on_train_start()

    monkeypatch.setattr(anomalib.models, "Padim", Counting)
    row = {"class_path": "Padim", "init_args": {"pre_trained": False, "n_features": 4, "layers": ["layer1"]}}
    images = {
        "root": str(tmp_path / "images"),
        "category": "wood",
        "num_train": 4,
        "num_test": 4,
        "image_size": 64,
        "num_workers": 0,
    }
    data = {"name": "a", "class_path": "ProceduralSurfaces", "init_args": images}
    config = {"models": [{**row, "normal_images": 2}, {**row, "name": "many", "normal_images": 5}], "datasets": [data]}
    for seed in (0, 1):
        failed = run.run_plan(make_plan({**config, "seed": seed}, str(tmp_path)), lambda *_: None)
        learned[seed] = learned.pop("wood")
        assert list(failed.values()) == ["ValueError: normal_images=5: the train split of a has 4."]
    assert [len(learned[seed]) for seed in (0, 1)] == [2, 2]
    assert learned[0] != learned[1]


def _maps(kind: str) -> ImageBatch:
    """Maps with defects, whose scores overlap, in different ranges."""
    torch.manual_seed(0)
    masks = torch.zeros(4, 48, 48, dtype=torch.bool)
    for index in range(3):
        masks[index, 8 * index : 8 * index + 12, 10:30] = True
        masks[index, 40:44, 30:35] = True
    scores = torch.randn(4, 48, 48) + 1.5 * masks
    ranges = {"distances": lambda x: 30 + 4 * x, "signed": lambda x: x, "tiny": lambda x: 1e-6 * x.exp()}
    scores = ranges[kind](scores)
    return ImageBatch(image=torch.zeros(4, 3, 48, 48), anomaly_map=scores, gt_mask=masks)


@pytest.mark.parametrize("kind", ["distances", "signed", "tiny"])
def test_scores_of_any_range_give_the_hosts_values(kind: str) -> None:
    maps = _maps(kind)
    histogram = AnyScoreHistogram(regions=True)
    for part in (slice(0, 1), slice(1, 4)):
        histogram.update(maps.anomaly_map[part], maps.gt_mask[part])
    values = histogram.compute()
    low, high = maps.anomaly_map.min(), maps.anomaly_map.max()
    # anomalib's metrics expect scores in [0, 1]; a shift and a factor do not change a ranking.
    scaled = maps.update(anomaly_map=(maps.anomaly_map.double() - low) / (high - low))
    for host, name in ((AUROC, "AUROC"), (AUPR, "AUPR"), (AUPRO, "AUPRO"), (F1Max, "F1Max")):
        metric = host(fields=["anomaly_map", "gt_mask"])
        metric.update(scaled)
        assert values[name] == pytest.approx(float(metric.compute()), abs=1e-3), name


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
@settings(deadline=None, max_examples=100)
def test_bins_of_any_score_keep_the_order(values: list[float]) -> None:
    scores = torch.tensor(sorted(values))
    bins = any_score_to_bin(scores)
    assert (bins.diff() >= 0).all()
    assert 0 <= int(bins.min()) <= int(bins.max()) < AnyScoreHistogram.bins
    finite = scores.isfinite() & (scores.abs() < 1e38)
    edges = any_bin_to_score(bins)
    assert (scores > edges)[finite].all()
    lower = bins[1:] > bins[:-1]
    assert (scores[:-1] <= edges[1:])[lower].all()
