# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip predict`` and ``test``: what a user reads on the screen, with right and with wrong settings."""

import io
import logging
import sys

import pytest
from lightning.pytorch.callbacks import RichProgressBar
from PIL import Image

from anomalib_fbclip.commands.cli import main

MODEL = ("--model", "FBCLIP", "--model.backbone", "tiny", "--model.image_size", "56")
RUN = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")


@pytest.fixture
def images(tmp_path, monkeypatch):
    for name in ("good/0.png", "bad/0.png", "images/0.png", "images/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 30), 50).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("images")
def test_each_line_is_ours_and_comes_once(capsys) -> None:
    handlers = logging.getLogger().handlers[:]
    assert main(["predict", *MODEL, *RUN, "--data", "images"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Scores", "Strips", "Uncalibrated"]
    assert lines[-1].endswith("--model.normal_source FOLDER_OF_GOOD_IMAGES")
    assert logging.getLogger().handlers == handlers
    assert main(["predict", *MODEL, *RUN, "--data", "images", "--model.normal_source", "good"]) == 0
    assert "Uncalibrated" not in capsys.readouterr().err


@pytest.mark.usefixtures("images")
def test_a_test_is_as_quiet(capsys) -> None:
    data = ("--data", "LabelledFolder", "--data.root", ".", "--data.normal_dir", "good", "--data.num_workers", "0")
    assert main(["test", *MODEL, *RUN, *data, "--data.abnormal_dir", "bad"]) == 0
    captured = capsys.readouterr()
    starts = [line.split(":")[0] for line in captured.err.splitlines() if not line.startswith(" ")]
    assert starts[0] == "The test split has no masks"
    assert starts[1].startswith("2 images at the threshold")
    assert starts[2:] == ["False alarms", "Misses", "Strips"]
    assert "image_AUROC" in captured.out
    for given, message in (
        (("--data.abnormal_dir", "no"), "no"),
        (("--data.abnormal", "bad"), "'abnormal' is not accepted"),
        (("--data", "LabeledFolder"), "did you mean 'LabelledFolder'?"),
    ):
        assert main(["test", *MODEL, *RUN, *data, *given]) == 1
        (*_, last) = capsys.readouterr().err.strip().splitlines()
        assert last.startswith("error: ")
        assert message in last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*MODEL, "--data", "nowhere"), "Path does not exist"),
        ((*MODEL, "--data", "images", "--model.weights", "no.safetensors"), "'no.safetensors' does not exist: give a"),
        (("--model", "FBCLIP", "--model.backbone", "tinny", "--data", "images"), "did you mean 'tiny'"),
        ((*MODEL, "--data", "images", "--model.k_shots", "3"), "'k_shots' is not accepted: did you mean 'k_shot'?"),
        ((*MODEL, "--data", "images", "--model.threshold", "1.5"), "threshold=1.5"),
        ((*MODEL, "--data", "images", "--trainer.acelerator", "cpu"), "Unrecognized arguments: --trainer.acelerator"),
        (("--model", "FBCLLIP", "--data", "images"), "did you mean 'FBCLIP'?"),
        (MODEL, "Option 'data' is required"),
    ],
)
@pytest.mark.usefixtures("images")
def test_an_error_is_one_or_two_lines(words, message, capsys) -> None:
    accelerator = () if "--trainer.acelerator" in words else RUN
    assert main(["predict", *words, *accelerator]) == 1
    (*first, last) = capsys.readouterr().err.strip().splitlines()
    assert len(first) <= 1
    assert message in (first or [last])[0]
    assert (first or [last])[0].startswith("error: ")


@pytest.mark.usefixtures("images")
def test_debug_shows_all() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["predict", *MODEL, *RUN, "--data", "nowhere", "--debug"])


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter is Python's with LC_ALL=C
def test_a_console_without_utf8_does_not_end_a_run(errors, images, model, engine, monkeypatch) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", console)
    # Its bar has a dot that ASCII does not know.
    engine(callbacks=[RichProgressBar()]).predict(model(), data_path=images / "images")
    sys.stdout.write("Prüfung")
    console.flush()
    shown = console.buffer.getvalue()
    assert b"\\u2022" in shown
    assert b"Pr\\xfcfung" in shown
