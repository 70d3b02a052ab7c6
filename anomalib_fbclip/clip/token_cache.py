# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Frozen tokens on disk, so that later epochs of training skip the visual tower."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from anomalib_fbclip.common.files import replacing

from .frozen import FrozenCLIP

logger = logging.getLogger(__name__)


class TokenCache:
    """Tokens of chosen blocks, computed once for each image and kept in half precision.

    An image is known by its normalised pixels, so another file content, size or way of resizing is another entry, as
    is another precision of the trainer; the backbone's fingerprint and the blocks name the folder. Files are written
    aside and renamed: an interrupted run leaves no half entry, and several processes may share a folder. A damaged
    entry is computed anew.

    Args:
        clip: Frozen backbone.
        layers: Blocks, counted from 1.
        directory: Where the entries go. ViT-L/14 at 518 x 518 with five blocks: 14 MB an image.
        limit: Bytes that the entries of this backbone and these blocks may fill together. When they are reached, no
            more are written (said once): throwing out the oldest would throw out just what the next epoch reads first.
        encode: Images to tokens of each block, for another way through the tower. ``None``: the backbone's.
        key: Names that way in the folder's name.

    Raises:
        ValueError: If ``limit`` is not positive.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        layers: Sequence[int],
        directory: str | Path,
        limit: float = 50e9,
        encode: Callable[[torch.Tensor], list[torch.Tensor]] | None = None,
        key: str = "",
    ) -> None:
        if not limit > 0:
            msg = f"limit={limit}: give the bytes that the token cache may fill, or no cache at all."
            raise ValueError(msg)
        self.clip = clip
        self.layers = clip.check_layers(layers)
        blocks = "-".join(str(layer) for layer in self.layers)
        activation = "" if clip.quick_gelu else "gelu"  # not part of the fingerprint, which is the weights' alone
        self.directory = Path(directory) / "-".join(filter(None, (clip.fingerprint(), blocks, activation, key)))
        self.encode = encode
        self.directory.mkdir(parents=True, exist_ok=True)
        self.limit = limit
        self._used = sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))
        self._said_full = False

    def encode_image(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Tokens of the blocks, read where they are known; see :meth:`FrozenCLIP.encode_image`.

        Args:
            images: Normalised images ``[B, 3, H, W]``.

        Returns:
            list[torch.Tensor]: For each block ``[B, 1 + g_h * g_w, D]``, rounded to half precision whether read or
                computed, so that the first epoch and the later ones see the same values.

        Raises:
            ValueError: If the images are no input of the backbone, or its tokens do not fit half precision.
        """
        files = [self._file(image) for image in images]
        shape = (len(self.layers), 1 + math.prod(self.clip.grid_of_images(images)), self.clip.vision_width)
        entries = [self._read(file, shape) for file in files]
        missing = [index for index, entry in enumerate(entries) if entry is None]
        if missing:
            chosen = images[missing]
            encoded = self.clip.encode_image(chosen, self.layers) if self.encode is None else self.encode(chosen)
            tokens = torch.stack(encoded, dim=1).half().cpu()
            if not tokens.isfinite().all():
                msg = "token_cache: tokens of this backbone are too large for half precision; train without the cache."
                raise ValueError(msg)
            for index, entry in zip(missing, tokens, strict=True):
                entries[index] = entry
                self._write(files[index], entry)
        # Autocast on a processor does not know how to stack half precision.
        with torch.autocast("cpu", enabled=False):
            stacked = torch.stack([entry for entry in entries if entry is not None], dim=1)
        return list(stacked.to(images.device, self.clip.visual.proj.dtype))

    def _file(self, image: torch.Tensor) -> Path:
        pixels = image.detach().float().cpu().contiguous()
        kind: list[object] = [tuple(pixels.shape)]
        if torch.is_autocast_enabled(image.device.type):
            # Tokens of a run in half precision are coarser than half precision's rounding of exact ones.
            kind.append(torch.get_autocast_dtype(image.device.type))
        digest = hashlib.blake2b(str(kind).encode(), digest_size=20)
        digest.update(pixels.numpy().tobytes())
        return self.directory / f"{digest.hexdigest()}.safetensors"

    @staticmethod
    def _read(file: Path, shape: tuple[int, ...]) -> torch.Tensor | None:
        if not file.is_file():
            return None
        try:
            tokens = load_file(file)["tokens"]
        except (SafetensorError, KeyError, OSError) as error:
            tokens, why = None, str(error)
        else:
            why = f"not {shape} finite numbers in half precision"
        if tokens is None or (tokens.shape, tokens.dtype) != (shape, torch.half) or not tokens.isfinite().all():
            logger.warning("The cached tokens in %s are damaged and are computed anew (%s).", file, why)
            return None
        return tokens

    def _write(self, file: Path, tokens: torch.Tensor) -> None:
        content = save({"tokens": tokens.contiguous()})
        if self._used + len(content) > self.limit:
            if not self._said_full:
                logger.warning(
                    "The token cache in %s is full (%.3g GB): further images go through the visual tower every time. "
                    "Raise token_cache_limit or delete old folders.",
                    self.directory.parent,
                    self.limit / 1e9,
                )
            self._said_full = True
            return
        with replacing(file) as aside:
            aside.write_bytes(content)
        self._used += len(content)
