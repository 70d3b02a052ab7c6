# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A folder that is watched: half-written files, restarts, signals; the model itself for every adapted model."""

import csv
import os
import signal
import sys
import time
from pathlib import Path
from threading import Event, Thread

import cv2
import numpy as np
import pytest
from models import CLASSES, every_adapted_model

from anomalib_fbclip.commands.cli import main
from anomalib_fbclip.host.unreadable import read_picture
from anomalib_fbclip.host.watch import COLUMNS, MissingWatchdogError, Table, watch


def png(seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


class Watching:
    """``watch`` in a thread, with the mean of an image for its score."""

    def __init__(self, folder, path, **options):
        self.table, self.stop, self.calls = Table(path), Event(), []
        options = {"settle": 0.4, "rescan": 60.0, **options}
        self.thread = Thread(target=watch, args=(folder, self.table, self.score, self.stop), kwargs=options)

    def score(self, path):
        self.calls.append(path.name)
        return {"score": round(float(read_picture(path).mean()), 4), "label": 0, "threshold": 0.5, "map_max": 0}

    def __enter__(self):
        self.thread.start()
        time.sleep(0.3)
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.table.close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "camera").mkdir()
    return tmp_path / "camera"


def test_files_are_scored_when_they_are_whole(folder, tmp_path) -> None:
    path = tmp_path / "table.csv"
    with Watching(folder, path):
        content = png(1)
        with (folder / "slow.png").open("wb") as file:
            for start in range(0, len(content), len(content) // 4):
                file.write(content[start : start + len(content) // 4])
                file.flush()
                time.sleep(0.15)
                assert not rows_of(path)
        until(lambda: len(rows_of(path)) == 1)
        (folder / "below").mkdir()
        time.sleep(0.2)
        (folder / "below" / "renamed.tmp").write_bytes(png(2))
        (folder / "below" / "renamed.tmp").rename(folder / "below" / "renamed.png")
        until(lambda: len(rows_of(path)) == 2)
        (folder / "broken.png").write_bytes(content[:500])
        (folder / "notes.txt").write_text("no image")
        until(lambda: len(rows_of(path)) == 3)
        (folder / "broken.png").write_bytes(content)
        until(lambda: len(rows_of(path)) == 4)
    rows = rows_of(path)
    assert [Path(row["path"]).name for row in rows] == ["slow.png", "renamed.png", "broken.png", "broken.png"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, False]
    assert rows[0]["score"] == rows[3]["score"] != ""


def test_a_restart_goes_on_where_a_crash_stopped(folder, tmp_path, caplog) -> None:
    path, names = tmp_path / "table.csv", ["0.png", 'two\nlines, "quoted".png', "2.png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(png(number))
        os.utime(folder / name, (number, number))
    with Watching(folder, path) as first:
        until(lambda: len(first.table) == 3)
    assert first.calls == names
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # a row that was being written
    (folder / "3.png").write_bytes(png(3))
    table = Table(path)
    stop = Event()
    again = Watching(folder, tmp_path / "other.csv")
    assert watch(folder, table, again.score, stop, settle=0.2, once=True) == 2
    assert again.calls == ["2.png", "3.png"]
    assert "cut off" in caplog.text
    assert [row["path"] for row in rows_of(path)] == [str(folder / name) for name in [*names, "3.png"]]
    assert tuple(rows_of(path)[0]) == COLUMNS

    (tmp_path / "foreign.csv").write_text("image,score\n1,2\n")
    with pytest.raises(ValueError, match="is no table of this command"):
        Table(tmp_path / "foreign.csv")


@every_adapted_model
def test_the_command_scores_with_a_line_file_as_predict_does(name, folder, tmp_path, capsys) -> None:
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    weights = CLASSES[name](backbone="tiny", weights=None).save_adapter(tmp_path / "a.safetensors")
    model = CLASSES[name](backbone="tiny", weights=weights, image_size=56, k_shot=2, few_shot_source=folder)
    model.calibrate(folder, 0.3)
    line = model.save_line(tmp_path / "line.safetensors")
    (folder / "bad.png").write_bytes(b"no image")
    table = tmp_path / "table.csv"
    assert main(["watch", str(folder), "--weights", str(line), "--output", str(table), "--once"]) == 0
    rows = {Path(row["path"]).name: row for row in rows_of(table)}
    assert "cannot be read" in rows.pop("bad.png")["error"]
    assert "4 rows written" in capsys.readouterr().out
    model.eval()
    for file, row in rows.items():
        expected = model(read_picture(folder / file)[None])
        assert float(row["score"]) == pytest.approx(float(expected.pred_score), abs=1e-4)
        assert (row["label"], row["threshold"]) == (str(int(expected.pred_label)), "0.5")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_clean(number, folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("anomalib_fbclip.commands.watch.load_module", lambda _: None)
    monkeypatch.setattr("anomalib_fbclip.commands.watch.scorer", lambda *_: lambda _: {"score": 0.1, "label": 0})
    table, before = tmp_path / "table.csv", signal.getsignal(number)

    def write_and_stop():
        until(lambda: table.exists() and table.stat().st_size)
        time.sleep(0.3)
        (folder / "0.png").write_bytes(png())
        until(lambda: len(rows_of(table)) == 1)
        os.kill(os.getpid(), number)

    thread = Thread(target=write_and_stop)
    thread.start()
    assert main(["watch", str(folder), "--weights", "x", "--output", str(table)]) == 0
    thread.join()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Watching")
    assert said[1:] == [f"{folder / '0.png'}: 0.100 normal", f"1 rows written to {table}."]
    assert signal.getsignal(number) is before


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch) -> None:
    table = Table(tmp_path / "table.csv")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        watch(tmp_path / "no", table, dict, Event())
    for name in [name for name in sys.modules if name.startswith("watchdog")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "watchdog", None)
    with pytest.raises(MissingWatchdogError, match=r"pip install 'anomalib-fbclip\[watch\]'"):
        watch(folder, table, dict, Event())
