# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Refuses a test on what was trained on: the same files, copies of them, or the same part of one data set."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from anomalib.data.datamodules.base.image import AnomalibDataModule

from .sets import single_categories

_HEAD = 1 << 16


def check_overlap(sources: Sequence[AnomalibDataModule], targets: Sequence[AnomalibDataModule]) -> None:
    """Compare the test splits of both sides.

    Args:
        sources: Data modules that were set up; their test splits are trained on.
        targets: Data modules that were set up; their test splits are tested on.

    Raises:
        ValueError: If both share images, by path or by content, or a category of one data set.
    """
    left, right = _pictures(sources), _pictures(targets)
    shared = sorted(left & right) or sorted(_copies(left, right))
    if shared:
        msg = (
            f"source and target share {len(shared)} images, such as {shared[0]}: a model tested on what it was "
            f"trained on tells nothing. Choose another source, other categories or other folders."
        )
        raise ValueError(msg)
    common = _parts(sources) & _parts(targets)
    if common:
        name, category = min(common)
        msg = (
            f"source and target are both {name}, category {category!r}: a model tested on the category that it was "
            f"trained on is not zero-shot. Choose other categories."
        )
        raise ValueError(msg)


def _pictures(datamodules: Sequence[AnomalibDataModule]) -> set[Path]:
    paths = (path for datamodule in datamodules for path in datamodule.test_data.samples["image_path"])
    return {Path(path).resolve() for path in paths}


def _parts(datamodules: Sequence[AnomalibDataModule]) -> set[tuple[str, str]]:
    return {
        (module.name, single)
        for module in datamodules
        if module.category
        for single in single_categories(module.name, str(module.category))
    }


def _copies(left: Iterable[Path], right: Iterable[Path]) -> set[Path]:
    """Files of ``right`` whose content is also in ``left``.

    Sizes are compared first, then the first 64 kB, then all: of two sets of ten thousand images few are ever read.
    """
    for key in (_size, _head, _content):
        by_left, by_right = _grouped(left, key), _grouped(right, key)
        common = by_left.keys() & by_right.keys()
        left = [path for value in common for path in by_left[value]]
        right = [path for value in common for path in by_right[value]]
    return set(right)


def _grouped(paths: Iterable[Path], key: Callable[[Path], Hashable]) -> dict[Hashable, list[Path]]:
    groups: dict[Hashable, list[Path]] = defaultdict(list)
    for path in paths:
        groups[key(path)].append(path)
    return groups


def _size(path: Path) -> int:
    return path.stat().st_size


def _head(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        return _size(path), hashlib.sha256(file.read(_HEAD)).digest()


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while block := file.read(1 << 20):
            sha.update(block)
        return sha.digest()
