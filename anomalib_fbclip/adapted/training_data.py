# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What a train split allows: masks, labels, or normal images with synthetic anomalies."""

import logging
from collections.abc import Sequence
from enum import Enum

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch import nn
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


class Supervision(Enum):
    """What the train split tells."""

    LABELS_AND_MASKS = "labels and masks"
    LABELS = "labels"
    NORMAL_ONLY = "normal images only"


def describe_training_data(dataloader: DataLoader) -> Supervision:
    """Look at the labels and masks of a train split and say in the log what they allow.

    Args:
        dataloader: Of an anomalib dataset, whose table of samples is read; no image is.

    Returns:
        Supervision: What to train on. A data set without a table is taken for labelled images with masks.

    Raises:
        ValueError: If the split holds anomalous images only.
    """
    samples = getattr(getattr(dataloader, "dataset", None), "samples", None)
    if samples is None or "label_index" not in samples:
        return Supervision.LABELS_AND_MASKS
    anomalous = samples["label_index"] == 1
    if not anomalous.any():
        logger.warning(
            "The train split holds normal images only: anomalies are synthesised (Perlin noise). This is not the "
            "paper's protocol, which trains once on a labelled auxiliary data set and transfers: give a data module "
            "whose train split has labelled anomalies with masks, or an adapter made from one (weights=...).",
        )
        return Supervision.NORMAL_ONLY
    if anomalous.all():
        msg = f"The train split holds {len(samples)} anomalous and no normal images: add normal ones, both are needed."
        raise ValueError(msg)
    masks = samples["mask_path"].fillna("").astype(str) if "mask_path" in samples else None
    if masks is None or not masks[anomalous].ne("").all():
        logger.warning("Anomalous training images have no masks: training on labels alone, without pixel losses.")
        return Supervision.LABELS
    return Supervision.LABELS_AND_MASKS


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for an epoch of a run, which neighbouring seeds do not share: a sum would make repeats depend."""
    return (seed * 2**20 + epoch) % 2**63


def repeat_order(dataloader: DataLoader, seed: int) -> None:
    """Tie the order of the images to the epoch, so that a run that goes on after an interruption sees the same.

    A sampler that has its own generator or its own epochs (as in several processes) is left alone.

    Args:
        dataloader: Of the train split; its sampler is changed.
        seed: Of the run.
    """
    sampler = dataloader.sampler
    if getattr(sampler, "generator", dataloader) is not None or hasattr(sampler, "set_epoch"):
        return
    generator = torch.Generator()
    sampler.generator = generator
    # Lightning calls it before each epoch, as it does for distributed samplers.
    sampler.set_epoch = lambda epoch: generator.manual_seed(epoch_seed(seed, epoch))
    sampler.set_epoch(0)


class AnomalySynthesis(nn.Module):
    """anomalib's Perlin anomalies on half of the images of a normalised batch.

    Args:
        mean: Mean that the images were normalised with.
        std: Standard deviation that the images were normalised with.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.generator = PerlinAnomalyGenerator(probability=0.5, blend_factor=(0.2, 1.0))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw anomalies.

        Args:
            images: Normalised images ``[B, 3, H, W]``.

        Returns:
            Images ``[B, 3, H, W]``, labels ``[B]``, masks ``[B, H, W]``.
        """
        altered, masks = self.generator(images * self.std + self.mean)
        masks = masks[:, 0] > 0
        return (altered.clamp(0, 1) - self.mean) / self.std, masks.flatten(1).any(dim=1).long(), masks
