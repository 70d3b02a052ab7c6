# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The reference bank: the last images seen of each category, for short batches, single images and streams."""

from dataclasses import dataclass, fields

import torch


@dataclass
class Reference:
    """What is kept of images; the first axis of every tensor counts images.

    Attributes:
        keys: Content of the image as one number ``[P]``, see :func:`content_keys`.
        patches: Patch tokens of the matched blocks ``[P, S, L, D]``.
        kept: What may serve as a reference ``[P, L]``.
        distances: Weighted distances ``[P, L]`` that the image had when it was seen; NaN where it had no reference.
        present: Rows that count ``[P]``; ``None``: all. Double images are marked and not cut out, for the number that
            is left would have to be read from the device.
        owners: Key of the image that each is from ``[P]``: the tiles of an image are no references of each other.
            ``None``: each is an image of its own.
    """

    keys: torch.Tensor
    patches: torch.Tensor
    kept: torch.Tensor
    distances: torch.Tensor
    present: torch.Tensor = None  # type: ignore[assignment]  # made in __post_init__
    owners: torch.Tensor = None  # type: ignore[assignment]  # made in __post_init__

    def __post_init__(self) -> None:
        """Let all rows count, and be images of their own, where nothing else is said."""
        if self.present is None:
            self.present = torch.ones_like(self.keys, dtype=torch.bool)
        if self.owners is None:
            self.owners = self.keys

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.keys)

    def __getitem__(self, index: torch.Tensor | slice) -> "Reference":
        """Some of the images."""
        return Reference(*(getattr(self, field.name)[index] for field in fields(self)))

    def __add__(self, other: "Reference") -> "Reference":
        """These images and others behind them."""
        return Reference(
            *(
                torch.cat((getattr(self, field.name), getattr(other, field.name).to(self.keys.device)))
                for field in fields(self)
            ),
        )

    def without(self, keys: torch.Tensor) -> "Reference":
        """The same rows; images of these contents do not count."""
        present = self.present & ~torch.isin(self.keys, keys.to(self.keys.device))
        return Reference(self.keys, self.patches, self.kept, self.distances, present, self.owners)

    def first(self, number: int) -> "Reference":
        """The first rows that count, at most this many, in their order; others behind them if there are fewer."""
        order = self.present.argsort(descending=True, stable=True)
        return self[order[:number]]


class ReferenceBank:
    """The last ``size`` images (or tiles) of each category, oldest out.

    Images of one batch are equally old. They enter in the order of their content keys, so that the order inside a batch
    changes nothing that comes later.

    Args:
        size: Images that are kept of each category; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._images: dict[str, Reference] = {}

    def __len__(self) -> int:
        """Images in the bank, of all categories."""
        return sum(int(images.present.sum()) for images in self._images.values())

    def __bool__(self) -> bool:
        """Whether images were seen; unlike their number, it need not be read from the device."""
        return len(self._images) > 0

    def get(self, category: str) -> Reference | None:
        """Images of a category, newest first; ``None`` where there are none."""
        return self._images.get(category)

    def add(self, category: str, batch: Reference) -> None:
        """Take in a batch. An image that is in the bank already becomes new again and is not kept twice."""
        if self.size == 0:
            return
        keys, order = batch.keys.sort(stable=True)
        new = batch[order]
        new.present = is_first(keys)
        old = self._images.get(category)
        if old is not None:
            # Not in place, which torch 2.10 does not compile for a class of ours.
            new = new + old.without(new.keys)
        # A copy, so that a view does not keep the whole batch in memory.
        self._images[category] = new.first(self.size)

    def clear(self, category: str | None = None) -> None:
        """Forget all images, or those of a category."""
        if category is None:
            self._images.clear()
        else:
            self._images.pop(category, None)


def is_first(ordered: torch.Tensor) -> torch.Tensor:
    """Which of ascending keys is the first of its value."""
    return torch.cat((torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]))


def first_of_each(keys: torch.Tensor) -> torch.Tensor:
    """Places of the first image of each content, in the order of the keys."""
    ordered, order = keys.sort(stable=True)
    return order[is_first(ordered)]


_SPREAD = -7046029254386353131
_PIXELS_AT_ONCE = 1 << 22
"""Of an image, when its key is computed: whole numbers take twice its memory."""


def content_keys(images: torch.Tensor) -> torch.Tensor:
    """One whole number for the content of each image, the same on every device and in every batch.

    Args:
        images: ``[B, 3, H, W]``.

    Returns:
        torch.Tensor: ``[B]``, 64 bits. Sums of whole numbers do not depend on the order of summation.
    """
    keys = []
    for image in images:
        bits = image.detach().float().contiguous().view(torch.int32).flatten()
        key = torch.zeros((), dtype=torch.long, device=bits.device)
        for start in range(0, len(bits), _PIXELS_AT_ONCE):
            part = bits[start : start + _PIXELS_AT_ONCE].long()
            place = torch.arange(start + 1, start + len(part) + 1, device=bits.device)
            total = part + place
            # Products of 64 bits wrap around; the odd constant spreads neighbouring places over all bits. The places
            # come from the sum: torch.compile takes products of the range itself for addresses, which must not wrap.
            key += (total * ((total - part) * _SPREAD | 1)).sum()
        keys.append(key)
    return torch.stack(keys)


def tile_keys(tiles: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """One whole number for each tile ``[T, 3, H, W]`` of images of keys ``[T]``: equal tiles of two images differ."""
    return content_keys(tiles) ^ (owners * _SPREAD)
