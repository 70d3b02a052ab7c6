# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Train an adapter on the embedded backbone, on the training families only: one command, one CPU core.

    python -m recipes.tiny_clip.train_adapter --model FBCLIP
    python -m recipes.tiny_clip.train_adapter --model AnomalyCLIP
    python -m recipes.tiny_clip.train_adapter --model AFCLIP

The backbone's tokens of all images are computed once. Some families and kinds of defect are left out of the training;
on them it is decided when to stop, and how far to go from the start. The number of steps and not the clock ends the
training, so that the same seed gives the same adapter, and so that ablations get the same images and updates.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

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
    from collections.abc import Mapping, Sequence

    from anomalib_fbclip.adapted.torch_model import AdaptedCLIP

logger = logging.getLogger("tiny_adapter")

STEPS = 80
IMAGES = {144: (160, 6), 224: (320, 4)}
"""Image size: number of images, images a step."""
LARGE_STEPS = 2
"""Every so many steps the images are of the largest size."""
LOOKS = 2
"""How often the held-out images are looked at."""
WAYS = (0.25, 0.5, 0.75)
"""Shares of the way from the start to the trained parameters that are tried on the held-out images at the end."""
HELD_FAMILIES, HELD_KINDS = ("marble", "hammered", "carpet"), ("dent", "fibre", "pit")
"""Left out of the adapters' training, to stop by."""
SOURCE = "ProceduralSurfaces/train"
SHARPNESS = 24.0
"""Factor on the logits of the two heads that look at the token itself."""


class Adapter(NamedTuple):
    """How a model is trained.

    Attributes:
        model: Class of the torch model.
        loss: Its loss. FB-CLIP's focal exponent and dice weight are not the paper's 4 and 0.2: they were chosen
            together with the rates, for few updates (the table in the package's page).
        rates: Learning rate of each part, by the start of its parameters' names; other parts stay as they start.
            FB-CLIP's few weights of the blocks start equal and have the longest way; its attention is not trained
            (the package's page says why).
        arguments: Of the model, where they are not the paper's (the package's page says why).
        steps: Number of updates. AnomalyCLIP's local tokens of the last block say little at the start.
    """

    model: type[AdaptedCLIP]
    loss: nn.Module
    rates: dict[str, float]
    arguments: Mapping[str, Any] = MappingProxyType({})
    steps: int = STEPS


ADAPTERS = {
    "FBCLIP": Adapter(
        FBCLIPModel,
        FBCLIPLoss(focal_gamma=2.0, dice_weight=0.5),
        {"prompts": 5e-4, "text_fusion": 5e-4, "scale_weights": 3e-2},
        {"views": ("id",), "smooth_logits": True},
    ),
    "AnomalyCLIP": Adapter(AnomalyCLIPModel, AnomalyCLIPLoss(), {"prompts": 5e-3}, steps=600),
    "AFCLIP": Adapter(AFCLIPModel, AFCLIPLoss(), {"adaptor": 2e-4, "prompts": 2e-3}),
}


@torch.no_grad()
def start_near_identity(model: AdaptedCLIP, seed: int) -> None:
    """Let an attention without a residual pass its tokens on at first, instead of mixing them at random.

    From torch's start the map would know nothing of the image, and the papers' many updates would be needed to bring
    it back. Here two heads look at the token itself and hand it through; all others start small. The bias of FB-CLIP's
    last LayerNorm gives back the mean that it takes away. AnomalyCLIP has no such attention.

    FB-CLIP's gate starts at one half. A random one closes to all tokens or to the class tokens with some seeds: what
    is left of them is below LayerNorm's epsilon, and the image score, or all of it, means nothing.

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
        attention.gate[-2].weight.zero_()
        attention.gate[-2].bias.zero_()
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


class Tokens(NamedTuple):
    """Images ``[M, 3, S, S]``, their masks ``[M, S, S]``, the blocks' tokens ``[M, N, D]`` each, and groups ``[M]``."""

    images: torch.Tensor
    masks: torch.Tensor
    blocks: list[torch.Tensor]
    groups: np.ndarray


@torch.no_grad()
def encode(model: AdaptedCLIP, images: torch.Tensor, masks: torch.Tensor, groups: np.ndarray) -> Tokens:
    """The backbone's tokens, in half precision."""
    parts = [model.encode_image(part) for part in images.split(8)]
    return Tokens(images, masks, [torch.cat(blocks).half() for blocks in zip(*parts, strict=True)], groups)


def training_tokens(model: AdaptedCLIP, seed: int) -> dict[int, Tokens]:
    """Tokens of the training images by image size, without the held-out families and kinds."""
    families = tuple(name for name in TRAIN_FAMILIES if name not in HELD_FAMILIES)
    kinds = tuple(name for name in KINDS if name not in HELD_KINDS)
    rng, found = np.random.default_rng((seed, 0)), {}
    for size, (count, _) in IMAGES.items():
        batch = make_batch(rng, count, size, families, kinds)
        found[size] = encode(model, batch.images, batch.masks, np.array(batch.families))
    return found


