# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Plain text similarity of the backbone on unseen families, beside local contrast. Run as ``python -m``, or call."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch.nn import functional

from anomalib_fbclip.clip.vision import block_tokens
from recipes.tiny_clip.baseline import local_contrast
from recipes.tiny_clip.batches import to_tensor, unseen_set
from recipes.tiny_clip.captions import FBCLIP_PROMPTS
from recipes.tiny_clip.metrics import report
from recipes.tiny_clip.towers import PATCH, TAPS, Vocabulary, text_features
from recipes.tiny_clip.weights import load

if TYPE_CHECKING:
    from open_clip.model import CLIP

logger = logging.getLogger(__name__)


@torch.no_grad()
def similarity(model: CLIP, vocabulary: Vocabulary, images: np.ndarray, size: int, causal: bool = False) -> tuple:
    """Zero-shot maps and scores: mean over the blocks of softmax(cos / 0.07), smoothed.

    Returns:
        ``(maps [M, S, S], class-token scores [M])`` at the images' own size S.
    """
    _, text = text_features(model, *vocabulary(list(FBCLIP_PROMPTS)), causal)
    maps, scores = [], []
    for start in range(0, len(images), 10):
        chunk = images[start : start + 10]
        small = np.stack([cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in chunk])
        tokens = torch.stack(block_tokens(model.visual, to_tensor(small), TAPS))
        chance = (functional.normalize(tokens @ model.visual.proj, dim=-1) @ text.T / 0.07).softmax(-1)[..., 1]
        side = size // PATCH
        plane = chance[:, :, 1:].mean(0).view(len(chunk), 1, side, side)
        big = functional.interpolate(plane, size=images.shape[1:3], mode="bilinear", align_corners=False)[:, 0].numpy()
        maps.extend(cv2.GaussianBlur(one, (0, 0), 4.0) for one in big)
        scores.append(chance[-3:, :, 0].mean(0).numpy())
    return np.stack(maps), np.concatenate(scores)


def evaluate(
    model: CLIP,
    vocabulary: Vocabulary,
    each: int = 60,
    sizes: tuple[int, ...] = (112, 144, 176),
) -> dict[str, dict]:
    """Numbers of local contrast and of the backbone at every input size and at all sizes together."""
    images, masks, names = unseen_set(each=each)
    contrast = local_contrast(images)
    out = {"local contrast": report(contrast, contrast.max((1, 2)), masks, names)}
    found = []
    for size in sizes:
        maps, scores = similarity(model, vocabulary, images, size)
        found.append((maps, scores))
        out[f"{size} px, class token"] = report(maps, scores, masks, names)
        out[f"{size} px, class token + map maximum"] = report(maps, scores + maps.max((1, 2)), masks, names)
    maps, scores = np.mean([one for one, _ in found], 0), np.mean([one for _, one in found], 0)
    out["all sizes, class token + map maximum"] = report(maps, scores + maps.max((1, 2)), masks, names)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="a clip.safetensors")
    parser.add_argument("--each", type=int, default=100, help="images of each family")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(2)
    vocabulary = Vocabulary()
    for name, row in evaluate(load(arguments.weights, vocabulary), vocabulary, arguments.each).items():
        logger.info("%-40s %s", name, row)
    logger.info("blocks read: %s", TAPS)


if __name__ == "__main__":
    main()
