# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The examples in the docstrings run, on the embedded backbone."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import anomalib_fbclip

ROOT = Path(anomalib_fbclip.__file__).parent
MODULES = sorted(
    ".".join(("anomalib_fbclip", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "image.png").write_bytes((Path(__file__).parents[2] / "docs" / "quickstart.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
