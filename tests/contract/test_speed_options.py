# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What makes a run faster does not make it another run: cached tokens, half precision by the trainer."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from models import ADAPTED, OURS
from torch.testing import assert_close

from anomalib_fbclip import FBCLIP

TRAIN = {"weights": None, "learning_rate": 1e-4}


def test_cached_tokens_train_the_same_model_and_skip_the_tower(model, surfaces, engine, tmp_path) -> None:
    data = {"train_anomalous": True, "train_batch_size": 4}
    losses, maps, calls = {}, {}, []
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for cache in (None, tmp_path / "tokens"):
        fbclip = model(**TRAIN, token_cache=cache, metrics="full")
        encode = fbclip.model.clip.encode_image
        if cache:

            def counted(images, layers, encode=encode):
                calls.append(len(images))
                return encode(images, layers)

            fbclip.model.clip.encode_image = counted
        runner = engine(max_epochs=2, limit_val_batches=0, num_sanity_val_steps=0)
        runner.fit(fbclip, datamodule=surfaces(**data))
        losses[cache] = runner.trainer.callback_metrics["train_loss_epoch"]
        maps[cache] = fbclip.eval().model(images).anomaly_map
    assert sum(calls) == 8 + 2  # each training image once, and the two above
    assert len(list((tmp_path / "tokens").rglob("*.safetensors"))) == 8
    assert_close(losses[None], losses[cache], rtol=2e-3, atol=0)
    assert_close(maps[None], maps[cache], rtol=0, atol=5e-3)


def test_the_cache_in_half_precision(model, surfaces, engine, tmp_path) -> None:
    losses = []
    for precision, cache in (
        ("bf16-mixed", None),
        ("bf16-mixed", tmp_path / "tokens"),
        ("32-true", tmp_path / "tokens"),
    ):
        fbclip = model(**TRAIN, token_cache=cache)
        runner = engine(max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0, precision=precision)
        runner.fit(fbclip, datamodule=surfaces(train_anomalous=True))
        losses.append(runner.trainer.callback_metrics["train_loss_epoch"])
    assert_close(losses[0], losses[1], rtol=2e-2, atol=0)
    # Coarser tokens are not read by a run in full precision.
    assert len(list((tmp_path / "tokens").rglob("*.safetensors"))) == 16


def test_synthesised_anomalies_are_not_cached(model, surfaces, engine, tmp_path) -> None:
    fbclip = model(**TRAIN, token_cache=tmp_path / "tokens")
    engine(max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0).fit(fbclip, datamodule=surfaces())
    assert not list((tmp_path / "tokens").rglob("*.safetensors"))


def test_the_limit_of_the_cache_is_in_gigabytes(model, surfaces, engine, tmp_path) -> None:
    fbclip = model(**TRAIN, token_cache=tmp_path / "tokens", token_cache_limit=1e-6)
    engine(max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0).fit(
        fbclip,
        datamodule=surfaces(train_anomalous=True),
    )
    assert not list((tmp_path / "tokens").rglob("*.safetensors"))


def test_half_precision_of_the_trainer_gives_the_same_metrics(surfaces, engine) -> None:
    found = {}
    for precision in ("32-true", "bf16-mixed", "16-true"):
        fbclip = FBCLIP(backbone="tiny", image_size=72, metrics="full", visualizer=False)
        (found[precision],) = engine(precision=precision, limit_val_batches=0).test(
            fbclip,
            datamodule=surfaces(image_size=112),
        )
    for precision in ("bf16-mixed", "16-true"):
        for name in ("image_AUROC", "pixel_AUROC"):
            assert found[precision][name] == pytest.approx(found["32-true"][name], abs=0.002), (precision, name)


@pytest.mark.parametrize("name", [name for name in ADAPTED if name in OURS])
def test_training_in_float16_with_scaled_gradients(name, surfaces, engine) -> None:
    # What `16-mixed` does on a GPU. On a CPU the trainer turns it into bf16-mixed, unless the plug-in is given.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses, changed = [], []
    for scaler in (None, torch.amp.GradScaler(device, init_scale=2.0**10)):
        plugins = None if scaler is None else [MixedPrecision("16-mixed", device, scaler)]
        trained = OURS[name](backbone="tiny", image_size=56, **TRAIN, visualizer=False)
        before = {key: value.clone() for key, value in trained.model.trained_state_dict().items()}
        runner = engine(max_epochs=1, limit_val_batches=0, num_sanity_val_steps=0, plugins=plugins, accelerator="auto")
        runner.fit(trained, datamodule=surfaces(train_anomalous=True))
        losses.append(runner.trainer.callback_metrics["train_loss_epoch"].cpu())
        after = trained.model.trained_state_dict()
        changed.append(torch.cat([(after[key].cpu() - before[key].cpu()).flatten() for key in before]))
        assert scaler is None or int(scaler.get_scale()) == 2**10, "a step was skipped: gradients overflow"
    assert_close(*losses, rtol=2e-2, atol=0)
    assert torch.cosine_similarity(*changed, dim=0) > 0.9
