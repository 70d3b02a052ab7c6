# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Files that are written whole or not at all, and files known by their content."""

import hashlib
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(path: str | Path) -> Generator[Path, None, None]:
    """Write a file under another name and rename it, so that no reader and no other run sees half of it.

    Args:
        path: File to write; its folder is made if it does not exist.

    Yields:
        Path: Hidden file beside ``path``, of the same suffix, to write to. It is renamed to ``path`` at the end, and
        removed after an error.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp(), "results", "table.csv")
        >>> with replacing(path) as file:
        ...     _ = file.write_text("image,score")
        >>> path.read_text()
        'image,score'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, which knows it under any name."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def common_root(paths: Sequence[Path]) -> Path | None:
    """The folder above the one that all files have in common; ``None`` without files, or on several drives."""
    folders = [os.path.abspath(path.parent) for path in paths]  # noqa: PTH100  # keeps links
    try:
        return Path(os.path.commonpath(folders)).parent if folders else None
    except ValueError:  # several drives
        return None


def below(path: str | Path, root: Path | None) -> Path:
    """A path relative to a folder above it; its last folder and name where it is not below."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  # keeps links
    if root is not None and absolute.is_relative_to(root):
        return absolute.relative_to(root)
    return Path(absolute.parent.name, absolute.name)
