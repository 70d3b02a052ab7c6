# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Every stored tensor of the published AF-CLIP is met: stages, losses, gradients, few-shot, five training steps."""

import pytest
import torch
from torch.testing import assert_close

from anomalib_fbclip.adapted.pickled_module import read_module_tensors
from anomalib_fbclip.afclip.aggregation import WINDOWS
from anomalib_fbclip.afclip.loss import AFCLIPLoss, grid_mask
from anomalib_fbclip.afclip.published import _NAMES
from anomalib_fbclip.afclip.torch_model import AFCLIPModel

LOSSES = ("image", "focal", "l1", "alignment", "total")


@pytest.fixture(scope="module")
def reference(golden_of):
    return golden_of("afclip")


def build(reference, **arguments):
    path, _, clip, sizes = reference
    model = AFCLIPModel(clip=clip, feature_layers=sizes["feature_layers"], n_ctx=sizes["n_ctx"], **arguments)
    model.load_adapter(path.with_name(f"{path.name}_prompt.pt"))
    return model.eval()


def losses(model, golden):
    scores = model.score(golden["input.images"])
    anomaly_map = model.upsample(scores.grid_map, golden["input.images"].shape[-1], 0)
    given = {"labels": golden["input.labels"], "masks": golden["input.masks"]}
    loss = AFCLIPLoss(literal=model.literal)
    return loss(pred_score=scores.pred_score, anomaly_map=anomaly_map, **given, **scores.loss_terms)


def published(model):
    """Trained tensors by their published names."""
    own = dict(model.named_parameters())
    adaptor = {f"adaptor.{theirs}": own[ours] for theirs, ours in _NAMES.items()}
    return {"state_prompt_embedding": model.prompts.context, **adaptor}


@pytest.mark.parametrize("literal", [False, True])
def test_every_expected_tensor(reference, literal):
    path, golden, _, sizes = reference
    expected = {name[9:]: tensor for name, tensor in golden.items() if name.startswith("expected.")}
    left = set(expected)

    def close(actual, name, tolerance=1e-5):
        actual = actual.detach().reshape(expected[name].shape)
        assert_close(actual, expected[name], rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")
        left.discard(name)

    model = build(reference, literal=literal)
    stored = {name[8:]: tensor for name, tensor in golden.items() if name.startswith("adapter.")}
    assert stored.keys() == published(model).keys() == set(sizes["trained"])
    assert all(torch.equal(tensor, stored[name]) for name, tensor in published(model).items())
    assert read_module_tensors(path.with_name(f"{path.name}_adaptor.pt"), ("clip.adaptor",)).keys() == _NAMES.keys()

    prediction, stages = model(golden["input.images"], return_stages=True)
    for name in ("text_features_raw", "text_features", "pred_score", "anomaly_map_grid"):
        close(getattr(stages, name), name)
    close(stages.anomaly_map_upsampled, "anomaly_map_upsampled")
    close(prediction.anomaly_map, "anomaly_map_smoothed")
    for index, block in enumerate(sizes["feature_layers"]):
        close(stages.image_tokens[index], f"image_tokens_{block}")
        for place, window in enumerate(WINDOWS):
            close(stages.aggregated[index * len(WINDOWS) + place], f"aggregated_{block}_{window}")
            close(stages.joint_tokens[index * len(WINDOWS) + place], f"joint_tokens_{block}_{window}")

    few = build(reference, literal=literal, few_shot=True)
    few.remember(golden["input.reference_images"])
    scores = few.score(golden["input.images"])
    close(scores.pred_score, "few_shot_score")
    close(scores.grid_map, "few_shot_map_grid")
    memory = few.memory.score(stages.image_tokens)
    close(memory[:, 0], "memory_score")
    close(memory[:, 1:], "memory_map_grid")

    model.train()
    close(grid_mask(golden["input.masks"], 6), "mask_grid")
    parts = losses(model, golden)
    for name in LOSSES:
        close(parts[name], f"loss_{name}")
    parts["total"].backward()
    for name, tensor in published(model).items():
        gradient = expected[f"grad.{name}"]
        assert (tensor.grad - gradient).norm() <= 1e-4 * gradient.norm(), name
        left.discard(f"grad.{name}")

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, betas=(0.5, 0.999))
    history = []
    for _ in range(5):
        optimizer.zero_grad()
        total = losses(model, golden)["total"]
        total.backward()
        optimizer.step()
        history.append(total.detach())
    close(torch.stack(history), "trajectory.loss", 1e-4)
    for name, tensor in published(model).items():
        close(tensor, f"trajectory.{name}", 1e-4)
    assert not left
