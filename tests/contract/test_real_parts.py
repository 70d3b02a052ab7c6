# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What a line asks for: regions, least areas, components, maps as numbers, several views of one part."""

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from lightning.pytorch import Callback
from PIL import Image
from torchmetrics.functional.classification import binary_auroc

from anomalib_fbclip import AFCLIP, FBCLIP
from anomalib_fbclip.adapted.line import set_up
from anomalib_fbclip.commands.front import _with_maps
from anomalib_fbclip.host.components import find_components
from anomalib_fbclip.host.parts import PATTERNS, RULES, Parts, View
from anomalib_fbclip.host.prediction_index import read_table
from anomalib_fbclip.host.regions import FILLS


class Pixels(Callback):
    """Keeps maps and masks of a test."""

    def __init__(self) -> None:
        self.maps, self.masks, self.labels = [], [], []

    def on_test_batch_end(self, *arguments):
        batch = arguments[3]
        self.maps.append(batch.anomaly_map.clone())
        self.masks.append(batch.gt_mask.clone())
        self.labels.append(batch.gt_label.clone())


def region(path: Path, *rows: slice) -> Path:
    inside = np.zeros((56, 56), bool)
    for part in rows:
        inside[part] = True
    Image.fromarray(inside).save(path)
    return path


@pytest.mark.parametrize("metrics", ["default", "full"])
def test_metrics_and_thresholds_count_what_is_inside(metrics, model, engine, surfaces, tmp_path) -> None:
    path = region(tmp_path / "region.png", slice(10, 46))
    pixels = Pixels()
    tested = model(region=path, metrics=metrics, visualizer=False)
    (results,) = engine(callbacks=[pixels]).test(tested, datamodule=surfaces())
    maps, masks = (torch.cat(each) for each in (pixels.maps, pixels.masks))
    inside = torch.from_numpy(np.asarray(Image.open(path)) > 0)
    assert not masks[:, ~inside].any()
    assert not maps[:, ~inside].any()
    expected = float(binary_auroc(maps[:, inside], masks[:, inside].int()))
    assert results["pixel_AUROC"] == pytest.approx(expected, abs=1e-3)
    # An image whose defect is outside is good.
    assert torch.equal(torch.cat(pixels.labels).bool(), masks.flatten(1).any(dim=1))
    (whole,) = engine().test(model(metrics=metrics, visualizer=False), datamodule=surfaces())
    assert whole["pixel_AUROC"] != pytest.approx(results["pixel_AUROC"], abs=1e-6)


def test_a_checkpoint_carries_the_region(model, engine, surfaces, tmp_path) -> None:
    path = region(tmp_path / "region.png", slice(10, 46))
    made = model(region=path, crop_to_region=True, region_fill="mean", visualizer=False)
    engine().test(made, datamodule=surfaces())
    made.trainer.save_checkpoint(tmp_path / "model.ckpt")
    path.unlink()
    loaded = type(made).load_from_checkpoint(tmp_path / "model.ckpt")
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images).anomaly_map, made.eval()(images).anomaly_map)
        path = region(path, slice(10, 46))
        nearest = model(region=path, crop_to_region=True).eval()(images)
        assert not torch.allclose(nearest.anomaly_map, made(images).anomaly_map, atol=1e-3)
        assert not torch.allclose(nearest.pred_score, made(images).pred_score, atol=1e-3)


def test_a_strip_shows_the_image_outside_of_the_region_pale(model, engine, tmp_path) -> None:
    columns = np.zeros((56, 56, 3), np.uint8)
    columns[:, ::14] = columns[:, 1::14] = columns[:, 2::14] = columns[:, 3::14] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(columns).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.tile(np.arange(56) < 28, (56, 1))).save(tmp_path / "left.png")
    engine().predict(model(region=tmp_path / "left.png", threshold=0.5), data_path=tmp_path / "images")
    (strip,) = (tmp_path / "results").rglob("images/**/a.png")
    panel = np.asarray(Image.open(strip).convert("L"), dtype=float)[100:300, 8:328]
    assert panel[:, :150].std() > 2 * panel[:, 170:].std() > 20


def test_a_folder_of_regions_is_refused_by_exports_and_holes_by_runs(model, engine, surfaces, tmp_path) -> None:
    (tmp_path / "regions").mkdir()
    region(tmp_path / "regions" / "0.png", slice(10, 46))
    made = model(region=tmp_path / "regions", visualizer=False)
    for kind in ("torch", "onnx"):
        with pytest.raises(ValueError, match="one mask for all images"):
            engine().export(made, kind, export_root=tmp_path)
    with pytest.raises(FileNotFoundError, match="has no mask for"):
        engine().test(made, datamodule=surfaces())
    for arguments in ({"crop_to_region": True}, {"region_fill": "mean"}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.* without a region"):
            model(**arguments)


def test_a_line_file_carries_the_region(adapter, surfaces, tmp_path) -> None:
    data = surfaces()
    data.setup()
    good = Path(data.train_data.samples.image_path[0]).parent
    path = region(tmp_path / "region.png", slice(10, 46))
    settings = {"backbone": "tiny", "weights": str(adapter), "image_size": 56, "k_shot": 2, "seconds_per_image": 1e3}
    made = set_up(good, region=path, crop_to_region=True, **settings).module
    file = made.save_line(tmp_path / "line.safetensors")
    path.unlink()
    loaded = FBCLIP(weights=file).eval()
    assert loaded.regions.crop
    assert loaded.thresholds == made.thresholds
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).anomaly_map, made(images).anomaly_map)
    # Thresholds of a region are not those of another one, nor of one that is filled otherwise.
    path = region(path, slice(10, 46))
    filled = [FBCLIP(weights=file, region=path, crop_to_region=True, region_fill=fill) for fill in FILLS]
    assert [each.thresholds["origin"] for each in filled] == ["normal pictures", "fixed"]
    path = region(tmp_path / "other.png", slice(5, 46))
    assert FBCLIP(weights=file, region=path).thresholds["origin"] == "fixed"


