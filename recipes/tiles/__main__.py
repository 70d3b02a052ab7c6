# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What true proportions and tiles are worth on real photographs, with the embedded backbone.

Sets, all made from the magnetic tiles (https://github.com/abin24/Magnetic-tile-defect-datasets.) with blowholes, breaks
and cracks, and from the steel strips of SD-saliency-900 where they are there:

* ``cells``: photographs, each resized to 120 x 120;
* ``strips``, ``mosaics``: cells in a row of four, or three by three; in a bad image one of them has a defect;
* ``photos``: the photographs at their own size and proportions, without any seam;
* ``cracks``: those of cracks, resized to 480 x 120;
* ``steel``: photographs of 200 x 200, all with a defect.

Ways: ``squashed`` to the model's square, ``kept`` proportions, ``tiled`` without the whole image, ``joined``, which is
what ``tiles=`` does. Tiles are the cells, without overlap where these are photographs of their own; of photos and steel
half of the shorter side. Metrics are at the size of the image. ``python -m recipes.tiles --data ../shared/data``.

``--fiseclip`` measures FiSeCLIP on sets of one size, such as strips, mosaics and cracks: the images of a set are each
other's references.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils import read_image, read_mask
from anomalib.engine import Engine
from PIL import Image
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from anomalib_fbclip import FBCLIP, FiSeCLIP
from anomalib_fbclip.host.metrics import ImageScores, ScoreHistogram
from anomalib_fbclip.host.tiling import Place

CELL = 120
DEFECTS = ("MT_Blowhole", "MT_Break", "MT_Crack")


RULES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "maximum": torch.maximum,
    "product": lambda whole, tiles: (whole * tiles).sqrt(),
    "mean": lambda whole, tiles: (whole + tiles) / 2,
    "mean 1 : 3": lambda whole, tiles: (whole + 3 * tiles) / 4,
    "logits": lambda whole, tiles: ((whole.logit(1e-6) + tiles.logit(1e-6)) / 2).sigmoid(),
    "logits 1 : 3": lambda whole, tiles: ((whole.logit(1e-6) + 3 * tiles.logit(1e-6)) / 4).sigmoid(),
    "roots": lambda whole, tiles: ((whole.sqrt() + tiles.sqrt()) / 2).square(),
}
"""Other rules by which the maps of the whole image, proportions kept, and of the tiles can be joined."""


