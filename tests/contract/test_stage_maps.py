# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Images of every stage, through anomalib's engine and command line; and the record that they are drawn from."""

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.models import Padim

from anomalib_fbclip import FBCLIP, StageMaps
from anomalib_fbclip.callbacks.stage_maps import draw_stages
from anomalib_fbclip.data.procedural.generator import generate


def test_test_draws_the_chosen_images_only(model, surfaces, engine, tmp_path, caplog):
    chosen = StageMaps(num_images=2, pattern="*/test/good/*", dirpath=tmp_path / "stages")
    with caplog.at_level(logging.INFO):
        engine(callbacks=[chosen]).test(model(), datamodule=surfaces(eval_batch_size=3))
    names = [path.relative_to(tmp_path / "stages").as_posix() for path in chosen.paths]
    assert names == ["good/wood_0000.png", "good/wood_0002.png"]
    assert f"Stage maps of 2 images: {tmp_path / 'stages'}" in caplog.text
    for path in chosen.paths:
        picture = cv2.imread(str(path))
        assert picture.shape[1] > picture.shape[0] > 500
        assert picture.std() > 10

    none = StageMaps(pattern="*/nothing/*")
    engine(callbacks=[none]).test(model(), datamodule=surfaces())
    assert "pattern='*/nothing/*', nothing was drawn" in caplog.text


def test_the_command_line_takes_it_for_a_folder_with_equal_names(tmp_path):
    name = "$5_and_$6"  # no formula
    for folder in ("a/x", "b/x"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        picture = np.random.default_rng(1).integers(0, 255, (60, 60, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "in" / folder / f"{name}.png"), picture)
    words = ["predict", "--model", "FBCLIP", "--model.backbone", "tiny", "--model.image_size", "56"]
    words += ["--data", str(tmp_path / "in"), "--default_root_dir", str(tmp_path / "results")]
    words += ["--trainer.callbacks", "anomalib_fbclip.StageMaps", "--trainer.callbacks.num_images", "null"]
    cli = AnomalibCLI(words)
    drawn = sorted((Path(cli.engine.trainer.default_root_dir) / "stages").rglob("*.png"))
    assert [path.name for path in drawn] == [f"{name}.png", f"{name}_1.png"]


@pytest.mark.parametrize(
    "arguments",
    [{"k_shot": 1}, {"views": ["sem"]}, {"views": ["id", "spa"], "suppression": False}, {"attention": False}],
    ids=str,
)
@torch.no_grad()
def test_the_record_is_the_model_s_own_and_every_ablation_can_be_drawn(arguments):
    fbclip = FBCLIP(backbone="tiny", image_size=56, weights=None, feature_layers=[2, 5, 8], **arguments).eval().model
    torch.nn.init.normal_(fbclip.scale_weights)
    sample = generate("wood", "hole", 56, seed=3)
    images = torch.from_numpy(sample.image).permute(2, 0, 1)[None] / 255 - 0.5
    if fbclip.memory is not None:
        fbclip.remember(images.flip(-1))
    batch, stages = fbclip(images.repeat(2, 1, 1, 1), return_stages=True)
    count = 3 * len(fbclip.views)
    assert len(stages.text_similarity) == len(stages.text_similarity_before) == count
    assert len(stages.gates) == (count if fbclip.attention is not None else 0)
    assert all(0 <= float(gate.min()) <= float(gate.max()) <= 1 for gate in stages.gates)

    # Summed with the layers' weights, the recorded similarities are the score; before suppression, another model's.
    weights = fbclip.scale_weights.softmax(0)
    logits = sum(weights[i // len(fbclip.views)] * each for i, each in enumerate(stages.text_similarity))
    logits = (logits / fbclip.temperature).diff(dim=-1)[..., 0]
    if fbclip.memory is not None:
        logits += stages.memory_evidence
    found = logits.sigmoid()
    torch.testing.assert_close(found[:, 0], batch.pred_score)
    torch.testing.assert_close(found[:, 1:].reshape(stages.anomaly_map_grid.shape), stages.anomaly_map_grid)
    fbclip.suppression = False
    torch.testing.assert_close(fbclip.score(images).grid_map, stages.anomaly_map_grid_before[:1])

    figure = draw_stages(stages, fbclip.feature_layers, 0, sample.image / 255, sample.mask, "wood")
    per_view = 5 - 1 - (fbclip.attention is None) - (stages.background_prototype is None)
    panels = 4 + (fbclip.memory is not None) + 3 * (1 + per_view * len(fbclip.views))
    bars = 1 + 1 + per_view
    assert len(figure.axes) == panels + bars


def test_what_it_cannot_draw_is_refused(surfaces, engine):
    with pytest.raises(ValueError, match="num_images=0"):
        StageMaps(num_images=0)
    with pytest.raises(TypeError, match="Padim has none: leave it out"):
        engine(callbacks=[StageMaps()]).fit(Padim(pre_trained=False), datamodule=surfaces())
