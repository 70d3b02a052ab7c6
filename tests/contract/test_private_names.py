# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Guards that rest on private names of Lightning step aside where a name is gone; the run goes on as in anomalib."""

import logging

import pytest
from PIL import Image

from anomalib_fbclip.adapted import lightning_model
from anomalib_fbclip.host import unreadable


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.radial_gradient("L").save(tmp_path / "images" / name)
    return tmp_path / "images"


def test_without_the_loaders_of_a_prediction(model, engine, folder, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(unreadable, "COMBINED_LOADER", "_gone")
    with caplog.at_level(logging.WARNING):
        assert len(engine().predict(model(), data_path=folder)) == 2
    (table,) = tmp_path.rglob("predictions.csv")
    assert len(table.read_text().splitlines()) == 3
    # An unreadable file then ends the run, as it does in anomalib.
    (folder / "c.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match="identify"):
        engine().predict(model(), data_path=folder)


def test_without_the_source_of_a_run_and_its_fetcher(model, surfaces, engine, monkeypatch) -> None:
    monkeypatch.setattr(unreadable, "DATA_SOURCE", "_gone")
    monkeypatch.setattr(lightning_model, "DATA_FETCHER", "_gone")
    trained = model(weights=None)
    engine(max_epochs=1).fit(trained, datamodule=surfaces(train_anomalous=True))
    assert trained.trainer.global_step > 0
    assert engine().test(trained, datamodule=surfaces())
