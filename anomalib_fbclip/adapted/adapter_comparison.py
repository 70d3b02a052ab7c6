# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Says at the end of training whether the new adapter is better than the one that was there before."""

import logging
import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.host.metrics import ImageScores, ScoreHistogram

from . import adapter_file

logger = logging.getLogger(__name__)

METRICS = ("image AUROC", "pixel AUROC", "AUPRO")
NOISE = 0.005
"""Differences below half a point are not called better or worse."""


class AdapterComparison(Callback):
    """Compare the trained adapter with an earlier one on the validation data, in the log.

    Image AUROC, pixel AUROC and AUPRO of both, in percent, and a warning where the new one is worse in any of them. The
    new one is measured by its last validation; the earlier one takes one more pass over the validation data. Models add
    this callback to their training runs by themselves, unless the trainer has one already.

    Args:
        earlier: Adapter to compare with; ``None``: none, nothing is compared.

    Attributes:
        result: Values of the earlier and of the new adapter by metric, in [0, 1], after the run.
    """

    def __init__(self, earlier: str | None = None) -> None:
        self.earlier = earlier
        self.result: dict[str, tuple[float, float]] = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure both, and log them."""
        loaders = trainer.val_dataloaders
        if self.earlier is None or not loaders or trainer.world_size > 1 or trainer.fast_dev_run:
            return
        logger.info("Comparing the new adapter with %s: two passes over the validation data.", self.earlier)
        new = {name: tensor.clone() for name, tensor in pl_module.model.trained_state_dict().items()}
        after = measure(trainer, pl_module)
        try:
            adapter_file.load_into(pl_module.model, self.earlier, memory=False)
        except (OSError, ValueError) as error:
            logger.info("The new adapter is not compared with %s: %s", self.earlier, error)
            return
        try:
            before = measure(trainer, pl_module)
        finally:
            pl_module.model.load_state_dict(new)
        self.result = {name: (before[name], after[name]) for name in METRICS if not math.isnan(after[name])}
        if not self.result:
            logger.info("The new adapter is not compared: the validation data have one class, or none.")
            return
        said = "; ".join(f"{name} {100 * old:.1f} -> {100 * now:.1f}" for name, (old, now) in self.result.items())
        logger.info("Validation data, %s -> the new adapter: %s.", self.earlier, said)
        worse = [name for name, (old, now) in self.result.items() if now < old - NOISE]
        if worse:
            logger.warning(
                "The new adapter is worse than %s in %s (%s). Use that one (weights=%s), or train longer, on more "
                "images, or from it (init_weights).",
                self.earlier,
                ", ".join(worse),
                said,
                self.earlier,
            )


@torch.no_grad()
def measure(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """Image AUROC, pixel AUROC and AUPRO on the validation data of a run; NaN where they are not defined."""
    image, pixel = ImageScores(), ScoreHistogram(regions=True)
    transform = getattr(pl_module.pre_processor, "transform", None)
    training = pl_module.model.training
    pl_module.model.eval()
    loaders = trainer.val_dataloaders
    try:
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            for index, batch in enumerate(loader):
                if index >= _limit(trainer):
                    break
                images = batch.image.to(pl_module.device)
                images = images if transform is None else transform(images)
                prediction = pl_module.model(images)
                if batch.gt_label is not None:
                    image.update(prediction.pred_score.cpu(), batch.gt_label.cpu())
                if batch.gt_mask is not None:
                    maps, masks = prediction.anomaly_map.cpu()[:, None], batch.gt_mask.cpu().float()
                    masks = masks if masks.ndim == 4 else masks[:, None]
                    masks = F.interpolate(masks, maps.shape[-2:])
                    pixel.update(maps[:, 0], masks[:, 0] > 0)
    finally:
        pl_module.model.train(training)
    found = dict.fromkeys(METRICS, math.nan)
    if image.update_called:
        found["image AUROC"] = image.compute()["AUROC"]
    if pixel.update_called:
        values = pixel.compute()
        found |= {"pixel AUROC": values["AUROC"], "AUPRO": values["AUPRO"]}
    return found


def _limit(trainer: Trainer) -> float:
    """Batches of each validation data loader that a run reads."""
    given = trainer.num_val_batches
    return max(given) if isinstance(given, (list, tuple)) and given else math.inf
