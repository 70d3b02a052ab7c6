# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""How often a run waits for its device: counted on a device that is none, through anomalib's own engine."""

from itertools import pairwise

import pytest
import torch
from anomalib.data import ImageBatch
from lightning.pytorch.trainer.states import RunningStage
from models import ADAPTED, CLASSES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

from anomalib_fbclip import Student
from anomalib_fbclip.host import batches
from anomalib_fbclip.host.batches import on_host

ATEN = torch.ops.aten
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "__array__")
"""Methods that give values of Python. In inference mode not all of their operators reach a dispatch mode."""
SIZES = {
    ATEN.equal.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.bincount.default,
    ATEN._unique2.default,
    ATEN.unique_dim.default,
}
"""Operators whose results are, or have a size that depends on, values."""


class Device(TorchDispatchMode):
    """Follows the tensors that would lie on a device, and counts what makes the host wait for them.

    Batches and model are put there; what is computed from a tensor of the device is there, too; ``cpu`` brings a copy
    back. Values, and sizes that depend on values, are waited for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        self._at_batches: dict[RunningStage, list[int]] = {}
        self._stores: dict[int, StorageWeakRef] = {}
        self._within = False
        monkeypatch.setattr(batches, "_is_on_host", lambda tensor: not self.holds(tensor))
        for name in ("cpu", *READS):
            monkeypatch.setattr(torch.Tensor, name, self._watched(name))
        to = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", lambda *args, **kwargs: self._to(to, *args, **kwargs))

    def holds(self, tensor: object) -> bool:
        if not isinstance(tensor, torch.Tensor):
            return False
        reference = self._stores.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def take(self, tensors) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                store = tensor.untyped_storage()
                self._stores[store._cdata] = StorageWeakRef(store)

    def put(self, model) -> None:
        """Put the model there, and each of its batches, noting how often the host waited before."""
        self.take([*model.parameters(), *model.buffers()])
        metrics = [module for module in model.modules() if isinstance(module, Metric)]
        self.take(getattr(metric, name) for metric in metrics for name in metric._defaults)

        def after_transfer(batch, _):
            self.take(vars(batch).values())
            self._at_batches.setdefault(model.trainer.state.stage, []).append(self.count)
            return batch

        model.on_after_batch_transfer = after_transfer

    def most(self) -> dict[RunningStage, int]:
        """Of one batch, by stage; the first batch is left out, in which text features are made."""
        return {
            stage: max(after - before for before, after in pairwise(counts[1:]))
            for stage, counts in self._at_batches.items()
        }

    def _watched(self, name: str):
        method = getattr(torch.Tensor, name)

        def watched(tensor, *args, **kwargs):
            held = self.holds(tensor) and not self._within
            assert not (held and name in {"numpy", "__array__"}), "a tensor of the device has no array"
            self.count += held
            self._within, before = self._within or held, self._within
            try:
                found = method(tensor, *args, **kwargs)
            finally:
                self._within = before
            return self._fetched(found) if held and name == "cpu" else found

        return watched

    def _to(self, method, tensor, *args, **kwargs):
        held = self.holds(tensor) and "cpu" in {*map(str, args), str(kwargs.get("device"))}
        # Without a device, ``cpu`` is every tensor's, also what another is moved to: the word alone is a copy.
        held = held and not any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        self.count += held
        found = method(tensor, *args, **kwargs)
        return self._fetched(found) if held else found

    def _fetched(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self._stores.pop(copy.untyped_storage()._cdata, None)
        return copy

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: PLW3201  # torch calls it
        leaves = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        held = any(map(self.holds, leaves))
        if held:
            self.count += function in SIZES
            if function in {ATEN.index.Tensor, ATEN.index_put_.default}:
                self.count += any(index is not None and index.dtype == torch.bool for index in args[1])
            if function is ATEN.copy_.default and not self.holds(args[0]):
                self.count += 1
                return function(*args, **(kwargs or {}))
        found = function(*args, **(kwargs or {}))
        made = torch.utils._pytree.tree_leaves(found)
        if held:
            self.take(made)
        else:
            for tensor in made:
                if isinstance(tensor, torch.Tensor):
                    self._stores.pop(tensor.untyped_storage()._cdata, None)
        return found


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


def test_one_copy_brings_all_tensors_of_a_batch(device) -> None:
    def make(**fields) -> ImageBatch:
        return ImageBatch(image=torch.rand(3, 3, 8, 6), gt_label=torch.tensor([0, 1, 1]), **fields)

    batch = make(anomaly_map=torch.rand(3, 8, 6), gt_mask=torch.rand(3, 8, 6) > 0.5, pred_score=torch.rand(3).half())
    batch.beside = torch.tensor(2.5, dtype=torch.float64)
    device.take(vars(batch).values())
    with device:
        copy = on_host(batch)
        assert device.count == 1
        assert on_host(batch) is copy
        assert not any(map(device.holds, vars(copy).values()))
    for name, tensor in vars(batch).items():
        if tensor is not None:
            assert torch.equal(getattr(copy, name), tensor)
            assert getattr(copy, name).dtype == tensor.dtype
    batch.pred_score = batch.pred_score + 1
    assert torch.equal(on_host(batch).pred_score, batch.pred_score)
    # Kept by itself, a score keeps nothing of the other tensors alive.
    assert copy.pred_score.untyped_storage().nbytes() == copy.pred_score.nbytes
    named = make(image_path=["a.png", "b.png", "c.png"])
    assert on_host(named).image.shape == (3, 3, 1, 1)
    named.image_path = ["d.png", "e.png", "f.png"]
    assert on_host(named).image_path == named.image_path


@pytest.mark.parametrize("name", [*CLASSES, "Student"])
@pytest.mark.parametrize("run", ["validate", "test", "predict", "train"])
def test_a_batch_waits_twice_at_most(name, run, device, surfaces, engine, tmp_path) -> None:
    size = 64 if name == "Student" else 56
    metrics = "default" if run == "train" else "full"
    arguments = {"image_size": size, "metrics": metrics, "save_maps": "png", "group_by": "(.).png"}
    if name == "Student":
        teacher = {"teacher": "FBCLIP", "teacher_arguments": {"backbone": "tiny", "image_size": 56}}
        arguments |= {
            **teacher,
            "held_out": 0.25,
            "pasted": 0,
            "max_epochs": 1,
            "target_cache": str(tmp_path / "targets"),
        }
    elif name in ADAPTED:
        arguments |= {"backbone": "tiny", "weights": None, "max_epochs": 1}
    else:
        arguments |= {"backbone": "tiny"}
    model = {**CLASSES, "Student": Student}[name](**arguments)
    device.put(model)
    with device:
        data = surfaces(image_size=size, train_anomalous=run == "train", train_batch_size=2, eval_batch_size=2)
        getattr(engine(num_sanity_val_steps=0), run)(model, datamodule=data)
    most = device.most()
    assert most
    assert max(most.values()) <= 2
