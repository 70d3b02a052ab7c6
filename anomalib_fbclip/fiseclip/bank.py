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
    """

    keys: torch.Tensor
    patches: torch.Tensor
    kept: torch.Tensor
    distances: torch.Tensor

    def __len__(self) -> int:
        """Number of images."""
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


class ReferenceBank:
    """The last ``size`` images of each category, oldest out.

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
        return sum(len(images) for images in self._images.values())

    def get(self, category: str) -> Reference | None:
        """Images of a category, newest first; ``None`` where there are none."""
        return self._images.get(category)

    def add(self, category: str, batch: Reference) -> None:
        """Take in a batch. An image that is in the bank already becomes new again and is not kept twice."""
        if self.size == 0:
            return
        new = batch[first_of_each(batch.keys)]
        old = self._images.get(category)
        if old is not None:
            new += old[~torch.isin(old.keys, new.keys)]
        # A copy, so that a view does not keep the whole batch in memory.
        self._images[category] = new[torch.arange(min(self.size, len(new)), device=new.keys.device)]

    def clear(self) -> None:
        """Forget all images."""
        self._images.clear()


def first_of_each(keys: torch.Tensor) -> torch.Tensor:
    """Places of the first image of each content, in the order of the keys."""
    ordered, order = keys.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


def content_keys(images: torch.Tensor) -> torch.Tensor:
    """One whole number for the content of each image, the same on every device and in every batch.

    Args:
        images: ``[B, 3, H, W]``.

    Returns:
        torch.Tensor: ``[B]``, 64 bits. Sums of whole numbers do not depend on the order of summation.
    """
    keys = []
    for image in images:
        bits = image.detach().float().contiguous().view(torch.int32).flatten().long()
        place = torch.arange(1, len(bits) + 1, device=bits.device)
        # Products of 64 bits wrap around; the odd constant spreads neighbouring places over all bits.
        keys.append(((bits + place) * (place * -7046029254386353131 | 1)).sum())
    return torch.stack(keys)
