# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Stages of FB-CLIP, switched at inference, on drawn families and on real images. Run as ``python -m``, or call.

    python -m recipes.tiny_clip.evaluate
    python -m recipes.tiny_clip.evaluate --seconds --sizes 112 144 176 224 288
    python -m recipes.tiny_clip.evaluate --magnetic-tile <folder> --steel-strips <folder> --sizes 112 144 224 --stages

The visual tower runs once for each image and size; what follows is run for each row on the same tokens.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch.nn import functional

from anomalib_fbclip.adapted import adapter_file
from anomalib_fbclip.clip.build import EMBEDDED, read_weights
from anomalib_fbclip.clip.frozen import FrozenCLIP
from anomalib_fbclip.data.magnetic_tile import DEFECTS, GOOD
from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.families import TEST_ONLY_FAMILIES, TRAIN_FAMILIES
from anomalib_fbclip.data.procedural.generator import generate
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel
from recipes.tiny_clip.baseline import local_contrast
from recipes.tiny_clip.batches import make_batch, to_images, to_tensor
from recipes.tiny_clip.captions import FBCLIP_PROMPTS
from recipes.tiny_clip.metrics import report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger("tiny_evaluate")

SIDE = 224
PLAIN, CONTRAST = "plain similarity", "local contrast"
FULL = "FB-CLIP"
STAGES: dict[str, dict[str, Any]] = {
    FULL: {},
    "view ID": {"views": ("id",)},
    "views ID, SEM": {"views": ("id", "sem")},
    "views ID, SPA": {"views": ("id", "spa")},
    "views ID, SEM, SPA": {"views": ("id", "sem", "spa")},
    "without suppression": {"suppression": False},
    "without attention": {"attention": None},
    "text: end-of-text only": {"poolings": ("eot",)},
    "view ID, without suppression": {"views": ("id",), "suppression": False},
    "view ID, without attention": {"views": ("id",), "attention": None},
    "view ID, neither": {"views": ("id",), "attention": None, "suppression": False},
}
"""Rows by what is switched, at inference, on one adapter."""


class Set(NamedTuple):
    """Images ``[M, S, S, 3]`` uint8, masks ``[M, S, S]`` bool, and each image's group ``[M]``."""

    images: np.ndarray
    masks: np.ndarray
    groups: np.ndarray


