# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``FiSeCLIP``: the Lightning module that anomalib's engine, CLI and pipelines run."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from anomalib.models.components import AnomalibModule
from torchmetrics.functional import spearman_corrcoef

from anomalib_fbclip import registration
from anomalib_fbclip.common.functional import is_exporting, pixels_checked
from anomalib_fbclip.data.picture_folder import PictureFolder
from anomalib_fbclip.host.calibration import NormalScores
from anomalib_fbclip.host.clip_module import CLIPModule
from anomalib_fbclip.host.post_processing import LABELS
from anomalib_fbclip.host.tiling import Place
from anomalib_fbclip.host.unreadable import UNREADABLE, files_of, read_item, read_picture
from anomalib_fbclip.host.validation import is_preparation

from .bank import content_keys
from .torch_model import DEFAULT_CLASS, MEMORY_TILES, FiSeCLIPModel

logger = logging.getLogger(__name__)

Pieces = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]
"""Of a reference image the whole ``[3, h, w]``, tiles of it and the key of its content ``[1]``."""

LEAST_IMAGES = 8
"""From so many images on, a contradiction of text and matching counts."""

CONTRADICTION = -0.2
"""Rank correlation of text and matching below which a run is its own outlier."""


class FiSeCLIP(CLIPModule, AnomalibModule):
    """FiSeCLIP: training-free CLIP whose test images are each other's references (ICCV 2025 workshops).

    Nothing is trained: ``anomalib train``, ``test`` and ``predict`` work at once, as with WinCLIP. The result of an
    image depends on its batch and on the last images seen before it; both begin anew with every run of validation,
    test or prediction and are in no checkpoint. With several devices each sees its own share of the images only, so
    that results depend on their number. Images are matched within their category, where the data set's table of samples
    names one (column ``category``), and all together elsewhere.

    Args:
        backbone: open_clip model name, or ``"tiny"`` for the small trained backbone inside this package.
        pretrained: Backbone weights: an open_clip tag, a local file, or ``None`` for random ones.
        feature_layers: Blocks whose tokens are matched, counted from 1. ``None``: 6, 12, 18, 24, at the same relative
            depths in another tower.
        class_name: Noun in the prompts. ``None``: the category of the data set, else "object".
        correlation: Attention of the restored path: ``qq-kk``, ``qq``, ``kk`` or ``vv``. ``none``: CLIP's own tokens.
            ``auto``: ``qq-kk``, and ``none`` with ``tiny``.
        semantic_blocks: How many of the last blocks the restored path runs through.
        temperature: Divides the cosine of tokens and text.
        refinement: Share of an image's patches, the most similar ones, that the text map is averaged over; 0: none.
        filter_share: Share of each image's patches, the most abnormal by text, that are no reference; at most 0.5.
        matching: ``False``: the text map alone.
        neighbourhoods: Sides of the neighbourhoods whose tokens are averaged before matching; odd. ``None``: 1, 3, 5 on
            a grid of 37 patches, the same shares of another grid.
        reference_share: Share of the reference images, the nearest ones, that a patch's distance is averaged over.
        bank_size: Reference images that an image gets at least, as soon as so many were seen; 0: the batch alone.
        shuffle: Match each image with ``bank_size`` images that are drawn at random from the whole run, and not with
            its batch and the images before it, which may be sorted. Results then depend neither on the batches nor on
            the order, which stays as it is; the drawn images are read twice. Without effect for ``bank_size=0``.
        seed: Of that choice.
        reference_source: Folder of good images that are references of all images beside the others, with all their
            patches. ``None``: none.
        text_weight: How much the text raises or lowers distances, in [0, 1].
        class_weight: Weight of the class token's text probability in the image score, in [0, 1].
        deviations: Robust standard deviations above the median distance at which the map is 0.5.
        smoothing_sigma: Gaussian smoothing of the map in pixels of the input; 0 switches it off.
        literal: Match pair by pair, in the literal form: slower, the same values up to rounding.
        **kwargs: Arguments of :class:`~anomalib_fbclip.host.clip_module.CLIPModule`. With ``tiles``, whole images are
            matched with whole images, and tiles with tiles of other images: 64 of a category, evenly chosen, or one of
            each image of ``reference_source`` if it has more. ``normal_source`` is a folder of two images or more here:
            they serve the thresholds alone, each is scored by the others, and they are no references of the images of
            a run.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range.
        FileNotFoundError: If a weights file does not exist.
        ConnectionError: If backbone weights are neither on this machine nor to be downloaded.

    Example:
        >>> from anomalib_fbclip import FiSeCLIP
        >>> FiSeCLIP(backbone="tiny").learning_type
        <LearningType.ZERO_SHOT: 'zero_shot'>
    """

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = "openai",
        *,
        feature_layers: Sequence[int] | None = None,
        class_name: str | None = None,
        correlation: str = "auto",
        semantic_blocks: int = 1,
        temperature: float = 0.07,
        refinement: float = 0.05,
        filter_share: float = 0.2,
        matching: bool = True,
        neighbourhoods: Sequence[int] | None = None,
        reference_share: float = 0.3,
        bank_size: int = 16,
        shuffle: bool = True,
        seed: int = 0,
        reference_source: str | None = None,
        text_weight: float = 0.8,
        class_weight: float = 0.3,
        deviations: float = 10.0,
        smoothing_sigma: float = 4.0,
        literal: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(backbone=backbone, pretrained=pretrained, **kwargs)
        if self.calibrator.normal_source is not None and matching and not bank_size:
            msg = f"normal_source={self.calibrator.normal_source!r} with bank_size=0: give bank_size=1 or more."
            raise ValueError(msg)
        self.build(
            FiSeCLIPModel,
            feature_layers=feature_layers,
            class_name=class_name,
            correlation=correlation,
            semantic_blocks=semantic_blocks,
            temperature=temperature,
            refinement=refinement,
            filter_share=filter_share,
            matching=matching,
            neighbourhoods=neighbourhoods,
            reference_share=reference_share,
            bank_size=bank_size,
            text_weight=text_weight,
            class_weight=class_weight,
            deviations=deviations,
            smoothing_sigma=smoothing_sigma,
            literal=literal,
        )
        if reference_source is not None and not matching:
            msg = f"reference_source={str(reference_source)!r} is not used with matching=False."
            raise ValueError(msg)
        if reference_source is not None and not Path(reference_source).expanduser().exists():
            msg = f"reference_source={str(reference_source)!r} does not exist: give a folder of good images."
            raise FileNotFoundError(msg)
        self.shuffle = shuffle
        self.seed = seed
        self.reference_source = str(reference_source) if reference_source is not None else None
        self._evidence: list[torch.Tensor] = []
        self._category = DEFAULT_CLASS
        self._categories: dict[str, str] = {}

    @property
    def learning_type(self) -> LearningType:
        """``ZERO_SHOT``: anomalib never trains it."""
        return LearningType.ZERO_SHOT

    @staticmethod
    def configure_optimizers() -> None:
        """None: nothing is trained."""

    def on_validation_epoch_start(self) -> None:
        """Begin a new stream of images."""
        self._start()

    def on_test_epoch_start(self) -> None:
        """Begin a new stream of images."""
        self._start()

    def on_predict_epoch_start(self) -> None:
        """Begin a new stream of images."""
        self._start()

    def on_validation_epoch_end(self) -> None:
        """Let thresholds follow; warn of images without references, and of those that contradict each other."""
        super().on_validation_epoch_end()
        if not is_preparation(self.trainer):  # the test or prediction that follows warns
            self._warn_of_references()

    def on_test_epoch_end(self) -> None:
        """Warn of images without references, and of those that contradict each other."""
        self._warn_of_references()

    def on_predict_epoch_end(self) -> None:
        """Warn of images without references, and of those that contradict each other."""
        self._warn_of_references()

    def to_torch(self, *args, **kwargs) -> Path:
        """Export as anomalib does, with the good images of ``reference_source``."""
        self.fill_references()
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401
        """Export the text map alone: a graph keeps no images to match with."""
        logger.warning(
            "The exported graph is FiSeCLIP's text side alone, without matching, for it has no memory of images. "
            "Export with export_type=torch to keep the whole method.",
        )
        # Computed before the graph is recorded, so that it holds features and no text tower.
        self.model.text_features(self.model.class_name or DEFAULT_CLASS)
        matching, self.model.matching = self.model.matching, False  # the thresholds are the text map's as well
        kept = self.thresholds
        if matching and kept is not None and kept["origin"] == LABELS:
            logger.warning(
                "The thresholds from labelled data are for the whole method: the graph gets 0.5. Give normal_source to "
                "have its own found.",
            )
            self.post_processor.set_thresholds(0.5, 0.5)
        try:
            return super().to_onnx(*args, **kwargs)
        finally:
            self.model.matching = matching
            if kept is not None:
                self.post_processor.set_thresholds(**kept)

    def _noun(self) -> str:
        """What the images of this run show, where their table does not say it."""
        category = getattr(getattr(self._trainer, "datamodule", None), "category", None)
        return category if isinstance(category, str) else DEFAULT_CLASS

    def calibration_state(self) -> object:
        """What thresholds from normal images depend on: also the word in the prompts, and matching."""
        return super().calibration_state(), self._noun(), self.model.matching

    def score_images(
        self,
        images: torch.Tensor,
        paths: Sequence[str | Path | None] | None = None,
    ) -> InferenceBatch:
        """Score and map of transformed images, as in a prediction, see :meth:`ScoringModule.score_images`."""
        # A list would fix the batch size of a recorded graph, whose word in the prompts is fixed anyway.
        return self._score(images, None if is_exporting() else [self._noun()] * len(images), paths)

    def score_unnamed(self, images: torch.Tensor) -> InferenceBatch:
        """Score and map of transformed images of whatever category."""
        return self._score(images, None)

    def _score(
        self,
        images: torch.Tensor,
        categories: list[str] | None,
        paths: Sequence[str | Path | None] | None = None,
        note: bool = False,
    ) -> InferenceBatch:
        """Score and map.

        Args:
            images: Transformed images ``[B, 3, H, W]``.
            categories: See :meth:`FiSeCLIPModel.forward`.
            paths: Files of the images.
            note: Whether the images count for the warning of :meth:`_warn_of_references`.
        """
        owners = None
        if self.tiling is not None and self.model.matching and not is_exporting():
            owners = content_keys(images)

        def of_whole(images: torch.Tensor) -> InferenceBatch:
            stages = self.model.analyse(images, categories, owners)
            if note:
                evidence = (stages.refined_map.amax(dim=1), stages.distances.amax(dim=1), stages.num_references)
                self._evidence.append(torch.stack(evidence))  # read at the end of the run: here the host would wait
            return self.model.predict(stages, images.shape[-2:])

        def of_tiles(tiles: torch.Tensor, _: Sequence[Place]) -> InferenceBatch:
            # Tiles come tile by tile. A recorded graph must not ask for their number, which would fix it.
            stages = self.model.analyse(
                tiles,
                None if categories is None else categories * (len(tiles) // len(images)),
                None if owners is None else owners.repeat(len(tiles) // len(images)),
                tiles=True,
            )
            return self.model.predict(stages, tiles.shape[-2:])

        if self.tiling is None:
            return of_whole(images)
        if owners is not None:
            number = max(self.model.bank.size, len(images))
            for name in dict.fromkeys(categories or [DEFAULT_CLASS]):
                pieces = [
                    self._split(image, None if paths is None else paths[place], number)
                    for place, image in enumerate(images)
                    if categories is None or categories[place] == name
                ]
                self.model.add_tiles(*_tiles_of(pieces), name)
        return self.tiling(of_whole, images, of_tiles, self.touched(images, paths))

    def score_normal(self, source: str | Path) -> NormalScores:
        """Score the images by each other: they go into the bank in a first pass, so that none of them is alone.

        Raises:
            ValueError: If there is one image only.
        """
        warn_alone, self.model.warn_alone = self.model.warn_alone, False
        self.fill_references()
        self.model.reset()
        try:
            if self.model.matching:
                first = super().score_normal(source)
                if len(first.scores) == 1:
                    msg = f"normal_source={str(source)!r} holds one image that can be read, but they are scored by "
                    msg += f"each other: give two or more. {first.unreadable or ''}"
                    raise ValueError(msg.rstrip())
            return super().score_normal(source)
        finally:
            self.model.reset()
            self.model.warn_alone = warn_alone

    def _start(self) -> None:
        """Forget the images of the run before, and look up what the images of this run show."""
        self.model.reset()
        self._category = self._noun()
        self._categories = {}
        for tables in (self.trainer.val_dataloaders, self.trainer.test_dataloaders, self.trainer.predict_dataloaders):
            for loader in tables if isinstance(tables, (list, tuple)) else (tables,):
                samples = getattr(getattr(loader, "dataset", None), "samples", None)
                if samples is not None and "category" in samples:
                    self._categories |= dict(zip(samples["image_path"], samples["category"].astype(str), strict=True))
        self._evidence = []
        if self.model.matching:
            self.fill_references()
            if self.shuffle and self.model.bank.size:
                self._draw_sample()
        nouns = {self.model.class_name} if self.model.class_name else set(self._categories.values()) or {self._category}
        logger.info("Prompts speak of: %s (class_name sets another word).", ", ".join(sorted(nouns)))

    def fill_references(self) -> None:
        """Read the good images of ``reference_source`` once."""
        if self.reference_source is None or self.model.trusted is not None:
            return
        files = PictureFolder(self.reference_source).image_filenames
        pieces = [self._split(self._prepare(read_picture(file), file), file, len(files)) for file in files]
        _set_references(self.model.set_trusted, pieces, self._noun())
        logger.info("%d good images of reference_source are references.", len(files))

    def _split(self, image: torch.Tensor, path: str | Path | None, number: int) -> Pieces:
        """An image as references have it: the whole, some of its tiles, and the key of all of them.

        Args:
            image: Transformed image ``[3, H, W]``.
            path: Its file.
            number: Images that share the memory of tiles.
        """
        key = content_keys(image[None])
        if self.tiling is None:
            return image, [], key
        # Of each image others, so that all places of the images are among the references.
        most, region = max(1, MEMORY_TILES // number), self.touched(image[None], [path])
        whole, *tiles = self.tiling.pieces(image[None], most, int(key), region)
        return whole, tiles, key

    def _draw_sample(self) -> None:
        """Draw the references of each category from the whole run; files that cannot be read are passed over."""
        places: dict[str, list[tuple[Any, int]]] = {}
        for dataset in self._datasets():
            for index, path in enumerate(files_of(dataset)):
                places.setdefault(self._categories.get(str(path), self._category), []).append((dataset, index))
        for category, found in places.items():
            generator = torch.Generator().manual_seed(self.seed)
            images: list[Pieces] = []
            number = min(len(found), self.model.bank.size)
            for place in torch.randperm(len(found), generator=generator).tolist():
                if len(images) == number:
                    break
                with suppress(*UNREADABLE):
                    item = read_item(*found[place])
                    image = self._prepare(item.image, item.image_path)
                    images.append(self._split(image, item.image_path, number))
            if images:
                _set_references(self.model.set_sample, images, category)

    def _datasets(self) -> list[Any]:
        """Data sets of the loop that is running."""
        trainer = self.trainer
        if trainer.predicting:
            loaders = trainer.predict_dataloaders
        else:
            loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        return [loader.dataset for loader in loaders if hasattr(loader, "dataset")]

    def _prepare(self, image: torch.Tensor, path: str | Path | None) -> torch.Tensor:
        """An image of a data set ``[3, H, W]`` as the model takes it."""
        transform = getattr(self.pre_processor, "transform", None)
        image = image[None].to(self.device)
        return self.look(image if transform is None else transform(image), [path])[0]

    def _predict(self, batch: Batch) -> Batch:
        self.check_images(batch)
        paths = batch.image_path or [""] * len(batch.image)
        categories = [self._categories.get(path, self._category) for path in paths]
        with pixels_checked():
            found = self._score(self.look(batch.image, batch.image_path), categories, batch.image_path, note=True)
        return batch.update(**self.cut(found, batch.image_path, batch.image.shape[-2:])._asdict())

    def _warn_of_references(self) -> None:
        """Warn of images without references, and where what the text calls normal lies farthest from the references.

        The method takes the references of a run for mostly normal. Where most are anomalous, or of another kind, the
        good images are those that match nowhere. The text does not depend on the references, and tells.
        """
        evidence, self._evidence = self._evidence, []
        if not evidence:
            return
        text, distance, references = torch.cat(evidence, dim=1).cpu()
        alone = int((references == 0).sum())
        if alone and self.model.matching:
            logger.warning(
                "%d of %d images had no reference (the first of their category, each alone in its batch): they are "
                "scored by the text alone. Give batches of two images or more.",
                alone,
                len(references),
            )
        text, distance = text[references > 0], distance[references > 0]
        if len(text) < LEAST_IMAGES:
            return
        agreement = float(spearman_corrcoef(text, distance))
        if agreement < CONTRADICTION:
            logger.warning(
                "The images of this run are their own outliers: those that the text calls normal match the others "
                "least (rank correlation %.2f over %d images). Most of them may be anomalous, or of another kind, and "
                "the scores inverted: give reference_source, a folder of good images.",
                agreement,
                len(text),
            )


def _tiles_of(images: Sequence[Pieces]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tiles of images, and of each the key of its image."""
    tiles = [tile for _, own, _ in images for tile in own]
    return tiles, torch.cat([key.expand(len(own)) for _, own, key in images])


def _set_references(take: Callable[..., None], images: Sequence[Pieces], category: str) -> None:
    """Hand images over to :meth:`FiSeCLIPModel.set_sample` or its like, and their tiles."""
    take([whole for whole, _, _ in images], category, torch.cat([key for _, _, key in images]))
    tiles, owners = _tiles_of(images)
    if tiles:
        take(tiles, category, owners, tiles=True)


registration.register_models()
