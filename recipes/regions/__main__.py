# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What to do with pixels outside of a region: real tiles among steel strips, lines and discs.

python -m recipes.regions magnetic_tile/ steel_strips/images --model FBCLIP --shape square
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

import anomalib_fbclip
from anomalib_fbclip.host.metrics import ImageScores, ScoreHistogram
from anomalib_fbclip.host.regions import Regions, make_view

SIDE, TILE = 240, 160
EDGE = (SIDE - TILE) // 2


def clutter(files: list[Path], chance: random.Random) -> np.ndarray:
    """A cut of a steel strip with up to four lines and discs."""
    image = np.array(Image.open(chance.choice(files)).convert("RGB"))
    image = cv2.resize(image, (max(SIDE, image.shape[1]), max(SIDE, image.shape[0])))
    top, left = chance.randrange(image.shape[0] - SIDE + 1), chance.randrange(image.shape[1] - SIDE + 1)
    out = image[top : top + SIDE, left : left + SIDE].copy()
    for _ in range(chance.randrange(5)):
        plain = (chance.choice([20, 230]),) * 3
        ink = tuple(chance.randrange(256) for _ in range(3)) if chance.random() < 0.5 else plain
        place, size = (chance.randrange(SIDE), chance.randrange(SIDE)), chance.randrange(8, 40)
        if chance.random() < 0.5:
            cv2.circle(out, place, size, ink, -1)
        else:
            cv2.line(out, place, (chance.randrange(SIDE), chance.randrange(SIDE)), ink, chance.randrange(2, 10))
    return out


def scenes(root: Path, strips: list[Path], region: np.ndarray, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and masks, good ones first."""
    found = []
    chance = random.Random(0)  # noqa: S311  # no secret
    for bad in (False, True):
        files = sorted(file for file in root.glob("MT_*/Imgs/*.jpg") if ("MT_Free" not in file.parts) == bad)
        chance.shuffle(files)
        for file in files[:number]:
            tile = np.array(Image.open(file).convert("RGB").resize((TILE, TILE), Image.Resampling.BOX))
            mask = np.array(Image.open(file.with_suffix(".png")).convert("L").resize((TILE, TILE), 0)) > 0
            image = clutter(strips, random.Random(str(file)))  # noqa: S311  # no secret
            whole, marked = image.copy(), np.zeros((SIDE, SIDE), bool)
            whole[EDGE : EDGE + TILE, EDGE : EDGE + TILE] = tile
            marked[EDGE : EDGE + TILE, EDGE : EDGE + TILE] = mask & bad
            marked &= region
            if marked.any() == bad:
                found.append((np.where(region[..., None], whole, image), marked))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of MT_Blowhole, ..., MT_Free")
    parser.add_argument("strips", type=Path, help="folder of images for what is outside")
    parser.add_argument("--model", default="FBCLIP", help="class of the package with an embedded adapter")
    parser.add_argument("--shape", choices=["square", "disc"], default="square", help="of the region")
    parser.add_argument("--number", type=int, default=60, help="good and bad tiles each")
    parser.add_argument("--image-size", type=int, default=128, help="of the model")
    arguments = parser.parse_args()
    rows, columns = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    region = np.maximum(abs(rows), abs(columns)) < TILE / 2
    if arguments.shape == "disc":
        region = np.hypot(rows, columns) < TILE / 2
    data = scenes(arguments.root, sorted(arguments.strips.glob("*")), region, arguments.number)
    size = (arguments.image_size, arguments.image_size)
    model = getattr(anomalib_fbclip, arguments.model)(backbone="tiny", image_size=size[0]).eval()
    transform = model.pre_processor.transform
    raw = [torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image, _ in data]
    plain = torch.cat([transform(image) for image in raw])
    masks = torch.stack([torch.from_numpy(cv2.resize(mask.astype(np.uint8), size, None, 0, 0, 0)) for _, mask in data])
    view = make_view(region, size)
    shown, near = view.shown, Regions(region).fill(plain, [None])
    # Pixels of the input that the resize has not mixed with what is outside.
    seen = (view.source == torch.arange(shown.numel())).reshape(size)
    mean = plain[:, :, seen].mean(dim=-1)[..., None, None]
    crop = Regions(region, crop=True)
    ways = {
        "map alone is cut": plain,
        "CLIP's mean": torch.where(seen, plain, torch.zeros(())),
        "mean of the region": torch.where(seen, plain, mean),
        "nearest pixel": near,
        "nearest pixel, blurred": torch.where(seen, plain, gaussian_blur(near, [61, 61], [15.0, 15.0])),
        "crop_to_region": crop.fill(torch.cat([transform(crop.crop_raw(image)) for image in raw]), [None]),
    }
    sys.stdout.write("| outside | image AUROC | pixel AUROC |\n|---|---|---|\n")
    for name, images in ways.items():
        image, pixel = ImageScores(), ScoreHistogram()
        for start in range(0, len(images), 16):
            with torch.no_grad():
                found = (crop if name == "crop_to_region" else Regions(region)).cut(
                    model.model(images[start : start + 16]),
                    [None],
                )
            truth = masks[start : start + 16]
            image.update(found.pred_score, truth.flatten(1).any(dim=1))
            pixel.update(found.anomaly_map[:, shown], truth[:, shown])
        line = f"| {name} | {100 * image.compute()['AUROC']:.1f} | {100 * pixel.compute()['AUROC']:.1f} |\n"
        sys.stdout.write(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
