# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Measure the committed weights through anomalib's engine: unseen families, ablations, controls, real images.

    python -m recipes.tiny_clip.results
    python -m recipes.tiny_clip.results --magnetic-tile <folder of MT_Blowhole, ..., MT_Free> --elpv 4

The rows of the ablations are trained by the recipe of the adapter, with the same images and the same number of
updates (``--steps``), once, into ``--work``.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine

from anomalib_fbclip import FBCLIP, ProceduralSurfaces
from anomalib_fbclip.adapted import adapter_file as adapters
from anomalib_fbclip.clip.build import read_weights
from anomalib_fbclip.clip.frozen import FrozenCLIP
from anomalib_fbclip.data.procedural.families import TEST_ONLY_FAMILIES
from anomalib_fbclip.host.metrics import ImageScores, ScoreHistogram
from recipes.tiny_clip.baseline import local_contrast
from recipes.tiny_clip.towers import Vocabulary, build
from recipes.tiny_clip.train_adapter import SOURCE, STEPS, train
from recipes.tiny_clip.weights import export

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anomalib.data.datamodules.base.image import AnomalibDataModule

logger = logging.getLogger("tiny_results")

COLUMNS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
VARIATIONS = (0.5, 1.0)
"""Strength of the generator's normal variation that is measured."""
SEED = 1
ROWS: dict[str, dict[str, Any]] = {
    "without MSTFF (text: end-of-text only)": {"text_poolings": ["eot"]},
    "with the paper's three views": {"views": ["id", "sem", "spa"]},
    "without attention": {"attention": False},
    "without suppression": {"suppression": False},
    "random backbone (control)": {},
}


def random_backbone(model: FBCLIP, folder: Path, seed: int) -> None:
    """Put an untrained backbone of the same shape into a model."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary()
    path = folder / "random.safetensors"
    export(build(vocabulary).state_dict(), vocabulary, path)
    clip = FrozenCLIP.from_state_dict(read_weights(path))
    inner = model.model
    inner.clip.load_state_dict(clip.state_dict())
    inner.prompts.word_embeddings = inner.clip.embed_text(inner.prompts.token_ids).detach()


def trained_for_the_table(name: str, steps: int, folder: Path) -> FBCLIP:
    """Build one row's model and train it, or read it where an earlier call has trained it."""
    model = FBCLIP(backbone="tiny", weights=None, metrics="full", visualizer=False, seed=0, **ROWS[name])
    if "random" in name:
        random_backbone(model, folder, seed=0)
    # Rows of another backbone, from an earlier run of the recipe, are other files.
    short, backbone = name.split(" (", maxsplit=1)[0].replace(" ", "_"), model.model.clip.fingerprint()[:8]
    path = folder / f"{short}_{steps}_{backbone}.safetensors"
    if path.is_file():
        model.model.load_adapter(path)
    else:
        logger.info("training: %s", name)
        train(model.model, steps, seed=0)
        adapters.save(model.model, path, source=SOURCE, steps=steps)
    model.weights = str(path)
    return model.eval()


def test(model: FBCLIP, datamodule: AnomalibDataModule) -> dict[str, float]:
    """Metrics of one model on one data module, by anomalib's engine; without a validation run, for ranks need none."""
    engine = Engine(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=0)
    found = engine.test(model, datamodule=datamodule, verbose=False)[0]
    return {name: float(value) for name, value in found.items()}


def surfaces(family: str, each: int, variation: float, seed: int = SEED) -> ProceduralSurfaces:
    """The unseen family's test images."""
    settings = {"num_train": 1, "num_test": each, "variation": variation, "seed": seed, "eval_batch_size": 16}
    return ProceduralSurfaces(category=family, **settings)


