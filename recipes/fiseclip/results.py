# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Measure FiSeCLIP on the embedded backbone through anomalib's engine, against its parts and against FB-CLIP.

    python -m recipes.fiseclip.results
    python -m recipes.fiseclip.results --tiles <folder of MT_Blowhole, ..., MT_Free>

Nothing is trained. The families wood, tiles and leather were used neither for the backbone nor to choose any default.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import TYPE_CHECKING

import cv2
import numpy as np

from anomalib_fbclip import FBCLIP, FiSeCLIP, FiSeCLIPModel, MagneticTile
from anomalib_fbclip.data.magnetic_tile import DEFECTS
from anomalib_fbclip.data.procedural.families import GROUPS, TEST_ONLY_FAMILIES
from recipes.tiny_clip.results import COLUMNS, SEED, surfaces, test

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from anomalib.data.datamodules.base.image import AnomalibDataModule
    from anomalib.models.components import AnomalibModule

    from anomalib_fbclip import FBCLIPModel

logger = logging.getLogger("fiseclip_results")

ROWS = {
    "FiSeCLIP": {},
    "text only": {"matching": False},
    "matching only (no text at all)": {"text_weight": 0, "class_weight": 0, "filter_share": 0},
    "without filter": {"filter_share": 0},
    "with restored semantics": {"correlation": "qq-kk"},
    "without text weight": {"text_weight": 0},
}


class LearnedText(FiSeCLIPModel):
    """FiSeCLIP with a trained FB-CLIP as its text side: map for filter and weight, score for the class token.

    Args:
        fbclip: The trained model.
    """

    def __init__(self, fbclip: FBCLIPModel) -> None:
        super().__init__(fbclip.clip)
        self.fbclip = fbclip

    def encode(self, images: torch.Tensor, categories: Sequence[str] | None = None) -> tuple[torch.Tensor, ...]:
        """See :meth:`FiSeCLIPModel.encode`."""
        patches, joint, _, _ = super().encode(images, categories)
        scores = self.fbclip.score(images)
        return patches, joint, scores.pred_score.float(), scores.grid_map.flatten(1).float()


def build() -> dict[str, AnomalibModule]:
    """Every row's model."""
    common = {"backbone": "tiny", "metrics": "full", "visualizer": False}
    models = {name: FiSeCLIP(**common, **arguments) for name, arguments in ROWS.items()}
    fbclip = FBCLIP(**common)
    learned = FiSeCLIP(**common)
    learned.model = LearnedText(fbclip.model)
    models |= {"FB-CLIP": fbclip, "matching with FB-CLIP's text map": learned}
    return {name: model.eval() for name, model in models.items()}


def table(title: str, models: dict[str, AnomalibModule], sets: dict[str, AnomalibDataModule]) -> None:
    """Log image AUROC / pixel AUROC / AUPRO of each model on each set, their mean, and the seconds."""
    logger.info("\n%s; image AUROC / pixel AUROC / AUPRO, percent", title)
    logger.info("| model | %s | mean | seconds |\n|---%s|", " | ".join(sets), "|---" * (len(sets) + 2))
    for name, model in models.items():
        rows, start = [], time.perf_counter()
        for datamodule in sets.values():
            found = test(model, datamodule)
            rows.append([found[column] for column in COLUMNS])
        seconds = time.perf_counter() - start
        cells = [" / ".join(f"{100 * value:.1f}" for value in row) for row in (*rows, np.mean(rows, 0))]
        logger.info("| %s | %s | %.0f |", name, " | ".join(cells), seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families",
        nargs="+",
        default=list(TEST_ONLY_FAMILIES),
        help="or 'train' for those of tuning",
    )
    parser.add_argument("--each", type=int, default=40, help="images of each family")
    parser.add_argument("--variation", type=float, default=0.5, help="strength of the generator's normal variation")
    parser.add_argument("--tiles", help="folder of the magnetic tile data set")
    parser.add_argument("--rows", nargs="+", help="first words of the rows to measure; all without")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logger.setLevel(logging.INFO)
    cv2.setNumThreads(1)
    models = build()
    if arguments.rows:
        models = {name: model for name, model in models.items() if name.startswith(tuple(arguments.rows))}
    families = [name for group in arguments.families for name in GROUPS.get(group, (group,))]
    if arguments.each:
        sets = {family: surfaces(family, arguments.each, arguments.variation) for family in families}
        title = f"Procedural surfaces, variation {arguments.variation:g}, seed {SEED}, {arguments.each} images each"
        table(title, models, sets)
    if arguments.tiles:
        # The defect's name, which is the folder's, would tell the text what to look for.
        for model in models.values():
            if isinstance(model, FiSeCLIP):
                model.model.class_name = "tile"
        tiles = {kind: MagneticTile(root=arguments.tiles, category=kind, eval_batch_size=16) for kind in DEFECTS}
        table("Magnetic tile (real, never tuned on)", models, tiles)


if __name__ == "__main__":
    main()
