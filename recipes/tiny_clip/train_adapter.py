# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Train an adapter on the embedded backbone, on the training families only: one command, one CPU core.

    python -m recipes.tiny_clip.train_adapter --model FBCLIP
    python -m recipes.tiny_clip.train_adapter --model AnomalyCLIP
    python -m recipes.tiny_clip.train_adapter --model AFCLIP

Images are made on the fly, fresh ones in every step, the same for all models. The number of steps and not the clock
ends the training, so that the same seed gives the same adapter, and so that ablations get the same images and updates.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.afclip.loss import AFCLIPLoss
from anomalib_fbclip.afclip.torch_model import AFCLIPModel
from anomalib_fbclip.anomalyclip.loss import AnomalyCLIPLoss
from anomalib_fbclip.anomalyclip.torch_model import AnomalyCLIPModel
from anomalib_fbclip.clip.build import EMBEDDED, load_clip
from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.families import TRAIN_FAMILIES
from anomalib_fbclip.data.procedural.generator import generate
from anomalib_fbclip.fbclip.attention import HEAD_WIDTH
from anomalib_fbclip.fbclip.loss import FBCLIPLoss
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel
from recipes.tiny_clip.batches import make_batch, to_tensor
from recipes.tiny_clip.metrics import report

if TYPE_CHECKING:
    from anomalib_fbclip.adapted.torch_model import AdaptedCLIP

logger = logging.getLogger("tiny_adapter")

STEPS = 90
STAGES = ((0.5, 72, 14), (0.85, 112, 8), (1.0, 144, 6))
"""(until this share of the steps, image size, images a step): small images first, at a third of the cost."""
SOURCE = "ProceduralSurfaces/train"
SHARPNESS = 24.0
"""Factor on the logits of the two heads that look at the token itself."""


class Adapter(NamedTuple):
    """How a model is trained.

    Attributes:
        model: Class of the torch model.
        loss: Its loss. FB-CLIP's focal exponent and dice weight are not the paper's 4 and 0.2: they were chosen
            together with the rates, for few updates (the table in the package's page).
        rates: Learning rate of each part, by the start of its parameters' names. FB-CLIP's few weights of the blocks
            start equal and have the longest way.
        steps: Number of updates. AnomalyCLIP's local tokens of the last block say little at the start (held-out
            families, 144 pixels, image AUROC / pixel AUROC / AUPRO: 94.1 / 64.5 / 13.9; after 90 updates and averaging
            96.6 / 78.6 / 35.3; after 300 without 90.0 / 91.6 / 76.3), so it is trained longer.
        share_of_start: The trained parameters are averaged with those of the start, which serves strange surfaces
            better than either alone (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022).
    """

    model: type[AdaptedCLIP]
    loss: nn.Module
    rates: dict[str, float]
    steps: int = STEPS
    share_of_start: float = 0.5


ADAPTERS = {
    "FBCLIP": Adapter(
        FBCLIPModel,
        FBCLIPLoss(focal_gamma=2.0, dice_weight=0.5),
        {"attention": 2e-4, "prompts": 2e-4, "text_fusion": 2e-4, "scale_weights": 3e-2},
    ),
    "AnomalyCLIP": Adapter(AnomalyCLIPModel, AnomalyCLIPLoss(), {"prompts": 2e-3}, steps=300, share_of_start=0.0),
    "AFCLIP": Adapter(AFCLIPModel, AFCLIPLoss(), {"adaptor": 2e-4, "prompts": 2e-3}),
}


@torch.no_grad()
def start_near_identity(model: AdaptedCLIP, seed: int) -> None:
    """Let an attention without a residual pass its tokens on at first, instead of mixing them at random.

    From torch's start the map would know nothing of the image, and the papers' many updates would be needed to bring
    it back. Here two heads look at the token itself and hand it through; all others start small. The bias of FB-CLIP's
    last LayerNorm gives back the mean that it takes away. AnomalyCLIP has no such attention.

    Args:
        model: Model to start.
        seed: Seed of the images that the mean is measured on.
    """
    fusion = getattr(model, "text_fusion", None)
    if fusion is not None and "attention" in fusion.poolings:
        fusion.projection[-1].weight.mul_(0.1)
        fusion.projection[-1].bias.zero_()
    attention = getattr(model, "attention", None)
    stream = getattr(model, "adaptor", None) if attention is None else attention.foreground
    if stream is None:
        return
    width = model.clip.vision_width
    own = 2 * HEAD_WIDTH
    through = torch.linalg.qr(torch.randn(own, width))[0]  # orthonormal columns: through.T @ through = 1
    if attention is not None:
        attention.background.to_out.weight.mul_(0.1)
        attention.background.to_out.bias.zero_()
    stream.to_out.weight.mul_(0.1)
    stream.to_out.bias.zero_()
    stream.to_v.weight[:own] = through
    stream.to_out.weight[:, :own] = through.T
    for head in range(2):
        look = torch.linalg.qr(torch.randn(width, HEAD_WIDTH))[0].T * SHARPNESS**0.5
        rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
        stream.to_q.weight[rows] = look
        stream.to_k.weight[rows] = look
    if attention is not None:
        images = make_batch(np.random.default_rng((seed, 1)), 16, 112).images
        tokens = torch.cat(model.encode_image(images))
        attention.norm.bias.fill_(float((tokens.mean(-1) / tokens.std(-1)).mean()))


