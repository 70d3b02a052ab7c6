# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Set up a model for one line: from a folder of good images to image size, tiles, memory and thresholds.

Choices within a time per image, which is measured, are compared by the image AUROC of a sample: first image sizes and
tiles, with a small memory, then memories. Of those that are next to the best the fastest is taken. Without bad images,
drawn defects in good images stand for them; they are easier than real ones, so the time that is allowed is used: of
sizes and tiles that are next to the best, those with the most pixels are taken.

Thresholds come from all good images, each scored by the memory without this image (leave-one-out). So the memory may
hold images of the very folder that the thresholds are from.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize

from anomalib_fbclip.clip.build import EMBEDDED
from anomalib_fbclip.common.files import file_digest
from anomalib_fbclip.common.functional import one_or_pair, pair
from anomalib_fbclip.data.picture_folder import PictureFolder
from anomalib_fbclip.data.procedural.paste import Patch, draw_patch
from anomalib_fbclip.host.calibration import NormalScores, set_thresholds
from anomalib_fbclip.host.metrics import ImageScores
from anomalib_fbclip.host.pre_processing import TileCanvas
from anomalib_fbclip.host.thresholds import check_rate
from anomalib_fbclip.host.tiling import Tiling
from anomalib_fbclip.host.unreadable import read_picture, reason

from .lightning_model import PLACED_TILES, AdaptedModule
from .load import find_model, load_module
from .normal_memory import TokenMemory, at_hand

if TYPE_CHECKING:
    from .torch_model import AdaptedCLIP

logger = logging.getLogger(__name__)

Size = int | tuple[int, int]
"""In pixels: one number for a square, else height and width."""

Transform = Callable[[torch.Tensor], torch.Tensor]

SIZES = (2 / 3, 1, 4 / 3, 5 / 3, 2)
"""Image sizes that are tried, relative to the one that adapter and backbone were trained with."""

SHOTS = (2, 4, 8, 16, 32)
"""Numbers of good images in the memory that are tried; in a memory of one, this image cannot be left out."""

SAMPLE = 48
"""Good images, and bad ones, that size, tiles and memory are chosen by; thresholds are from all."""

CLOSE = 0.005
"""Image AUROCs that differ by less count as equal."""

LARGE = 2
"""Tiles are tried where the longer side of the images is so many times the model's."""

_TIMED = 5
_ENCODED_AT_ONCE = 8
_ALL = 10**9  # tiles of an image
_SEED = 0


@dataclass
class Choice:
    """An image size, tiles, and a number of good images in the memory.

    Attributes:
        image_size: In pixels; height and width where they differ.
        k_shot: Good images in the memory.
        seconds: Measured time per image, least of a few, interpolated in ``k_shot``: reading, resizing, scoring.
        auroc: Image AUROC of the sample.
        tiles: Side of the tiles in pixels of the image; ``None``: none.
        pixels: Pixels of all that the model looks at for one image.
    """

    image_size: Size
    k_shot: int
    seconds: float
    auroc: float = 0.0
    tiles: int | None = None
    pixels: int = 0


@dataclass
class Line:
    """A model that is ready for a line, and what to expect of it.

    Attributes:
        module: The model, with memory and thresholds.
        tried: What was compared.
        seconds: Measured time per image, median: reading, resizing, scoring.
        thresholds: Thresholds with number of images, expected false-alarm rate and interval.
        bad: Scores and map peaks of the bad images.
        auroc: Image AUROC of all good images (leave-one-out) and all bad ones; ``None`` without bad images.
    """

    module: AdaptedModule
    tried: list[Choice]
    seconds: float
    thresholds: dict[str, Any]
    bad: NormalScores = field(default_factory=NormalScores)
    auroc: float | None = None


