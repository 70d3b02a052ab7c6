# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What ``memory_radius`` adds: a patch is compared with remembered patches near its own place, or with all.

    python -m recipes.few_shot.place printed_board machined_part            # drawn, under a fixed camera
    python -m recipes.few_shot.place printed_board --tiles 112
    python -m recipes.few_shot.place printed_board --vary                   # a new drawing in each image
    python -m recipes.few_shot.place --magnetic-tile magnetic_tile/         # photographs, two by two in each image
    python -m recipes.few_shot.place --magnetic-tile magnetic_tile/ --cells 1
    python -m recipes.few_shot.place --seconds                              # of one image

A drawn product is one drawing, which the camera sees shifted by up to ``--jitter`` pixels of 224 in each direction and
turned a little, with other noise and blur in each image. Each image goes through the backbone once, and its tokens and
text scores serve all rows; the rows are means, and after the sign standard deviations, over ``--choices`` choices of
the good images. ``auto`` says how many of the choices it compares near their place.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from anomalib.data import InferenceBatch
from torch.nn import functional

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.adapted.normal_memory import NormalMemory, at_hand, choose_radius
from anomalib_fbclip.common.functional import tokens_to_grid
from anomalib_fbclip.data.procedural.defects import KINDS, add_defect
from anomalib_fbclip.data.procedural.families import FAMILIES, render
from anomalib_fbclip.data.procedural.fields import Surface
from anomalib_fbclip.data.procedural.generator import finish, generate
from anomalib_fbclip.host.metrics import ImageScores, ScoreHistogram

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_fbclip.host.tiling import Place

SIDE = 224
GOOD = 16
SEED = 1
_MARGIN = 300  # pixels of the drawing, so that a shifted camera sees no border


class Sample(NamedTuple):
    """An image ``[3, H, W]`` in [0, 1] and its mask ``[H, W]``."""

    image: torch.Tensor
    mask: torch.Tensor


class Encoded(NamedTuple):
    """Images after the backbone, N of them in P pieces (the whole, and tiles).

    Attributes:
        tokens: Of each block ``[P, N, 1 + L, D]``.
        text: Logits of the text ``[P, N, 1 + L]``.
        places: Of the pieces.
        canvases: What is cut ``[N, 3, H, W]``.
        masks: ``[N, H, W]``.
    """

    tokens: list[torch.Tensor]
    text: torch.Tensor
    places: list[Place]
    canvases: torch.Tensor
    masks: torch.Tensor