def baseline(datamodule: AnomalibDataModule) -> dict[str, float]:
    """Local contrast on the images at their own size, by the same metrics."""
    datamodule.prepare_data()
    datamodule.setup("test")
    image, pixel = ImageScores(), ScoreHistogram(regions=True)
    for batch in datamodule.test_dataloader():
        pictures = (batch.image.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        maps = torch.from_numpy(local_contrast(pictures))
        image.update(maps.amax((1, 2)), batch.gt_label)
        pixel.update(maps, batch.gt_mask)
    values = {f"image_{name}": value for name, value in image.compute().items()}
    return values | {f"pixel_{name}": value for name, value in pixel.compute().items()}


def line(name: str, values: Iterable[float]) -> str:
    """One row of a Markdown table, in percent."""
    return f"| {name} | " + " | ".join("-" if value != value else f"{100 * value:.1f}" for value in values) + " |"  # noqa: PLR0124  # NaN


def unseen(models: dict[str, FBCLIP], each: int, variation: float, number: int) -> None:
    """Log the tables of the unseen families: mean over the draws of the images, and the first model's single draws.

    Args:
        models: Rows of the table; local contrast is added.
        each: Images of each family and draw.
        variation: Strength of the generator's normal variation.
        number: Draws, with the seeds 0, 1, ...; all rows see the same images.
    """
    heads = [f"{family} I/P/O" for family in (*TEST_ONLY_FAMILIES, "mean")]
    settings = (variation, each, number)
    logger.info("\nUnseen families, variation %g, %d images each, mean over %d draws of them, percent;", *settings)
    logger.info("I/P/O: image AUROC / pixel AUROC / AUPRO")
    logger.info("| model | %s |\n|---%s|", " | ".join(heads), "|---" * len(heads))
    measured = {}
    for name, model in (*models.items(), ("local contrast", None)):
        found = []
        for seed in range(number):
            sets = [surfaces(family, each, variation, seed) for family in TEST_ONLY_FAMILIES]
            values = [baseline(one) if model is None else test(model, one) for one in sets]
            found.append([[value[column] for column in COLUMNS] for value in values])
        measured[name] = np.array(found)  # [draws, families, metrics]
        rows = [*measured[name].mean(0), measured[name].mean((0, 1))]
        logger.info("| %s | %s |", name, " | ".join(" / ".join(f"{100 * v:.1f}" for v in row) for row in rows))
    if number == 1:
        return
    name = next(iter(measured))
    logger.info("\n%s, variation %g, draw by draw, percent", name, variation)
    logger.info("| seed | image AUROC | pixel AUROC | AUPRO |\n|---|---|---|---|")
    draws = measured[name].mean(1)
    for seed, values in enumerate(draws):
        logger.info(line(str(seed), values))
    logger.info(line("mean", draws.mean(0)))
    logger.info(line("standard deviation", draws.std(0)))


def magnetic_tile(model: FBCLIP, folder: str) -> None:
    """Log the real tiles, per defect against the defect's share of the good tiles, as they come out."""
    from anomalib_fbclip import MagneticTile
    from anomalib_fbclip.data.magnetic_tile import DEFECTS

    logger.info("\nMagnetic tile (real, never trained or tuned on), percent")
    logger.info("| defect | image AUROC | pixel AUROC | AUPRO |\n|---|---|---|---|")
    for defect in DEFECTS:
        datamodule = MagneticTile(root=folder, category=defect, eval_batch_size=16)
        found = test(model, datamodule)
        logger.info(line(defect, (found[column] for column in COLUMNS)))


@torch.no_grad()
def elpv(model: FBCLIP, every: int) -> None:
    """Log real photovoltaic cells of ``elpv-dataset``: cells with a defect probability of 1 against those of 0."""
    from elpv_dataset.utils import load_dataset

    images, chance, kinds = (column[::every] for column in load_dataset())
    logger.info(
        "\nelpv-dataset (real, image labels only; probability 1 is defective, 0 is good), cells ::%d, percent",
        every,
    )
    logger.info("| cells | images | image AUROC |\n|---|---|---|")
    scores = []
    for start in range(0, len(images), 16):
        pictures = np.stack([cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) for image in images[start : start + 16]])
        batch = ImageBatch(image=torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        scores.append(model(batch.image).pred_score)  # resizes and normalises by itself
    scores = torch.cat(scores)
    for kind in (*np.unique(kinds), "all"):
        sure = torch.from_numpy(((chance == 0) | (chance == 1)) & ((kinds == kind) | (kind == "all")))
        metric = ImageScores()
        metric.update(scores[sure], torch.from_numpy(chance == 1)[sure])
        logger.info("| %s | %d | %.1f |", kind, int(sure.sum()), 100 * metric.compute()["AUROC"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=40, help="images of each unseen family")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of the rows trained for the table")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="rows trained for the table")
    parser.add_argument("--variations", type=float, nargs="*", default=list(VARIATIONS))
    parser.add_argument("--draws", type=int, default=8, metavar="N", help="draws of the images, seeds 0 to N - 1")
    parser.add_argument("--train-only", action="store_true", help="train the table's rows and stop")
    parser.add_argument("--magnetic-tile", help="folder of the magnetic tile data set")
    parser.add_argument(
        "--elpv",
        type=int,
        default=0,
        metavar="N",
        help="measure every N-th cell of elpv-dataset (installed)",
    )
    parser.add_argument("--work", type=Path, default=Path("./tiny_clip_results"), help="keeps what is trained here")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in ("tiny_results", "tiny_adapter"):
        logging.getLogger(name).setLevel(logging.INFO)
    cv2.setNumThreads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = {name: trained_for_the_table(name, arguments.steps, arguments.work) for name in arguments.rows}
    if arguments.train_only:
        return
    committed = FBCLIP(backbone="tiny", metrics="full", visualizer=False).eval()
    models = {"FB-CLIP, committed": committed, **rows}
    for variation in arguments.variations:
        unseen(models, arguments.each, variation, arguments.draws)
    if arguments.magnetic_tile:
        magnetic_tile(committed, arguments.magnetic_tile)
    if arguments.elpv:
        elpv(committed, arguments.elpv)


if __name__ == "__main__":
    main()