@pytest.fixture
def images(surfaces, tmp_path) -> Path:
    """Four defective images, twice as large as the model's input."""
    data = surfaces()
    data.setup()
    samples = data.test_data.samples
    folder = tmp_path / "images"
    folder.mkdir()
    for number, file in enumerate(samples[samples.label_index == 1].image_path):
        Image.open(file).resize((112, 112)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_components_and_maps_are_in_pixels_of_the_image(kind, model, engine, images) -> None:
    runner = engine()
    runner.predict(model(threshold=0.3, save_maps=kind), data_path=images)
    root = Path(runner.trainer.default_root_dir)
    rows = read_table(root / "images" / "predictions.csv")
    assert len(rows) == len(list((root / "maps").rglob(f"*.{kind}"))) == 4
    for row in rows:
        path = (root / "images" / row["map"]).resolve()
        values = np.load(path) if kind == "npy" else np.asarray(Image.open(path)) / 65535
        assert values.shape == (112, 112)
        assert values.max() == pytest.approx(float(row["map_max"]), abs=0.1)
        for component in json.loads(row["components"]):
            left, top, right, bottom = component["box"]
            assert values[top:bottom, left:right].max() == pytest.approx(component["peak"], abs=0.1)
    assert any(json.loads(row["components"]) for row in rows)


def test_a_least_area_empties_masks_verdicts_and_rows(model, engine, images) -> None:
    everything = engine().predict(model(threshold=0.3, visualizer=False), data_path=images)
    sizes = [
        [one.area for one in find_components(batch.pred_mask[0], batch.anomaly_map[0], (112, 112))]
        for batch in everything
    ]
    least = max(max(each, default=0) for each in sizes) + 1
    runner = engine()
    batches = runner.predict(model(threshold=0.3, min_area=least), data_path=images)
    for batch, before, areas in zip(batches, everything, sizes, strict=True):
        assert not batch.pred_mask.any()
        assert bool(batch.pred_label) == (bool(before.pred_label) and not areas)
    rows = read_table(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv")
    assert all(row["components"] == "[]" for row in rows)
    raw = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    for least, marked in ((112 * 112 + 1, False), (1, True)):
        made = model(min_area=least).eval()
        made.post_processor.set_thresholds(0.0, 0.0)
        with torch.no_grad():
            assert bool(made(raw).pred_mask.any()) is marked
    for arguments in ({"min_area": -1}, {"min_area": 5, "post_processor": False}, {"save_maps": "tiff"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            model(**arguments)


def test_onnx_holds_region_crop_and_least_area(engine, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = region(tmp_path / "region.png", slice(10, 46))
    light = {"backbone": "tiny", "image_size": 56, "weights": None, "feature_layers": [1], "visualizer": False}
    # Near 1, where untrained maps lie at the default, a threshold would magnify the last digits.
    made = AFCLIP(region=path, crop_to_region=True, min_area=1, temperature=1.0, **light).eval()
    images = torch.rand(6, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    images[1:, :, 40:60, 50:80] = 0
    with torch.no_grad():
        raw = made(images).anomaly_map  # at the threshold 0.5 nothing is bent
        made.post_processor.set_thresholds(0.0, float(raw[raw > 0].quantile(0.9)))
        loose = made(images)
        found = zip(loose.pred_mask, loose.anomaly_map, strict=True)
        areas = sorted(one.area for mask, values in found for one in find_components(mask, values, (112, 112)))
        least = made.post_processor.min_area = (areas[0] + areas[-1]) // 2
        expected = made(images)
    assert 0 < expected.pred_mask.sum() < loose.pred_mask.sum()
    file = engine().export(made, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["min_area"]) == least
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    maps = torch.tensor(found["anomaly_map"]).reshape(expected.anomaly_map.shape)
    torch.testing.assert_close(maps, expected.anomaly_map, rtol=0, atol=1e-5)
    masks = torch.tensor(found["pred_mask"]).reshape(expected.pred_mask.shape)
    assert (masks != expected.pred_mask).float().mean() < 5e-3  # a pixel on the threshold may change sides


def test_the_front_takes_maps_and_the_command_line_all_arguments(tmp_path) -> None:
    assert _with_maps(["--data", "x", "--save_maps"])[-2:] == ["--model.save_maps", "png"]
    assert _with_maps(["--save_maps", "npy", "--data", "x"]) == ["--data", "x", "--model.save_maps", "npy"]
    assert _with_maps(["--save_maps=npy"]) == ["--model.save_maps", "npy"]
    assert _with_maps(["--save_maps", "--data", "png"]) == ["--data", "png", "--model.save_maps", "png"]
    path = region(tmp_path / "region.png", slice(10, 46))
    words = ["predict", "--model", "FBCLIP", "--model.backbone", "tiny", "--data", "ProceduralSurfaces"]
    words += ["--model.region", str(path), "--model.crop_to_region", "true", "--model.min_area", "7"]
    words += ["--model.save_maps", "npy", "--model.group_by", "data", "--model.part_score", "mean"]
    built = AnomalibCLI([*words, "--data.views", "2", "--default_root_dir", str(tmp_path)], run=False).model
    assert built.regions.crop
    assert built.post_processor.min_area == 7
    assert built.parts.rule == "mean"


def test_parts_have_scores_thresholds_and_metrics_of_their_own(model, engine, surfaces, caplog) -> None:
    runner = engine()
    data = surfaces(views=3, num_train=4, num_test=6)
    made = model(group_by="data", visualizer=False)
    with caplog.at_level(logging.INFO, logger="anomalib_fbclip"):
        (results,) = runner.test(made, datamodule=data)
    parts = made.parts.last
    assert len(parts) == 6
    assert all(part.views == 3 for part in parts)
    assert sum(bool(part.truth) for part in parts) == 3
    assert {"image_AUROC", "part_AUROC", "part_F1Max", "part_F1Score"} <= results.keys()
    truths = torch.tensor([int(bool(part.truth)) for part in parts])
    expected = float(binary_auroc(torch.tensor([part.score for part in parts]), truths))
    assert results["part_AUROC"] == pytest.approx(expected)
    assert results["part_F1Score"] == pytest.approx(results["part_F1Max"])  # the threshold is from the same parts
    assert "6 parts at the threshold" in caplog.text

    runner.predict(made, datamodule=data)
    (table,) = Path(runner.trainer.default_root_dir).rglob("parts.csv")
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [row["part"] for row in rows] == [part.name for part in made.parts.last]
    assert all(int(row["label"]) == (float(row["score"]) > float(row["threshold"])) for row in rows)
    assert all(row["part"] in row["view"] for row in rows)


def test_normal_parts_set_the_threshold_of_parts(model, engine, surfaces, tmp_path) -> None:
    data = surfaces(views=3, num_train=4, num_test=6)
    data.setup()
    good = Path(data.train_data.samples.image_path[0]).parent
    made = model(group_by=r"(\w+_\d+)_view", normal_source=good, false_alarm_rate=0.3, visualizer=False)
    engine().predict(made, data_path=good)
    found = made.thresholds
    assert (found["pictures"], found["parts"]) == (12, 4)
    assert 0 < found["part"] < 1
    stored = model(group_by=r"(\w+_\d+)_view", weights=made.save_adapter(tmp_path / "a.safetensors"))
    assert stored.thresholds == found
    highest = model(group_by=r"(\w+_\d+)_view", part_score="max", normal_source=good, visualizer=False)
    highest.calibrate_once()
    assert highest.thresholds["part"] >= highest.thresholds["image"]
    assert highest.thresholds["part"] != found["part"]
    with pytest.raises(ValueError, match=r"'\(nothing\)' is not in the path"):
        engine().predict(model(group_by="(nothing)", visualizer=False), data_path=good)
    for arguments in ({"group_by": "("}, {"group_by": "x", "part_score": "least"}, {"part_score": "mean"}):
        with pytest.raises(ValueError, match=[*arguments][-1]):
            model(**arguments)


def test_rules_and_groups() -> None:
    assert (
        Parts(PATTERNS["RealIAD"])
        .name_of("/d/audiojack/NG/BX/S0009/audiojack_0009_NG_BX_C1_2023.jpg")
        .endswith("S0009")
    )
    scores = torch.tensor([0.5, 0.2, 0.8])
    found = {name: round(float(rule(scores)), 4) for name, rule in RULES.items()}
    # Odds of 1, 1 / 4 and 4: their geometric mean is 1.
    assert found == {"log_odds": 0.5, "max": 0.8, "mean": 0.5, "any": 0.92}
    assert float(RULES["log_odds"](torch.tensor([0.9, 0.9, 0.5]))) == pytest.approx(0.8123, abs=1e-4)
    parts = Parts(r"side(?P<view>\d)/(?P<part>\w+)\.png").group(
        [View("side1/a.png", 0.1, False), View("side2/a.png", 0.7, True), View("side1/b.png", 0.3)],
    )
    assert parts[0].score == pytest.approx((0.1 / 0.9 * 0.7 / 0.3) ** 0.5 / (1 + (0.1 / 0.9 * 0.7 / 0.3) ** 0.5))
    assert [(part.name, part.view, part.views, part.truth) for part in parts] == [
        ("a", "side2/a.png", 2, True),
        ("b", "side1/b.png", 1, None),
    ]
