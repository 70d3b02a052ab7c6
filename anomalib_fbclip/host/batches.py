# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Batches as callbacks read them: on the host, copied from the device once."""

import weakref

import torch
from anomalib.data import Batch


class _HostCopy:
    """The host copy of one batch, for as long as the batch lives and none of its tensors is replaced."""

    def __init__(self) -> None:
        self._of: weakref.ref[Batch] | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._copy: Batch | None = None

    def __call__(self, batch: Batch) -> Batch:
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        known = self._of is not None and self._of() is batch and self._tensors.keys() == tensors.keys()
        if self._copy is None or not known or any(self._tensors[name] is not tensors[name] for name in tensors):
            self._of, self._tensors, self._copy = weakref.ref(batch, self._forget), tensors, _copied(batch, tensors)
        return self._copy

    def _forget(self, reference: "weakref.ref[Batch]") -> None:
        if reference is self._of:
            self._of, self._tensors, self._copy = None, {}, None


_LAST = _HostCopy()


def on_host(batch: Batch) -> Batch:
    """A copy of a batch on the host: of all callbacks that read it image by image, the first one waits for the device.

    Images of files are cut to a pixel: who wants one reads the file. Tensors that were set on the batch beside its
    fields are copied, too.
    """
    return _LAST(batch)


def _copied(batch: Batch, tensors: dict[str, torch.Tensor]) -> Batch:
    if batch.image_path is not None:
        tensors = {**tensors, "image": batch.image[..., :1, :1]}
    if not all(_is_on_host(tensor) for tensor in tensors.values()):
        tensors = _in_one_copy(tensors)
    fields = batch.__dataclass_fields__
    copy = batch.update(in_place=False, **{name: value for name, value in tensors.items() if name in fields})
    for name in tensors.keys() - fields.keys():
        setattr(copy, name, tensors[name])
    return copy


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _in_one_copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the host; each copy from a device would wait for all that the device has to do."""
    # The widest types first, so that each begins at a multiple of its width.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    flat = [tensors[name].detach().contiguous().flatten().view(torch.uint8) for name in names]
    parts = torch.cat(flat).cpu().split([len(part) for part in flat])
    return {
        name: part.view(tensors[name].dtype).view(tensors[name].shape) for name, part in zip(names, parts, strict=True)
    }
