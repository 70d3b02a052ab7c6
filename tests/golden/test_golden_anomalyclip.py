# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Every stored tensor of the published AnomalyCLIP is met: stages, losses, gradients, five training steps."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.testing import assert_close

from anomalib_fbclip.anomalyclip.loss import AnomalyCLIPLoss
from anomalib_fbclip.anomalyclip.torch_model import AnomalyCLIPModel

LOSSES = {"loss_image": ("image", 1), "loss_focal": ("focal", 4), "loss_dice": ("dice", 4), "loss_total": ("total", 1)}


@pytest.fixture(scope="module")
def reference(golden_of):
    return golden_of("anomalyclip")


def build(reference, **arguments):
    path, _, clip, sizes = reference
    model = AnomalyCLIPModel(
        clip=clip,
        feature_layers=sizes["feature_layers"],
        n_ctx=sizes["n_ctx"],
        prompt_depth=sizes["depth"],
        deep_tokens=sizes["t_n_ctx"],
        local_blocks=sizes["dpam_layer"] - 1,
        **arguments,
    )
    model.load_adapter(path.with_suffix(".pth"))
    return model.eval()


def losses(model, golden):
    scores = model.score(golden["input.images"])
    anomaly_map = model.upsample(scores.grid_map, golden["input.images"].shape[-1], 0)
    given = {"labels": golden["input.labels"], "masks": golden["input.masks"]}
    return AnomalyCLIPLoss()(pred_score=scores.pred_score, anomaly_map=anomaly_map, **given, **scores.loss_terms)


def published(model):
    """Trained tensors by their published names."""
    prompts = model.prompts
    deep = {f"compound_prompts_text.{index}": tensor for index, tensor in enumerate(prompts.deep_prompts)}
    return {"ctx_pos": prompts.normal_context, "ctx_neg": prompts.abnormal_context, **deep}


@pytest.mark.parametrize("literal", [False, True])
def test_every_expected_tensor(reference, literal):
    _, golden, _, sizes = reference
    expected = {name[9:]: tensor for name, tensor in golden.items() if name.startswith("expected.")}
    left = set(expected)

    def close(actual, name, tolerance=1e-5):
        actual = torch.as_tensor(actual).reshape(expected[name].shape)
        assert_close(actual, expected[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")
        left.discard(name)

    model = build(reference, literal=literal)
    prediction, stages = model(golden["input.images"], return_stages=True)
    for name in ("prompt_embeddings", "text_features_raw", "text_features", "image_feature"):
        close(getattr(stages, name), name)
    close(prediction.pred_score, "pred_score")
    for index, block in enumerate(sizes["feature_layers"]):
        # The local path's class token is stored, too; it enters no score.
        expected[f"patch_tokens_{block}"] = expected[f"patch_tokens_{block}"][:, 1:]
        close(stages.patch_tokens[index], f"patch_tokens_{block}")
        grid = stages.patch_probability[index].unflatten(1, (6, 6))
        close(model.upsample(grid, 84, sigma=0), f"map_{block}")
    count = len(sizes["feature_layers"])
    close(count * stages.anomaly_map_upsampled, "anomaly_map_sum")
    close(count * prediction.anomaly_map, "anomaly_map_sum_smoothed")
    smoothed = np.stack([gaussian_filter(each.numpy(), sigma=4) for each in expected["anomaly_map_sum"]])
    close(smoothed, "anomaly_map_sum_smoothed")

    model.train()
    parts = losses(model, golden)
    for name, (part, weight) in LOSSES.items():
        close(parts[part] / weight, name)
    parts["total"].backward()
    gradients = {"ctx_pos": model.prompts.normal_context.grad, "ctx_neg": model.prompts.abnormal_context.grad}
    gradients |= {f"compound_prompts_text.{i}": each for i, each in enumerate(model.prompts.deep_prompts.grad)}
    for name, gradient in gradients.items():
        stored = expected[f"grad.{name}"]
        assert (gradient.reshape(stored.shape) - stored).norm() <= 1e-4 * stored.norm(), name
        left.discard(f"grad.{name}")

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=(0.5, 0.999))
    history = []
    for _ in range(5):
        optimizer.zero_grad()
        total = losses(model, golden)["total"]
        total.backward()
        optimizer.step()
        history.append(total.detach())
    close(torch.stack(history), "trajectory.loss", 1e-4)
    for name, tensor in published(model).items():
        close(tensor.detach(), f"trajectory.{name}", 1e-4)
    assert not left
