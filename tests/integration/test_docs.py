# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The README and the pages of ``docs`` and of the package: blocks run or are marked, internal links resolve.

Blocks run in one process, in a folder that has what ``docs/contributing.md`` lists, with smaller images than a user's.
"""

import logging
import re
import shlex
import shutil
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from anomalib.cli import AnomalibCLI

import anomalib_fbclip
from anomalib_fbclip.data.procedural.families import TEST_ONLY_FAMILIES

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
INDEX = ROOT / "docs" / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "anomalib_fbclip").rglob("*.md"))]
LINKED = [README, *PAGES, *sorted((ROOT / "docs" / "datasets").glob("*.md"))]
NEEDS = {"data", "download", "hub", "install", "time"}
RUN = {"bash", "python"}
NOT_RUN = {"bibtex", "text", "yaml"}
MAX_WORDS = 900

_BLOCK = re.compile(r"(?:^<!-- needs: (\w+) -->\n)?^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_RESULTS = re.compile(r"`(results/[^`<*]+)`")


class Block(NamedTuple):
    """A fenced block of a page, and what it needs that the tests do not have."""

    needs: str | None
    language: str
    code: str


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    return [Block(needs or None, language, code) for needs, language, code in _BLOCK.findall(read(page))]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: images, good and defective ones with masks, an adapter."""

    def draw(path: Path, defect: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(len(list(tmp_path.rglob("*.png")))).integers(90, 130, (64, 64, 3), np.uint8)
        if defect:
            image[20:40, 24:44] = 250
        assert cv2.imwrite(str(path), image)

    def mark(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((64, 64), np.uint8)
        mask[20:40, 24:44] = 255
        assert cv2.imwrite(str(path), mask)

    mark(tmp_path / "region.png")
    for number in range(4):
        draw(tmp_path / "good" / f"{number}.png")
    for number in range(2):
        draw(tmp_path / "images" / f"{number}.png", defect=bool(number))
        mark(tmp_path / "regions" / f"{number}.png")
        for view in ("left", "right"):
            draw(tmp_path / "stations" / f"part{number}_{view}.png", defect=bool(number))
        for root, kinds in (("parts", ("bad", "scratch", "dent")), ("other", ("bad",))):
            draw(tmp_path / root / "good" / f"{number}.png")
            for kind in kinds:
                draw(tmp_path / root / kind / f"{number}.png", defect=True)
                mark(tmp_path / root / "masks" / ("" if kind == "bad" else kind) / f"{number}.png")
    shutil.copy(
        Path(anomalib_fbclip.__file__).parent / "clip" / "tiny" / "fbclip.safetensors",
        tmp_path / "adapter.safetensors",
    )
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(code: str) -> list[list[str]]:
    """Words of each command of a block, without ``uv run``; what a pipe does with the output is left out."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for ends, group in groupby(words, lambda word: word == "&&"):
            command = list(group)
            if not ends and command != ["pip", "install", "uv"]:
                command = command[: command.index("|")] if "|" in command else command
                found.append(command[2:] if command[:2] == ["uv", "run"] else command)
    return found


def smaller(words: list[str]) -> list[str]:
    """Options that make a command of anomalib's small and let it run on any machine."""
    command = words[0]
    if command not in {"export", "predict", "test", "train"}:
        return []
    # A line file has the size that its memory was made for.
    more = [] if "line.safetensors" in words else ["--model.image_size=56"]
    if command != "export":
        more.append("--trainer.accelerator=cpu")
    if command == "train":
        more.append("--trainer.max_epochs=1")
    if "ProceduralSurfaces" in words or "configs/quickstart.yaml" in words:
        more += ["--data.num_train=1", "--data.num_test=2", "--data.image_size=64"]
    return more


def run_command(words: list[str]) -> AnomalibCLI | None:
    """Run a command as its script does, in this process."""
    program, *rest = words
    if program == "anomalib":
        if "--model.help" not in rest:
            return AnomalibCLI([*rest, *smaller(rest)])
        with pytest.raises(SystemExit) as stop:
            AnomalibCLI(rest)
        assert not stop.value.code
        return None
    script = next(iter(entry_points(group="console_scripts", name=program)), None)
    assert program == "anomalib-fbclip", f"{shlex.join(words)}: mark the block with what it needs"
    assert script is not None
    # The setup tries several sizes, which tests of its own do.
    size = ["--image-size", "56"] if rest[0] == "setup" else []
    assert script.load()([*rest, *size]) == 0, shlex.join(words)
    return None


def run_page(page: Path) -> list[AnomalibCLI]:
    """Run all blocks that are not marked; those in Python share their names."""
    names: dict[str, object] = {}
    clis = []
    for block in blocks(page):
        if block.needs is None and block.language == "bash":
            clis += [run_command(words) for words in commands(block.code)]
        elif block.needs is None and block.language == "python":
            exec(compile(block.code, _name(page), "exec"), names)  # our own pages
    for written in _RESULTS.findall(read(page)):
        assert Path(written).exists(), f"{_name(page)} promises {written}"
    return [cli for cli in clis if cli is not None]


@pytest.mark.parametrize("page", [README, *PAGES], ids=_name)
def test_every_block_is_run_or_marked(page: Path) -> None:
    text = read(page)
    found = blocks(page)
    assert text.count("```") == 2 * len(found), "a fence that is not at the start of its line, or is not closed"
    assert text.count("<!-- needs:") - text.count("`<!-- needs:") == sum(block.needs is not None for block in found)
    for block in found:
        assert block.language in RUN | NOT_RUN, f"```{block.language}: name one of {sorted(RUN | NOT_RUN)}"
        assert block.needs is None or block.needs in NEEDS


@pytest.mark.parametrize("page", PAGES, ids=_name)
@pytest.mark.usefixtures("workplace")
def test_the_blocks_run(page: Path) -> None:
    run_page(page)


def test_the_readme_does_what_it_says(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="anomalib_fbclip"):
        first, predicted, line = run_page(README)
    names = {name.split("/")[0] for name in first.engine.trainer.callback_metrics}
    assert {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"} <= names
    folder = Path(first.engine.model.visualizer.output_dir)
    assert len(list(folder.rglob("*.png"))) == 2 * len(TEST_ONLY_FAMILIES)
    assert str(folder) in caplog.text
    folder = Path(predicted.engine.model.visualizer.output_dir)
    assert len(list(folder.rglob("*.png"))) == len(list((workplace / "images").iterdir()))
    assert (folder / "predictions.csv").is_file()
    assert 1 <= line.engine.model.model.memory.num_images <= 4
    assert line.engine.model.thresholds["origin"] == "normal pictures"


@pytest.mark.parametrize("page", LINKED, ids=_name)
def test_internal_links_resolve(page: Path) -> None:
    for target, anchor in _LINK.findall(read(page)):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{_name(page)}: {target}"
        if anchor:
            titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(read(path)))
            assert anchor in {title.strip().replace(" ", "-") for title in titles}, f"{_name(page)}: {target}#{anchor}"


def test_the_readme_is_short_and_the_index_complete() -> None:
    assert len(read(README).split()) <= MAX_WORDS
    linked = {(INDEX.parent / target).resolve() for target, _ in _LINK.findall(read(INDEX))}
    assert set(PAGES) - linked <= {INDEX}
