# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Where the normal images of a few-shot model come from: a folder, or the train split of a data module."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils.image import get_image_filenames

from anomalib_fbclip.host.unreadable import read_picture


def collect_references(
    k_shot: int,
    source: str | Path | None,
    datamodule: Any,  # noqa: ANN401  # any data module of anomalib, or none
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
    seed: int | None,
) -> tuple[list[torch.Tensor], list[Path]]:
    """Read ``k_shot`` normal images.

    Args:
        k_shot: How many.
        source: A folder: its first images by name. ``None``: the data module.
        datamodule: Data module whose train split has normal images: a random choice of these.
        transform: The model's resize and normalisation.
        seed: Of the choice.

    Returns:
        tuple: Images ``[3, H, W]``, and their files.

    Raises:
        ValueError: If there is no source, it has fewer normal images, or one of them cannot be read.
        FileNotFoundError: If there is no such folder.
    """
    if source is not None:
        files = files_in(k_shot, source)
    elif not hasattr(datamodule, "train_data"):
        msg = (
            f"k_shot={k_shot} needs normal images: give few_shot_source=<folder>, a data module whose train split "
            f"has them, or a checkpoint that holds them."
        )
        raise ValueError(msg)
    else:
        files = _in_train_split(k_shot, datamodule, seed)
    images = [read_picture(file) for file in files]
    return [image if transform is None else transform(image) for image in images], files


def files_in(k_shot: int, source: str | Path) -> list[Path]:
    """The images of a folder that are taken: the first ``k_shot`` by name."""
    folder = Path(source).expanduser()
    if not folder.exists():
        msg = f"few_shot_source={str(source)!r} does not exist: give a folder of normal images."
        raise FileNotFoundError(msg)
    files = sorted(get_image_filenames(folder))
    _check_count(k_shot, files, f"few_shot_source={str(source)!r}")
    return files[:k_shot]


def _in_train_split(k_shot: int, datamodule: Any, seed: int | None) -> list[Path]:  # noqa: ANN401
    if hasattr(datamodule, "source_name"):
        msg = (
            f"k_shot={k_shot}: the train split of {type(datamodule).__name__} is the auxiliary data set's and not the "
            f"target's. Give few_shot_source=<folder of normal images of the target>."
        )
        raise ValueError(msg)
    dataset = datamodule.train_data
    normal = [index for index, label in enumerate(dataset.samples["label_index"]) if label == 0]
    _check_count(k_shot, normal, f"the train split of {type(datamodule).__name__}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(normal), generator=generator)[:k_shot].tolist()
    return [Path(dataset.samples["image_path"].iloc[normal[place]]) for place in chosen]


def _check_count(k_shot: int, found: Sequence[object], where: str) -> None:
    if len(found) < k_shot:
        msg = f"k_shot={k_shot}, but {where} has {len(found)} normal images: lower k_shot or add images."
        raise ValueError(msg)