def set_up(
    good: str | Path,
    bad: str | Path | None = None,
    model: str = "FBCLIP",
    backbone: str | None = None,
    pretrained: str | None = None,
    weights: str = "auto",
    seconds_per_image: float = 0.5,
    rate: float = 0.05,
    image_size: int | None = None,
    k_shot: int | None = None,
    device: str = "cpu",
    region: str | Path | None = None,
    crop_to_region: bool = False,
    tiles: int | None = None,
    min_area: int = 0,
    memory_radius: int | str | None = "auto",
) -> Line:
    """Choose image size, tiles and memory, and find thresholds, from good images.

    Args:
        good: Folder of good images, two or more.
        bad: Folder of bad images, if there are any.
        model: Name of the model; not used where ``weights`` is a file, which names its own.
        backbone: ``None``: that of the file, else ViT-L-14-336.
        pretrained: Weights of the backbone; ``None``: those of the file, else ``openai``.
        weights: Adapter, ``"auto"``: the one embedded with the backbone.
        seconds_per_image: Time that one image may take on this machine, positive.
        rate: Wanted share of good images above each threshold, in (0, 1).
        image_size: In pixels, a multiple of the patch size. ``None``: chosen.
        k_shot: Good images in the memory, one or more; of one alone, this image
            says nothing of thresholds. ``None``: chosen.
        device: Where the model runs.
        region: Mask of the part of the images that is scored. ``None``: all of each image.
        crop_to_region: Cut images to the region's bounding box.
        tiles: Side of the tiles in pixels of the images; 0: none. ``None``: chosen.
        min_area: Least area of a defect in pixels of the images: drawn defects have about this area, thresholds are for
            it, and the line file holds it. 0: all count.
        memory_radius: See :class:`AdaptedModule`. ``"auto"`` is ``None`` where the good images have several sizes.

    Raises:
        ValueError: If an argument is out of range, there is no adapter, there are too few good images, or no choice is
            fast enough.
        FileNotFoundError: If a folder or file does not exist.
    """
    check_rate(rate)
    if not seconds_per_image > 0:
        msg = f"seconds_per_image={seconds_per_image}: give a positive number."
        raise ValueError(msg)
    good_files, bad_files = _readable(good), [] if bad is None else _readable(bad)
    if {file.resolve() for file in good_files} & {file.resolve() for file in bad_files}:
        msg = f"the folder of good images {str(good)!r} holds bad ones of {str(bad)!r}: give separate folders."
        raise ValueError(msg)
    least = max(2, k_shot or 0)
    if len(good_files) < least or (k_shot is not None and k_shot < 1):
        msg = f"{len(good_files)} good images in {str(good)!r} and k_shot={k_shot}: give two images or more, and as "
        msg += "many as the memory is to hold (1 or more)."
        raise ValueError(msg)

    if memory_radius == "auto" and len({_size(file) for file in good_files}) > 1:
        memory_radius = None

    def build(**settings: Any) -> AdaptedModule:  # noqa: ANN401  # of any model
        settings |= {} if region is None else {"region": region, "crop_to_region": crop_to_region}
        settings["memory_radius"] = memory_radius
        module = _build(model, backbone, pretrained, weights, **settings)
        return module.to(device).eval()

    # A random choice, the same each time: images of a folder are often sorted.
    order = torch.randperm(len(good_files), generator=torch.Generator().manual_seed(_SEED)).tolist()
    shuffled = [good_files[place] for place in order]
    base = build(k_shot=1, image_size=image_size)
    survey = _Survey(base, shuffled, _some(bad_files), seconds_per_image, min_area)
    best = survey.choose([image_size] if image_size else None, [k_shot] if k_shot else None, tiles)

    module = build(k_shot=best.k_shot, image_size=best.image_size, tiles=best.tiles, min_area=min_area)
    members, transform = shuffled[: best.k_shot], module.pre_processor.transform
    module.remember([survey.read(file, transform) for file in members], members)
    logger.info("Scoring %d good images, each without itself in the memory.", len(good_files))
    scores = module.score_normal(good)
    found = set_thresholds(module.post_processor, scores, rate)
    times = survey.times(module, transform)
    line = Line(module, survey.tried, statistics.median(times), found)
    if bad is not None:
        line.bad = module.score_normal(bad)
        counted = [each.counted_scores(found["pixel"]) for each in (scores, line.bad)]
        line.auroc = _auroc(*counted)
    return line


