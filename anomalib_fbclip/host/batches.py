# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Batches as callbacks read them: on the host, copied from the device once."""

import weakref

import torch
from anomalib.data import Batch


class _HostCopy:
    """The host copy of one batch, for as long as the batch lives and none of its values is replaced by another."""

    def __init__(self) -> None:
        self._of: weakref.ref[Batch] | None = None
        self._values: dict[str, object] = {}
        self._copy: Batch | None = None

    def __call__(self, batch: Batch) -> Batch:
        values, copy = dict(vars(batch)), self._copy
        known = self._of is not None and self._of() is batch and self._values.keys() == values.keys()
        if copy is None or not known or any(self._values[name] is not value for name, value in values.items()):
            copy = _copied(batch, {name: value for name, value in values.items() if isinstance(value, torch.Tensor)})
            self._of, self._values, self._copy = weakref.ref(batch, self._forget), values, copy
        return copy

    def _forget(self, reference: "weakref.ref[Batch]") -> None:
        if reference is self._of:
            self._of, self._values, self._copy = None, {}, None


_LAST = _HostCopy()


def on_host(batch: Batch) -> Batch:
    """A copy of a batch on the host. Several callbacks read it image by image, and the first one alone waits.

    Images of files are cut to a pixel: who wants one reads the file. Tensors that were set on the batch beside its
    fields are copied, too. A tensor that is changed in place afterwards is not copied again.
    """
    return _LAST(batch)


def _copied(batch: Batch, tensors: dict[str, torch.Tensor]) -> Batch:
    if batch.image_path is not None:
        tensors = {**tensors, "image": batch.image[..., :1, :1]}
    away = {name: tensor for name, tensor in tensors.items() if not _is_on_host(tensor)}
    if away:
        tensors = {**tensors, **_in_one_copy(away)}
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
    # Cloned, for a view would keep the block in memory, and copies of a view copy all of it.
    return {
        name: part.view(tensors[name].dtype).view(tensors[name].shape).clone()
        for name, part in zip(names, parts, strict=True)
    }
