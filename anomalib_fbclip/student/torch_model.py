# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``StudentModel``: a convolutional network with one head for the map and one for the image score."""

from pathlib import Path
from typing import NamedTuple

import timm
import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fbclip.clip.build import EMBEDDED, load_clip
from anomalib_fbclip.clip.stem import network_features
from anomalib_fbclip.common.safe_load import reason

FINE, COARSE = 8, 16
"""Strides of the features that the heads read."""


class Features(NamedTuple):
    """What the network makes of images.

    Attributes:
        fine: Features at stride 8 ``[B, C1, H / 8, W / 8]``.
        coarse: Features at stride 16 ``[B, C2, H / 16, W / 16]``.
    """

    fine: torch.Tensor
    coarse: torch.Tensor

    @property
    def pooled(self) -> torch.Tensor:
        """Their means ``[B, C1 + C2]``: what an image looks like on the whole."""
        return torch.cat([self.fine.mean(dim=(2, 3)), self.coarse.mean(dim=(2, 3))], dim=1)


class TimmEncoder(nn.Module):
    """A convolutional network of timm, cut off after stride 16.

    Args:
        name: Name of the network.
        weights: See :class:`StudentModel`.
    """

    def __init__(self, name: str, weights: str | Path | None = None) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.rsplit('_', 1)[-1]}*")[:3])
            msg = f"backbone={name!r} is no network of timm; take 'tiny'"
            raise ValueError(f"{msg} or one of {near}." if near else f"{msg}.")
        path = None if weights is None else Path(weights).expanduser()
        if path is not None and not path.is_file():
            msg = f"backbone_weights={str(weights)!r} does not exist: give a file, or None for random weights."
            raise FileNotFoundError(msg)
        try:
            self.network = timm.create_model(name, pretrained=False, checkpoint_path="" if path is None else str(path))
        except Exception as error:
            if path is None:
                raise
            # Not chained: torch's message advises to load the file without the check.
            msg = f"backbone_weights={str(weights)!r} cannot be used for {name}: {reason(error)}"
            raise ValueError(msg) from None
        info = getattr(self.network, "feature_info", None) or []
        levels = {level["reduction"]: index for index, level in enumerate(info)}
        if not {FINE, COARSE} <= levels.keys() or not hasattr(self.network, "forward_intermediates"):
            msg = f"backbone={name!r} has no features at strides {FINE} and {COARSE}: take a convolutional one, or "
            msg += "'tiny'."
            raise ValueError(msg)
        self._levels = [levels[FINE], levels[COARSE]]
        self.channels = tuple(info[level]["num_chs"] for level in self._levels)
        self.network.prune_intermediate_layers(self._levels, prune_head=True)
        self.mean = tuple(self.network.pretrained_cfg["mean"])
        self.std = tuple(self.network.pretrained_cfg["std"])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features of normalised images at strides 8 and 16."""
        return self.network.forward_intermediates(
            images,
            indices=self._levels,
            stop_early=True,
            intermediates_only=True,
        )


class EmbeddedEncoder(nn.Module):
    """The convolutional network inside the embedded CLIP, a copy of it that can be trained.

    Args:
        name: Name of the embedded backbone.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        clip = load_clip(name)
        patches = clip.visual.conv1
        self.first, self.blocks = patches.first, patches.blocks
        self.channels = (patches.fine.in_channels, patches.coarse.in_channels)
        self.mean, self.std = clip.mean, clip.std
        self.requires_grad_().train()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of normalised images at strides 8 and 16."""
        return network_features(self.first, self.blocks, images)


class StudentModel(nn.Module):
    """Map and score of images from a small convolutional network.

    Both are learned as the teacher's logits, standardised over the training images: ``logit = scale * output +
    offset``.

    Args:
        backbone: ``"tiny"``: the convolutional network inside the embedded CLIP, with its weights, which began as
            ImageNet's (EfficientNet-Lite0 up to stride 16). Else the name of a timm network with features at strides 8
            and 16; what comes after stride 16 is cut off.
        backbone_weights: File with a timm network's weights under timm's names, ``.safetensors`` or ``.pth``. ``None``:
            random ones.
        width: Channels of the heads.

    Attributes:
        mean: Mean of each colour that the network's images are normalised with.
        std: Standard deviation of each colour, likewise.

    Raises:
        ValueError: If timm has no such network, it has no features at these strides, the file holds other weights
            or code, or weights are given for ``"tiny"``, which has its own.
        FileNotFoundError: If the file does not exist.
    """

    map_offset: torch.Tensor
    map_scale: torch.Tensor
    score_offset: torch.Tensor
    score_scale: torch.Tensor
    pooled_mean: torch.Tensor
    pooled_whitening: torch.Tensor
    usual_distance: torch.Tensor

    def __init__(
        self,
        backbone: str = "tiny",
        backbone_weights: str | Path | None = None,
        width: int = 64,
    ) -> None:
        super().__init__()
        if width < 1:
            msg = f"width={width}: give 1 channel or more."
            raise ValueError(msg)
        self.backbone = backbone
        self.encoder = self._encoder(backbone, backbone_weights)
        fine, coarse = self.encoder.channels
        self.mean, self.std = self.encoder.mean, self.encoder.std

        self.fine_in = nn.Conv2d(fine, width, 1)
        self.coarse_in = nn.Conv2d(coarse, width, 1)
        self.whole_in = nn.Linear(fine + coarse, width)
        self.mix = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1),
            nn.ReLU6(),
        )
        self.map_head = nn.Conv2d(width, 1, 1)
        self.score_head = nn.Linear(2 * width + fine + coarse, 1)
        for name in ("map", "score"):
            self.register_buffer(f"{name}_offset", torch.zeros(()))
            self.register_buffer(f"{name}_scale", torch.ones(()))
        self.register_buffer("pooled_mean", torch.zeros(fine + coarse))
        self.register_buffer("pooled_whitening", torch.zeros(fine + coarse, fine + coarse))
        self.register_buffer("usual_distance", torch.ones(()))

    @staticmethod
    def _encoder(backbone: str, weights: str | Path | None) -> "TimmEncoder | EmbeddedEncoder":
        if backbone not in EMBEDDED:
            return TimmEncoder(backbone, weights)
        if weights is not None:
            msg = (
                f"backbone_weights={str(weights)!r} with backbone={backbone!r}, which has its own: name timm's network."
            )
            raise ValueError(msg)
        return EmbeddedEncoder(backbone)

    def encode(self, images: torch.Tensor) -> Features:
        """Features of normalised images ``[B, 3, H, W]``."""
        return Features(*self.encoder(images))

    def decode(self, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardised logits of score ``[B]`` and map ``[B, H / 8, W / 8]``."""
        fine = self.fine_in(features.fine)
        coarse = F.interpolate(self.coarse_in(features.coarse), fine.shape[-2:], mode="bilinear", align_corners=False)
        # What is large, or another colour than the rest, shows only against the image as a whole.
        whole = self.whole_in(features.pooled)[:, :, None, None]
        hidden = self.mix(fine + coarse + whole)
        seen = torch.cat([hidden.mean(dim=(2, 3)), hidden.amax(dim=(2, 3)), features.pooled], dim=1)
        return self.score_head(seen)[:, 0], self.map_head(hidden)[:, 0]

    def predict(self, features: Features, size: torch.Size | tuple[int, int]) -> InferenceBatch:
        """Score ``[B]`` and map ``[B, H, W]`` in [0, 1], on the teacher's scale."""
        score, grid_map = self.decode(features)
        logits = self.map_scale * grid_map + self.map_offset
        upsampled = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        pred_score = (self.score_scale * score + self.score_offset).sigmoid()
        return InferenceBatch(pred_score=pred_score, anomaly_map=upsampled.sigmoid())

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images: Images ``[B, 3, H, W]`` normalised with :attr:`mean` and :attr:`std`.

        Returns:
            InferenceBatch: ``pred_score`` ``[B]`` and ``anomaly_map`` ``[B, H, W]``, both in [0, 1].
        """
        return self.predict(self.encode(images), images.shape[-2:])

    def distance(self, pooled: torch.Tensor) -> torch.Tensor:
        """How far images lie from those of the training ``[B]``; above 1 is farther than 99 of 100 of these.

        The Mahalanobis distance of the pooled features, divided by that which the training images, each measured
        against the others, exceed in one of 100 cases. 0 before training.

        Args:
            pooled: :attr:`Features.pooled`.
        """
        return ((pooled - self.pooled_mean) @ self.pooled_whitening).norm(dim=1) / self.usual_distance