def held_out_tokens(model: AdaptedCLIP) -> tuple[Tokens, Tokens]:
    """Clean images of 144 pixels, and as rough ones of 224 pixels as the training's.

    The clean ones are of held-out families with any defect and of the others with held-out kinds only; the rough ones
    of held-out families, and of the surfaces and soft defects that all training images may have.
    """
    samples = [
        generate(family, "good" if n % 2 else kinds[n // 2 % len(kinds)], 144, (78, f, n), 0.5)
        for f, family in enumerate(TRAIN_FAMILIES)
        for kinds in ((KINDS if family in HELD_FAMILIES else HELD_KINDS),)
        for n in range(8 if family in HELD_FAMILIES else 2)
    ]
    groups = np.array([sample.family if sample.family in HELD_FAMILIES else "others" for sample in samples])
    images = to_tensor(np.stack([sample.image for sample in samples]))
    masks = torch.from_numpy(np.stack([sample.mask for sample in samples]))
    rough = make_batch(np.random.default_rng((78, 5)), 60, 224, HELD_FAMILIES, HELD_KINDS)
    alike = np.array(["rough"] * len(rough.images))
    return encode(model, images, masks, groups), encode(model, rough.images, rough.masks, alike)


@torch.no_grad()
def measure(model: AdaptedCLIP, sets: Sequence[Tokens]) -> dict[str, float]:
    """Image AUROC, pixel AUROC and AUPRO, mean over the sets, and in each over its groups.

    Not over all images together: that would reward levels that agree between families and miss what a training
    spoils within them.
    """
    model.eval()
    reports = []
    for tokens in sets:
        maps, scores = [], []
        for start in range(0, len(tokens.images), 8):
            part = slice(start, start + 8)
            found = model.score(tokens.images[part], [block[part].float() for block in tokens.blocks])
            # Probabilities as in the loss, whatever the model smooths.
            maps.append(model.upsample(found.grid_map, tokens.images.shape[-1], model.smoothing_sigma))
            scores.append(found.pred_score)
        masks = tokens.masks.numpy() > 0
        reports.append(report(torch.cat(maps).numpy(), torch.cat(scores).numpy(), masks, tokens.groups))
    return {name: round(float(np.mean([one[name] for one in reports])), 4) for name in reports[0]}


def train(
    model: AdaptedCLIP,
    steps: int = STEPS,
    seed: int = 0,
    log_every: int = 25,
) -> AdaptedCLIP:
    """Train the unfrozen parameters with the model's own loss; held-out images choose when to stop and how far to go.

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
    adapter, rng = ADAPTERS[model.model_name], np.random.default_rng((seed, 2))
    cached, held_out = training_tokens(model, seed), held_out_tokens(model)
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in learned.items() if name.startswith(tuple(adapter.rates))}
    for name, parameter in learned.items():
        parameter.requires_grad_(name in trained)
    groups = [
        {"params": [parameter for name, parameter in trained.items() if name.startswith(part)], "start": rate}
        for part, rate in adapter.rates.items()
    ]

    def state() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in trained.items()}

    def look(name: str) -> float:
        numbers = measure(model, held_out)
        logger.info("%s: held out %s", name, numbers)
        return float(np.mean(list(numbers.values())))

    beginning = best = state()
    found = {0.0: look("start")}
    optimiser = torch.optim.Adam(groups, betas=(0.5, 0.999))
    begin, sums, sizes = time.monotonic(), {}, sorted(cached)
    for step in range(steps):
        share = step / steps
        size = sizes[-1] if step % LARGE_STEPS == LARGE_STEPS - 1 else sizes[0]
        factor = min(1.0, (share + 0.002) / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = group["start"] * factor
        tokens = cached[size]
        chosen = torch.from_numpy(rng.choice(len(tokens.images), IMAGES[size][1], replace=False))
        masks = tokens.masks[chosen]
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            scores = model.score(tokens.images[chosen], [block[chosen].float() for block in tokens.blocks])
        maps = model.upsample(scores.grid_map, size, sigma=0)
        parts = adapter.loss(
            pred_score=scores.pred_score,
            anomaly_map=maps,
            labels=masks.flatten(1).amax(1),
            masks=masks,
            **{name: value.float() for name, value in scores.loss_terms.items()},
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
        if (step + 1) % max(1, steps // LOOKS) == 0 and (now := look(f"step {step + 1}")) > max(found.values()):
            found[1.0], best = now, state()

    # Between start and end lies what serves strange surfaces better than either alone (Wortsman et al., Robust
    # fine-tuning of zero-shot models, CVPR 2022).
    def go(way: float) -> None:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(beginning[name].lerp(best[name], way))

    for way in WAYS if best is not beginning else ():
        go(way)
        found[way] = look(f"{way:g} of the way")
    go(max(found, key=found.__getitem__))
    for parameter in learned.values():
        parameter.requires_grad_()
    return model.eval()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(ADAPTERS), default="FBCLIP")
    parser.add_argument("--steps", type=int, help="updates (default: those of the model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write (default: the embedded adapter of the model)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(arguments.seed)
    settings = ADAPTERS[arguments.model].arguments
    model = ADAPTERS[arguments.model].model(load_clip("tiny"), **settings)
    rates, steps = ADAPTERS[arguments.model].rates, arguments.steps or ADAPTERS[arguments.model].steps
    logger.info("%s, seed %d, %d steps, learning rates %s", arguments.model, arguments.seed, steps, rates)
    train(model, steps, arguments.seed)
    out = arguments.out or EMBEDDED["tiny"] / f"{arguments.model.lower()}.safetensors"
    notes = {"source": SOURCE, "steps": steps, "seed": arguments.seed}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()  # half the file; the model reads it in float32
    logger.info("-> %s", adapters.save(model, out, **notes))
    model = ADAPTERS[arguments.model].model(model.clip, **settings).eval()
    model.load_adapter(out)
    logger.info("as written: held out %s", measure(model, held_out_tokens(model)))


if __name__ == "__main__":
    main()
