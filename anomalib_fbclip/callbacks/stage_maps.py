# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Draws the maps of every stage of a model, one image for each image."""

import fnmatch
import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data import Batch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from anomalib_fbclip.adapted.stages import Stages
from anomalib_fbclip.common.functional import tokens_to_grid

logger = logging.getLogger(__name__)

PROBABILITY = ("inferno", 0.0, 1.0)
"""Colours and scale of every map of probabilities."""

_PANEL, _GAP, _MARGIN, _TOP = 1.0, 0.3, 0.75, 2.5


class StageMaps(Callback):
    """Write one image of all stages for each chosen image of a test or prediction run.

    What is drawn is the model's own: :meth:`Stages.panels` for every block, :meth:`Stages.maps` above them. For FB-CLIP
    mask, views, gates, similarity to the background prototype and to the texts, and the map without and with background
    suppression. Of several processes the first one draws, from its share. Drawing takes about a second
    an image, and the model runs a second time on it.

    Args:
        num_images: Images that are drawn at most, in their order; ``None``: all.
        pattern: Only images whose path matches this shell pattern, such as ``"*/scratch/*"``.
        dirpath: Folder to write to. ``None``: ``stages`` in the run's folder.

    Raises:
        ValueError: If ``num_images`` is below 1.
        TypeError: When the run starts, if the model has no record of stages.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[StageMaps(num_images=4, pattern="*/crack/*")])
    """

    def __init__(
        self,
        num_images: int | None = 8,
        pattern: str = "*",
        dirpath: str | Path | None = None,
    ) -> None:
        if num_images is not None and num_images < 1:
            msg = f"num_images={num_images}: give 1 or more, or None for all."
            raise ValueError(msg)
        self.num_images = num_images
        self.pattern = pattern
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self.paths: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model without stages, begin to count anew."""
        del trainer, stage
        if not hasattr(getattr(pl_module, "model", None), "record"):
            msg = f"StageMaps draws models with a record of stages; {type(pl_module).__name__} has none: leave it out."
            raise TypeError(msg)
        self.paths = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        batch: Batch,
        batch_idx: int,
        *args,
    ) -> None:
        """Draw the chosen images of a batch."""
        del outputs, batch_idx, args
        self._draw(trainer, pl_module, batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch,
        batch: Batch,
        batch_idx: int,
        *args,
    ) -> None:
        """Draw the chosen images of a batch."""
        del outputs, batch_idx, args
        self._draw(trainer, pl_module, batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the images are."""
        del pl_module
        if not trainer.is_global_zero:
            return
        if self.paths:
            logger.info("Stage maps of %d images: %s", len(self.paths), self.paths[0].parents[1])
        else:
            logger.warning("StageMaps: no image matches pattern=%r, nothing was drawn.", self.pattern)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the images are."""
        self.on_test_end(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: Trainer, pl_module: LightningModule, batch: Batch) -> None:
        if not trainer.is_global_zero:
            return
        names = batch.image_path or [f"image_{number}" for number in range(len(batch.image))]
        chosen = [index for index, name in enumerate(names) if fnmatch.fnmatch(Path(name).as_posix(), self.pattern)]
        if self.num_images is not None:
            chosen = chosen[: self.num_images - len(self.paths)]
        if not chosen:
            return
        images, masks = batch.image[chosen], batch.gt_mask
        tiling = getattr(pl_module, "tiling", None)
        if tiling is not None:  # the stages of the whole image
            images = tiling.whole(images)
            masks = None if masks is None else resize(masks, list(images.shape[-2:]), InterpolationMode.NEAREST)
        _, stages = pl_module.model(images, return_stages=True)
        clip = pl_module.model.clip
        mean, std = (images.new_tensor(values)[:, None, None] for values in (clip.mean, clip.std))
        pictures = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
        folder = self.dirpath or Path(trainer.default_root_dir) / "stages"
        for place, index in enumerate(chosen):
            name = Path(names[index])
            mask = None if masks is None else _numpy(masks[index].squeeze())
            title = f"{name.parent.name}/{name.name}"
            figure = draw_stages(stages, pl_module.model.feature_layers, place, _numpy(pictures[place]), mask, title)
            path = self._free(folder / name.parent.name / name.stem)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
            self.paths.append(path)

    def _free(self, stem: Path) -> Path:
        """A name that this run has not written yet: images of several categories share names."""
        path, number = stem.with_name(f"{stem.name}.png"), 1
        while path in self.paths:
            path, number = stem.with_name(f"{stem.name}_{number}.png"), number + 1
        return path


def draw_stages(
    stages: Stages,
    feature_layers: Sequence[int],
    index: int,
    picture: np.ndarray,
    mask: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """Draw one image's stages: blocks from top to bottom, stages from left to right, the maps above them.

    Args:
        stages: Record of ``model(images, return_stages=True)``.
        feature_layers: Numbers of the blocks, ``model.feature_layers``.
        index: Place of the image in the batch.
        picture: The image ``[H, W, 3]``, values 0..1.
        mask: True defect ``[H, W]``, outlined where it is given.
        title: Heading, such as the file name.

    Returns:
        Figure: For ``savefig``, or to be shown in a notebook.
    """
    groups = stages.panels()
    wide = sum(len(group.columns) for group in groups) * _PANEL + (len(groups) - 1) * _GAP
    width = 2 * _MARGIN + max(wide, 5 * (_TOP - 0.5 + _GAP))
    # With one view a group is narrower than its title in one line.
    titles = [textwrap.fill(group.title, int(11 * (len(group.columns) * _PANEL + _GAP / 2))) for group in groups]
    top = _TOP + 1.2 + 0.14 * max((text.count("\n") for text in titles), default=0)
    height = top + len(feature_layers) * _PANEL + 0.5
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")

    def panel(left: float, top: float, size: float) -> Axes:
        axes = figure.add_axes((left / width, 1 - (top + size) / height, size / width, size / height))
        axes.set_xticks([])
        axes.set_yticks([])
        return axes

    _draw_maps(figure, panel, stages, index, picture, mask)
    left = (width - wide) / 2
    for group, text in zip(groups, titles, strict=True):
        count = len(group.columns)
        at = ((left + count * _PANEL / 2) / width, 1 - (top - 0.27) / height)
        figure.text(*at, text, ha="center", va="bottom", fontsize=9, weight="bold")
        for row, layer in enumerate(feature_layers):
            for column, heading in enumerate(group.columns):
                axes = panel(left + column * _PANEL + 0.02, top + row * _PANEL + 0.02, _PANEL - 0.04)
                grid = _numpy(tokens_to_grid(group.grids[row * count + column][index], stages.grid))
                axes.imshow(grid, cmap=group.colours, vmin=group.low, vmax=group.high)
                if row == 0:
                    axes.set_title(heading, fontsize=8, pad=2)
                if column == 0 and group is groups[0]:
                    axes.set_ylabel(f"block {layer}", fontsize=9)
        place = (left, top + len(feature_layers) * _PANEL + 0.1, count * _PANEL)
        _colour_bar(figure, place, group.colours, group.low, group.high)
        left += count * _PANEL + _GAP
    figure.suptitle(title, fontsize=11, y=1 - 0.12 / height, va="top", parse_math=False)
    return figure


def _draw_maps(
    figure: Figure,
    panel: Callable[[float, float, float], Axes],
    stages: Stages,
    index: int,
    picture: np.ndarray,
    mask: np.ndarray | None,
) -> None:
    size, (height, width) = _TOP - 0.5, picture.shape[:2]
    colours, low, high = PROBABILITY
    memory = stages.memory_evidence
    known = {} if memory is None else {"memory of normal images": tokens_to_grid(memory[:, 1:].sigmoid(), stages.grid)}
    shown: dict[str, torch.Tensor | None] = {
        "image" if mask is None else "image, defect outlined": None,
        **known,
        **stages.maps(),
        f"result, smoothed; score {float(stages.pred_score[index]):.3f}": stages.anomaly_map_smoothed,  # type: ignore[index]
    }
    step = size + _GAP
    left = (figure.get_figwidth() - len(shown) * step + _GAP) / 2
    for number, (heading, values) in enumerate(shown.items()):
        axes = panel(left + number * step, 0.6, size)
        axes.set_title(heading, fontsize=9, pad=3)
        if values is None:
            axes.imshow(picture)
        else:
            axes.imshow(_numpy(values[index]), cmap=colours, vmin=low, vmax=high, extent=(0, width, height, 0))
        if mask is not None and mask.any():
            places = (np.arange(width) + 0.5, np.arange(height) + 0.5)
            axes.contour(*places, mask, levels=[0.5], colors="#00e5ff", linewidths=1)
    _colour_bar(figure, (left + step, 0.6 + size + 0.06, (len(shown) - 1) * step - _GAP), colours, low, high)


def _colour_bar(figure: Figure, place: tuple[float, float, float], colours: str, low: float, high: float) -> None:
    left, top, length = place
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + 0.1) / height, length / width, 0.1 / height))
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours), cax=axes, orientation="horizontal")
    bar.set_ticks([low, (low + high) / 2, high])
    bar.ax.tick_params(labelsize=7, length=2, pad=1)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()