def train(
    model: AdaptedCLIP,
    steps: int = STEPS,
    seed: int = 0,
    log_every: int = 25,
) -> AdaptedCLIP:
    """Train the unfrozen parameters with the model's own loss, then average them with their start.

    The learning rates warm up over 5 % of the steps, then fall to zero as a cosine.

    Args:
        model: Model to train, in place.
        steps: Number of updates.
        seed: Seed of start and images.
        log_every: Steps between two lines.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(seed)
    start_near_identity(model, seed)
    adapter, rng = ADAPTERS[model.model_name], np.random.default_rng((seed, 0))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [parameter for name, parameter in trained.items() if name.startswith(part)], "start": rate}
        for part, rate in adapter.rates.items()
    ]
    beginning = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimiser = torch.optim.Adam(groups, betas=(0.5, 0.999))
    model.train()
    begin, sums = time.monotonic(), {}
    for step in range(steps):
        share = step / steps
        size, count = next((size, count) for until, size, count in STAGES if share < until)
        factor = min(1.0, (share + 0.002) / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = group["start"] * factor
        batch = make_batch(rng, count, size)
        scores = model.score(batch.images)
        maps = model.upsample(scores.grid_map, size, sigma=0)
        labels = (batch.kinds > 0).float()
        parts = adapter.loss(
            pred_score=scores.pred_score,
            anomaly_map=maps,
            labels=labels,
            masks=batch.masks,
            **scores.loss_terms,
        )
        optimiser.zero_grad(set_to_none=True)
        parts["total"].backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
        for name, value in parts.items():
            sums.setdefault(name, []).append(float(value.detach()))
        if (step + 1) % log_every == 0:
            line = "  ".join(f"{name} {np.mean(values):.4f}" for name, values in sums.items())
            logger.info("step %d  %.0f s  %d px  %s", step + 1, time.monotonic() - begin, size, line)
            sums = {}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.lerp_(beginning[name], adapter.share_of_start)
    return model.eval()


def held_out(each: int = 8, size: int = 224, seed: int = 77, variation: float = 0.5) -> tuple[np.ndarray, ...]:
    """Images of the training families that no training sees: what settings are chosen by.

    Returns:
        ``(images uint8 [M, S, S, 3], masks bool [M, S, S], families [M])``.
    """
    samples = [
        generate(family, "good" if n % 2 else KINDS[(n // 2 + f) % len(KINDS)], size, (seed, f, n), variation)
        for f, family in enumerate(TRAIN_FAMILIES)
        for n in range(each)
    ]
    names = np.array([sample.family for sample in samples])
    return np.stack([sample.image for sample in samples]), np.stack([sample.mask for sample in samples]), names


@torch.no_grad()
def measure(
    model: AdaptedCLIP,
    images: np.ndarray,
    masks: np.ndarray,
    families: np.ndarray,
    size: int,
) -> dict[str, float]:
    """Image AUROC, pixel AUROC and AUPRO, mean over the families, at an input size.

    Not over all images together: that would reward levels that agree between families and miss what a training
    spoils within them.

    Args:
        model: Model in evaluation mode.
        images: uint8 ``[M, S, S, 3]``.
        masks: bool ``[M, S, S]``.
        families: Family of each image ``[M]``.
        size: Side of the input in pixels.
    """
    maps, scores = [], []
    for start in range(0, len(images), 16):
        small = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images[start : start + 16]]
        found = model(to_tensor(np.stack(small)))
        maps.append(found.anomaly_map.numpy())
        scores.append(found.pred_score.numpy())
    small = np.stack([cv2.resize(m.astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST) for m in masks]) > 0
    return report(np.concatenate(maps), np.concatenate(scores), small, families)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ADAPTERS), default="FBCLIP")
    parser.add_argument("--steps", type=int, help="updates (default: those of the model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=int, nargs="*", default=[112, 144], help="input sizes measured at the end")
    parser.add_argument("--out", type=Path, help="file to write (default: the embedded adapter of the model)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(arguments.seed)
    model = ADAPTERS[arguments.model].model(load_clip("tiny"))
    rates, steps = ADAPTERS[arguments.model].rates, arguments.steps or ADAPTERS[arguments.model].steps
    logger.info("%s, seed %d, %d steps, learning rates %s", arguments.model, arguments.seed, steps, rates)
    train(model, steps, arguments.seed)
    out = arguments.out or EMBEDDED["tiny"] / f"{arguments.model.lower()}.safetensors"
    notes = {"source": SOURCE, "steps": steps, "seed": arguments.seed}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()  # half the file; the model reads it in float32
    logger.info("-> %s", adapters.save(model, out, **notes))
    model = ADAPTERS[arguments.model].model(model.clip).eval()
    model.load_adapter(out)
    pictures = held_out()
    for size in arguments.sizes:
        logger.info("held-out images of the training families, %d px: %s", size, measure(model, *pictures, size))


if __name__ == "__main__":
    main()
