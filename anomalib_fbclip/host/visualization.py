# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Result images of a prediction, one strip for each file, also in nested folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.utils.path import convert_to_title_case, generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import visualize_anomaly_map
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_fbclip.common.files import below, common_root, replacing

from .batches import on_host
from .components import Component, components_of, original_size
from .processes import gather, own_number
from .regions import inside_of
from .unreadable import predicted_files, read_picture
from .verdicts import ANOMALOUS, NORMAL, Verdict, is_calibrated, judge

_TEXT_SIZE = 15
_GAP = 8
_BAR = 12
_BAR_HEIGHT = 80
_ELONGATED = 2
"""Ratio of sides from which on panels are twice as long; wide ones then stand below each other."""

_BACKGROUND, _TEXT, _MUTED = "white", (30, 30, 30), (110, 110, 110)
_BOX, _PALE = (255, 220, 0), 0.65
_COLOURS = {ANOMALOUS: (185, 20, 20), NORMAL: (10, 110, 50)}
_OVERLAYS = [("image", ["pred_mask"]), ("image", ["anomaly_map"])]


class PredictionVisualizer(ImageVisualizer):
    """anomalib's visualizer with verdict, score and scale, in the proportions of the image.

    A strip has a line with verdict and score, the panels of anomalib's visualizer in the proportions of the original
    image (side by side, or below each other for wide images), and the scale of the map with its threshold as a bar.
    Where the thresholds rest on nothing the line says ``uncalibrated`` and nothing is outlined or marked. What is
    marked is outlined, with a box around each component. What is outside of a region is pale. Strips are PNG files.

    anomalib keeps a file's last folder only, so ``line1/good/0.png`` and ``line2/good/0.png`` overwrite each other.
    Here all folders below the one that the files have in common are kept, and its name. Tests write as anomalib does.

    Args:
        size: Longest side of a panel in pixels, twice that for images of 2 : 1 or more; small images are enlarged.
        name_by: ``"path"``: strips are named as their images. ``"score"``: rank and score come first, such as
            ``0007_0.913_<name>.png`` for the image with the seventh highest score; renamed at the end of a run.
        overlay_fields: As anomalib's. ``None``: the outline of what is above the map's threshold, and the map.
        text_config: As anomalib's; ``{"enable": False}`` leaves the line, captions and bar out.
        **kwargs: As anomalib's, except ``field_size``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from anomalib_fbclip import FBCLIP
        >>> model = FBCLIP(backbone="tiny", visualizer=PredictionVisualizer(size=512, name_by="score"))
    """

    output_dir: str | Path | None
    _root: Path | None = None

    def __init__(
        self,
        size: int = 320,
        name_by: str = "path",
        overlay_fields: list[tuple[str, list[str]]] | None = None,
        text_config: dict[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if size < 16:
            msg = f"size={size}: give 16 pixels or more."
            raise ValueError(msg)
        if name_by not in {"path", "score"}:
            msg = f"name_by={name_by!r}: choose 'path' or 'score'."
            raise ValueError(msg)
        super().__init__(overlay_fields=overlay_fields or _OVERLAYS, text_config=text_config, **kwargs)
        self.size = size
        self.name_by = name_by
        self.renamed: dict[Path, Path] = {}
        self._written: dict[Path, float] = {}

    def visualize(
        self,
        predictions: Any,  # noqa: ANN401  # as anomalib's
        post_processor: object = None,
        inside: torch.Tensor | None = None,
    ) -> Any:  # noqa: ANN401  # as anomalib's
        """One strip for each image.

        Args:
            predictions: Item or batch, post-processed.
            post_processor: Where thresholds come from. ``None``: they are 0.5 and taken for granted.
            inside: Pixels of the maps that belong to the regions, ``[H, W]`` or for a batch ``[B, H, W]``. ``None``:
                all.

        Returns:
            An image, a list of them for a batch of several, or ``None`` without anything to draw.
        """
        if isinstance(predictions, ImageBatch):
            cut = [None] * len(predictions.image) if inside is None else list(inside)
            strips = [self.visualize(item, post_processor, one) for item, one in zip(predictions, cut, strict=True)]
            return strips[0] if len(strips) == 1 else strips
        if not isinstance(predictions, ImageItem):
            return super().visualize(predictions)
        calibrated = is_calibrated(post_processor)
        panels = self._panels(predictions, calibrated, inside)
        if not panels or not self.text_config["enable"]:
            return _beside(list(panels.values())) if panels else None
        verdict = judge(predictions, calibrated, post_processor) if predictions.pred_score is not None else None
        threshold = getattr(post_processor, "normalized_pixel_threshold", 0.5) if calibrated else None
        font = self._font(self.text_config["size"] or _TEXT_SIZE)
        return _strip(
            panels,
            verdict,
            None if predictions.pred_score is None else float(predictions.pred_score),
            None if threshold is None else float(threshold),
            font,
        )

    def _panels(
        self,
        item: ImageItem,
        calibrated: bool,
        inside: torch.Tensor | None = None,
    ) -> dict[str, Image.Image]:
        """Caption and image of each panel, in the proportions of the original image."""
        size = _panel_size(item, self.size)
        # Resized here, so that an outline has the same width on all sides of an elongated image.
        sized = ImageItem(
            image=item.image,
            image_path=item.image_path,
            gt_mask=_resized(item.gt_mask, size),
            pred_mask=_resized(item.pred_mask, size) if calibrated else None,
            anomaly_map=_resized(item.anomaly_map, size),
        )
        present = {
            field for field in ("image", "gt_mask", "pred_mask", "anomaly_map") if getattr(sized, field) is not None
        }
        fields = [field for field in self.fields if field in present]
        overlays = [(base, [o for o in over if o in present]) for base, over in self.overlay_fields if base in present]
        overlays = [(base, over) for base, over in overlays if over]
        row = visualize_image_item(
            sized,
            fields=fields,
            overlay_fields=overlays,
            field_size=size,
            fields_config=self.fields_config,
            overlay_fields_config=self.overlay_fields_config,
            text_config={"enable": False},
        )
        if row is None:
            return {}
        names = [[field] for field in fields] + [[base, *over] for base, over in overlays]
        captions = [" + ".join(convert_to_title_case(field) for field in name) for name in names]
        width, height = size
        panels = [row.crop((place * width, 0, (place + 1) * width, height)) for place in range(len(names))]
        if calibrated:
            marked = components_of(item)
            for panel, name in zip(panels, names, strict=True):
                if name[-1] == "pred_mask":
                    _draw_boxes(panel, marked, original_size(item.image_path, tuple(item.image.shape)))
        if inside is not None:
            # A batch of files comes without their pixels, see on_host.
            image = item.image if item.image_path is None else read_picture(Path(item.image_path))
            panels = [_pale_outside(panel, image, _resized(inside, size)) for panel in panels]
        return dict(zip(captions, panels, strict=True))

    def _font(self, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        name = self.text_config["font"]
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to rank anew."""
        del trainer, pl_module
        self._written, self.renamed = {}, {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one strip for each image of the batch; of several processes, one writes it."""
        del outputs
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        datamodule = getattr(trainer, "datamodule", None)
        for item in list(on_host(batch))[: own_number(trainer, batch_idx, dataloader_idx)]:
            target = generate_output_filename(
                input_path=item.image_path or "",
                output_path=self.output_dir,
                dataset_name=getattr(datamodule, "name", None),
                category=getattr(datamodule, "category", None),
            )
            self._write(item, _as_png(Path(target)), pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the strips their ranks, if wanted."""
        del pl_module
        self._rank(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the folder that all files have in common."""
        self.on_test_start(trainer, pl_module)
        self._root = common_root(predicted_files(trainer))

    def picture_path(self, image_path: str | Path) -> Path:
        """Where the strip of a file is written, below ``output_dir``, before it is ranked."""
        return _as_png(below(image_path, self._root))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write one strip for each image of the batch."""
        del outputs, batch_idx, dataloader_idx
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        for number, item in enumerate(on_host(batch)):
            target = Path(self.output_dir) / self.picture_path(item.image_path or f"unnamed/{number}.png")
            self._write(item, target, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the strips their ranks, if wanted."""
        del pl_module
        self._rank(trainer)

    def _write(self, item: ImageItem, target: Path, pl_module: LightningModule) -> None:
        inside = inside_of(pl_module, [item.image_path], None if item.anomaly_map is None else item.anomaly_map[None])
        strip = self.visualize(
            item,
            getattr(pl_module, "post_processor", None),
            None if inside is None else inside.reshape(inside.shape[-2:]),
        )
        if strip is None:
            return
        _save(strip, target)
        if self.name_by == "score" and item.pred_score is not None:
            self._written[target] = float(item.pred_score)

    def _rank(self, trainer: Trainer) -> None:
        if self.name_by != "score":
            return
        ranked = sorted(gather(trainer, list(self._written.items())), key=lambda row: (-row[1], str(row[0])))
        digits = max(4, len(str(len(ranked))))
        for rank, (path, score) in enumerate(ranked, start=1):
            target = path.with_name(f"{rank:0{digits}d}_{score:.3f}_{path.name}")
            self.renamed[path] = target
            if path in self._written:
                path.replace(target)
        self._written = {}


def _save(strip: Image.Image, target: Path) -> None:
    with replacing(target) as file:
        # Half the time of the default level, for files of nearly the same size.
        strip.save(file, compress_level=4)


def _as_png(path: Path) -> Path:
    """The same name for PNG; else with ``.png`` behind it, so that ``0.jpg`` and ``0.png`` stay apart."""
    return path if path.suffix.lower() == ".png" else path.with_name(f"{path.name}.png")


def _panel_size(item: ImageItem, longest: int) -> tuple[int, int]:
    """Width and height of a panel, in the proportions of the original image."""
    height, width = original_size(item.image_path, tuple(item.image.shape))
    elongated = max(width, height) >= _ELONGATED * min(width, height)
    scale = longest * (1 + elongated) / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(values: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor | None:
    """Map or mask ``[H, W]`` at a width and height."""
    if values is None:
        return None
    flat = values.detach().cpu().reshape(1, 1, *values.shape[-2:]).float()
    shape = size[::-1]
    if values.dtype == torch.bool:
        return functional.interpolate(flat, shape, mode="nearest-exact")[0, 0].bool()
    return functional.interpolate(flat, shape, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def _draw_boxes(panel: Image.Image, marked: Sequence[Component], size: tuple[int, int]) -> None:
    """Draw a box around each component of an image of a height and width."""
    pen = ImageDraw.Draw(panel)
    rows, columns = panel.height / size[0], panel.width / size[1]
    for left, top, right, bottom in (component.box for component in marked):
        corners = (left * columns - 3, top * rows - 3, right * columns + 2, bottom * rows + 2)
        pen.rectangle(corners, outline=_BOX)


def _pale_outside(panel: Image.Image, image: torch.Tensor, inside: torch.Tensor | None) -> Image.Image:
    """A panel that shows the image, pale, where it is outside of the region."""
    if inside is None:
        return panel
    plain = to_pil_image(image.detach().cpu().float().clamp(0, 1)).convert("RGB").resize(panel.size)
    pale = Image.blend(plain, Image.new("RGB", plain.size, _BACKGROUND), _PALE)
    return Image.composite(panel.convert("RGB"), pale, to_pil_image(inside.float()))


def _beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels alone, in their order, beside or below each other."""
    width, height = panels[0].size
    below = width >= _ELONGATED * height
    size = (width, height * len(panels)) if below else (width * len(panels), height)
    strip = Image.new("RGB", size)
    for place, panel in enumerate(panels):
        strip.paste(panel, (0, place * height) if below else (place * width, 0))
    return strip


def _strip(
    panels: dict[str, Image.Image],
    verdict: Verdict | None,
    score: float | None,
    threshold: float | None,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> Image.Image:
    """Panels with captions, the line above them, and the bar at the right."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    line = int(font.getbbox("Ag")[3]) + 4
    head = [] if verdict is None or score is None else [_say(verdict, score), *([verdict.note] if verdict.note else [])]
    width, height = next(iter(panels.values())).size
    below = width >= _ELONGATED * height
    cell = max([width, *(int(pen.textlength(caption, font=font)) + 1 for caption in panels)])
    columns, rows = (1, len(panels)) if below else (len(panels), 1)
    top = _GAP + line * len(head)
    inner_height = rows * (line + height) + (rows - 1) * _GAP
    bar_height = max(inner_height - line, _BAR_HEIGHT)
    bar_left = _GAP + columns * (cell + _GAP)
    labels = int(pen.textlength("0.5 threshold" if threshold is not None else "1.0", font=font)) + 8
    total = max(
        bar_left + _BAR + labels + _GAP,
        *(int(pen.textlength(text, font=font)) + 2 * _GAP for text in ["", *head]),
    )
    strip = Image.new("RGB", (total, top + line + max(inner_height - line, bar_height) + 2 * _GAP), _BACKGROUND)
    pen = ImageDraw.Draw(strip)
    for number, text in enumerate(head):
        colour = _COLOURS.get(verdict.word, _TEXT) if verdict is not None and not number else _TEXT
        pen.text((_GAP, _GAP + number * line), text, fill=colour, font=font)
    for place, (caption, panel) in enumerate(panels.items()):
        left = _GAP + (0 if below else place * (cell + _GAP))
        upper = top + (place * (line + height + _GAP) if below else 0)
        pen.text((left, upper), caption, fill=_MUTED, font=font)
        strip.paste(panel, (left, upper + line))
    _draw_bar(strip, (bar_left, top + line), bar_height, threshold, font)
    return strip


def _say(verdict: Verdict, score: float) -> str:
    return f"{verdict.word}   score {score:.3f}" if verdict.word else f"score {score:.3f}"


def _draw_bar(
    strip: Image.Image,
    place: tuple[int, int],
    height: int,
    threshold: float | None,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """The colours of the map from 1 (top) to 0, and its threshold."""
    left, top = place
    strip.paste(visualize_anomaly_map(torch.linspace(1, 0, height)[:, None].expand(height, _BAR).contiguous()), place)
    pen = ImageDraw.Draw(strip)
    right = left + _BAR
    pen.text((right + 5, top), "1.0", fill=_MUTED, font=font, anchor="lt")
    pen.text((right + 5, top + height), "0.0", fill=_MUTED, font=font, anchor="lb")
    if threshold is not None and 0 <= threshold <= 1:
        level = top + round((1 - threshold) * (height - 1))
        pen.line((left - 3, level, right + 3, level), fill=_TEXT, width=2)
        pen.text((right + 5, level), f"{threshold:.2g} threshold", fill=_TEXT, font=font, anchor="lm")