def _build(
    model: str,
    backbone: str | None,
    pretrained: str | None,
    weights: str,
    **settings: Any,  # noqa: ANN401  # of any model
) -> AdaptedModule:
    settings = {name: value for name, value in settings.items() if value is not None}
    if weights != "auto":
        module = load_module(weights, backbone, pretrained, **settings)
    else:
        named = {"backbone": backbone, "pretrained": pretrained}
        settings |= {name: value for name, value in named.items() if value is not None}
        module = find_model(model)(**settings)
    if module.weights is None:
        msg = f"{model} has no adapter for backbone {module.hparams['backbone']!r}: give weights, a trained adapter "
        msg += f"(--weights), or one of the backbones that come with one, {sorted(EMBEDDED)}."
        raise ValueError(msg)
    if module.model.clip.name.endswith("/random"):
        msg = f"backbone {module.model.clip.name!r} has random weights, which say nothing of images: give pretrained."
        raise ValueError(msg)
    return module


class _Survey:
    """Compares image sizes, tiles and memories on a sample.

    Args:
        module: A model with a memory and without tiles.
        good: All good images, shuffled: the first ones are those that the memory may hold.
        bad: Sample of the bad images; none: defects are drawn into good ones.
        budget: Seconds that one image may take.
        min_area: Least area of drawn defects; 0: any.
    """

    def __init__(
        self,
        module: AdaptedModule,
        good: Sequence[Path],
        bad: Sequence[Path],
        budget: float,
        min_area: int = 0,
    ) -> None:
        self.module, self.good, self.bad, self.budget = module, good, bad, budget
        self.model: AdaptedCLIP = module.model
        self.device = next(self.model.parameters()).device
        self.min_area = min_area
        self.tried: list[Choice] = []
        # The last ones, which the memory holds only where there are few.
        self.spoiled = [] if bad else [(file, seed) for seed, file in enumerate(good[::-1][:SAMPLE])]
        self._patches: dict[Path, Patch] = {}

    def choose(self, sizes: Sequence[Size] | None, shots: Sequence[int] | None, tiles: int | None = None) -> Choice:
        """The best choice, out of given sizes and numbers where they are given; ``tiles`` as in :func:`set_up`."""
        patch, own = self.model.clip.patch_size, pair(self.module.image_size)
        shares = [[max(1, round(side * share / patch)) * patch for side in own] for share in sorted(SIZES)]
        sizes = sizes or list(dict.fromkeys(one_or_pair(sides) for sides in shares))
        shots = shots or [number for number in SHOTS if number <= len(self.good)]
        sides = self._sides(own) if tiles is None else [tiles] if tiles else []
        fast = [] if tiles else self._fast([(size, None) for size in sizes], shots)
        fast += self._fast([(self.module.image_size, side) for side in sides], shots) if fast or tiles else []
        if not fast:
            least = self.tried[0]
            cut = "" if least.tiles is None else f" in tiles of {least.tiles}"
            msg = f"an image of {least.image_size} pixels{cut} takes {least.seconds:.3g} s here, more than "
            msg += f"seconds_per_image={self.budget:g}: allow more time, or fewer pixels."
            raise ValueError(msg)
        if not self.bad and sum(map(len, fast)) > 1:
            logger.info("No bad images: choosing by drawn defects in %d good ones.", len(self.spoiled))
        first = [choices[0] for choices in fast]
        for choice in first if len(first) > 1 else []:
            self._score([choice])
        chosen = min(_close_to_best(first), key=lambda choice: (0 if self.bad else -choice.pixels, choice.seconds))
        choices = fast[first.index(chosen)]
        if len(choices) > 1:
            self._score(choices)
        return min(_close_to_best(choices), key=lambda choice: choice.seconds)

    def _sides(self, own: tuple[int, int]) -> list[int]:
        """Sides of tiles to try, each half the one before, as long as nothing is enlarged; none of small images."""
        shapes = [self.read(file, nn.Identity()).shape[-2:] for file in self.good[:_TIMED]]
        shorter, longer = (int(statistics.median(map(end, shapes))) for end in (min, max))
        if own[0] != own[1] or longer < LARGE * own[0]:
            return []
        sides = [shorter] if longer >= LARGE * shorter else []
        while (shorter := shorter // 2) >= own[0]:
            sides.append(shorter)
        return sides

    def _fast(self, settings: Sequence[tuple[Size, int | None]], shots: Sequence[int]) -> list[list[Choice]]:
        """The choices that are fast enough, of settings that take longer and longer."""
        fast = []
        for size, side in settings:
            choices = self._timed(size, side, self._held(size, side, shots))
            self.tried += choices
            if choices[0].seconds > self.budget:
                break
            fast.append([choice for choice in choices if choice.seconds <= self.budget])
        return fast

    def _held(self, size: Size, side: int | None, shots: Sequence[int]) -> Sequence[int]:
        """The numbers of good images whose tiles a memory with a radius holds, one at least."""
        if side is None or self.model.memory_radius is None:
            return shots
        transform = self._set(size, side)
        tiles = len(self.module.tiling.chosen(self.read(self.good[0], transform)[None], _ALL))  # type: ignore[union-attr]
        return [number for number in shots if number * tiles <= PLACED_TILES] or shots[:1]

    @torch.no_grad()
    def _score(self, choices: list[Choice]) -> None:
        """Image AUROC of each choice, all of one setting: good images by a memory without them."""
        transform = self._set(choices[0].image_size, choices[0].tiles)
        memories = [self._memory(choice.k_shot, transform) for choice in choices]
        good = self.good[: max(SAMPLE, choices[-1].k_shot)]
        scores = [
            [self._scores(self.read(file, transform), file, memories) for file in good],
            [self._scores(self.read(file, transform), file, memories) for file in self.bad]
            or [self._scores(self.read(file, transform, seed), file, memories) for file, seed in self.spoiled],
        ]
        for choice, rows, others in zip(choices, *(torch.stack(each).T for each in scores), strict=True):
            choice.auroc = _auroc(rows, others)
            logger.info(
                "%s pixels%s, memory of %d good images: %.3g s per image, image AUROC %.1f %%.",
                choice.image_size,
                "" if choice.tiles is None else f", tiles of {choice.tiles}",
                choice.k_shot,
                choice.seconds,
                100 * choice.auroc,
            )

    def _scores(self, image: torch.Tensor, file: Path, memories: Sequence[TokenMemory]) -> torch.Tensor:
        """Score of an image with each memory, without what the memory holds of its file: ``[C]``."""
        own, model = file_digest(file), self.model
        pieces = torch.stack([image] if self.module.tiling is None else self.module.tiling.pieces(image[None], _ALL))
        found = []
        for part in pieces.split(_ENCODED_AT_ONCE):
            blocks = model.encode_image(part)
            found.append((blocks, memories[0].compared(model.clip.visual, part, at_hand(blocks))))
        tokens, compared = (
            [torch.cat(each) for each in zip(*lists, strict=True)] for lists in zip(*found, strict=True)
        )
        grid = model.clip.grid_of_images(pieces)
        logit, scores = model.detect(tokens, model.text_features(), grid).logit, []
        tiling = self.module.tiling
        places = [] if tiling is None else tiling.chosen(image[None], _ALL)
        for memory in memories:
            others = [place for place, name in enumerate(memory.names) if name != own]
            # Of a memory of one, which only a user asks for, its image cannot be left out.
            model.memory = memory.part(others) if 0 < len(others) < len(memory.names) else memory
            scores.append(model.abnormal_probability(logit, compared, grid, places)[:, 0].max())
        return torch.stack(scores).cpu()

    def _timed(self, size: Size, side: int | None, shots: Sequence[int]) -> list[Choice]:
        """Time of each memory with one setting, from those of the smallest and the largest."""
        transform, ends = self._set(size, side), []
        for number in dict.fromkeys((shots[0], shots[-1])):
            self.model.memory = self._memory(number, transform)
            # Of a few times the least: what else the machine does at the moment only adds to it.
            ends.append(min(self.times(self.module, transform)))
            if ends[0] > self.budget:
                break  # a larger memory is slower still
        slope = (ends[-1] - ends[0]) / max(1, shots[-1] - shots[0])
        tiling, pixels = self.module.tiling, math.prod(pair(size))
        if tiling is not None:
            pixels *= len(tiling.pieces(self.read(self.good[0], transform)[None], _ALL))
        times = [ends[0] + slope * (number - shots[0]) for number in shots]
        found = [Choice(size, shot, each, tiles=side, pixels=pixels) for shot, each in zip(shots, times, strict=True)]
        return found[:1] if ends[0] > self.budget else found

    @torch.no_grad()
    def times(self, module: AdaptedModule, transform: Transform) -> list[float]:
        """Times of a few images on this machine: reading, resizing, scoring."""
        times = []
        for file in [self.good[0], *self.good[:_TIMED]]:
            start = time.perf_counter()
            module.score_images(self.read(file, transform)[None], [file]).pred_score.cpu()
            times.append(time.perf_counter() - start)
        return times[1:]  # the first one prepares what later ones find

    def read(self, file: Path, transform: Transform, spoil: int | None = None) -> torch.Tensor:
        """An image ``[3, H, W]`` as the model takes it; with the defect that a seed stands for, if one is given."""

        def see(image: torch.Tensor) -> torch.Tensor:
            return transform(image if spoil is None else self._spoil(image, file, spoil))

        regions = self.module.regions
        cropped = regions is not None and regions.crop
        # Cropped images are read by the regions.
        image = torch.zeros(1, 3, 1, 1) if cropped else see(read_picture(file)[None])
        return (image if regions is None else regions.look(image, [file], see))[0].to(self.device)

    def _spoil(self, image: torch.Tensor, file: Path, seed: int) -> torch.Tensor:
        """Draw a defect into an image ``[1, 3, H, W]``, the same each time."""
        if file not in self._patches:
            height, width = image.shape[-2:]
            part = torch.ones(height, width, dtype=torch.bool)
            regions = self.module.regions
            source = None if regions is None else regions.view((height, width), file).source
            if source is not None:
                part = (source == torch.arange(height * width)).reshape(height, width)
            colours = image[0].permute(1, 2, 0).float().numpy()
            least = min(pair(self.module.image_size))
            self._patches[file] = draw_patch(colours, part.numpy(), seed, least, self.min_area)
        patch, image = self._patches[file], image.clone()
        side = len(patch.pixels)
        pixels = torch.from_numpy(patch.pixels).permute(2, 0, 1).to(image)
        image[0, :, patch.top : patch.top + side, patch.left : patch.left + side] = pixels
        return image

    def _memory(self, number: int, transform: Transform) -> TokenMemory:
        """The memory of the first good images."""
        memory: Any = self.model.make_memory().to(self.device)
        self.model.memory, members = memory, self.good[:number]
        self.module.remember([self.read(file, transform) for file in members], members)
        return memory

    def _set(self, size: Size, side: int | None) -> Transform:
        """Let the module cut images into tiles, or not; the transform that goes with it."""
        settings, clip = self.module.hparams, self.model.clip
        if side is None:
            self.module.tiling = None
            return self.module.pre_processor_for(clip, size).transform
        height, width = pair(size)
        if height != width:
            msg = f"image_size={size} with tiles={side}: tiles are squares, give image_size as one number."
            raise ValueError(msg)
        self.module.tiling = Tiling(side, settings["overlap"], height, settings["tile_batch_size"])
        return Compose([TileCanvas(self.module.tiling.canvas), Normalize(clip.mean, clip.std)])


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def _close_to_best(choices: list[Choice]) -> list[Choice]:
    best = max(choice.auroc for choice in choices)
    return [choice for choice in choices if choice.auroc >= best - CLOSE]


def _readable(folder: str | Path) -> list[Path]:
    """The images of a folder that can be read; the others are named in the log."""
    found = []
    for file in PictureFolder(folder).image_filenames:
        why = reason(file)
        if why is None:
            found.append(Path(file))
        else:
            logger.warning("%s is left out, it cannot be read: %s", file, why)
    return found


def _some(files: Sequence[Path]) -> list[Path]:
    """A sample, evenly spaced."""
    step = max(1.0, len(files) / SAMPLE)
    return [files[int(place * step)] for place in range(min(SAMPLE, len(files)))]


def _auroc(good: torch.Tensor, bad: torch.Tensor) -> float:
    metric = ImageScores()
    metric.update(torch.cat((good, bad)), torch.tensor([0] * len(good) + [1] * len(bad)))
    return metric.compute()["AUROC"]
