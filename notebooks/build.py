# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Make the notebooks from the readable files in ``sources``, and run them.

    python notebooks/build.py

A source is a Python file whose cells begin with ``# %%``, or ``# %% [markdown]`` for text. All notebooks run in one
kernel, one after the other, each with empty names: importing anomalib takes longer than most of them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "sources"
FORGET = "%reset -f\nimport time\nprint(time.process_time())"
"""Run between two notebooks, so that none lives on the names of another; tells the processor time of the kernel."""


class Run(NamedTuple):
    """An executed notebook and the processor seconds that it took: a busy machine does not change them much."""

    name: str
    notebook: nbformat.NotebookNode
    seconds: float


def parse(path: Path) -> nbformat.NotebookNode:
    """Read one source."""
    cells: list[nbformat.NotebookNode] = []
    head, *parts = path.read_text(encoding="utf-8").split("\n# %%")
    del head  # the licence
    for number, part in enumerate(parts):
        first, _, body = part.partition("\n")
        if first.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cell = new_markdown_cell("\n".join(lines))
        else:
            cell = new_code_cell(body.strip())
        cell["id"] = f"cell-{number}"
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def run(paths: Sequence[Path], folder: Path, timeout: int = 900) -> Iterator[Run]:
    """Execute sources in one kernel whose working directory is ``folder``.

    Args:
        paths: Sources.
        folder: Working directory: pictures, data and results of the notebooks go there.
        timeout: Seconds that one cell may take, on a busy machine too.
    """
    warm_up = new_notebook(cells=[new_code_cell("import anomalib_fbclip; anomalib_fbclip.FBCLIP, None")])
    client = NotebookClient(warm_up, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with client.setup_kernel():
        client.execute(reset_kc=False, cleanup_kc=False)
        for path in paths:
            notebook = parse(path)
            before, after = (new_notebook(cells=[new_code_cell(FORGET)]) for _ in range(2))
            for each in (before, notebook, after):
                runner = NotebookClient(each, km=client.km, timeout=timeout)
                runner.kc = client.kc
                runner.execute(reset_kc=False, cleanup_kc=False)
            begin, end = (float(each.cells[0].outputs[0].text) for each in (before, after))
            yield Run(path.stem, notebook, end - begin)


def main() -> None:
    """Execute all sources and write the notebooks beside this file, with what they show."""
    with tempfile.TemporaryDirectory() as folder:
        for done in run(sorted(SOURCES.glob("*.py")), Path(folder)):
            for cell in done.notebook.cells:
                cell.metadata.pop("execution", None)
                if cell.cell_type == "code":
                    # Warnings and progress of the machine that built them tell a reader nothing.
                    cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            nbformat.write(done.notebook, FOLDER / f"{done.name}.ipynb")


if __name__ == "__main__":
    main()
