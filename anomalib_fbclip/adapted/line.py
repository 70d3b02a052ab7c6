# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Set up a model for one line: from a folder of good images to image size, memory and thresholds.

Image size and memory are chosen for a time per image, which is measured. With bad images the choice is the one with the
best image AUROC of a sample. Without, it is the largest size within the time, as a patch then covers less of a part;
and the memory is doubled as long as that brings a good image, left out, noticeably nearer to it.

Thresholds come from all good images, each scored by the memory without this image (leave-one-out). So the memory may
hold images of the very folder that the thresholds are from.
"""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip.build import EMBEDDED
from anomalib_fbclip.common.files import file_digest
from anomalib_fbclip.common.functional import one_or_pair, pair
from anomalib_fbclip.data.picture_folder import PictureFolder
from anomalib_fbclip.host.calibration import NormalScores, set_thresholds
from anomalib_fbclip.host.metrics import ImageScores
from anomalib_fbclip.host.thresholds import check_rate
from anomalib_fbclip.host.unreadable import read_picture, reason

from .lightning_model import AdaptedModule
from .load import find_model, load_module
from .torch_model import AdaptedCLIP

logger = logging.getLogger(__name__)

Size = int | tuple[int, int]
"""In pixels: one number for a square, else height and width."""

SIZES = (2 / 3, 1, 4 / 3, 5 / 3, 2)
"""Image sizes that are tried, relative to the one that adapter and backbone were trained with."""

SHOTS = (2, 4, 8, 16, 32)
"""Numbers of good images in the memory that are tried; in a memory of one, this image cannot be left out."""

SAMPLE = 48
"""Good images, and bad ones, that size and memory are chosen by; thresholds are from all."""

LEAST_GAIN = 0.03
"""The memory is doubled while this lowers the distance of a good image to it by so much, relatively."""

CLOSE = 0.005
"""Image AUROCs that differ by less count as equal: the faster choice wins."""

_TIMED = 5
_SEED = 0


@dataclass
class Choice:
    """An image size and a number of good images in the memory.

    Attributes:
        image_size: In pixels; height and width where they differ.
        k_shot: Good images in the memory.
        seconds: Measured time per image, least of a few, interpolated in ``k_shot``: reading, resizing, scoring.
        auroc: Image AUROC of the sample; ``None`` without bad images.
    """

    image_size: Size
    k_shot: int
    seconds: float
    auroc: float | None = None


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
) -> Line:
    """Choose image size and memory, and find thresholds, from good images.

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

    def build(**settings: Any) -> AdaptedModule:  # noqa: ANN401  # of any model
        settings |= {} if region is None else {"region": region, "crop_to_region": crop_to_region}
        module = _build(model, backbone, pretrained, weights, **settings)
        return module.to(device).eval()

    # A random choice, the same each time: images of a folder are often sorted.
    order = torch.randperm(len(good_files), generator=torch.Generator().manual_seed(_SEED)).tolist()
    shuffled = [good_files[place] for place in order]
    survey = _Survey(build(k_shot=1, image_size=image_size), shuffled, _some(bad_files), seconds_per_image)
    best = survey.choose([image_size] if image_size else None, [k_shot] if k_shot else None)

    module = build(k_shot=best.k_shot, image_size=best.image_size)
    members = shuffled[: best.k_shot]
    _remember(module.model, survey.read(members, module.pre_processor.transform), members)
    logger.info("Scoring %d good images, each without itself in the memory.", len(good_files))
    scores = module.score_normal(good)
    found = set_thresholds(module.post_processor, scores, rate)
    times = survey.times(module.model, module.pre_processor.transform)
    line = Line(module, survey.tried, statistics.median(times), found)
    if bad is not None:
        line.bad = module.score_normal(bad)
        line.auroc = _auroc(torch.stack(scores.scores), torch.stack(line.bad.scores))
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
    """Compares image sizes and memories on a sample.

    Args:
        module: A model with a memory.
        good: All good images, shuffled: the first ones are those that the memory may hold.
        bad: Sample of the bad images.
        budget: Seconds that one image may take.
    """

    def __init__(self, module: AdaptedModule, good: Sequence[Path], bad: Sequence[Path], budget: float) -> None:
        self.module, self.good, self.bad, self.budget = module, good, bad, budget
        self.model: AdaptedCLIP = module.model
        self.device = next(self.model.parameters()).device
        self.tried: list[Choice] = []

    def choose(self, sizes: Sequence[Size] | None, shots: Sequence[int] | None) -> Choice:
        """The best choice, out of given sizes and numbers where they are given."""
        patch, own = self.model.clip.patch_size, pair(self.module.image_size)
        shares = [[max(1, round(side * share / patch)) * patch for side in own] for share in sorted(SIZES)]
        sizes = sizes or list(dict.fromkeys(one_or_pair(sides) for sides in shares))
        shots = shots or [number for number in SHOTS if number <= len(self.good)]
        fast = []
        for size in sizes:
            choices = self._timed(size, shots)
            self.tried += choices
            if choices[0].seconds > self.budget:
                break  # larger sizes are slower
            fast.append([choice for choice in choices if choice.seconds <= self.budget])
        if not fast:
            least = self.tried[0]
            msg = f"an image of {least.image_size} pixels takes {least.seconds:.3g} s here, more than "
            msg += f"seconds_per_image={self.budget:g}: allow more time, or fewer pixels."
            raise ValueError(msg)
        return self._by_bad_images(fast) if self.bad else self._by_good_images(fast[-1])

    def _by_bad_images(self, fast: list[list[Choice]]) -> Choice:
        """The fastest of those whose image AUROC is next to the best."""
        for choices in fast:
            self._score(choices)
        found = [choice for choices in fast for choice in choices]
        best = max(choice.auroc or 0.0 for choice in found)
        return min((c for c in found if (c.auroc or 0.0) >= best - CLOSE), key=lambda choice: choice.seconds)

    @torch.no_grad()
    def _by_good_images(self, choices: list[Choice]) -> Choice:
        """The largest size; the memory is doubled while good images come nearer to it."""
        transform = self._transform(choices[0].image_size)
        members = self.good[: choices[-1].k_shot]
        memory = torch.stack(self._tokens(self.read(members, transform)))[:, :, 1:]
        memory = F.normalize(memory.float(), dim=-1)
        curves = []
        for index, file in enumerate(self.good[: max(SAMPLE, len(members))]):
            tokens = torch.stack(self._tokens(self.read([file], transform)))[:, 0, 1:]
            curves.append(_distance_curve(F.normalize(tokens.float(), dim=-1), memory, index))
        # The first images have no distance to a memory of themselves alone.
        distance = torch.stack(curves).nanmean(dim=0)
        chosen = choices[0]
        for smaller, larger in pairwise(choices):
            before, after = (float(distance[choice.k_shot - 1]) for choice in (smaller, larger))
            logger.info("Memory of %d good images: mean distance %.4f.", smaller.k_shot, before)
            if not after < (1 - LEAST_GAIN) * before:
                break
            chosen = larger
        return chosen

    @torch.no_grad()
    def _score(self, choices: list[Choice]) -> None:
        """Image AUROC of each choice, all of one size: good images by a memory without them."""
        transform = self._transform(choices[0].image_size)
        members = self.good[: choices[-1].k_shot]
        _remember(self.model, self.read(members, transform), members)
        full: Any = self.model.memory
        parts = [full.part(range(choice.k_shot)) for choice in choices]
        good, bad = self.good[: max(SAMPLE, len(members))], self.bad
        scores = torch.empty(len(choices), len(good) + len(bad))
        try:
            for index, file in enumerate([*good, *bad]):
                images = self.read([file], transform)
                tokens, grid = self._tokens(images), self.model.clip.grid_of_images(images)
                logit = self.model.detect(tokens, self.model.text_features(), grid).logit
                for place, choice in enumerate(choices):
                    others = [other for other in range(choice.k_shot) if other != index]
                    # Of a memory of one, which only a user asks for, its image cannot be left out.
                    self.model.memory = full.part(others) if 0 < len(others) < choice.k_shot else parts[place]
                    scores[place, index] = self.model.abnormal_probability(logit, tokens, grid)[0, 0]
        finally:
            self.model.memory = full
        for choice, row in zip(choices, scores, strict=True):
            choice.auroc = _auroc(row[: len(good)], row[len(good) :])
            logger.info(
                "%s pixels, memory of %d good images: %.3g s per image, image AUROC %.1f %%.",
                choice.image_size,
                choice.k_shot,
                choice.seconds,
                100 * choice.auroc,
            )

    @torch.no_grad()
    def _timed(self, size: Size, shots: Sequence[int]) -> list[Choice]:
        """Time of each memory at one size, from those of the smallest and the largest."""
        transform = self._transform(size)
        ends = []
        for number in dict.fromkeys((shots[0], shots[-1])):
            # What the memory holds does not change the time.
            images = self.read(self.good[:1], transform).expand(number, -1, -1, -1)
            _remember(self.model, images, ())
            # Of a few times the least: what else the machine does at the moment only adds to it.
            ends.append(min(self.times(self.model, transform)))
            if ends[0] > self.budget:
                break  # a larger memory is slower still
        slope = (ends[-1] - ends[0]) / max(1, shots[-1] - shots[0])
        found = [Choice(size, number, ends[0] + slope * (number - shots[0])) for number in shots]
        return found[:1] if ends[0] > self.budget else found

    @torch.no_grad()
    def times(self, model: AdaptedCLIP, transform: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        """Times of a few images on this machine: reading, resizing, scoring."""
        times = []
        for file in [self.good[0], *self.good[:_TIMED]]:
            start = time.perf_counter()
            model(self.read([file], transform)).pred_score.cpu()
            times.append(time.perf_counter() - start)
        return times[1:]  # the first one prepares what later ones find

    def read(self, files: Sequence[Path], transform: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Images ``[B, 3, H, W]`` as the model takes them."""
        images = torch.stack([transform(read_picture(file)) for file in files])
        regions = self.module.regions
        return (images if regions is None else regions.look(images, files, transform)).to(self.device)

    def _tokens(self, images: torch.Tensor) -> list[torch.Tensor]:
        parts = [self.model.encode_image(image) for image in images.split(1)]
        return [torch.cat(blocks) for blocks in zip(*parts, strict=True)]

    def _transform(self, size: Size) -> Callable[[torch.Tensor], torch.Tensor]:
        return self.module.pre_processor_for(self.model.clip, size).transform


def _remember(model: AdaptedCLIP, images: torch.Tensor, files: Sequence[Path]) -> None:
    model.remember(images, [file_digest(file) for file in files])


def _distance_curve(patches: torch.Tensor, memory: torch.Tensor, own: int) -> torch.Tensor:
    """Mean distance of an image's patches to the first 1, 2, ..., K remembered images, without itself.

    Args:
        patches: Of unit length ``[S, L, D]``.
        memory: Likewise ``[S, K, M, D]``.
        own: Place of the image in the memory, or beyond its end.

    Returns:
        torch.Tensor: ``[K]``; NaN where there is no other image.
    """
    best, curve = torch.full(patches.shape[:2], -1.0, device=patches.device), []
    for place in range(memory.shape[1]):
        if place != own:
            best = torch.maximum(best, (patches @ memory[:, place].mT).amax(dim=-1))
        curve.append((1 - best).mean() if place or place != own else best.new_tensor(torch.nan))
    return torch.stack(curve)


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
