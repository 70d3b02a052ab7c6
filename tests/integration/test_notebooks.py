# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Every notebook is what its source says, and runs from top to bottom in under two minutes of a processor."""

import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted((FOLDER / "sources").glob("*.py"))
LIMIT = 120


@pytest.fixture(scope="module")
def build():
    sys.path.insert(0, str(FOLDER))
    import build

    yield build
    sys.path.remove(str(FOLDER))


def test_the_committed_notebooks_are_made_from_their_sources(build):
    assert [path.stem for path in sorted(FOLDER.glob("*.ipynb"))] == [path.stem for path in SOURCES]
    for source in SOURCES:
        committed = nbformat.read(FOLDER / f"{source.stem}.ipynb", as_version=4)
        nbformat.validate(committed)
        expected = build.parse(source)
        assert [(c.cell_type, c.source) for c in committed.cells] == [(c.cell_type, c.source) for c in expected.cells]


def test_every_notebook_runs(build, tmp_path):
    seconds = {}
    for done in build.run(SOURCES, tmp_path):
        seconds[done.name] = done.seconds
        shown = [out for cell in done.notebook.cells if cell.cell_type == "code" for out in cell.outputs]
        pictures = [out for out in shown if "image/png" in out.get("data", {})]
        assert pictures or "side_by_side" in done.name, f"{done.name} shows no image"
        if "side_by_side" in done.name:
            text = str(shown)
            # Where WinCLIP's weights cannot be had, a sentence stands in for its row.
            assert "WinCLIP, zero-shot" in text
            assert "FiSeCLIP, zero-shot" in text
    assert len(seconds) == len(SOURCES)
    assert max(seconds.values()) < LIMIT, seconds
