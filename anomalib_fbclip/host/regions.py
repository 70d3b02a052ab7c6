# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The part of an image that is the product: nothing else is scored, shown, or counted in metrics and thresholds."""

import base64
import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils import get_image_filenames
from PIL import Image

from .unreadable import UNREADABLE, read_picture

FILLS = ("nearest", "mean")

_PROPORTIONS = 0.01
"""Relative difference of proportions that is rounding, such as 1001 x 500 and 500 x 250."""


class View(NamedTuple):
    """A region as a model of one input size sees it.

    Attributes:
        shown: Pixels of the whole image at the size of the map that belong to the region ``[H, W]``.
        source: For each pixel of the model's input the place of the nearest pixel inside of the region ``[h * w]``: its
            own if it is inside. ``None``: all of the input is inside.
        rows: Weights that put the rows of the map of a cropped image back ``[H, h]``; ``None``: not cropped.
        columns: Likewise ``[W, w]``.
    """

    shown: torch.Tensor
    source: torch.Tensor | None
    rows: torch.Tensor | None
    columns: torch.Tensor | None


class Regions:
    """One region for all images, or one for each.

    Each pixel outside of the region is replaced before an image is scored, and the map is 0 there: scores and maps do
    not depend on what is outside. Where the resize of the input mixes pixels across the border, the mixed ones count as
    outside of the input.

    A mask is white inside and black outside: what is brighter than half of its brightest pixel is inside. It has the
    image's size or at least its proportions, and is scaled then.

    Args:
        source: A mask for all images; or a folder of masks, whose names (and subfolders, as far as they have any) are
            those of the images, with any suffix.
        crop: Cut images to the region's bounding box before the resize, and put the maps back.
        fill: What replaces a pixel outside: ``"nearest"``, the nearest one inside; ``"mean"``, the mean colour that the
            normalisation subtracts.

    Attributes:
        mask: The mask for all images ``[h, w]``; ``None`` with a folder.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If the mask is empty or cannot be read, the folder holds no images, or the fill is unknown.
    """

    def __init__(self, source: str | Path | np.ndarray, crop: bool = False, fill: str = "nearest") -> None:
        if fill not in FILLS:
            msg = f"region_fill={fill!r}: choose one of {list(FILLS)}."
            raise ValueError(msg)
        self.crop = crop
        self.fill_with = fill
        self.mask: np.ndarray | None = None
        self._files: dict[tuple[str, ...], Path] = {}
        self._views: dict[object, Any] = {}
        if isinstance(source, np.ndarray):
            self.source, self.mask = "", source
            return
        path = Path(source).expanduser()
        self.source = str(source)
        if not path.exists():
            msg = f"region={self.source!r} does not exist: give a mask, or a folder of masks with the images' names."
            raise FileNotFoundError(msg)
        if path.is_file():
            self.mask = read_region(path)
            return
        try:
            files = get_image_filenames(path)
        except ValueError as error:
            msg = f"region={self.source!r} holds no masks: give a folder of masks with the images' names."
            raise ValueError(msg) from error
        self._files = {_key(Path(file).relative_to(path.resolve())): Path(file) for file in files}

    def digest(self) -> str:
        """Stands for region, crop and fill where thresholds are stored."""
        content = self.source if self.mask is None else (self.mask.shape, np.packbits(self.mask).tobytes())
        # As files from before there was another fill have it.
        known = (content, self.crop) if self.fill_with == "nearest" else (content, self.crop, self.fill_with)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def packed(self) -> dict[str, Any] | None:
        """The mask for all images in types that JSON knows, for :meth:`unpacked`; ``None`` with a folder."""
        if self.mask is None:
            return None
        encoded = cv2.imencode(".png", self.mask.astype(np.uint8) * 255)[1]
        mask = base64.b64encode(encoded.tobytes()).decode("ascii")
        return {"mask": mask, "crop": self.crop, "fill": self.fill_with}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> "Regions":
        """The regions that :meth:`packed` stored."""
        with Image.open(io.BytesIO(base64.b64decode(packed["mask"]))) as file:
            return cls(np.asarray(file) > 0, packed["crop"], packed.get("fill", "nearest"))

    def check(self, paths: Sequence[str | Path]) -> None:
        """Name the images without a mask before a run begins.

        Raises:
            FileNotFoundError: If there are such.
        """
        missing = [str(path) for path in paths if self.mask is None and self._file(path) is None]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            msg = f"region={self.source!r} has no mask for {missing[:5]}{more}: add masks of these names."
            raise FileNotFoundError(msg)

    def view(
        self,
        size: tuple[int, int],
        path: str | Path | None = None,
        whole: tuple[int, int] | None = None,
    ) -> View:
        """The region of an image.

        Args:
            size: Height and width of the model's input.
            path: The image; ``None``: any, with one mask for all.
            whole: Height and width of the map of the whole image; ``None``: those of the input.

        Raises:
            FileNotFoundError: If it has no mask.
            ValueError: If the mask is empty, cannot be read, has other proportions than the image, or nothing is left
                of it at this size.
        """
        mask, name = self._checked_mask(path)
        if self.mask is None:
            return make_view(mask, size, self.crop, name, whole)
        if (size, whole) not in self._views:
            self._views[size, whole] = make_view(mask, size, self.crop, name, whole)
        return self._views[size, whole]

    def inside(self, size: tuple[int, int], paths: Sequence[str | Path | None]) -> torch.Tensor:
        """Pixels of maps ``[B, H, W]`` that belong to the regions of the images."""
        return self._of_each(_shown, size, paths)

    def touched(self, size: tuple[int, int], paths: Sequence[str | Path | None]) -> torch.Tensor:
        """Pixels of model inputs ``[B, h, w]`` that show anything of the regions of the images."""
        return self._of_each(_touched, size, paths)

    def _of_each(
        self,
        make: Callable[[np.ndarray, tuple[int, int], bool], torch.Tensor],
        size: tuple[int, int],
        paths: Sequence[str | Path | None],
    ) -> torch.Tensor:
        masks = [self._checked_mask(path)[0] for path in paths]
        if self.mask is None:
            return torch.stack([make(mask, size, self.crop) for mask in masks])
        if (make, size) not in self._views:
            self._views[make, size] = make(self.mask, size, self.crop)
        return self._views[make, size].expand(len(paths), -1, -1)

    def look(
        self,
        images: torch.Tensor,
        paths: Sequence[str | Path | None],
        transform: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Images as a model scores them.

        Args:
            images: Transformed images ``[B, 3, H, W]``.
            paths: Their files. Cropped ones are read anew, as these are too small by now.
            transform: Resize and normalisation.

        Raises:
            ValueError: If an image that is to be cropped has no file.
        """
        if self.crop:
            images = torch.cat([self._read(path, transform).to(images) for path in paths])
        return self.fill(images, paths)

    def _read(self, path: str | Path | None, transform: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
        if path is None:
            msg = "crop_to_region reads image files anew, and these images have none: give files, or no crop."
            raise ValueError(msg)
        mask, name = self._mask(path)
        image = read_picture(path)[None]
        _check_proportions(mask, name, tuple(image.shape[-2:]), str(path))
        image = crop_to(image, mask)
        return image if transform is None else transform(image)

    def crop_raw(self, images: torch.Tensor, path: Path | None = None) -> torch.Tensor:
        """Raw images ``[B, 3, h, w]`` cut to the box if they are to be; without a file, by one mask for all."""
        mask, _ = self._mask(path)
        return crop_to(images, mask) if self.crop else images

    def fill(self, images: torch.Tensor, paths: Sequence[str | Path | None]) -> torch.Tensor:
        """Replace the pixels of transformed images ``[B, 3, H, W]`` that are outside.

        Args:
            images: Transformed, and cropped if they are to be.
            paths: Their files; ``[None]``: any number of images, with one mask for all.
        """
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if self.mask is not None:
            for path in paths:
                view = self.view(size, path)
            return self._fill(images, view)
        filled = [self._fill(image[None], self.view(size, path)) for image, path in zip(images, paths, strict=True)]
        return torch.cat(filled)

    def _fill(self, images: torch.Tensor, view: View) -> torch.Tensor:
        if view.source is None:
            return images
        source = view.source.to(images.device)
        if self.fill_with == "nearest":
            return images.flatten(2)[..., source].reshape(images.shape)
        seen = source == torch.arange(len(source), device=images.device)
        return images * seen.reshape(images.shape[-2:])

    def cut(
        self,
        prediction: InferenceBatch,
        paths: Sequence[str | Path | None],
        whole: tuple[int, int] | None = None,
    ) -> InferenceBatch:
        """A prediction on such images, its map put back into the whole image and 0 outside of the region.

        Args:
            prediction: Scores and maps, of the size of the model's input.
            paths: See :meth:`fill`.
            whole: See :meth:`view`.
        """
        maps = prediction.anomaly_map
        size = (int(maps.shape[-2]), int(maps.shape[-1]))
        whole = whole if self.crop else None
        if self.mask is not None:
            return prediction._replace(anomaly_map=_cut(maps, self.view(size, whole=whole)))
        cut = [_cut(one[None], self.view(size, path, whole)) for one, path in zip(maps, paths, strict=True)]
        return prediction._replace(anomaly_map=torch.cat(cut))

    def _mask(self, path: str | Path | None) -> tuple[np.ndarray, str]:
        if self.mask is not None:
            return self.mask, self.source
        if path is None:
            msg = (
                f"region={self.source!r} is a folder of masks, and these images have no file names to find theirs by: "
                "give one mask for all images. An exported file sees pixels and no names."
            )
            raise ValueError(msg)
        file = self._file(path)
        if file is None:
            self.check([path])
        return read_region(file), str(file)  # type: ignore[arg-type]  # check() raised

    def _checked_mask(self, path: str | Path | None) -> tuple[np.ndarray, str]:
        mask, name = self._mask(path)
        if path is not None and Path(path).is_file():
            with Image.open(path) as image:
                width, height = image.size
            _check_proportions(mask, name, (height, width), str(path))
        return mask, name

    def _file(self, path: str | Path) -> Path | None:
        """The mask with the longest end of the image's path."""
        key = _key(Path(path))
        return next((self._files[key[start:]] for start in range(len(key)) if key[start:] in self._files), None)

    def __getstate__(self) -> dict[str, object]:
        """Leave what was computed out of copies."""
        return {**self.__dict__, "_views": {}}


def inside_of(
    module: object,
    paths: Sequence[str | Path | None] | None,
    maps: torch.Tensor | None,
) -> torch.Tensor | None:
    """Pixels of maps ``[B, H, W]`` that count for a module; ``None``: all of them."""
    inside = getattr(module, "inside", None)
    if inside is None or maps is None:
        return None
    found = inside(paths, tuple(maps.shape[-2:]))
    return None if found is None else found.to(maps.device).expand(maps.shape)


def read_region(path: str | Path) -> np.ndarray:
    """The mask of a file, true inside ``[h, w]``.

    Raises:
        ValueError: If it is empty or cannot be read; the file is named.
    """
    try:
        with Image.open(path) as file:
            values = np.asarray(file.convert("L"))
    except UNREADABLE as error:
        msg = f"The region {str(path)!r} cannot be read: {' '.join(str(error).split())}. Repair it."
        raise ValueError(msg) from error
    if not values.max():
        msg = f"The region {str(path)!r} is empty (all black): white marks what is scored."
        raise ValueError(msg)
    return values > values.max() / 2


def _placement(number: int, low: float, high: float, whole: int) -> torch.Tensor:
    """Weights ``[whole, number]`` that put values over [0, 1] back to [low, high]; rows that lie outside are 0."""
    axis = (torch.arange(whole, dtype=torch.float64) + 0.5) / whole
    place = (axis - low) / (high - low) * number - 0.5
    wide = max(1.0, number / whole / (high - low))  # of the linear kernel, as in an antialiased resize
    distance = (place.clamp(0, number - 1)[:, None] - torch.arange(number, dtype=torch.float64)).abs() / wide
    weights = (1 - distance).clamp(min=0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    touched = (axis + 0.5 / whole > low) & (axis - 0.5 / whole < high)
    return (weights * touched[:, None]).float()


@torch.inference_mode(mode=False)  # what is kept of a prediction must serve an export, too
def make_view(
    mask: np.ndarray,
    size: tuple[int, int],
    crop: bool = False,
    name: str = "",
    whole: tuple[int, int] | None = None,
) -> View:
    """A region at the size of a model's input.

    Args:
        mask: True inside ``[h, w]``.
        size: Height and width of the input.
        crop: Whether the input is the region's bounding box.
        name: Of the mask, for messages.
        whole: Height and width of the map of the whole image; ``None``: ``size``.

    Raises:
        ValueError: If nothing is left of the region.
    """
    whole = whole or size
    top, bottom, left, right = box_of(mask) if crop else (0, mask.shape[0], 0, mask.shape[1])
    part = _part(mask, crop)
    shown, share = _shown(mask, whole, crop), _share(part, size)
    # What the resize can mix across the border: bicubic weights reach two pixels of the coarser grid.
    reach = [math.ceil(2 * max(1.0, after / before)) for after, before in zip(size, part.shape, strict=True)]
    full = (share > 1 - 1e-4).astype(np.uint8)
    seen = np.asarray(cv2.erode(full, np.ones((2 * reach[0] + 1, 2 * reach[1] + 1), np.uint8)))
    if not seen.any() or not shown.any():
        msg = (
            f"The region {name!r} is so narrow that nothing is left of it in an input of {size[1]} x {size[0]} pixels: "
            "give a larger image_size, a wider region, or crop_to_region=True."
        )
        raise ValueError(msg)
    source = None if seen.all() else torch.from_numpy(_nearest(seen))
    height, width = mask.shape
    return View(
        shown,
        source,
        _placement(size[0], top / height, bottom / height, whole[0]) if crop else None,
        _placement(size[1], left / width, right / width, whole[1]) if crop else None,
    )


@torch.inference_mode(mode=False)  # kept, see make_view()
def _shown(mask: np.ndarray, size: tuple[int, int], crop: bool) -> torch.Tensor:
    """Pixels of the map of a whole image ``[H, W]`` that belong to a region."""
    share = _share(mask, size)
    # A cropped region may be narrower than a pixel of the whole image's map.
    return torch.from_numpy(share >= 0.5 if (share >= 0.5).any() or not crop else share > 0)


@torch.inference_mode(mode=False)  # kept, see make_view()
def _touched(mask: np.ndarray, size: tuple[int, int], crop: bool) -> torch.Tensor:
    """Pixels of a model's input ``[h, w]`` that show anything of a region."""
    return torch.from_numpy(_share(_part(mask, crop), size) > 0)


def _part(mask: np.ndarray, crop: bool) -> np.ndarray:
    """What the model's input shows of a mask."""
    top, bottom, left, right = box_of(mask) if crop else (0, mask.shape[0], 0, mask.shape[1])
    return mask[top:bottom, left:right]


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is true, bottom and right exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def crop_to(images: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """Images ``[B, 3, h, w]`` cut to the bounding box of a mask of their size or proportions."""
    top, bottom, left, right = box_of(mask)
    height, width = images.shape[-2:]
    # Whole numbers alone, which also hold for the symbolic sizes of an exported graph.
    rows = slice(top * height // mask.shape[0], -(-bottom * height // mask.shape[0]))
    columns = slice(left * width // mask.shape[1], -(-right * width // mask.shape[1]))
    return images[..., rows, columns]


def _share(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Share of each pixel of a size that is inside."""
    return cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)


def _nearest(seen: np.ndarray) -> np.ndarray:
    """Place of the nearest pixel that is seen, for each pixel ``[H * W]``."""
    _, labels = cv2.distanceTransformWithLabels(1 - seen, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    places = np.zeros(labels.max() + 1, np.int64)
    inside = np.flatnonzero(seen)
    places[labels.reshape(-1)[inside]] = inside
    return places[labels.reshape(-1)]


def _cut(maps: torch.Tensor, view: View) -> torch.Tensor:
    if view.rows is not None and view.columns is not None:
        maps = view.rows.to(maps.device) @ maps.float() @ view.columns.to(maps.device).T
    return maps * view.shown.to(maps.device)


def _check_proportions(mask: np.ndarray, name: str, size: tuple[int, ...], image: str) -> None:
    (height, width), (mask_height, mask_width) = size, mask.shape
    if abs(mask_width * height / (mask_height * width) - 1) > _PROPORTIONS:
        msg = (
            f"The region {name!r} is {mask_width} x {mask_height} pixels, {image} is {width} x {height}: give a mask "
            "of the image's size, or of its proportions."
        )
        raise ValueError(msg)


def _key(path: Path) -> tuple[str, ...]:
    """A path without its suffix, for image and mask may be of different formats."""
    return (*path.parts[:-1], path.stem)