def drawn(families: Sequence[str], each: int, seed: int, variation: float = 0.5) -> Set:
    """Half good, half defective images of each family, every kind of defect in turn."""
    samples = [
        generate(family, "good" if n % 2 else KINDS[(n // 2 + f) % len(KINDS)], SIDE, (seed, f, n), variation)
        for f, family in enumerate(families)
        for n in range(each)
    ]
    names = np.array([sample.family for sample in samples])
    return Set(np.stack([sample.image for sample in samples]), np.stack([sample.mask for sample in samples]), names)


def varied(count: int = 96, seed: int = 4242) -> Set:
    """Images as the training's, with its surfaces, soft defects and cameras, from seeds that no training has."""
    batch = make_batch(np.random.default_rng((seed, 99)), count, SIDE)
    return Set(to_images(batch.images), batch.masks.numpy() > 0, np.array(["varied"] * count))


def _crop(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A square of ``SIDE`` pixels, around a pixel of the mask where there is one; small images are enlarged."""
    factor = max(1.0, SIDE / min(mask.shape))
    shape = tuple(max(SIDE, round(side * factor)) for side in mask.shape[::-1])
    image = cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR)
    mask = cv2.resize(mask.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST) > 0
    places = np.argwhere(mask) if mask.any() else np.array([[int(rng.integers(side)) for side in mask.shape]])
    pick = places[rng.integers(len(places))]
    shift = rng.integers(-SIDE // 4, SIDE // 4 + 1, 2)
    top, left = (int(np.clip(p + s - SIDE // 2, 0, n - SIDE)) for p, s, n in zip(pick, shift, mask.shape, strict=True))
    return image[top : top + SIDE, left : left + SIDE], mask[top : top + SIDE, left : left + SIDE]


def magnetic_tiles(folder: str, each: int = 12, seed: int = 0, defects: Sequence[str] = DEFECTS) -> Set:
    """Crops of ``each`` tiles of each kind in ``defects``, and as many of good ones."""
    rng, images, masks = np.random.default_rng(seed), [], []
    root = Path(folder)
    for kind in (*defects, GOOD):
        files = sorted((root / kind / "Imgs").glob("*.jpg"))
        for index in rng.permutation(len(files))[: each if kind != GOOD else each * len(defects)]:
            image = cv2.cvtColor(cv2.imread(str(files[index])), cv2.COLOR_BGR2RGB)
            mask = np.zeros(image.shape[:2], dtype=bool)
            if kind != GOOD:
                mask = cv2.imread(str(files[index].with_suffix(".png")), cv2.IMREAD_GRAYSCALE) > 127
            image, mask = _crop(image, mask, rng)
            images.append(image)
            masks.append(mask)
    return Set(np.stack(images), np.stack(masks), np.array(["tiles"] * len(images)))


def steel_strips(folder: str, count: int = 60, seed: int = 0) -> Set:
    """``count`` steel strips, all defective: pixel metrics only."""
    root, images, masks = Path(folder), [], []
    files = sorted((root / "images").iterdir())
    for index in np.random.default_rng(seed).permutation(len(files))[:count]:
        mask = cv2.imread(str(next((root / "masks").glob(f"{files[index].stem}.*"))), cv2.IMREAD_GRAYSCALE) > 127
        images.append(cv2.resize(cv2.cvtColor(cv2.imread(str(files[index])), cv2.COLOR_BGR2RGB), (SIDE, SIDE)))
        masks.append(cv2.resize(mask.astype(np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST) > 0)
    return Set(np.stack(images), np.stack(masks), np.array(["strips"] * len(images)))


def plain_text(clip: FrozenCLIP) -> torch.Tensor:
    """Text vectors ``[2, d]`` of FB-CLIP's untrained prompts, as mean plus half the end-of-text token."""
    ids = SimpleTokenizer()(list(FBCLIP_PROMPTS), context_length=clip.context_length)
    tokens = clip.encode_text(clip.embed_text(ids), causal=False)
    end = tokens[torch.arange(len(ids)), ids.argmax(dim=-1)]
    return functional.normalize(clip.project_text(tokens.mean(dim=1) + 0.5 * end), dim=-1)


def plain_scores(model: FBCLIPModel, tokens: list[torch.Tensor], text: torch.Tensor) -> tuple:
    """Mean over the blocks of softmax(cos / 0.07): image scores ``[B]`` of the last three, grid maps ``[B, g, g]``."""
    chance = torch.stack([model.similarity(model.clip.project(block), text).softmax(-1)[..., 1] for block in tokens])
    side = round((chance.shape[-1] - 1) ** 0.5)
    return chance[-3:, :, 0].mean(0), chance[:, :, 1:].mean(0).unflatten(-1, (side, side))


def switched(model: FBCLIPModel, tokens: list[torch.Tensor], change: dict[str, Any]) -> tuple:
    """Scores and grid maps of an FB-CLIP with some of its stages switched off."""
    before = model.views, model.suppression, model.attention, model.text_fusion.poolings
    model.views, model.suppression = change.get("views", before[0]), change.get("suppression", before[1])
    model.attention = change.get("attention", before[2])
    model.text_fusion.poolings = change.get("poolings", before[3])
    text = model.encode_text() if "poolings" in change else model.text_features()
    logit = model.detect(iter(tokens), text).logit.sigmoid()
    model.views, model.suppression, model.attention, model.text_fusion.poolings = before
    side = round((logit.shape[-1] - 1) ** 0.5)
    return logit[:, 0], logit[:, 1:].unflatten(-1, (side, side))


@torch.no_grad()
def evaluate(model: FBCLIPModel, one: Set, size: int, rows: Sequence[str]) -> dict[str, dict[str, float]]:
    """Numbers of each row on one set of images at one input size, all at ``SIDE`` pixels."""
    found: dict[str, list] = {name: [] for name in rows}
    text = plain_text(model.clip)
    for start in range(0, len(one.images), 10):
        chunk = one.images[start : start + 10]
        way = cv2.INTER_AREA if size < SIDE else cv2.INTER_LINEAR
        images = to_tensor(np.stack([cv2.resize(image, (size, size), interpolation=way) for image in chunk]))
        tokens = model.encode_image(images)
        for name, outs in found.items():
            # Plain similarity is smoothed as FB-CLIP is, so that the rows differ by the method alone.
            change = STAGES.get(name, {})
            scores, maps = plain_scores(model, tokens, text) if name == PLAIN else switched(model, tokens, change)
            outs.append((scores, model.smooth(maps, SIDE, sigma=4.0 * SIDE / size)))
    out = {}
    for name, outs in found.items():
        scores, maps = (torch.cat(parts).numpy() for parts in zip(*outs, strict=True))
        out[name] = report(maps, scores, one.masks, one.groups)
    return out


@torch.no_grad()
def seconds(call: Callable[[torch.Tensor], object], size: int, tries: int = 20) -> float:
    """Processor time of one image on one thread, least of a few: other work on the machine hardly changes it."""
    times = []
    for _ in range(tries + 1):
        images = torch.zeros(1, 3, size, size).uniform_(-1, 1)
        start = time.process_time()
        call(images)
        times.append(time.process_time() - start)
    return min(times[1:])


def contrast(one: Set) -> dict[str, float]:
    """Numbers of the local contrast."""
    maps = local_contrast(one.images)
    return report(maps, maps.max((1, 2)), one.masks, one.groups)


def build(weights: Path | None = None, adapter: Path | None = None) -> FBCLIPModel:
    """FB-CLIP on a backbone's file; without ``adapter`` its parts are untrained, good for plain similarity only."""
    weights = weights or EMBEDDED["tiny"] / "clip.safetensors"
    notes = adapter_file.read(adapter)[1] if adapter else {}
    parts = ("views", "attention", "suppression", "text_poolings", "smooth_logits")
    arguments = {name: notes[name] for name in parts if name in notes}
    model = FBCLIPModel(FrozenCLIP.from_state_dict(read_weights(weights), name="tiny"), **arguments)
    if adapter:
        model.load_adapter(adapter)
    return model.eval()


def sets(options: argparse.Namespace) -> dict[str, list[Set]]:
    """The sets to measure, by name; a drawn one several times."""
    found: dict[str, list[Set]] = {}
    if options.each:
        found["unseen"] = [drawn(TEST_ONLY_FAMILIES, options.each, seed) for seed in range(options.draws)]
    if options.held_out:
        found |= {"held out": [drawn(TRAIN_FAMILIES, 8, 77)], "varied": [varied()]}
    if options.magnetic_tile:
        found["tiles"] = [
            magnetic_tiles(options.magnetic_tile, seed=seed, defects=options.defects)
            for seed in range(options.real_draws)
        ]
    if options.steel_strips:
        found["strips"] = [steel_strips(options.steel_strips, seed=seed) for seed in range(options.real_draws)]
    return found


def add_sets(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose the sets."""
    parser.add_argument("--each", type=int, default=24, help="images of each unseen family and draw; 0: none")
    parser.add_argument("--draws", type=int, default=2, help="draws of them")
    parser.add_argument("--held-out", action="store_true", help="also the images that settings are chosen by")
    parser.add_argument("--magnetic-tile", help="folder of MT_Blowhole, ..., MT_Free: 12 crops a defect, as many good")
    parser.add_argument("--defects", nargs="+", choices=DEFECTS, default=DEFECTS, help="of the tiles that are taken")
    parser.add_argument("--steel-strips", help="folder of images and masks: 60 images, without image AUROC")
    parser.add_argument("--real-draws", type=int, default=1, help="draws of the real images")


def line(values: Sequence[dict[str, float]]) -> str:
    """``image AUROC / pixel AUROC / AUPRO``, mean of the draws, percent."""
    mean = np.mean([list(value.values()) for value in values], axis=0)
    return " / ".join("-" if np.isnan(value) else f"{100 * value:.1f}" for value in mean)


def gain(draws: Sequence[dict[str, dict[str, float]]]) -> str:
    """What FB-CLIP has above plain similarity on the same images: mean and standard deviation of the draws, percent."""
    gaps = [[value - draw[PLAIN][name] for name, value in draw[FULL].items()] for draw in draws]
    pairs = zip(np.mean(gaps, axis=0), np.std(gaps, axis=0, ddof=1), strict=True)
    return " / ".join("-" if np.isnan(mean) else f"{100 * mean:+.1f} ± {100 * spread:.1f}" for mean, spread in pairs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a clip.safetensors; default: the package's")
    parser.add_argument("--adapter", type=Path, help="its FB-CLIP adapter; default: the package's, without --weights")
    parser.add_argument("--sizes", type=int, nargs="*", default=[SIDE])
    parser.add_argument("--stages", action="store_true", help="also FB-CLIP with its parts switched off at inference")
    parser.add_argument("--seconds", action="store_true", help="only the processor time of an image, by size")
    add_sets(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    adapter = options.adapter or (None if options.weights else EMBEDDED["tiny"] / "fbclip.safetensors")
    model = build(options.weights, adapter)
    if options.seconds:
        for size in options.sizes:
            times = size, seconds(model, size), seconds(model.encode_image, size)
            logger.info("%d px: %.3f s, its bare visual tower %.3f s", *times)
        return
    rows = [PLAIN] if adapter is None else [PLAIN, *(STAGES if options.stages else [FULL])]
    chosen = sets(options)
    logger.info("image AUROC / pixel AUROC / AUPRO, percent\n| px | row | %s |", " | ".join(chosen))
    contrasts = [line([contrast(draw) for draw in draws]) for draws in chosen.values()]
    logger.info("| %d | %s | %s |", SIDE, CONTRAST, " | ".join(contrasts))
    for size in options.sizes:
        found = [[evaluate(model, draw, size, rows) for draw in draws] for draws in chosen.values()]
        for row in rows:
            cells = [line([draw[row] for draw in draws]) for draws in found]
            logger.info("| %d | %s | %s |", size, row, " | ".join(cells))
        if FULL in rows and all(len(draws) > 1 for draws in found):
            logger.info("| %d | FB-CLIP above it | %s |", size, " | ".join(gain(draws) for draws in found))


if __name__ == "__main__":
    main()
