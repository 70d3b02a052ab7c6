# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The same seed gives the same weights, bit for bit, however images are loaded and whoever interrupts the run."""

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler, WeightedRandomSampler

from anomalib_fbclip.adapted.training_data import repeat_order
from anomalib_fbclip.data import AuxiliaryTransfer

MIXED = {"train_anomalous": True, "train_batch_size": 4}


def train(model, engine, data, epochs, **arguments) -> torch.Tensor:
    """All trained weights after so many epochs."""
    fbclip = model(weights=None, views=["id"], learning_rate=1e-3)
    engine(max_epochs=epochs, limit_val_batches=0).fit(fbclip, datamodule=data, **arguments)
    return torch.cat([tensor.flatten() for tensor in fbclip.model.trained_state_dict().values()])


@pytest.fixture
def undisturbed(model, surfaces, engine) -> torch.Tensor:
    return train(model, engine, surfaces(**MIXED), 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_with_the_weights_of_one_in_one_piece(
    workers,
    undisturbed,
    model,
    surfaces,
    engine,
    tmp_path,
) -> None:
    torch.manual_seed(workers)
    first = train(model, engine, surfaces(**MIXED, num_workers=workers), 1)
    (checkpoint,) = tmp_path.glob("results/FBCLIP/ProceduralSurfaces/wood/v1/weights/lightning/*.ckpt")
    second = train(model, engine, surfaces(**MIXED, num_workers=workers), 2, ckpt_path=checkpoint)
    assert not torch.equal(first, second)
    assert torch.equal(second, undisturbed)


def test_workers_change_nothing(undisturbed, model, surfaces, engine) -> None:
    assert torch.equal(train(model, engine, surfaces(**MIXED, num_workers=4), 2), undisturbed)


def test_synthesised_anomalies_follow_the_epoch(model, surfaces, engine, tmp_path) -> None:
    whole = train(model, engine, surfaces(train_batch_size=4), 2)
    torch.manual_seed(5)
    train(model, engine, surfaces(train_batch_size=4), 1)
    (checkpoint,) = tmp_path.glob("results/FBCLIP/ProceduralSurfaces/wood/v1/weights/lightning/*.ckpt")
    assert torch.equal(train(model, engine, surfaces(train_batch_size=4), 2, ckpt_path=checkpoint), whole)


def test_order_follows_seed_and_epoch_and_own_generators_are_left_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.manual_seed(0)
        loader = DataLoader(range(50), shuffle=True)
        repeat_order(loader, seed)
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(1, 3) == order(1, 3)
    assert order(1, 3) != order(1, 2)
    assert len({str(order(seed, epoch)) for seed in (0, 1, 2, 5) for epoch in range(4)}) == 16
    own = torch.Generator()
    for loader in (
        DataLoader(range(5), shuffle=True, generator=own),
        DataLoader(range(5), sampler=SequentialSampler(range(5))),
        DataLoader(range(5), sampler=WeightedRandomSampler([1.0] * 5, 5, generator=own)),
    ):
        repeat_order(loader, 1)
        assert not hasattr(loader.sampler, "set_epoch")


def test_balanced_sampling_is_resumed_in_order(model, surfaces, engine, tmp_path) -> None:
    def data() -> AuxiliaryTransfer:
        return AuxiliaryTransfer(surfaces(category="tiles"), surfaces(), sampling="balanced", train_batch_size=4)

    whole = train(model, engine, data(), 2)
    torch.manual_seed(5)
    train(model, engine, data(), 1)
    (checkpoint,) = tmp_path.glob("results/**/v1/weights/lightning/*.ckpt")
    assert torch.equal(train(model, engine, data(), 2, ckpt_path=checkpoint), whole)