@dataclass
class Sample:
    """An image ``[3, H, W]`` in [0, 1] and its mask ``[H, W]``."""

    image: torch.Tensor
    mask: torch.Tensor

    def resized(self, height: int, width: int) -> "Sample":
        """The same at another size."""
        image = resize(self.image, [height, width], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        return Sample(image, resize(self.mask[None].float(), [height, width], InterpolationMode.NEAREST)[0] > 0)


def read(files: Sequence[Path], mask_of: Callable[[Path], Path | None]) -> list[Sample]:
    """Images with their masks; without one, all is normal."""
    samples = []
    for file in files:
        image, place = torch.as_tensor(read_image(file, as_tensor=True)), mask_of(file)
        mask = torch.zeros(image.shape[1:]) if place is None else torch.as_tensor(read_mask(place, as_tensor=True))
        mask = resize(mask.reshape(1, *mask.shape[-2:]).float(), list(image.shape[1:]), InterpolationMode.NEAREST)[0]
        samples.append(Sample(image, mask > 0))
    return samples


def grid_of_cells(cells: Sequence[Sample], columns: int) -> Sample:
    """Cells side by side, row by row."""
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return Sample(
        torch.cat([torch.cat([cell.image for cell in row], dim=2) for row in rows], dim=1),
        torch.cat([torch.cat([cell.mask for cell in row], dim=1) for row in rows], dim=0),
    )


def make_sets(data: Path, number: int) -> dict[str, tuple[list[Sample], Callable[[Sample], int]]]:
    """Each set, and the side of its tiles: two thirds of the images bad, one third good."""
    draw = random.Random(0)  # noqa: S311  # no secret
    root = data / "magnetic_tile"
    good = read(sorted((root / "MT_Free" / "Imgs").glob("*.jpg"))[3::5], lambda _: None)
    draw.shuffle(good)
    bad = []
    for defect in DEFECTS:
        files = sorted((root / defect / "Imgs").glob("*.jpg"))[::2][:24]
        bad += read(files, lambda file: file.with_suffix(".png"))
    good_cells, bad_cells = ([each.resized(CELL, CELL) for each in group] for group in (good, bad))

    def composed(count: int, columns: int, rows: int) -> tuple[list[list[Sample]], list[Sample]]:
        groups = []
        for index in range(count + count // 2):
            cells = draw.sample(good_cells, rows * columns)
            if index < count:
                cells[draw.randrange(len(cells))] = bad_cells[index * len(bad_cells) // count]
            groups.append(cells)
        return groups, [grid_of_cells(cells, columns) for cells in groups]

    def cell(_: Sample) -> int:
        return CELL

    def half(sample: Sample) -> int:
        return min(sample.mask.shape) // 2

    cells, strips = composed(number, 4, 1)
    _, mosaics = composed(max(1, number // 2), 3, 3)
    spread = range(0, len(bad), max(1, len(bad) // number))
    sets = {
        "cells": ([each for group in cells for each in group], cell),
        "strips": (strips, cell),
        "mosaics": (mosaics, cell),
        "photos": ([bad[index] for index in spread] + good[: number // 2], half),
        "cracks": (
            [each.resized(CELL, 4 * CELL) for each in [*bad[-24:][: number // 2], *good[: number // 4]]],
            cell,
        ),
    }
    steel = data / "steel_strips"
    if steel.is_dir():
        files = sorted((steel / "images").iterdir())
        files = files[:: max(1, len(files) // number)]
        sets["steel"] = (read(files, lambda file: steel / "masks" / file.name), half)
    return sets


class Ways:
    """Scores and maps of one image in each way."""

    def __init__(self) -> None:
        self.models = {
            "squashed": FBCLIP(backbone="tiny").eval(),
            "kept": FBCLIP(backbone="tiny", resize="keep").eval(),
        }

    @staticmethod
    @lru_cache(maxsize=4)
    def in_tiles(side: int, overlap: float) -> FBCLIP:
        """The model with tiles."""
        return FBCLIP(backbone="tiny", tiles=side, overlap=overlap).eval()

    @torch.no_grad()
    def __call__(
        self,
        sample: Sample,
        side: int,
        seams: bool,
        alone: bool,
        rules: bool,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """For each way score and map ``[h, w]``.

        Args:
            sample: Image and mask.
            side: Of the tiles.
            seams: Let no tile lie over two cells.
            alone: Leave out all but the squashed image.
            rules: Also join by :data:`RULES`.
        """
        found = {}
        for name, model in self.models.items():
            batch = model(sample.image[None])
            found[name] = (batch.pred_score[0], batch.anomaly_map.squeeze(0))
            if alone:
                return found
        tiled = self.in_tiles(side, 0.0 if seams else 0.25)
        canvas = tiled.pre_processor(sample.image[None])
        seen: dict[bytes, InferenceBatch] = {}

        def score(images: torch.Tensor, _: Sequence[Place] = ()) -> InferenceBatch:
            key = images.numpy().tobytes()
            if key not in seen:
                seen[key] = tiled.model(images)
            return seen[key]

        scores, blended = tiled.tiling.blend(score, canvas, *tiled.tiling.places(*canvas.shape[-2:]))
        found["tiled"] = (scores.max(), blended[0])
        batch = tiled.tiling(score, canvas)
        found["joined"] = (batch.pred_score[0], batch.anomaly_map[0])
        if rules:
            size, whole = blended.shape[-2:], found["kept"][1]
            whole = F.interpolate(whole.reshape(1, 1, *whole.shape[-2:]), size=size, mode="bilinear")[0, 0]
            found |= {name: (found["joined"][0], rule(whole, blended[0])) for name, rule in RULES.items()}
        return found


def fiseclip_ways(
    samples: Sequence[Sample],
    side: Callable[[Sample], int],
    seams: bool,
) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Of each image scores and maps ``[h, w]`` by FiSeCLIP at 112 pixels: squashed, in tiles without and with matching.

    Args:
        samples: Images of a set: they are each other's references.
        side: Of the tiles of an image.
        seams: See :class:`Ways`.
    """
    tiles = {"tiles": side(samples[0]), "overlap": 0.0 if seams else 0.25}
    ways = {"squashed": {}, "tiles, text alone": {**tiles, "matching": False}, "tiles": tiles}
    found: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in samples]
    with TemporaryDirectory() as folder:
        for number, sample in enumerate(samples):
            pixels = (sample.image * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(Path(folder, f"{number:03d}.png"))
        for way, settings in ways.items():
            model = FiSeCLIP(backbone="tiny", image_size=112, threshold=0.5, visualizer=False, **settings)
            engine = Engine(default_root_dir=Path(folder, "results"), accelerator="cpu", devices=1, logger=False)
            for own, batch in zip(found, engine.predict(model, data_path=folder), strict=True):
                own[way] = (batch.pred_score[0], batch.anomaly_map[0])
    yield from found


def measure_memory(side: int, stub: bool) -> None:
    """Print how much memory the prediction of an image of 8000 x 6000 pixels takes beside the model.

    Args:
        side: Side of the tiles.
        stub: Put the mean of the colours in the place of the model: with thousands of tiles, only what is around it.
    """
    model = FBCLIP(backbone="tiny", tiles=side).eval()
    if stub:
        model.model.forward = lambda images: InferenceBatch(
            pred_score=images.mean(dim=(1, 2, 3)).sigmoid(),
            anomaly_map=images.mean(dim=1).sigmoid(),
        )
    with TemporaryDirectory() as folder:
        random = np.random.default_rng(0).integers(100, 150, (6000, 8000, 3), dtype=np.uint8)
        Image.fromarray(random).save(Path(folder, "large.jpg"))
        del random
        model(torch.rand(1, 3, side, side))
        before, peak, ended = _resident(), [0.0], Event()

        def watch() -> None:
            while not ended.wait(0.005):
                peak[0] = max(peak[0], _resident())

        watcher = Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1)
        engine.predict(model, data_path=folder, return_predictions=False)
        ended.set()
        watcher.join()
    print(f"{peak[0] - before:.2f} GB beside {before:.2f} GB before, {time.perf_counter() - start:.0f} s")


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize() / 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--number", type=int, default=36, help="bad images of a set (default: %(default)s)")
    parser.add_argument("--sets", nargs="*", help="some of the sets (default: all)")
    parser.add_argument("--rules", action="store_true", help="also join by other rules")
    parser.add_argument("--fiseclip", action="store_true", help="FiSeCLIP in tiles instead of FB-CLIP")
    parser.add_argument("--memory", type=int, metavar="SIDE", help="measure memory with tiles of this side instead")
    parser.add_argument("--stub", action="store_true", help="with --memory: without the model itself")
    arguments = parser.parse_args()
    if arguments.memory:
        measure_memory(arguments.memory, arguments.stub)
        return
    ways = Ways()
    print("| set | images | way | image AUROC | pixel AUROC | AUPRO |\n|---|---|---|---|---|---|")
    for name, (samples, side) in make_sets(arguments.data, arguments.number).items():
        if arguments.sets and name not in arguments.sets:
            continue
        flags = (name in {"strips", "mosaics"}, name == "cells", arguments.rules)
        meters: dict[str, tuple[ImageScores, ScoreHistogram]] = {}
        own = fiseclip_ways(samples, side, flags[0])
        every = (ways(sample, side(sample), *flags) for sample in samples)
        for sample, found in zip(samples, own if arguments.fiseclip else every, strict=True):
            for way, (score, anomaly_map) in found.items():
                image, pixel = meters.setdefault(way, (ImageScores(), ScoreHistogram(regions=True)))
                anomaly_map = anomaly_map.reshape(1, 1, *anomaly_map.shape[-2:])  # noqa: PLW2901
                sized = F.interpolate(anomaly_map, size=sample.mask.shape, mode="bilinear", antialias=True)
                image.update(score[None], sample.mask.any()[None].long())
                pixel.update(sized[0], sample.mask[None])
        for way, (image, pixel) in meters.items():
            values = (image.compute()["AUROC"], pixel.compute()["AUROC"], pixel.compute()["AUPRO"])
            cells = " | ".join("" if value != value else f"{100 * value:.1f}" for value in values)  # noqa: PLR0124
            print(f"| {name} | {len(samples)} | {way} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
