# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Score images as they appear in a folder, into a table that survives a crash.

A file is read when its writer has closed it or has renamed it into place; where no event says so (network drives,
links), when size and time of change have stayed the same for a while. A file that cannot be read is tried again until
it has settled, and then gets a row with the error. Rows reach the disk one by one; a later run reads them and goes on.
"""

import csv
import hashlib
import io
import logging
import os
import queue
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from threading import Event
from typing import Any

from anomalib.data.utils.image import is_image_file

from .unreadable import UNREADABLE

logger = logging.getLogger(__name__)

COLUMNS = ("path", "score", "label", "threshold", "map_max", "bytes", "modified", "time", "error")
"""``bytes`` and ``modified`` (nanoseconds) tell a file from a later one of its name; ``time`` is that of the row."""

_FAILED = (*UNREADABLE, RuntimeError, MemoryError)
_TICK = 0.1
_AT_ONCE = 50


class MissingWatchdogError(ImportError):
    """The optional package that reports new files is not installed."""


class Table:
    """A CSV file to which rows are appended durably; a row that a crash cut off is removed.

    Args:
        path: The file; it and its folder are made if they do not exist.

    Raises:
        ValueError: If the file is another table.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._known: set[int] = set()
        kept = self._read()
        # File names need not be valid text: what Python could not decode, it writes back as it was.
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._write(COLUMNS)

    def __len__(self) -> int:
        """Files that have a row."""
        return len(self._known)

    def __contains__(self, file: tuple[str, int, int]) -> bool:
        """Whether a file of this path, size and time of change has a row."""
        return _key(*file) in self._known

    def append(self, row: dict[str, Any]) -> None:
        """Write a row and wait until it is on the disk."""
        self._write([row.get(name, "") for name in COLUMNS])
        self._known.add(_key(row["path"], row["bytes"], row["modified"]))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> int:
        """Note the rows that are there; returns the length of those that are whole."""
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        kept = content.rfind(b"\n") + 1
        while content.count(b'"', 0, kept) % 2:  # a line break inside a quoted name ends no row
            kept = content.rfind(b"\n", 0, kept - 1) + 1
        if kept < len(content):
            logger.warning("The last row of %s was cut off and is removed; its image is scored again.", self.path)
        rows = csv.DictReader(io.StringIO(content[:kept].decode("utf-8", "surrogateescape"), newline=""))
        if kept and tuple(rows.fieldnames or ()) != COLUMNS:
            msg = (
                f"{str(self.path)!r} is no table of this command, whose columns are {', '.join(COLUMNS)}: give another."
            )
            raise ValueError(msg)
        for row in rows:
            self._known.add(_key(row["path"], int(row["bytes"]), int(row["modified"])))
        return kept

    def _write(self, values: Any) -> None:  # noqa: ANN401  # what a CSV writer takes
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(values)
        self._file.write(text.getvalue().encode("utf-8", "surrogateescape"))
        self._file.flush()
        os.fsync(self._file.fileno())


