# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Training that starts from an adapter, and the comparison with it; for every adapted model."""

import logging

import pytest
import torch
from models import CLASSES, every_adapted_model
from torch.testing import assert_close

from anomalib_fbclip.adapted import adapter_comparison
from anomalib_fbclip.adapted.adapter_comparison import METRICS, AdapterComparison
from anomalib_fbclip.clip.build import EMBEDDED


@every_adapted_model
def test_training_starts_from_the_adapter_and_is_compared_with_it(
    name,
    surfaces,
    engine,
    tmp_path,
    caplog,
    monkeypatch,
) -> None:
    tiny = {"backbone": "tiny", "image_size": 56, "weights": None}
    adapter = CLASSES[name](**tiny, seed=11).save_adapter(tmp_path / "start.safetensors")
    comparison = AdapterComparison(str(adapter))
    model = CLASSES[name](**tiny, seed=3, init_weights=adapter, learning_rate=1e-9, max_epochs=1)
    start = {key: tensor.clone() for key, tensor in model.model.trained_state_dict().items()}
    assert_close(start, CLASSES[name](**tiny, seed=11).model.trained_state_dict())
    other = CLASSES[name](**tiny, seed=3).model.trained_state_dict()
    assert any(not torch.allclose(tensor, start[key]) for key, tensor in other.items())
    with caplog.at_level(logging.INFO):
        engine(callbacks=[comparison], limit_train_batches=1).fit(model, datamodule=surfaces(train_anomalous=True))
    assert model.trainer.global_step > 0
    assert_close(model.model.trained_state_dict(), start, atol=1e-6, rtol=0)
    assert tuple(comparison.result) == METRICS
    for before, after in comparison.result.values():
        assert before == pytest.approx(after, abs=1e-3)
    assert f"{adapter} -> the new adapter: image AUROC" in caplog.text
    assert "worse" not in caplog.text

    # Our own callback is added with the right adapter, and says plainly what is worse.
    values = iter([dict.fromkeys(METRICS, 0.6), {**dict.fromkeys(METRICS, 0.599), "AUPRO": 0.7}])
    monkeypatch.setattr(adapter_comparison, "measure", lambda *_: next(values))
    again = CLASSES[name](**tiny, init_weights=adapter, max_epochs=1)
    engine(limit_train_batches=1).fit(again, datamodule=surfaces(train_anomalous=True))
    assert f"The new adapter is worse than {adapter} in AUPRO (image AUROC 59.9 -> 60.0; " in caplog.text

    path = tmp_path / "model.ckpt"
    again.trainer.save_checkpoint(path)
    adapter.unlink()
    loaded = CLASSES[name].load_from_checkpoint(path)
    assert_close(loaded.model.trained_state_dict(), again.model.trained_state_dict())


@pytest.mark.parametrize("name", ["FBCLIP", "AFCLIP", "AnomalyCLIP"])
def test_training_starts_from_the_embedded_adapter(name) -> None:
    tiny = {"backbone": "tiny", "image_size": 56}
    started = CLASSES[name](**tiny, weights=None, init_weights="auto")
    assert started.init_weights == str(EMBEDDED["tiny"] / f"{name.lower()}.safetensors")
    assert_close(started.model.trained_state_dict(), CLASSES[name](**tiny).model.trained_state_dict(), atol=0, rtol=0)
    with pytest.raises(ValueError, match=f"no {name} adapter comes with the backbone 'ViT-B-16'"):
        CLASSES[name](backbone="ViT-B-16", weights=None, init_weights="auto")


@every_adapted_model
def test_what_cannot_be_is_said(name, tmp_path) -> None:
    with pytest.raises(ValueError, match="give weights=None"):
        CLASSES[name](backbone="tiny", init_weights="a.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CLASSES[name](backbone="tiny", weights=None, init_weights=tmp_path / "a.safetensors")


def test_a_plain_training_is_compared_with_the_embedded_adapter(surfaces, engine) -> None:
    model = CLASSES["FBCLIP"](backbone="tiny", image_size=56, weights=None)
    engine(limit_train_batches=1, limit_val_batches=0, max_epochs=1).fit(model, datamodule=surfaces())
    (comparison,) = (each for each in model.trainer.callbacks if isinstance(each, AdapterComparison))
    assert comparison.earlier == str(EMBEDDED["tiny"] / "fbclip.safetensors")
    assert not comparison.result  # there were no validation data
