# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``PictureFolder``: images to predict, broken links among them."""

from collections.abc import Callable
from pathlib import Path

import torch
from anomalib.data import PredictDataset
from anomalib.data.utils.image import is_image_file
from torch.utils.data import Dataset


class PictureFolder(PredictDataset):
    """anomalib's ``PredictDataset``, which a link that leads nowhere does not end.

    anomalib refuses a whole folder for one such link before any model is asked. Here it is listed as every other file,
    and the models of this package then name it among those that cannot be read.

    Args:
        path: An image, or a folder of images, also in folders below it.
        transform: Applied to each image ``[3, H, W]`` in [0, 1].

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it holds no images.

    Example:
        >>> from anomalib_fbclip import PictureFolder
        >>> len(PictureFolder("docs"))
        1
    """

    def __init__(self, path: str | Path, transform: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        # Not anomalib's own, which lists the folder.
        Dataset.__init__(self)
        path = Path(path).expanduser()
        if not path.exists():
            msg = f"path={str(path)!r} does not exist: give an image or a folder of images."
            raise FileNotFoundError(msg)
        self.path = path
        files = [path] if path.is_file() else sorted(path.glob("**/*"))
        self.image_filenames = [file for file in files if is_image_file(file)]
        self.transform = transform
        if not self.image_filenames:
            msg = f"path={str(path)!r} holds no images: give an image or a folder of images."
            raise ValueError(msg)