def watch(
    folder: str | Path,
    table: Table,
    score: Callable[[Path], dict[str, Any]],
    stop: Event,
    settle: float = 0.5,
    rescan: float = 10.0,
    once: bool = False,
    report: Callable[[dict[str, Any]], object] = lambda _: None,
) -> int:
    """Score the images of a folder and its subfolders, those that are there and those that come, until told to stop.

    Args:
        folder: Folder to watch.
        table: Where rows go. Files with a row are not scored again, unless they have changed.
        score: From a file to its columns ``score``, ``label``, ``threshold``, ``map_max``.
        stop: Set from a signal handler or another thread; the image at hand is finished.
        settle: Seconds that a file must stay as it is where nobody says that it was closed.
        rescan: Seconds between listings of the folder, which find what no event reported.
        once: Score what is there, wait for what is being written, and return.
        report: Called with each row after it was written.

    Returns:
        int: Rows written.

    Raises:
        FileNotFoundError: If there is no such folder.
        MissingWatchdogError: If the package ``watchdog`` is not installed.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        msg = f"{str(folder)!r} is no folder: give the one that images are written to."
        raise FileNotFoundError(msg)
    watcher = _Watcher(folder, table, score, settle, report)
    observer = None if once else _observe(folder, watcher.events)
    try:
        listed = None
        while not stop.is_set():
            if listed is None or (not once and time.monotonic() - listed >= rescan):
                watcher.list_folder(stop)
                listed = time.monotonic()
            watcher.step(stop)
            if once and not watcher.waiting:
                break
    finally:
        if observer is not None:
            observer.stop()
            observer.join()
    return watcher.written


class _Watcher:
    """Files that wait for their writers, and what becomes of them."""

    def __init__(
        self,
        folder: Path,
        table: Table,
        score: Callable[[Path], dict[str, Any]],
        settle: float,
        report: Callable[[dict[str, Any]], object],
    ) -> None:
        self.folder, self.table, self.score, self.settle, self.report = folder, table, score, settle, report
        self.events: queue.SimpleQueue[tuple[Path, bool]] = queue.SimpleQueue()
        self.waiting: dict[Path, tuple[tuple[int, int], float]] = {}
        self.written = 0

    def list_folder(self, stop: Event) -> None:
        """Take in what the folder holds, oldest first."""
        found = [path for path in self.folder.rglob("*") if is_image_file(path)]
        states = {path: state for path in found if (state := _state(path)) is not None}
        for path in sorted(states, key=lambda path: (states[path][1], path)):
            if stop.is_set():
                return
            if path not in self.waiting and (str(path), *states[path]) not in self.table:
                self._take(path, closed=time.time() - states[path][1] / 1e9 > self.settle)

    def step(self, stop: Event) -> None:
        """Take in the events of a moment, then look after the files that wait."""
        try:
            self._take(*self.events.get(timeout=_TICK))
            for _ in range(_AT_ONCE):
                if stop.is_set():
                    return
                self._take(*self.events.get_nowait())
        except queue.Empty:
            pass
        for path, (before, since) in list(self.waiting.items()):
            if stop.is_set():
                return
            state = _state(path)
            if state is None:
                del self.waiting[path]  # renamed or removed by its writer
            elif state != before:
                self.waiting[path] = (state, time.monotonic())
            elif time.monotonic() - since >= self.settle:
                self._finish(path, state, last=True)

    def _take(self, path: Path, closed: bool) -> None:
        state = _state(path)
        if state is None or (str(path), *state) in self.table:
            return
        if not (closed and self._finish(path, state, last=False)) and self.waiting.get(path, (None,))[0] != state:
            self.waiting[path] = (state, time.monotonic())

    def _finish(self, path: Path, state: tuple[int, int], last: bool) -> bool:
        """Score a file and write its row; without ``last``, one that cannot be read may still be in writing."""
        row: dict[str, Any] = {"path": str(path), "bytes": state[0], "modified": state[1]}
        try:
            row |= self.score(path)
        except _FAILED as error:
            if not last or _state(path) != state:
                return False
            row["error"] = " ".join(str(error).split()) or type(error).__name__
        row["time"] = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.table.append(row)
        self.waiting.pop(path, None)
        self.written += 1
        self.report(row)
        return True


def _observe(folder: Path, events: "queue.SimpleQueue[tuple[Path, bool]]") -> Any:  # noqa: ANN401  # of an optional package
    """Have new files reported from now on."""
    try:
        from watchdog.events import FileSystemEvent, FileSystemEventHandler
        from watchdog.observers import Observer
    except ImportError as error:
        msg = "watch needs the package watchdog: pip install 'anomalib-fbclip[watch]'."
        raise MissingWatchdogError(msg) from error

    class Handler(FileSystemEventHandler):
        def on_any_event(self, event: FileSystemEvent) -> None:  # noqa: PLR6301  # called by watchdog
            if event.is_directory or event.event_type not in {"created", "modified", "closed", "moved"}:
                return
            moved = event.event_type == "moved"
            path = Path(os.fsdecode(event.dest_path if moved else event.src_path))
            if is_image_file(path):
                events.put((path, moved or event.event_type == "closed"))

    observer = Observer()
    observer.schedule(Handler(), str(folder), recursive=True)
    observer.start()
    return observer


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change in nanoseconds; ``None`` where there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _key(path: str, size: int, modified: int) -> int:
    """64 bits for a file, so that a long run remembers many in little memory."""
    text = f"{path}|{size}|{modified}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
