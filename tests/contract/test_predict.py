# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Predicting images as users have them: folders in folders, odd names, files that are no images."""

import csv
import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import PredictDataset
from lightning.pytorch import Callback
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_fbclip import PictureFolder
from anomalib_fbclip.callbacks import PredictionIndex
from anomalib_fbclip.host.prediction_index import read_table
from anomalib_fbclip.host.visualization import PredictionVisualizer

READABLE = {
    "line1/good/0.png": "RGB",
    "line2/good/0.png": "L",
    "line2/good/0.jpg": "RGB",
    'odd, "name" ü %20 #1.PNG': "RGBA",
    "x.bmp": "P",
    "y.tiff": "RGB",
    "z.webp": "RGB",
}
UNREADABLE = ("cut.png", "cut.jpg", "deep/empty.png", "text.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    for index, (name, mode) in enumerate(READABLE.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[: 30 + 9 * index]).convert(mode).save(path)
    (root / "deep").mkdir()
    for name in UNREADABLE[:2]:
        Image.fromarray(noise).save(root / name)
        (root / name).write_bytes((root / name).read_bytes()[:900])
    (root / "deep/empty.png").touch()
    (root / "text.png").write_text("no image")
    return root


def _rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_a_folder_ends_in_one_picture_and_one_row_a_file(model, engine, folder, caplog) -> None:
    runner = engine()
    with caplog.at_level(logging.INFO):
        batches = runner.predict(model(threshold=0.5), data_path=folder)
    assert len(batches) == len(READABLE)
    images = Path(runner.trainer.default_root_dir) / "images"
    rows = _rows(images / "predictions.csv")
    assert rows.keys() == {str(folder / name) for name in (*READABLE, *UNREADABLE)}
    for batch in batches:
        row = rows[batch.image_path[0]]
        assert float(row["score"]) == pytest.approx(float(batch.pred_score), abs=1e-6)
        assert row["label"] == str(int(batch.pred_label))
        assert int(row["label"]) == (float(row["score"]) > float(row["threshold"]))
        assert float(row["map_max"]) == pytest.approx(float(batch.anomaly_map.max()), abs=1e-6)
    pictures = {rows[str(folder / name)]["picture"] for name in READABLE}
    assert pictures == {f"{folder.name}/{name}{'' if name.lower().endswith('.png') else '.png'}" for name in READABLE}
    assert all(Image.open(images / picture).format == "PNG" for picture in pictures)
    assert "To calibrate" not in caplog.text
    assert sorted(images.glob("*.csv")) == [images / "predictions.csv"]
    for name in UNREADABLE:
        assert rows[str(folder / name)]["error"]
        assert not rows[str(folder / name)]["score"]
        assert str(folder / name) in caplog.text
    assert f"{len(UNREADABLE)} of {len(rows)} files could not be read" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_workers_and_json_lines(workers: int, model, engine, folder, tmp_path) -> None:
    # Images of one size, so that they fit into batches; the data set is left as it was.
    dataset = PredictDataset(folder)
    resize = torch.nn.AdaptiveAvgPool2d(40)
    dataset.transform = resize
    index = PredictionIndex(tmp_path / "elsewhere", "scores.jsonl")
    # A batch of one makes batches that are empty, a batch of three such that are not full.
    loader = DataLoader(dataset, batch_size=1 + workers, num_workers=workers, collate_fn=dataset.collate_fn)
    batches = engine(callbacks=[index]).predict(model(), dataloaders=loader)
    assert sum(len(batch) for batch in batches) == len(READABLE)
    rows = [json.loads(line) for line in (tmp_path / "elsewhere" / "scores.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in rows if "error" in row] == [
        Path(name).name for name in sorted(UNREADABLE)
    ]
    assert len(index.unreadable) == len(UNREADABLE)
    assert all(Path(row["picture"]).is_file() and row["label"] == "uncalibrated" for row in rows if "score" in row)
    with pytest.raises(OSError, match="truncated"):
        dataset[[path.name for path in dataset.image_filenames].index("cut.jpg")]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_picture_is_left_out_without_a_row(workers, model, engine, folder) -> None:
    def transform(image: torch.Tensor) -> torch.Tensor:
        if image.shape[-2] == 30:  # the first of the folder
            msg = "the share was away"
            raise OSError(msg)
        return image[..., :30, :30]

    dataset = PredictDataset(folder / "line1", transform=transform)
    runner = engine()
    loader = DataLoader(dataset, collate_fn=dataset.collate_fn, num_workers=workers)
    assert runner.predict(model(), dataloaders=loader) == []
    (row,) = _rows(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv").values()
    assert "the image can be read now" in row["error"]


def test_nothing_readable_is_no_crash(model, engine, folder, caplog) -> None:
    runner = engine()
    assert runner.predict(model(), data_path=folder / "text.png") == []
    assert "1 of 1 files could not be read" in caplog.text
    (row,) = _rows(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv").values()
    assert "cannot identify" in row["error"]


def test_a_limit_and_an_interrupted_run(model, engine, folder) -> None:
    runner = engine(limit_predict_batches=3)
    runner.predict(model(), data_path=folder)
    images = Path(runner.trainer.default_root_dir) / "images"
    assert len([row for row in _rows(images / "predictions.csv").values() if row["score"]]) == 3
    (images / "predictions.csv").unlink()

    fbclip = model()
    step, calls = fbclip.predict_step, []

    def fail_at_third(*args):
        calls.append(args)
        if len(calls) == 3:
            # As a run that is killed now would leave it; the name is this process's own.
            assert len(_rows(images / f"predictions.partial-{os.getpid()}.csv")) == 2
            msg = "no more power"
            raise RuntimeError(msg)
        return step(*args)

    fbclip.predict_step = fail_at_third
    with pytest.raises(RuntimeError, match="power"):
        engine().predict(fbclip, data_path=folder)
    assert not (images / "predictions.csv").exists()
    assert len(_rows(images / f"predictions.partial-{os.getpid()}.csv")) == 2


@pytest.mark.parametrize("dataset", [None, PictureFolder])
def test_files_that_anomalib_passes_over_are_counted_and_have_rows(dataset, model, engine, tmp_path, caplog) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (60, 60)).save(folder / "0.png")
    Image.new("RGB", (60, 60)).save(folder / "deep" / "1.png")
    skipped = ["a.gif", "b.GIF", "c.heic", "deep/d.avif", "e.svg", "f.mp4", "g.jp2"]
    for name in [*skipped, "notes.txt", "table.csv"]:
        (folder / name).touch()
    runner = engine()
    data = {"data_path": folder} if dataset is None else {"dataset": dataset(folder)}
    runner.predict(model(), **data)
    rows = _rows(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv")
    assert {path for path, row in rows.items() if row["error"]} == {str(folder / name) for name in skipped}
    assert len(rows) == 2 + len(skipped)
    assert "7 images or videos have extensions that anomalib does not read (2 .gif, " in caplog.text
    assert all(str(folder / name) in caplog.text for name in skipped)
    # One image is asked for, and not its folder, of which it would be one of two.
    runner = engine()
    runner.predict(model(), data_path=folder / "0.png")
    assert len(_rows(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv")) == 1
    # The folder of a single image.
    runner = engine()
    data = {"data_path": folder / "deep"} if dataset is None else {"dataset": dataset(folder / "deep")}
    runner.predict(model(), **data)
    rows = _rows(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv")
    assert set(rows) == {str(folder / "deep" / name) for name in ("1.png", "d.avif")}


class Terminate(Callback):
    """Sends this process the signal by which service managers and batch systems end it."""

    def on_predict_batch_start(self, *args) -> None:
        if args[3] == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_prediction_and_the_rows_so_far_are_named(model, engine, folder, caplog) -> None:
    runner = engine(callbacks=[Terminate()])
    with pytest.raises(SystemExit) as ended:
        runner.predict(model(), data_path=folder)
    assert ended.value.code == 143
    (partial,) = Path(runner.trainer.default_root_dir).rglob("*.csv")
    assert len(_rows(partial)) == 3
    assert f"The rows of 3 images: {partial}" in caplog.text


def test_the_command_line(folder, tmp_path, adapter) -> None:
    options = {"--model.backbone": "tiny", "--model.image_size": "56", "--model.weights": str(adapter)}
    words = [word for pair in options.items() for word in pair]
    cli = AnomalibCLI(
        ["predict", "--model", "FBCLIP", *words, "--data", str(folder), "--default_root_dir", str(tmp_path)],
    )
    assert not any(cli.engine.trainer.predict_loop.predictions)  # nobody reads them, and thousands fill the memory
    (table,) = tmp_path.rglob("predictions.csv")
    assert len([row for row in _rows(table).values() if row["score"]]) == len(READABLE)


def test_without_thresholds_there_is_no_verdict_but_the_command_that_sets_them(model, engine, folder, caplog) -> None:
    runner = engine()
    (batch,) = runner.predict(model(), data_path=folder / "x.bmp")
    assert batch.pred_label.dtype is batch.pred_mask.dtype is torch.bool
    (row,) = _rows(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv").values()
    assert (row["label"], row["note"]) == ("uncalibrated", "")
    assert "To calibrate: model.calibrate(" in caplog.records[-1].getMessage()
    assert "score and map disagree" not in caplog.text


def test_where_score_and_map_disagree_the_row_says_so(model, engine, folder, caplog) -> None:
    fbclip = model()
    fbclip.post_processor.set_thresholds(0.0, 1.0)
    runner = engine()
    with caplog.at_level(logging.INFO):
        runner.predict(fbclip, data_path=folder / "x.bmp")
    (row,) = _rows(Path(runner.trainer.default_root_dir) / "images" / "predictions.csv").values()
    assert (row["label"], row["note"]) == ("1", "score above its threshold, no pixel above the map's")
    assert "1 anomalous, 1 where score and map disagree" in caplog.text


@pytest.mark.parametrize("filename", ["predictions.csv", "predictions.jsonl"])
def test_strips_are_named_by_rank_and_score(filename, model, engine, folder) -> None:
    runner = engine(callbacks=[PredictionIndex(filename=filename)])
    runner.predict(model(visualizer=PredictionVisualizer(size=40, name_by="score")), data_path=folder)
    images = Path(runner.trainer.default_root_dir) / "images"
    rows = [row for row in read_table(images / filename) if row.get("score")]
    rows.sort(key=lambda row: -float(row["score"]))
    for rank, row in enumerate(rows, start=1):
        name = Path(row["picture"]).name
        assert name.startswith(f"{rank:04d}_{float(row['score']):.3f}_{Path(row['path']).name}")
        assert (images / row["picture"]).is_file()
    assert len(list(images.rglob("*.[pP][nN][gG]"))) == len(rows) == len(READABLE)


def test_table_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"scores\.txt"):
        PredictionIndex(filename="scores.txt")
