# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""One HTML page of a prediction, which needs no other file, no server and no network."""

import base64
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from anomalib_fbclip.common.files import replacing

from .prediction_index import PredictionIndex, read_table
from .verdicts import ANOMALOUS, NORMAL, UNCALIBRATED

logger = logging.getLogger(__name__)

PAGE_BYTES = 40_000_000
"""Images of a page, together, before their encoding as text (a third more)."""

_IMAGE_BYTES = 60_000
_SIDES = (1200, 900, 640, 480, 360, 260, 180)
_QUALITY = 70
_NAMED = 3
_WORDS = {"1": ANOMALOUS, "0": NORMAL, UNCALIBRATED: UNCALIBRATED}


class Report(Callback):
    """Write ``report.html`` at the end of a prediction: one page with all strips, the highest score first.

    The page filters by name and verdict, sorts, and has a slider that moves the threshold and shows how many images are
    above it. It holds small copies of the strips, so that it can be sent as one file; a click opens the strip itself
    where the page stands beside it. ``report=True`` of our models adds this callback.

    Args:
        filename: Name of the page, in the folder of the table of :class:`PredictionIndex`.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[Report()])
    """

    def __init__(self, filename: str = "report.html") -> None:
        self.filename = filename
        self.last_path: Path | None = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page from the table that was just written."""
        tables = [callback.last_path for callback in trainer.callbacks if isinstance(callback, PredictionIndex)]
        if not trainer.is_global_zero:
            return
        if not tables or tables[0] is None:
            logger.warning("Report: %s writes no table of its predictions, so no page.", type(pl_module).__name__)
            return
        self.last_path = write_report(tables[0], tables[0].with_name(self.filename))
        logger.info("Report: %s (%.1f MB)", self.last_path, self.last_path.stat().st_size / 1e6)


def write_report(table: Path, page: Path) -> Path:
    """Write the page of a table.

    Args:
        table: Table of :class:`PredictionIndex`.
        page: File to write.

    Returns:
        Path: ``page``.
    """
    rows = read_table(table)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    thresholds = [float(row["threshold"]) for row in rows if row.get("threshold") not in {None, ""}]
    stream = environment.get_template("report.html.jinja").stream(
        title=_text("/".join((table.parent.parent if table.parent.name == "images" else table.parent).parts[-2:])),
        folder=_text(str(table.parent)),
        threshold=thresholds[0] if thresholds else 0.5,
        uncalibrated=any(row.get("label") == UNCALIBRATED for row in rows),
        rows=list(_rows(rows, table.parent, page.parent)),
    )
    with replacing(page) as file:
        stream.dump(str(file), encoding="utf-8", errors="replace")
    return page


def find_table(folder: Path) -> Path:
    """The table of a run's folder, or of one below it.

    Args:
        folder: Folder of a run, its folder ``images``, or the table itself.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several.
    """
    if folder.is_file():
        return folder
    for place in (folder, folder / "images"):
        for name in ("predictions.csv", "predictions.jsonl"):
            if (place / name).is_file():
                return place / name
    # "latest" is a link to one of the others.
    found = sorted({path.resolve() for path in folder.rglob("predictions.csv")})
    if not found:
        msg = (
            f"{str(folder)!r} holds no predictions.csv: give the folder of a prediction, such as results/FBCLIP/latest."
        )
        raise FileNotFoundError(msg)
    if len(found) > 1:
        msg = f"{str(folder)!r} holds {len(found)} tables, give the folder of one: " + ", ".join(map(str, found[:5]))
        raise ValueError(msg)
    return found[0]


def _rows(rows: Sequence[dict[str, Any]], folder: Path, page: Path) -> Iterator[dict[str, Any]]:
    """What the page knows of each image; the names are short as there are many."""
    limit = min(_IMAGE_BYTES, PAGE_BYTES // max(len(rows), 1))
    start = 0
    for row in rows:
        strip = folder / row["picture"] if row.get("picture") else None
        image = None
        if strip is not None and strip.is_file():
            # Strips of a run are much alike: what was too large for one is not tried for the next.
            image, start = _thumbnail(strip, limit, start)
        yield {
            "path": _text(str(row["path"])),
            "score": _number(row.get("score")),
            "peak": _number(row.get("map_max")),
            "word": "unreadable" if row.get("error") else _WORDS.get(str(row.get("label")), ""),
            "note": _text(row.get("error") or row.get("note") or ""),
            "disagree": bool(row.get("note")),
            "marked": _marked(row.get("components")),
            "strip": _link(strip, page) if image and strip else "",
            "image": image or "",
        }


def _marked(components: Any) -> str:  # noqa: ANN401  # of CSV or JSON
    """What is marked in an image, in words."""
    found = json.loads(components) if isinstance(components, str) and components else components or []
    said = []
    for one in found[:_NAMED]:
        left, top, right, bottom = one["box"]
        said.append(f"{right - left} x {bottom - top} at {left}, {top} (area {one['area']}, peak {one['peak']:.2f})")
    more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{len(found)} marked: {'; '.join(said)}{more}" if found else ""


def _thumbnail(path: Path, limit: int, start: int) -> tuple[str, int]:
    """A small copy as text, and the place in the list of sizes that it has."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    data = b""
    for place in range(start, len(_SIDES)):
        small = image.copy()
        small.thumbnail((_SIDES[place], _SIDES[place]))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=_QUALITY, method=2)
        data = buffer.getvalue()
        if len(data) <= limit:
            break
    return base64.b64encode(data).decode("ascii"), place


def _link(strip: Path, folder: Path) -> str:
    try:
        return quote(Path(os.path.relpath(strip, folder)).as_posix(), safe="/", errors="surrogateescape")
    except ValueError:  # on another drive
        return ""


def _number(value: Any) -> float | None:  # noqa: ANN401  # of CSV or JSON
    return None if value in {None, ""} else float(value)


def _text(value: str) -> str:
    """Text that can be shown: file names need not be valid."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
