# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The embedded backbone and adapter: small, fast to load, and trained."""

import time

import cv2
import numpy as np
import pytest
import torch
from anomalib import LearningType
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc

from anomalib_fbclip import AFCLIP, FBCLIP, AnomalyCLIP
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.clip.build import EMBEDDED, read_weights
from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.families import TEST_ONLY_FAMILIES
from anomalib_fbclip.data.procedural.generator import generate
from anomalib_fbclip.fbclip.views import VIEWS
from recipes.tiny_clip.metrics import report

FOLDER = EMBEDDED["tiny"]
WEIGHTS = FOLDER / "clip.safetensors"
ADAPTER = FOLDER / "fbclip.safetensors"


@pytest.fixture(scope="module")
def model():
    return FBCLIP(backbone="tiny").eval()


def test_all_files_stay_below_eight_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) < 8_000_000


@pytest.mark.parametrize(("model", "least"), [(FBCLIP, 0.9), (AFCLIP, 0.9), (AnomalyCLIP, 0.8)])
def test_each_model_is_zero_shot_on_families_that_it_was_not_trained_on(model, least):
    model = model(backbone="tiny").eval()
    assert model.learning_type is LearningType.ZERO_SHOT
    samples = [generate("wood", "hole", model.image_size, seed=seed, variation=0.5) for seed in range(6)]
    images = torch.stack([torch.from_numpy(sample.image).permute(2, 0, 1) / 255 for sample in samples])
    masks = torch.stack([torch.from_numpy(sample.mask) for sample in samples])
    with torch.no_grad():
        maps = model(images).anomaly_map.reshape(masks.shape)
    assert float(binary_auroc(maps.flatten(), masks.flatten().int())) > least


def test_views_and_smoothing_are_those_of_the_embedded_adapter_and_elsewhere_the_papers(model, monkeypatch):
    assert model.model.views == tuple(adapters.read(ADAPTER)[1]["views"])
    assert FBCLIP(backbone="tiny", weights=None).model.views == model.model.views
    assert FBCLIP(backbone="tiny", weights=None, views=["spa"]).model.views == ("spa",)
    assert model.model.smooth_logits
    assert not FBCLIP(backbone="tiny", smooth_logits=False).model.smooth_logits
    monkeypatch.setattr(FBCLIP, "_embedded_adapter", lambda _: None)
    paper = FBCLIP(backbone="tiny", weights=None).model
    assert (paper.views, paper.smooth_logits) == (VIEWS, False)


def test_weights_are_read_within_a_second():
    begin = time.perf_counter()
    read_weights(WEIGHTS)
    assert time.perf_counter() - begin < 1


def test_unknown_words_share_one_row_and_known_ones_do_not():
    from open_clip import tokenizer

    table = read_weights(WEIGHTS)["token_embedding.weight"]
    assert table.shape[0] == 49408
    strange = tokenizer.tokenize(["xylophone zebra"])[0, 1:3]
    known = tokenizer.tokenize(["with without"])[0, 1:3]
    assert torch.equal(table[strange[0]], table[strange[1]])
    assert not torch.equal(table[known[0]], table[known[1]])
    assert not torch.equal(table[known[0]], table[strange[0]])


def test_zero_shot_by_default_and_trainable_on_request(model):
    assert model.learning_type is LearningType.ZERO_SHOT
    assert model.source == "ProceduralSurfaces/train"
    assert FBCLIP(backbone="tiny", weights=None).learning_type is LearningType.ONE_CLASS


@torch.no_grad()
def test_finds_defects_on_families_that_it_never_saw():
    model = FBCLIP(backbone="tiny", image_size=144).eval()
    samples = [
        generate(family, kind, 144, (9, place, number), variation=0.5)
        for place, family in enumerate(TEST_ONLY_FAMILIES)
        for number, defect in enumerate(KINDS[:6])
        for kind in ("good", defect)
    ]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).float() / 255
    found = model.model(model.pre_processor.transform(images))
    size = found.anomaly_map.shape[-1]
    masks = [cv2.resize(s.mask.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST) for s in samples]
    labels = torch.tensor([int(sample.kind != "good") for sample in samples])
    assert binary_auroc(found.pred_score, labels) > 0.8
    assert binary_auroc(found.anomaly_map.flatten(), torch.from_numpy(np.stack(masks)).flatten().long()) > 0.8


def test_of_two_processes_that_train_it_one_measures_alone(monkeypatch):
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr(Metric, "_sync_dist", lambda *_, **__: pytest.fail("waits for the counts of the other"))
    masks = np.arange(2 * 8 * 8).reshape(2, 8, 8) > 100
    numbers = report(masks * 1.0, masks.mean((1, 2)), masks, np.array(["wood", "wood"]))
    assert numbers == {"image_auroc": 1.0, "pixel_auroc": 1.0, "aupro": 1.0}