def drawn(family: str, jitter: float, number: int, vary: bool) -> tuple[list[Sample], list[Sample]]:
    """Good images, and as many test images of both kinds as ``number`` says."""
    base = render(family, np.random.default_rng(5), _MARGIN)
    good, test = [], []
    for index in range(GOOD + 2 * number):
        rng = np.random.default_rng((SEED, index))
        kind = KINDS[index % len(KINDS)] if index >= GOOD + number else "good"
        if vary:
            sample = generate(family, kind, SIDE, (SEED, index), 0.5)
            image, mask = sample.image, sample.mask
        else:
            warp = cv2.getRotationMatrix2D((_MARGIN / 2,) * 2, rng.normal(0, 0.075 * jitter), SIDE / _MARGIN)
            warp[:, 2] += (SIDE - _MARGIN) / 2 + rng.uniform(-jitter, jitter, 2)
            seen = cv2.warpAffine(base.image, warp, (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE).clip(0, 1)
            part = cv2.warpAffine(base.part.astype(np.uint8), warp, (SIDE, SIDE), flags=cv2.INTER_NEAREST) > 0
            mask = np.zeros((SIDE, SIDE), bool)
            spoiled = seen
            if kind != "good":
                spoiled, mask, *_ = add_defect(rng, Surface(seen, part), kind)
            image, _ = finish(rng, spoiled, seen, mask, 0.5)
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        (good if index < GOOD else test).append(Sample(pixels, torch.from_numpy(mask.copy())))
    return good, test


def photographs(root: Path, number: int, cells: int) -> tuple[list[Sample], list[Sample]]:
    """``cells`` x ``cells`` magnetic tiles in each image, any at any place; in a bad image one of them is bad."""
    chance = random.Random(SEED)  # noqa: S311  # no secret
    files = sorted(root.glob("MT_*/Imgs/*.jpg"))
    chance.shuffle(files)
    free = iter([file for file in files if file.parent.parent.name == "MT_Free"])
    bad = iter([file for file in files if file.parent.parent.name != "MT_Free"])
    side = SIDE // cells

    def cell(file: Path, spoiled: bool) -> Sample:
        image = cv2.resize(cv2.imread(str(file))[..., ::-1], (side, side), interpolation=cv2.INTER_AREA)
        mask = torch.zeros(side, side, dtype=torch.bool)
        if spoiled:
            truth = cv2.imread(str(file.with_suffix(".png")), cv2.IMREAD_GRAYSCALE)
            mask = torch.from_numpy(cv2.resize(truth, (side, side), interpolation=cv2.INTER_NEAREST) > 0)
        return Sample(torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255, mask)

    def mosaic(spoiled: bool) -> Sample:
        at = chance.randrange(cells**2) if spoiled else None
        each = [cell(next(bad if place == at else free), place == at) for place in range(cells**2)]
        rows = [each[start : start + cells] for start in range(0, cells**2, cells)]
        return Sample(
            *(torch.cat([torch.cat([own[part] for own in row], dim=-1) for row in rows], dim=-2) for part in (0, 1)),
        )

    return (
        [mosaic(spoiled=False) for _ in range(GOOD)],
        [mosaic(spoiled=index >= number) for index in range(2 * number)],
    )


@torch.no_grad()
def encode(model: FBCLIP, samples: Sequence[Sample]) -> Encoded:
    """Run the paper's method on images and their tiles; the memory comes later."""
    inner, tiling = model.model, model.tiling
    canvases = model.pre_processor.transform(torch.stack([sample.image for sample in samples]))
    pieces, places = list(canvases[:, None]), []
    if tiling is not None:
        pieces = [torch.stack(tiling.pieces(canvas[None], 64)) for canvas in canvases]
        places = tiling.chosen(canvases[:1], 64)
    tokens, text = [], []
    for images in pieces:
        blocks = inner.encode_image(images)
        text.append(inner.detect(iter(blocks), inner.text_features()).logit)
        tokens.append(torch.stack(inner.memory.compared(inner.clip.visual, images, at_hand(blocks))))
    every = torch.stack(tokens, dim=2)  # [S, P, N, 1 + L, D]
    masks = torch.stack([sample.mask for sample in samples])
    return Encoded(list(every), torch.stack(text, dim=1), places, canvases, masks)


@torch.no_grad()
def remember(model: FBCLIP, good: Encoded, chosen: Sequence[int], radius: int | str | None) -> None:
    """Fill a new memory with some of the good images; a ``memory_radius`` of ``"auto"`` is chosen by these."""
    inner = model.model
    if radius == "auto":
        grid = inner.clip.grid_of_images(torch.zeros(1, 3, *(2 * [model.image_size])))
        radius = choose_radius([block[0, list(chosen)] for block in good.tokens], grid)
    inner.memory_radius = radius
    inner.memory = inner.make_memory()
    pieces = len(good.tokens[0])
    places = [] if radius is None else [place for place in good.places for _ in chosen]
    names = [str(image) for image in chosen] * pieces
    inner.memory.fill([block[:, list(chosen)].flatten(0, 1) for block in good.tokens], None, names, places)


@torch.no_grad()
def scores(model: FBCLIP, test: Encoded) -> list[float]:
    """Image AUROC, pixel AUROC and AUPRO in percent, with the memory that the model holds."""
    inner, shape = model.model, test.text.shape
    tokens = [block.flatten(0, 1) for block in test.tokens]
    chance = inner.abnormal_probability(test.text.flatten(0, 1), tokens, None, test.places)
    maps = inner.smooth(tokens_to_grid(chance[:, 1:]), model.image_size, inner.smoothing_sigma)
    score, maps = chance[:, 0].unflatten(0, shape[:2]), maps.unflatten(0, shape[:2])
    image, pixel = ImageScores(), ScoreHistogram(regions=True)
    for index, mask in enumerate(test.masks):
        found = InferenceBatch(pred_score=score[0, index, None], anomaly_map=maps[0, index, None])
        if model.tiling is not None:

            def tiles(_: torch.Tensor, places: Sequence[Place], index: int = index) -> InferenceBatch:
                numbers = [place.number for place in places]
                return InferenceBatch(pred_score=score[numbers, index], anomaly_map=maps[numbers, index])

            found = model.tiling(lambda _, whole=found: whole, test.canvases[index, None], tiles)
        image.update(found.pred_score, mask.any()[None])
        pixel.update(functional.interpolate(found.anomaly_map[:, None], mask.shape, mode="bilinear")[0], mask[None])
    of_pixels = pixel.compute()
    return [100 * float(value) for value in (image.compute()["AUROC"], of_pixels["AUROC"], of_pixels["AUPRO"])]


def choices(shot: int, number: int) -> list[list[int]]:
    """Choices of ``shot`` good images."""
    return [
        torch.randperm(GOOD, generator=torch.Generator().manual_seed(seed))[:shot].tolist() for seed in range(number)
    ]


def seconds() -> None:
    """Time of one image's comparison with four, on one thread, the least of five; tokens are random."""
    torch.set_num_threads(1)
    sys.stdout.write("| patches | blocks x width | memory_radius | milliseconds |\n|---|---|---|---|\n")
    for side, layers, width in ((14, 4, 128), (28, 4, 128), (37, 5, 1024)):
        tokens, text = [torch.randn(4, 1 + side**2, width) for _ in range(layers)], torch.zeros(1, 1 + side**2)
        for radius in (None, 2, 1):
            memory, times = NormalMemory(layers, width, radius), []
            memory.fill(tokens)
            for _ in range(5):
                start = time.perf_counter()
                memory([block[:1] for block in tokens], text)
                times.append(time.perf_counter() - start)
            sys.stdout.write(f"| {side} x {side} | {layers} x {width} | {radius} | {1000 * min(times):.1f} |\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"drawn products, out of {', '.join(FAMILIES)}")
    parser.add_argument("--magnetic-tile", type=Path, help="folder of the magnetic tile data set")
    parser.add_argument("--cells", type=int, default=2, help="magnetic tiles along a side (default: %(default)s)")
    parser.add_argument("--seconds", action="store_true", help="time one image instead")
    parser.add_argument("--vary", action="store_true", help="a new drawing in each image")
    parser.add_argument(
        "--jitter",
        type=float,
        default=3,
        help="of the camera, in pixels of 224 (default: %(default)s)",
    )
    parser.add_argument("--tiles", type=int, help="side of tiles, in pixels of 224")
    parser.add_argument("--image-size", type=int, default=112, help="of the model (default: %(default)s)")
    parser.add_argument("--shots", type=int, nargs="*", default=[4], help="numbers of good images")
    parser.add_argument("--radii", nargs="*", default=["None", "4", "2", "1", "0", "auto"], help="of memory_radius")
    parser.add_argument("--choices", type=int, default=3, help="choices of the good images")
    parser.add_argument("--each", type=int, default=24, help="test images of each kind")
    arguments = parser.parse_args()
    if arguments.seconds:
        seconds()
        return
    model = FBCLIP(
        backbone="tiny",
        image_size=arguments.image_size,
        k_shot=1,
        tiles=arguments.tiles,
        visualizer=False,
    ).eval()
    sets = {name: drawn(name, arguments.jitter, arguments.each, arguments.vary) for name in arguments.families}
    if arguments.magnetic_tile is not None:
        sets["magnetic tiles"] = photographs(arguments.magnetic_tile, arguments.each, arguments.cells)
    sys.stdout.write(
        "| product | good images | memory_radius | image AUROC | pixel AUROC | AUPRO |\n" + "|---" * 6 + "|\n",
    )
    for name, samples in sets.items():
        good, test = (encode(model, each) for each in samples)
        for shot in arguments.shots:
            for radius in arguments.radii:
                wanted = {"None": None, "auto": "auto"}[radius] if radius in {"None", "auto"} else int(radius)
                rows, near = [], 0
                for chosen in choices(shot, arguments.choices):
                    remember(model, good, chosen, wanted)
                    near += model.model.memory_radius is not None
                    rows.append(scores(model, test))
                cells = [f"{mean:.1f} ± {std:.1f}" for mean, std in zip(np.mean(rows, 0), np.std(rows, 0), strict=True)]
                known = f"auto ({near} of {len(rows)} near)" if radius == "auto" else radius
                sys.stdout.write(f"| {name} | {shot} | {known} | {' | '.join(cells)} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
