# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Each equation is stated once: who edits it changes scores, loss and images alike."""

import pytest
import torch

from anomalib_fbclip.fbclip import background, foreground, views
from anomalib_fbclip.fbclip.loss import FBCLIPLoss
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel


@pytest.mark.parametrize("literal", [False, True])
def test_another_suppression_moves_scores_loss_and_pictures(small_clip, monkeypatch, literal):
    torch.manual_seed(0)
    model = FBCLIPModel(small_clip(), feature_layers=(1, 3), n_ctx=3, literal=literal).train()
    images, masks = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32)

    def everything():
        scores = model.train().score(images)
        anomaly_map = model.upsample(scores.grid_map, 32, 0)
        labels = torch.tensor([0, 1])
        loss = FBCLIPLoss()(scores.pred_score, anomaly_map, labels=labels, masks=masks, **scores.loss_terms)
        _, stages = model.eval()(images, return_stages=True)
        panels = stages.panels()[-1].grids
        return [scores.pred_score, scores.grid_map, loss["scr"], stages.suppressed_projected[-1], panels[-1]]

    before = everything()
    monkeypatch.setattr(background, "suppress_background", lambda feature, _, weight: feature * weight)
    for old, new in zip(before, everything(), strict=True):
        assert (old - new).abs().max() > 1e-4


def test_another_mask_value_reaches_both_forms(small_clip, monkeypatch):
    torch.manual_seed(0)
    fast = FBCLIPModel(small_clip(), feature_layers=(1, 3), n_ctx=3).eval()
    literal = FBCLIPModel(fast.clip, feature_layers=(1, 3), n_ctx=3, literal=True).eval()
    literal.load_state_dict(fast.state_dict())
    images = torch.randn(2, 3, 40, 40)
    before = fast(images).anomaly_map
    for module in (foreground, views):
        monkeypatch.setattr(module, "BACKGROUND_VALUE", 0.2)
    assert (fast(images).anomaly_map - before).abs().max() > 1e-4
    torch.testing.assert_close(fast(images).anomaly_map, literal(images).anomaly_map, rtol=0, atol=2e-5)
    before = fast(images).anomaly_map
    monkeypatch.setattr(foreground, "FOREGROUND_THRESHOLD", 0.3)
    assert (fast(images).anomaly_map - before).abs().max() > 1e-4
