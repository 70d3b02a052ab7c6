# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What a few normal images add on the embedded backbone.

    python -m recipes.few_shot.results
    python -m recipes.few_shot.results --magnetic-tile <folder of MT_Blowhole, ..., MT_Free>
    python -m recipes.few_shot.results --families train --patch-weight 3 --image-weight 0.5

Each number of images is measured with several choices of them (``--choices``) from the train split; the table has the
mean over the choices and, after the sign, their standard deviation. The test images go through the
backbone once, and their tokens and text scores serve all rows. The weights of the fusion are chosen with the third
command, on training families only.
"""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from anomalib_fbclip import FBCLIP, MagneticTile, ProceduralSurfaces
from anomalib_fbclip.adapted import normal_memory as fusion
from anomalib_fbclip.adapted.references import collect_references
from anomalib_fbclip.common.functional import tokens_to_grid
from anomalib_fbclip.data.magnetic_tile import DEFECTS
from anomalib_fbclip.data.procedural.families import GROUPS
from anomalib_fbclip.host.metrics import ImageScores, ScoreHistogram

if TYPE_CHECKING:
    from anomalib.data.datamodules.base.image import AnomalibDataModule

logger = logging.getLogger("few_shot")

COLUMNS = ("image AUROC", "pixel AUROC", "AUPRO")
SEED = 1


class Encoded(NamedTuple):
    """A test split after the backbone: tokens that the memory compares, text logits ``[M, N]``, labels and masks."""

    tokens: list[torch.Tensor]
    text: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor


@torch.no_grad()
def encode(model: FBCLIP, datamodule: AnomalibDataModule) -> Encoded:
    """Run the paper's method on a test split; the memory comes later."""
    datamodule.prepare_data()
    datamodule.setup()
    resize, normalize = model.pre_processor.transform.transforms
    datamodule.test_data.augmentations = resize
    inner, memory = model.model, model.model.memory
    inner.memory = None
    parts = []
    for batch in datamodule.test_dataloader():
        _, stages = inner(normalize(batch.image), return_stages=True)
        weights = inner.scale_weights.softmax(0).repeat_interleave(len(inner.views))
        similarity = sum(w * each for w, each in zip(weights, stages.text_similarity, strict=False)) / inner.temperature
        text = similarity[..., 1] - similarity[..., 0]
        compared = memory.compared(inner.clip.visual, normalize(batch.image), inner.encode_image)
        parts.append((torch.stack(compared), text, batch.gt_label, batch.gt_mask))
    inner.memory = memory
    tokens, text, labels, masks = zip(*parts, strict=True)
    return Encoded(list(torch.cat(tokens, 1)), torch.cat(text), torch.cat(labels), torch.cat(masks))


@torch.no_grad()
def scores(model: FBCLIP, test: Encoded, few_shot: bool) -> list[float]:
    """Image AUROC, pixel AUROC and AUPRO in percent, with what the memory holds or without."""
    inner = model.model
    logits = test.text + inner.memory(test.tokens, test.text) if few_shot else test.text
    chance = functional.sigmoid(logits)
    maps = inner.smooth(tokens_to_grid(chance[:, 1:]), test.masks.shape[-1], inner.smoothing_sigma)
    image, pixel = ImageScores(), ScoreHistogram(regions=True)
    image.update(chance[:, 0], test.labels)
    pixel.update(maps, test.masks)
    of_pixels = pixel.compute()
    return [100 * float(value) for value in (image.compute()["AUROC"], of_pixels["AUROC"], of_pixels["AUPRO"])]


def measure(datamodules: list[AnomalibDataModule], shots: list[int], choices: int) -> None:
    """Log one table: a row for each number of images, means over the data modules."""
    model = FBCLIP(backbone="tiny", k_shot=1, visualizer=False).eval()
    tests = [encode(model, datamodule) for datamodule in datamodules]
    logger.info("| normal images | %s |\n|---|---|---|---|", " | ".join(COLUMNS))
    for shot in shots:
        rows = []
        for choice in range(choices if shot else 1):
            found = []
            for datamodule, test in zip(datamodules, tests, strict=True):
                if shot:
                    transform = model.pre_processor.transform
                    images, _ = collect_references(shot, None, datamodule, transform, seed=choice)
                    model.model.remember(torch.stack(images))
                found.append(scores(model, test, few_shot=shot > 0))
            rows.append(np.mean(found, 0))
        cells = [f"{mean:.1f}" for mean in np.mean(rows, 0)]
        if shot:
            cells = [f"{cell} ± {spread:.1f}" for cell, spread in zip(cells, np.std(rows, 0), strict=True)]
        logger.info("| %d | %s |", shot, " | ".join(cells))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, nargs="*", default=[0, 1, 2, 4, 8], help="numbers of normal images")
    parser.add_argument("--choices", type=int, default=3, help="choices of the images")
    parser.add_argument("--each", type=int, default=40, help="test images of each family")
    parser.add_argument("--variation", type=float, default=0.5, help="strength of the normal variation, 0..1")
    parser.add_argument("--families", default="test", choices=list(GROUPS), help="group of families")
    parser.add_argument("--patch-weight", type=float, default=fusion.PATCH_WEIGHT, help="other weight of patches")
    parser.add_argument("--image-weight", type=float, default=fusion.IMAGE_WEIGHT, help="other weight of the image")
    parser.add_argument("--magnetic-tile", help="folder of the magnetic tile data set; then only this is measured")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logger.setLevel(logging.INFO)
    fusion.PATCH_WEIGHT, fusion.IMAGE_WEIGHT = arguments.patch_weight, arguments.image_weight
    if arguments.magnetic_tile:
        logger.info("\nMagnetic tile (real), mean over the defects, percent")
        root = arguments.magnetic_tile
        datamodules = [MagneticTile(root=root, category=defect, eval_batch_size=16) for defect in DEFECTS]
    else:
        logger.info(
            "\n%s families, variation %g, %d images each, seed %d, percent",
            arguments.families.capitalize(),
            arguments.variation,
            arguments.each,
            SEED,
        )
        settings = {"num_test": arguments.each, "variation": arguments.variation, "seed": SEED, "eval_batch_size": 16}
        datamodules = [ProceduralSurfaces(category=family, **settings) for family in GROUPS[arguments.families]]
    measure(datamodules, arguments.shots, arguments.choices)


if __name__ == "__main__":
    main()
