# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What a teacher makes of the images of one product, with and without pasted defects: computed once, kept on disk."""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from anomalib_fbclip.adapted.lightning_model import AdaptedModule
from anomalib_fbclip.common.files import file_digest, replacing
from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.paste import draw_change
from anomalib_fbclip.host.unreadable import read_picture

from .torch_model import FINE

logger = logging.getLogger(__name__)

_CERTAIN = 1e-6


class Target(NamedTuple):
    """One image of the training and what the teacher makes of it.

    Attributes:
        image: uint8 ``[3, H, W]``, at the student's size.
        map_logit: Logit of the teacher's map at stride 8, ``[H / 8, W / 8]``.
        score_logit: Logit of the teacher's score, ``[]``.
    """

    image: torch.Tensor
    map_logit: torch.Tensor
    score_logit: torch.Tensor


class TeacherTargets:
    """The targets of a student, in one file for each image and each of its variants.

    Variant 0 is the image itself; the others have a drawn defect pasted into them, of a random kind, place and size.
    What counts is not where it was pasted but what the teacher makes of it. A teacher with a memory scores an image
    of the memory by the others; one with a region scores what is inside. Files that are there are not computed again,
    so an interrupted run goes on where it stopped; another teacher, size or seed has another folder.

    Args:
        teacher: Teacher, ready to score.
        folder: Folder of all targets, of any teacher.
        image_size: Height and width of the student's images in pixels.
        pasted: Variants of each image with a pasted defect.
        seed: Of the pasted defects.
    """

    def __init__(
        self,
        teacher: AdaptedModule,
        folder: str | Path,
        image_size: tuple[int, int],
        pasted: int,
        seed: int,
    ) -> None:
        self.teacher = teacher
        self.image_size = image_size
        self.pasted = pasted
        self.seed = seed
        self.folder = Path(folder).expanduser() / self._key()

    def compute(self, files: Iterable[Path]) -> dict[str, list[Path]]:
        """Have the teacher score all images that are not there yet; the console shows how far it is.

        Args:
            files: Images of the product.

        Returns:
            dict: Files of the targets of each image, variant 0 first. An image that the teacher's memory holds alone,
            and cannot be asked about, is left out.
        """
        found = {}
        for file in track(list(files), description="Teacher"):
            digest = file_digest(file)
            places = [self.folder / f"{digest[:32]}-{variant}.safetensors" for variant in range(1 + self.pasted)]
            if all(place.is_file() for place in places) or self._score(file, digest, places):
                found[str(file)] = places
        return found

    def _score(self, file: Path, digest: str, places: list[Path]) -> bool:
        image = read_picture(file)
        raw = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        seeds = ((self.seed, int(digest[:8], 16), variant) for variant in range(1, len(places)))
        variants = [raw, *(paste_defect(raw, np.random.default_rng(seed)) for seed in seeds)]
        images = torch.stack([image, *(torch.from_numpy(v).permute(2, 0, 1) / 255 for v in variants[1:])])
        targets = self._ask(images.to(self.teacher.device), file)
        if targets is None:
            return False
        # As the student's pre-processor does it: it must be trained on the pixels that it will see.
        small = resize(images, list(self.image_size), InterpolationMode.BICUBIC, antialias=True)
        small = (small * 255).round().clamp(0, 255).byte()
        for place, own, map_logit, score_logit in zip(places, small, *targets, strict=True):
            content = {"image": own, "map_logit": map_logit.half(), "score_logit": score_logit.clone()}
            with replacing(place) as path:
                save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
        return True

    @torch.no_grad()
    def _ask(self, images: torch.Tensor, file: Path) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits of maps ``[N, H / 8, W / 8]`` and scores ``[N]`` of raw images ``[N, 3, H, W]``."""
        teacher, paths = self.teacher, [file] * len(images)
        transform = getattr(teacher.pre_processor, "transform", None) or (lambda raw: raw)
        whole = transform(images)
        seen = whole
        if teacher.regions is not None:
            # The files do not have the pasted defects, so crops are cut from the images themselves.
            seen = transform(teacher.regions.crop_raw(images, file)) if teacher.regions.crop else whole
            seen = teacher.regions.fill(seen, paths)
        scored = teacher.score_unseen(seen, file)
        if scored is None:
            return None
        scored = teacher.cut(scored, paths, whole.shape[-2:])
        grid = [side // FINE for side in self.image_size]
        maps = scored.anomaly_map.float().clamp(_CERTAIN, 1 - _CERTAIN).logit()
        maps = maps.reshape(len(images), 1, *maps.shape[-2:])
        inside = teacher.inside(paths[:1], (int(maps.shape[-2]), int(maps.shape[-1])))
        if inside is not None:
            # Outside nothing is scored: there an image is as normal as where it is most normal.
            inside = inside.to(maps.device)
            least = maps.masked_fill(~inside, torch.inf).amin(dim=(-2, -1), keepdim=True)
            maps = torch.where(inside, maps, least)
        maps = F.adaptive_avg_pool2d(maps, grid)[:, 0]
        return maps.cpu(), scored.pred_score.float().clamp(_CERTAIN, 1 - _CERTAIN).logit().cpu()

    def _key(self) -> str:
        """What the targets depend on beside the image."""
        model = self.teacher.model
        # min_area counts in verdicts alone.
        settings = {**model.architecture(), **self.teacher.calibration_settings(), "min_area": None}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(f"{self.image_size} {self.pasted and self.seed}".encode())
        for name, tensor in sorted(model.state_dict().items()):
            if not name.startswith("clip."):  # the architecture holds the backbone's fingerprint
                digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_target(path: Path) -> Target:
    """Read a target.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        content = load_file(path)
        return Target(content["image"], content["map_logit"].float(), content["score_logit"])
    except (SafetensorError, KeyError, OSError) as error:
        msg = f"{str(path)!r} is damaged ({error}): remove it, and it is computed again."
        raise ValueError(msg) from error


def paste_defect(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a defect into a square window at a random place.

    The window has the length of the shorter side or, half of the time, a random one from a third of it on. Defects grow
    with it, and a student that has seen no large areas of another tone misses them.

    Args:
        image: uint8 ``[H, W, 3]``.
        rng: Source of randomness.

    Returns:
        np.ndarray: The changed image, uint8 ``[H, W, 3]``.
    """
    height, width = image.shape[:2]
    share = rng.uniform(1 / 3, 1) if rng.random() < 0.5 else 1
    side = max(1, round(min(height, width) * share))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    window = image[top : top + side, left : left + side].astype(np.float32) / 255
    window = window + draw_change(window, np.ones((side, side), dtype=bool), str(rng.choice(KINDS)), rng)[0]
    result = image.copy()
    result[top : top + side, left : left + side] = np.round(window.clip(0, 1) * 255).astype(np.uint8)
    return result
