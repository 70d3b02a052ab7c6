# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What happens to files that cannot be read: a prediction goes on without them, any other run ends with their name.

anomalib's data sets read an image where the data loader asks for it, perhaps in a worker process, and an error there
ends the run, often without the name of the file. In a prediction the loader leaves such an item out instead; the main
process compares what came with what was asked. Training and tests must not lose images without a word: there the
error is said again, with the file and what to do.
"""

import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from mimetypes import guess_type
from pathlib import Path
from typing import Any

import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image, read_mask
from anomalib.data.utils.image import is_image_file
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are no image, cut off, damaged, locked, gone or dangerously large."""


_NOT_READ = {
    *(".avif", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".svg", ".tga", ".exr", ".dcm", ".dds", ".pnm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".mp4", ".mkv", ".avi", ".mov", ".webm"),
    *(".3gp", ".mts"),
}
"""Images and videos, with those that not every system's table of types knows."""

COMBINED_LOADER, DATA_SOURCE = "_combined_loader", "_data_source"
"""Private names of Lightning's loops. Where they are gone, files that cannot be read end a run as in anomalib."""

_DEEP = ("I", "F")
_STRETCH = 1.1


class ReadableItems:
    """Stands in for a data set's ``__getitems__``, which PyTorch's loader asks first: leaves out what fails.

    Args:
        dataset: Data set of files.
        one_size: Refuse a batch of images of different sizes, of which anomalib would stretch all to the largest.
    """

    def __init__(self, dataset: Any, one_size: bool = False) -> None:  # noqa: ANN401  # any data set of files
        self.dataset = dataset
        self.one_size = one_size

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        """Items that could be read, in order."""
        items = []
        for index in indices:
            try:
                items.append(read_item(self.dataset, index))
            except UNREADABLE:  # noqa: PERF203  # one bad file must not take the others with it
                continue
        if self.one_size:
            check_one_size(items)
        return items


class NamedItems(ReadableItems):
    """The same for runs that need every image: an error names the file, and what to do with it."""

    _warned = False

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        """All items, in order.

        Raises:
            ValueError: If an image or its mask cannot be read.
        """
        items = []
        for index in indices:
            try:
                item = read_item(self.dataset, index)
            except UNREADABLE as error:
                msg = _blame(self.dataset, index)
                if msg is None:
                    raise
                raise ValueError(msg) from error
            if not self._warned:
                self._warned = _warn_of_stretched_mask(item)
            items.append(item)
        if self.one_size:
            check_one_size(items)
        return items


def check_one_size(items: Sequence[Any]) -> None:
    """Refuse to make a batch of images of different sizes.

    Raises:
        ValueError: If two sizes differ; both files are named.
    """
    for item in items:
        if item.image.shape != items[0].image.shape:
            both = [f"{str(i.image_path)!r} ({i.image.shape[-1]} x {i.image.shape[-2]})" for i in (items[0], item)]
            msg = f"{' and '.join(both)} have different sizes after the resize, and one batch holds one size: give "
            msg += "batches of one image (--data.train_batch_size 1 --data.eval_batch_size 1), or images of the same "
            msg += "proportions."
            raise ValueError(msg)


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


def _loaders(trainer: Trainer) -> list[Any]:
    """The data loaders of a prediction, in order: the public property loses it, and cannot be changed."""
    combined = getattr(trainer.predict_loop, COMBINED_LOADER, None)
    return combined.flattened if combined is not None else []


def predicted_files(trainer: Trainer) -> list[Path]:
    """All files that a prediction is going to read, data loader by data loader."""
    return [path for loader in _loaders(trainer) for path in files_of(getattr(loader, "dataset", None))]


def predicted_folders(trainer: Trainer) -> list[Path]:
    """The folders that a prediction was asked for, as far as they are known.

    anomalib's data set of a folder keeps the files and not the folder: on the command line it is in the arguments,
    elsewhere it is what all files have in common.
    """
    folders = []
    for loader in _loaders(trainer):
        dataset = getattr(loader, "dataset", None)
        if not isinstance(dataset, PredictDataset):
            continue
        asked = getattr(dataset, "path", None)
        for callback in trainer.callbacks if asked is None else ():
            if isinstance(callback, SaveConfigCallback):
                data = callback.config.get("data")
                asked = data if isinstance(data, (str, Path)) else None
        if asked is None and (files := files_of(dataset)):
            common = Path(os.path.commonpath([path.parent for path in files]))
            # A single file was asked for as a folder if that holds no other image.
            among_others = len(files) == 1 and any(
                is_image_file(path) and path not in files for path in common.glob("**/*")
            )
            asked = None if among_others else common
        if asked is not None and Path(asked).is_dir():
            folders.append(Path(asked))
    return folders


def skipped_files(folder: Path) -> list[Path]:
    """Images and videos of a folder and of those below it that anomalib passes over for their extensions."""
    return [
        path
        for path in sorted(folder.glob("**/*"))
        if not is_image_file(path)
        and (path.suffix.lower() in _NOT_READ or (guess_type(path.name)[0] or "").startswith(("image/", "video/")))
        and path.is_file()
    ]


def reads_all(trainer: Trainer) -> bool:
    """Whether a prediction reads every file of its data sets, and not what a sampler of the user chooses."""
    plain = (SequentialSampler, DistributedSampler)
    return all(isinstance(getattr(loader, "sampler", None), plain) for loader in _loaders(trainer))


def skip_unreadable(trainer: Trainer, one_size: bool = False) -> list[Any]:
    """Make the data loaders of a prediction that is about to start leave out what they cannot read.

    Args:
        trainer: Trainer of the prediction.
        one_size: Also refuse batches of images of different sizes.

    Returns:
        list: The data sets that were changed, for :func:`restore`.
    """
    loop = trainer.predict_loop
    loaders, changed = [], []
    for loader in _loaders(trainer):
        if isinstance(loader, DataLoader) and files_of(loader.dataset) and _replaceable(loader.dataset):
            loader.dataset.__getitems__ = ReadableItems(loader.dataset, one_size)
            loader.collate_fn = CollateSome(loader.collate_fn)
            changed.append(loader.dataset)
            loaders.append(SkipEmpty(loader))
        else:
            loaders.append(loader)
    if changed:
        getattr(loop, COMBINED_LOADER).flattened = loaders
        # Workers, if there are any, hold copies of the data sets as they were.
        loop.reset()
    return changed


def name_unreadable(trainer: Trainer, stage: str, one_size: bool = False) -> list[Any]:
    """Make the data sets of a run that is being set up name the files that they cannot read.

    Args:
        trainer: Trainer whose data module, if it has one, was set up.
        stage: ``fit``, ``validate`` or ``test``; nothing is done for ``predict``.
        one_size: Also refuse batches of images of different sizes.

    Returns:
        list: The data sets that were changed, for :func:`restore`.
    """
    fit = trainer.fit_loop
    loops: dict[str, tuple[Any, ...]] = {
        "fit": (fit, fit.epoch_loop.val_loop),
        "validate": (trainer.validate_loop,),
        "test": (trainer.test_loop,),
    }
    changed = []
    for loop in loops.get(stage, ()):
        # No public name says before the first batch what a run is going to read.
        given = getattr(getattr(loop, DATA_SOURCE, None), "instance", None)
        for source in CombinedLoader(given, "sequential").flattened if given is not None else []:
            # A data loader of the user, or a data module.
            for name in ("dataset", "train_data", "val_data", "test_data"):
                dataset = getattr(source, name, None)
                if hasattr(getattr(dataset, "samples", None), "image_path") and _replaceable(dataset):
                    dataset.__getitems__ = NamedItems(dataset, one_size)  # type: ignore[union-attr]
                    changed.append(dataset)
    return changed


def restore(datasets: list[Any]) -> None:
    """Undo :func:`skip_unreadable` or :func:`name_unreadable`: a later run must not inherit it."""
    for dataset in datasets:
        vars(dataset).pop("__getitems__", None)


def read_item(dataset: Any, index: int) -> Any:  # noqa: ANN401  # any data set of files, any item
    """An item of a data set whose image was read as it is.

    Raises:
        ValueError: If its image has more than eight bit a channel, which anomalib cuts off.
    """
    item = dataset[index]
    path = getattr(item, "image_path", None)
    if isinstance(path, (str, Path)):
        _check_depth(path)
    return item


def read_picture(path: str | Path) -> torch.Tensor:
    """An image ``[3, H, W]`` in [0, 1], read as anomalib does.

    Raises:
        ValueError: If it cannot be read; the file is named.
    """
    try:
        _check_depth(path)
        return read_image(path, as_tensor=True)
    except UNREADABLE as error:
        msg = f"{str(path)!r} cannot be read: {_one_line(error)}. Remove or repair it."
        raise ValueError(msg) from error


def reason(path: Path) -> str | None:
    """Why an image cannot be read, in one line; ``None`` if it can."""
    try:
        _check_depth(path)
        read_image(path)
    except UNREADABLE as error:
        return _one_line(error)
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_depth(path: str | Path) -> None:
    with Image.open(path) as image:
        if image.mode.startswith(_DEEP):
            msg = (
                f"it has more than 8 bit a channel (mode {image.mode}), which anomalib cuts off to plain white or "
                f"black: convert it to 8 bit"
            )
            raise ValueError(msg)


def _blame(dataset: Any, index: int) -> str | None:  # noqa: ANN401
    """What to say of an item that cannot be read; ``None`` if its files can."""
    row = dataset.samples.iloc[index]
    why = reason(row.image_path)
    if why is not None:
        return f"{str(row.image_path)!r} cannot be read: {why}. Remove or repair it."
    mask = getattr(row, "mask_path", None)
    if isinstance(mask, (str, Path)) and str(mask):
        try:
            read = read_mask(mask)
        except UNREADABLE as error:
            return f"The mask {str(mask)!r} of {str(row.image_path)!r} cannot be read: {_one_line(error)}. Repair it."
        if min(read.shape) == 1:
            size = f"{read.shape[1]} x {read.shape[0]}"
            return (
                f"The mask {str(mask)!r} of {str(row.image_path)!r} is {size} pixels, and anomalib reads none of a "
                "single row or column: enlarge it, or leave image and mask out."
            )
    return None


def _warn_of_stretched_mask(item: Any) -> bool:  # noqa: ANN401
    """Say that a mask has other proportions than its image; it will be stretched. From the two files' heads alone."""
    path, mask_path = getattr(item, "image_path", None), getattr(item, "mask_path", None)
    if not (isinstance(path, (str, Path)) and isinstance(mask_path, (str, Path)) and str(mask_path)):
        return False
    with Image.open(path) as image, Image.open(mask_path) as mask:
        (width, height), (mask_width, mask_height) = image.size, mask.size
    stretch = width * mask_height / (height * mask_width)
    if 1 / _STRETCH <= stretch <= _STRETCH:
        return False
    logger.warning(
        "The mask %s is %d x %d, its image %d x %d: it is stretched to the image. If it was drawn on an image "
        "that the camera marked as rotated (EXIF), turn it back: anomalib reads images as they are stored. "
        "(Reported once.)",
        mask_path,
        mask_width,
        mask_height,
        width,
        height,
    )
    return True


def _replaceable(dataset: Any) -> bool:  # noqa: ANN401
    """Whether a data set reads item by item; an interrupted run may have left what it put there."""
    return isinstance(getattr(dataset, "__getitems__", None), (ReadableItems, type(None)))
