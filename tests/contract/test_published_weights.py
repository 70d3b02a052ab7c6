# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Published weights of all methods through anomalib: zero-shot at once, their source stated, converted."""

import logging

import pytest
import torch
from anomalib.data import Visa
from anomalib.engine import Engine
from miniatures import write
from published import write_afclip, write_anomalyclip, write_fbclip

import anomalib_fbclip
from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.commands.cli import main

NAMES = ("AFCLIP", "AnomalyCLIP", "FBCLIP")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of each method, in the form of its authors, and the map that it must give."""
    folder = tmp_path_factory.mktemp("published")
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    files = {}
    for name in NAMES:
        module = getattr(anomalib_fbclip, name)(backbone="tiny", image_size=56, weights=None, seed=3).eval()
        path = {
            "AFCLIP": lambda model: write_afclip(model, folder / "weight", "visa"),
            "AnomalyCLIP": lambda model: write_anomalyclip(model, folder / "epoch_15.pth"),
            "FBCLIP": lambda model: write_fbclip(model, folder / "fbclip.pth"),
        }[name](module.model)
        with torch.no_grad():
            files[name] = (path, images, module(images).anomaly_map)
    return files


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_zero_shot_and_convert_makes_an_adapter_of_them(name, published, tmp_path, capsys):
    path, images, expected = published[name]
    output = tmp_path / "adapter.safetensors"
    words = ["convert", str(path), "--output", str(output), "--source", "VisA", "--backbone", "tiny"]
    assert main(words) == 0, capsys.readouterr().err
    assert "trained on VisA" in capsys.readouterr().out
    _, metadata = adapter_file.read(output)
    assert (metadata["model"], metadata["source"], metadata["backbone"]) == (name, "VisA", "tiny")
    for weights in (path, output):
        module = getattr(anomalib_fbclip, name)(backbone="tiny", image_size=56, weights=weights).eval()
        with torch.no_grad():
            torch.testing.assert_close(module(images).anomaly_map, expected)


def test_convert_reports_what_it_cannot_do(published, tmp_path, capsys):
    path = published["AFCLIP"][0]
    output = tmp_path / "a.safetensors"
    assert main(["convert", str(path), "--output", str(output), "--backbone", "tiny"]) == 0
    assert "give --source" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.pth"), "--output", str(output)]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["convert", str(path), "--output", str(tmp_path / "a.pth"), "--backbone", "tiny"]) == 1
    assert "use the suffix .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_stated_source_is_guarded(name, published, tmp_path, caplog):
    write("VisA", tmp_path / "visa", ("candle",))
    data = Visa(tmp_path / "visa", category="candle", num_workers=0)

    def tested(**arguments):
        caplog.clear()
        arguments = {"weights": str(published[name][0]), "backbone": "tiny", "image_size": 56, **arguments}
        module = getattr(anomalib_fbclip, name)(**arguments)
        with caplog.at_level(logging.WARNING):
            Engine(default_root_dir=tmp_path / "results", accelerator="cpu", devices=1).test(module, datamodule=data)
        return "this is not zero-shot" in caplog.text

    assert not tested()
    assert tested(source="VisA")
    assert not tested(source="MVTec AD")


def test_what_is_stated_counts_and_needs_weights(published, tmp_path, caplog):
    path = published["FBCLIP"][0]
    model = anomalib_fbclip.FBCLIP
    assert model(backbone="tiny", image_size=56, weights=path).source == "mvtec"
    stated = model(backbone="tiny", image_size=56, weights=path, source="VisA")
    assert stated.source == "VisA"
    assert "source='VisA' counts; the adapter says 'mvtec'" in caplog.text
    path = stated.save_adapter(tmp_path / "a.safetensors")
    assert model(backbone="tiny", image_size=56, weights=path).source == "VisA"
    with pytest.raises(ValueError, match="source='VisA' says what an adapter was trained on: give weights"):
        model(backbone="tiny", weights=None, source="VisA")
