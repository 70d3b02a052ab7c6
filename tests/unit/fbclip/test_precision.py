# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Half precision ranks images as float32 does, and its maps stay near."""

import contextlib

import cv2
import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from anomalib_fbclip.clip.build import EMBEDDED, load_clip
from anomalib_fbclip.data.procedural.families import TEST_ONLY_FAMILIES
from anomalib_fbclip.data.procedural.generator import generate
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel
from anomalib_fbclip.host.pre_processing import CLIP_MEAN, CLIP_STD

DEFECTS = ("crack", "pit", "stain", "scratch")


@pytest.fixture(scope="module")
def pictures():
    """Normalised images of the unseen families ``[48, 3, 72, 72]``, labels, masks."""
    images, masks = [], []
    for family in TEST_ONLY_FAMILIES:
        for n in range(16):
            sample = generate(family, "good" if n % 2 else DEFECTS[n // 2 % 4], 224, (5, n), 0.5)
            images.append(cv2.resize(sample.image, (72, 72), interpolation=cv2.INTER_AREA))
            masks.append(cv2.resize(sample.mask.astype(np.uint8), (72, 72), interpolation=cv2.INTER_NEAREST))
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    masks = torch.from_numpy(np.stack(masks)).int()
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    images = (images - mean) / std
    return images, masks.flatten(1).amax(1), masks, run(images, torch.float32)


def run(images, dtype, whole=False):
    model = FBCLIPModel(load_clip("tiny"), views=("id",))
    model.load_adapter(EMBEDDED["tiny"] / "fbclip.safetensors")
    mixed = dtype != torch.float32 and not whole
    context = torch.autocast("cpu", dtype) if mixed else contextlib.nullcontext()
    model = model.eval().to(dtype if whole else torch.float32)
    with torch.inference_mode(), context:
        return model(images.to(dtype) if whole else images)


# What docs/performance.md states, for both kinds of processors. The tokens of a whole model in bfloat16 have 8 bits,
# those under autocast 24.
@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize(
    ("dtype", "whole", "tolerance"),
    [
        (torch.bfloat16, False, 0.1),
        (torch.float16, False, 0.03),
        (torch.bfloat16, True, 0.35),
        (torch.float16, True, 0.03),
    ],
)
def test_ranking_and_maps(pictures, monkeypatch, dtype, whole, tolerance, amx):
    capabilities = {"avx512_bf16": True, "amx_tile": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    images, labels, masks, exact = pictures
    half = run(images, dtype, whole)
    assert half.anomaly_map.dtype == torch.float32
    assert (half.anomaly_map - exact.anomaly_map).abs().max() < tolerance
    for name, truth in (("pred_score", labels), ("anomaly_map", masks)):
        found = [binary_auroc(getattr(scores, name).flatten(), truth.flatten()) for scores in (half, exact)]
        assert abs(found[0] - found[1]) <= 0.002, name


@pytest.mark.parametrize("amx", [True, False])
def test_all_views_under_autocast(monkeypatch, amx):
    capabilities = {"avx512_bf16": True, "amx_tile": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    torch.manual_seed(0)
    model = FBCLIPModel(load_clip("tiny", image_size=64)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    assert (half.anomaly_map - exact.anomaly_map).abs().max() < 0.1
    assert not torch.equal(half.anomaly_map, exact.anomaly_map)
