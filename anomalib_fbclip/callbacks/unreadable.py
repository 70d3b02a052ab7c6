# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Lets a prediction go on past files that cannot be read, and finds out afterwards which they were.

anomalib's data sets read a picture where the data loader asks for it, perhaps in a worker process, and an error there
ends the run. Here the loader leaves such an item out instead; the main process compares what came with what was asked.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from anomalib.data.utils import read_image
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are no picture, cut off, damaged, locked, gone or dangerously large."""


class ReadableItems:
    """Stands in for a data set's ``__getitems__``, which PyTorch's loader asks first: leaves out what fails."""

    def __init__(self, dataset: Any) -> None:  # noqa: ANN401  # any data set of files
        self.dataset = dataset

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        """Items that could be read, in order."""
        items = []
        for index in indices:
            try:
                items.append(self.dataset[index])
            except UNREADABLE:  # noqa: PERF203  # one bad file must not take the others with it
                continue
        return items


class CollateSome:
    """Collate a batch of which items may be missing; ``None`` where all are."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:  # noqa: ANN401  # whatever the data set's own function returns
        """Collate what is there."""
        return self.collate(items) if items else None


class SkipEmpty:
    """A data loader without its empty batches."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.dataset = loader.dataset

    def __len__(self) -> int:
        """Batches, if none were empty."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Batches that hold something."""
        return (batch for batch in self.loader if batch is not None)


def files_of(dataset: object) -> list[Path]:
    """The files behind an anomalib data set, in order; empty for another kind of data set."""
    if hasattr(dataset, "image_filenames"):
        return [Path(path) for path in dataset.image_filenames]
    samples: Any = getattr(dataset, "samples", None)
    return [Path(path) for path in samples.image_path] if hasattr(samples, "image_path") else []


def predicted_files(trainer: Trainer) -> list[Path]:
    """All files that a prediction is going to read, data loader by data loader."""
    combined = trainer.predict_loop._combined_loader  # noqa: SLF001  # the public property loses their order
    loaders = combined.flattened if combined is not None else []
    return [path for loader in loaders for path in files_of(getattr(loader, "dataset", None))]


def skip_unreadable(trainer: Trainer) -> list[Any]:
    """Make the data loaders of a prediction that is about to start leave out what they cannot read.

    Returns:
        list: The data sets that were changed, for :func:`restore`.
    """
    loop = trainer.predict_loop
    combined = loop._combined_loader  # noqa: SLF001  # Lightning has no public place to wrap a running loop's loaders
    loaders, changed = [], []
    for loader in combined.flattened:
        if isinstance(loader, DataLoader) and files_of(loader.dataset) and not hasattr(loader.dataset, "__getitems__"):
            loader.dataset.__getitems__ = ReadableItems(loader.dataset)
            loader.collate_fn = CollateSome(loader.collate_fn)
            changed.append(loader.dataset)
            loaders.append(SkipEmpty(loader))
        else:
            loaders.append(loader)
    if changed:
        combined.flattened = loaders
        # Workers, if there are any, hold copies of the data sets as they were.
        loop.reset()
    return changed


def restore(datasets: list[Any]) -> None:
    """Undo :func:`skip_unreadable` on the data sets: a later test must not lose pictures without a word."""
    for dataset in datasets:
        vars(dataset).pop("__getitems__", None)


def reason(path: Path) -> str | None:
    """Why a file cannot be read, in one line; ``None`` if it can."""
    try:
        read_image(path)
    except UNREADABLE as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None
