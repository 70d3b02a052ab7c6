# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``ScoringModule``: what the Lightning modules of all our models share, and the edges towards anomalib."""

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.utils.path import create_versioned_dir
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torchvision.transforms.v2.functional import resize

from anomalib_fbclip.common.arguments import check_arguments, plain
from anomalib_fbclip.common.console import escape_what_cannot_be_shown
from anomalib_fbclip.common.functional import as_json, pair, pixels_checked
from anomalib_fbclip.data.sets import shares_source

from . import checkpoints, export
from .calibration import Calibrator, NormalScores, normal_files, score_folder, set_thresholds
from .map_files import MapFiles
from .metrics import FullEvaluator, InsideEvaluator
from .parts import Parts
from .post_processing import FIXED, ProbabilityPostProcessor
from .prediction_index import PredictionIndex
from .processes import share_folder
from .regions import Regions
from .report import Report
from .thresholds import check_rate
from .tiling import Place, Tiling
from .unreadable import files_of, name_unreadable, predicted_files, read_picture, restore
from .validation import KeptPredictions, is_preparation, source_of, validates_on_test_images
from .verdicts import Confusion, how_to_calibrate, is_calibrated
from .visualization import PredictionVisualizer

logger = logging.getLogger(__name__)

_COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")


class ScoringModule(LightningModule):  # noqa: PLR0904  # hooks of Lightning
    """A Lightning module of anomalib whose ``model`` scores batches of images.

    anomalib lists the *direct* subclasses of its ``AnomalibModule`` as models. So this class is none, and each model
    names both: ``class FBCLIP(AdaptedModule, AnomalibModule)``. Its constructor passes the arguments of this one on and
    sets ``model`` and ``image_size``.

    Args:
        normal_source: A normal image or a folder of them, for thresholds without labels: see :meth:`calibrate`. They
            win over labelled validation data.
        false_alarm_rate: Wanted share of normal images above each threshold, in (0, 1); needs ``normal_source``.
        threshold: Threshold of score and map, such as 0.5, whatever the data say. ``None``: from ``normal_source``,
            else the adapter's from normal images, else from labelled validation data, else the adapter's other, else
            0.5.
        metrics: ``"default"``: anomalib's four, so that benchmark grids with its models work. ``"full"``: image
            AUROC, AUPR, F1Max and pixel AUROC, AUPR, AUPRO, F1Max.
        pre_processor: As in every anomalib model.
        post_processor: As in every anomalib model.
        evaluator: As in every anomalib model; overrides ``metrics``.
        visualizer: As in every anomalib model.
        report: Whether a prediction also writes one HTML page, see :class:`Report`.
        region: A mask, white inside, of the part of the images that is scored; or a folder of masks with the images'
            names, see :class:`Regions`. Training does not use it. ``None``: all of each image.
        crop_to_region: Cut images to the bounding box of the region before the resize, so that it fills the input.
        region_fill: What the model sees in place of the pixels outside of the region: ``"nearest"``, the nearest pixel
            inside, for better maps; ``"mean"``, CLIP's mean colour, for better image scores.
        min_area: Least area of a defect in pixels of the original image: smaller marked components are not shown, and
            do not make an image anomalous. 0: all count.
        save_maps: Write the maps of tests and predictions as numbers at the size of the images, see :class:`MapFiles`:
            ``"png"`` (16 bit) or ``"npy"``. ``None``: not.
        group_by: Regular expression that finds the part in the path of an image: the images of one part get one score,
            threshold and verdict, see :class:`Parts`. ``"data"``: the data module's own pattern. ``None``: each image
            is judged by itself alone.
        part_score: How the scores of its images make the score of a part: ``log_odds``, ``max``, ``mean`` or ``any``.

    Attributes:
        regions: The region, or regions; ``None`` without.
        model: The torch model.
        image_size: Height and width of the input in pixels; one number for a square.
        weights: The adapter of a model that has one.
        source: What the adapter was trained on, as far as it is known.
        tiling: How images are cut into tiles; ``None``: not.
        calibrator: What the user wants of the thresholds.
        export_metadata: What an exported file says about itself.
        validates_on_test_images: Whether the data module of the last run validates on the images that it tests.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range.
    """

    image_size: int | tuple[int, int]
    calibrator: Calibrator
    weights: str | None = None
    source: str | None = None
    export_metadata: dict[str, Any] | None = None
    validates_on_test_images = False
    tiling: Tiling | None = None
    _warned_uniform = False
    _kept: KeptPredictions | None = None
    _limit_val_batches: int | float | None = None
    _warned_outside = False
    regions: Regions | None = None
    parts: Parts | None = None
    _named: Sequence[Any] = ()

    def __init__(
        self,
        normal_source: str | None = None,
        false_alarm_rate: float = 0.05,
        threshold: float | None = None,
        metrics: str = "default",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        report: bool = False,
        region: str | Path | None = None,
        crop_to_region: bool = False,
        region_fill: str = "nearest",
        min_area: int = 0,
        save_maps: str | None = None,
        group_by: str | None = None,
        part_score: str = "log_odds",
    ) -> None:
        # Buffers made in inference mode could not be changed later, parameters not be trained.
        with torch.inference_mode(mode=False):
            super().__init__(pre_processor, post_processor, evaluator, visualizer)
        settings = {name: value for name, value in self.hparams.items() if name not in _COMPONENTS}
        for base in type(self).__mro__:
            if issubclass(base, ScoringModule):
                check_arguments(base.__init__, settings)
        # Checkpoints hold plain types only, and get_model hands over OmegaConf's lists.
        self.hparams.update({name: plain(value) for name, value in settings.items()})
        if metrics not in {"default", "full"}:
            msg = f"metrics={metrics!r}: choose 'default' or 'full'."
            raise ValueError(msg)
        for name, value, default in (
            ("crop_to_region", crop_to_region, False),
            ("region_fill", region_fill, "nearest"),
        ):
            if value != default and region is None:
                msg = f"{name}={value!r} without a region: give region, a mask or a folder of masks."
                raise ValueError(msg)
        self.regions = None if region is None else Regions(region, crop_to_region, region_fill)
        if evaluator is True:
            plain_metrics = [*self.evaluator.test_metrics]  # type: ignore[has-type]  # anomalib's
            self.evaluator = FullEvaluator() if metrics == "full" else InsideEvaluator(test_metrics=plain_metrics)
        self.calibrator = Calibrator(
            self.post_processor,
            str(normal_source) if normal_source is not None else None,
            false_alarm_rate,
            threshold,
        )
        self.set_min_area(min_area)
        if part_score != "log_odds" and group_by is None:
            msg = f"part_score={part_score!r} without group_by: give the pattern of a part in the paths."
            raise ValueError(msg)
        self.parts = None if group_by is None else Parts(group_by, part_score)
        self._map_files = None if save_maps is None else MapFiles(save_maps)
        self._own_pre_processor = pre_processor is True
        self._report = report

    def set_min_area(self, min_area: int) -> None:
        """Set the least area of a defect, see the class.

        Raises:
            ValueError: If it is negative, or the post-processor is not this model's own.
        """
        if min_area < 0:
            msg = f"min_area={min_area}: give pixels of the original image, 1 or more, or 0 for no least area."
            raise ValueError(msg)
        if min_area:
            if not isinstance(self.post_processor, ProbabilityPostProcessor):
                msg = f"min_area={min_area} needs this model's own post-processor: leave post_processor at True."
                raise ValueError(msg)
            self.post_processor.min_area = min_area

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing: what the user's trainer says wins."""
        return {}

    def setup(self, stage: str) -> None:
        """Have unreadable files and checkpoints named, warn of tests that tell little, keep ``latest`` a link.

        A run of test or predict would otherwise leave a real folder of that name.
        """
        escape_what_cannot_be_shown()
        if self.trainer.world_size > 1:
            share_folder(self.trainer)
        datamodule = getattr(self.trainer, "datamodule", None)
        tested = getattr(datamodule, "targets", [datamodule] if datamodule is not None else [])
        if stage == "test" and self.weights is not None and shares_source(self.source, tested):
            logger.warning(
                "The adapter was trained on %s, which is tested now: this is not zero-shot, the numbers are too good.",
                self.source,
            )
        if stage == "test":
            _warn_of_one_class(tested)
            _warn_of_no_masks(tested)
        self.validates_on_test_images = validates_on_test_images(datamodule)
        if is_preparation(self.trainer):
            self._kept = KeptPredictions() if self.validates_on_test_images else None
            if self._learns_nothing():
                self._limit_val_batches, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0
        self._named = name_unreadable(self.trainer, stage, one_size=self.fits_images)
        if self.regions is not None and stage != "fit":
            for name in {"validate": ("val_data",), "test": ("test_data",)}.get(stage, ()):
                self.regions.check(files_of(getattr(datamodule, name, None)))
        checkpoints.name_damaged(self.trainer)
        root = Path(self.trainer.default_root_dir)
        if root.name == "latest" and not root.exists() and self.trainer.is_global_zero:
            # A run of test or predict before the first train would leave a real folder where train expects a link.
            create_versioned_dir(root.parent)

    def teardown(self, stage: str) -> None:
        """Leave the data sets as they were."""
        super().teardown(stage)
        restore(list(self._named))
        self._named = ()
        if self._limit_val_batches is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        if stage != "validate":
            self._kept = None

    @property
    def fits_images(self) -> bool:
        """Whether the size of an image after the resize depends on its size before."""
        return bool(getattr(self.pre_processor, "fits_images", False))

    def forget_validation(self) -> None:
        """Score each image of the coming test anew, also where the validation has just scored it: for timings."""
        self._kept = None

    def _learns_nothing(self) -> bool:
        """Whether a validation before a test or prediction changes no threshold and computes no metric."""
        if getattr(self.evaluator, "val_metrics", None) or not isinstance(
            self.post_processor,
            ProbabilityPostProcessor,
        ):
            return False
        # The model itself has no validation data: see val_dataloader().
        return source_of(self.trainer) is self or self.calibrator.wants_own or not self.post_processor.takes_labels

    def configure_callbacks(self) -> list[Callback]:
        """The components; a table of each prediction, the confusion matrix of each test; the report if wanted."""
        # Named here even if the trainer has them: Lightning then moves them behind the post-processor.
        callbacks = super().configure_callbacks()
        wanted: dict[type[Callback], Callback | None] = {
            Confusion: Confusion(),
            MapFiles: self._map_files,
            PredictionIndex: PredictionIndex(),
            Parts: self.parts,
            Report: Report() if self._report else None,
        }
        for kind, ours in wanted.items():
            given = [callback for callback in self.trainer.callbacks if isinstance(callback, kind)]
            callbacks = [*callbacks, *(given or ([ours] if ours is not None else []))]
        return callbacks

    def validation_step(self, batch: Batch, *args, **kwargs) -> Batch:
        """Scores and maps of one batch."""
        del args, kwargs
        self._cut_truth(batch)
        batch = self._noted(self._predict(batch))
        if self._kept is not None:
            self._kept.add(batch)
        return batch

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> Batch:
        """Scores and maps of one batch."""
        del batch_idx, args, kwargs
        self._cut_truth(batch)
        kept = self._kept.take(batch) if self._kept is not None else None
        return self._noted(self._predict(batch) if kept is None else batch.update(**kept))

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """Scores and maps of one batch."""
        del batch_idx, dataloader_idx
        return self._noted(self._predict(batch))

    def forward(self, batch: torch.Tensor, *args, **kwargs) -> InferenceBatch:
        """Score raw images, as an exported file does: region, pre-processing, model, post-processing.

        Args:
            batch: Raw images ``[B, 3, h, w]`` in [0, 1].
            *args: Not used.
            **kwargs: Not used.

        Raises:
            ValueError: If there is a folder of regions: images without names have none.
        """
        del args, kwargs
        images = batch if self.regions is None else self.regions.crop_raw(batch)
        images = self.pre_processor(images) if self.pre_processor else images
        images = images if self.regions is None else self.regions.fill(images, [None])
        found = self.score_unnamed(images)
        found = found if self.regions is None else self.regions.cut(found, [None], self._map_size(batch))
        found = self.post_processor(found) if self.post_processor else found
        if getattr(self.post_processor, "min_area", 0) and found.pred_mask is not None:
            sizes = [(batch.shape[-2], batch.shape[-1])] * (1 if torch.compiler.is_exporting() else len(batch))
            masks, labels = self.post_processor.without_small(found.pred_mask, found.pred_label, sizes)
            found = found._replace(pred_mask=masks, pred_label=labels)
        return found

    def on_validation_epoch_end(self) -> None:
        """Let thresholds from normal images follow what was trained."""
        self.calibrate_once()
        if self._kept is not None:
            self._kept.state = self.calibration_state()

    def on_test_start(self) -> None:
        """Set the thresholds that the user asked for; forget the validation's scores if the model has changed."""
        self.calibrate_once()
        if self._kept is not None and self._kept.state != self.calibration_state():
            self._kept = None

    def on_predict_start(self) -> None:
        """Set the thresholds that the user asked for."""
        if self.regions is not None:
            self.regions.check(predicted_files(self.trainer))
        self.calibrate_once()

    def on_test_end(self) -> None:
        """Log where the strips are and, in the last line, how to calibrate a model that is not."""
        if not self.trainer.is_global_zero:
            return
        directory = getattr(self.visualizer, "output_dir", None)
        if directory is not None and Path(directory).is_dir():
            logger.info("Strips: %s", directory)
        if not is_calibrated(self.post_processor):
            logger.warning(
                "Uncalibrated: no good images, labels or number set the thresholds, so scores come without verdicts. "
                "To calibrate: %s",
                how_to_calibrate(self.trainer),
            )

    def on_predict_end(self) -> None:
        """As at the end of a test."""
        self.on_test_end()

    @staticmethod
    def val_dataloader() -> list:
        """No validation data of its own: lets ``predict`` run on a folder alone."""
        return []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone and the evaluator out of the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoints.strip(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone, keep this model's image size."""
        checkpoints.check(self, checkpoint)
        super().on_load_checkpoint(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args, **kwargs) -> "ScoringModule":
        """Load a model from a checkpoint, as Lightning's, and name a file that cannot be read.

        Raises:
            ValueError: If the file is cut off, altered, of another kind, or holds code.
        """
        with checkpoints.named(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> object:
        """Load a state dict with or without backbone and evaluator."""
        return super().load_state_dict(checkpoints.refill(self, state_dict), strict=strict, assign=assign)

    def calibrate_once(self) -> None:
        """Set the thresholds that the user asked for; images are read once for the parameters as they are."""
        self.calibrator.set_once(self.post_processor, self.calibration_state, self.score_normal, self.parts)

    def calibrate(self, normal_source: str | Path, false_alarm_rate: float = 0.05) -> dict[str, Any]:
        """Set the thresholds from normal images, see :func:`~anomalib_fbclip.host.calibration.set_thresholds`.

        Args:
            normal_source: A normal image or a folder of them.
            false_alarm_rate: Wanted share of normal images above each threshold, in (0, 1).

        Returns:
            dict: Thresholds and what is known of them.

        Raises:
            TypeError: If the post-processor is not this model's own, or the pre-processor has no transform.
            ValueError: If no image can be read, or the rate is not in (0, 1).
            FileNotFoundError: If there is no such folder.
        """
        check_rate(false_alarm_rate)
        if not isinstance(self.post_processor, ProbabilityPostProcessor):
            name = type(self.post_processor).__name__
            msg = f"post_processor={name}: it has no thresholds to calibrate. Build the model with post_processor=True."
            raise TypeError(msg)
        return set_thresholds(self.post_processor, self.score_normal(normal_source), false_alarm_rate, self.parts)

    def fill_memory(self) -> None:
        """Read the normal images that a model compares with; this one compares with none."""

    @torch.no_grad()
    def score_normal(self, source: str | Path) -> NormalScores:
        """Scores of the normal images of a folder, before post-processing.

        Raises:
            TypeError: If the pre-processor has no transform that could be applied to them.
        """
        if self.pre_processor and not callable(getattr(self.pre_processor, "transform", None)):
            name = type(self.pre_processor).__name__
            msg = f"pre_processor={name}: it has no transform for the good images. Build the model with another."
            raise TypeError(msg)
        self.fill_memory()
        training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()

        def predict(image: torch.Tensor, path: Path) -> InferenceBatch | None:
            image = image.to(device)
            image = self.pre_processor.transform(image) if self.pre_processor else image
            prediction = self.score_unseen(self.look(image, [path]), path)
            return None if prediction is None else self.cut(prediction, [path], image.shape[-2:])

        try:
            return score_folder(source, predict, getattr(self.post_processor, "min_area", 0))
        finally:
            self.model.train(training)

    def score_images(
        self,
        images: torch.Tensor,
        paths: Sequence[str | Path | None] | None = None,
    ) -> InferenceBatch:
        """Score and map of transformed images, as in a prediction.

        Args:
            images: Images as :meth:`look` returns them.
            paths: Their files.
        """
        if self.tiling is None:
            return self.model(images)
        return self.tiling(self.model, images, self.score_tiles, self.touched(images, paths))

    def score_tiles(self, tiles: torch.Tensor, places: Sequence[Place]) -> InferenceBatch:
        """Score and map of tiles.

        Args:
            tiles: ``[T * B, 3, size, size]``, tile by tile.
            places: Where the T tiles are.
        """
        del places
        return self.model(tiles)

    def score_unnamed(self, images: torch.Tensor) -> InferenceBatch:
        """Score and map of transformed images of which nothing else is known."""
        return self.score_images(images)

    def touched(self, images: torch.Tensor, paths: Sequence[str | Path | None] | None) -> torch.Tensor | None:
        """Pixels that show anything of the regions, ``[B, H, W]`` or ``[1, H, W]``; ``None``: all, or not known.

        Args:
            images: Images as :meth:`look` returns them.
            paths: Their files.
        """
        if self.regions is None or (paths is None and self.regions.mask is None):
            return None
        size = (int(images.shape[-2]), int(images.shape[-1]))
        known = [None] if paths is None or self.regions.mask is not None else paths
        return self.regions.touched(size, known).to(images.device)

    def score_unseen(self, images: torch.Tensor, path: Path) -> InferenceBatch | None:
        """The same as if the model had not seen this image before; ``None`` where it knows nothing else.

        Args:
            images: One transformed image ``[1, 3, H, W]``.
            path: Its file.
        """
        return self.score_images(images, [path])

    def calibration_state(self) -> object:
        """What thresholds from normal images depend on: they are found anew where it has changed."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return [(0 if t.is_inference() else t._version, t.shape) for t in tensors]  # noqa: SLF001  # no public name

    def calibration_settings(self) -> dict[str, Any]:
        """Settings that thresholds hold for, by the names that an adapter's metadata has for them."""
        return {
            "image_size": as_json(self.image_size),
            "region": None if self.regions is None else self.regions.digest(),
            "min_area": getattr(self.post_processor, "min_area", 0),
        }

    def identity(self) -> dict[str, str]:
        """What a checkpoint must have in common with the model: ``backbone``, its name, and ``fingerprint``."""
        raise NotImplementedError

    @property
    def thresholds(self) -> dict[str, Any] | None:
        """Thresholds and where they come from, for adapters and exports; ``None`` with a foreign post-processor."""
        return getattr(self.post_processor, "thresholds", None)

    def restore_thresholds(self, metadata: Mapping[str, Any]) -> None:
        """Take the thresholds of an adapter, where it has some for maps like those of this model."""
        stored = metadata.get("thresholds")
        if stored is None or not isinstance(self.post_processor, ProbabilityPostProcessor):
            return
        # A file from before it was stored, or a published one, is smoothed as in the papers.
        before = {"k_shot": 0, "smoothing_sigma": 4.0, "resize": "squash", "tiles": None, "overlap": None}
        before |= {"region": None, "min_area": 0, "memory_radius": None}
        theirs = {**before, **metadata}
        ours = self.calibration_settings()
        # A larger least area only removes false alarms.
        theirs["min_area"] = max(theirs["min_area"], ours["min_area"])
        different = [name for name, value in ours.items() if theirs[name] != value]
        if not different:
            self.post_processor.set_thresholds(**stored)
        elif stored["origin"] != FIXED:
            logger.warning(
                "The adapter's thresholds are for %s and not used with %s: give normal_source.",
                ", ".join(f"{name}={theirs[name]}" for name in different),
                ", ".join(f"{name}={ours[name]}" for name in different),
            )

    def describe(self, input_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """What an exported file says about itself, see :func:`~anomalib_fbclip.host.export.describe`."""
        return export.describe(self, input_size)

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as anomalib does, with thresholds, region and metadata."""
        self._prepare_region()
        self.calibrate_once()
        self.export_metadata = self.describe()
        return super().to_torch(export_root, model_file_name)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401  # passed through to torch.onnx.export
    ) -> Path:
        """Export as anomalib does, with thresholds and metadata, in one file.

        Args:
            export_root: Folder to write to.
            model_file_name: Name of the file.
            input_size: Height and width of the raw images. ``None``: the file takes images of any size; not where the
                resize depends on the size of the image.
            **kwargs: Passed through to ``torch.onnx.export``; ``dynamic_axes={}`` fixes the batch to one image.

        Raises:
            ValueError: If ``input_size`` is missing.
        """
        if input_size is None and self.fits_images:
            settings = ", ".join(f"{name}={value!r}" for name, value in self.calibration_settings().items())
            msg = f"{settings}: a graph has fixed sizes, give input_size, "
            msg += "height and width of the raw images (--input_size '[600,800]')."
            raise ValueError(msg)
        self._prepare_region(input_size)
        self.calibrate_once()
        options = {**export.onnx_options(self.model), **kwargs}
        # An exporter makes a sub-graph of every switch of gradients, too.
        with torch.no_grad():
            path = super().to_onnx(export_root, model_file_name, input_size, **options)
        # torch's tracing leaves a subclass under our name, which anomalib's command line finds as a second model.
        gc.collect()
        export.annotate(path, self.describe(input_size))
        return path

    def _prepare_region(self, input_size: tuple[int, int] | None = None) -> None:
        """Compute the region before a graph is recorded, so that it is a constant of it.

        Args:
            input_size: Height and width of the raw images; ``None``: the model takes images of one size.

        Raises:
            ValueError: If there is a folder of regions.
        """
        if self.regions is None:
            return
        raw = torch.zeros(1, 3, *(input_size or pair(self.image_size)))
        images = self.regions.crop_raw(raw)
        if self.pre_processor:
            images = self.pre_processor.transform(images)
        size = (images.shape[-2], images.shape[-1])
        for whole in (None, self._map_size(raw)):
            self.regions.view(size, whole=whole)
        self.regions.touched(size, [None])

    def _map_size(self, images: torch.Tensor) -> tuple[int, int] | None:
        """Height and width of the maps of raw images; ``None``: those of the model's input."""
        steps = getattr(getattr(self.pre_processor, "transform", None), "transforms", ())
        return next((step.fit(*images.shape[-2:]) for step in steps if hasattr(step, "fit")), None)

    def _post_training_quantization_ov(self, model: Any, datamodule: Any = None) -> Any:  # noqa: ANN401  # OpenVINO's
        """INT8_PTQ: weights and activations, calibrated on ``normal_source``, else on the data module's normal images.

        Raises:
            ValueError: If there is neither.
        """
        files = normal_files(self.calibrator.normal_source, datamodule)
        shape = model.input(0).get_partial_shape()
        size = None if shape[2].is_dynamic else (shape[2].get_length(), shape[3].get_length())
        images = (read_picture(file) for file in files)
        return export.quantize(model, images if size is None else (resize(image, list(size)) for image in images))

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Thresholds from 0.5 on, on a fixed scale: :class:`ProbabilityPostProcessor`."""
        return ProbabilityPostProcessor()

    @staticmethod
    def configure_visualizer() -> Visualizer:
        """Images as anomalib's, one for each predicted file also in nested folders: :class:`PredictionVisualizer`."""
        return PredictionVisualizer()

    def _noted(self, batch: Batch) -> Batch:
        """A scored batch whose scores count for the parts."""
        if self.parts is not None:
            self.parts.note(batch)
        return batch

    def _predict(self, batch: Batch) -> Batch:
        self.check_images(batch)
        with pixels_checked():
            prediction = self.score_images(self.look(batch.image, batch.image_path), batch.image_path)
        return batch.update(**self.cut(prediction, batch.image_path, batch.image.shape[-2:])._asdict())

    def look(self, images: torch.Tensor, paths: Sequence[str | Path | None] | None) -> torch.Tensor:
        """Transformed images ``[B, 3, H, W]`` as the model scores them: without what is outside of their regions."""
        if self.regions is None:
            return images
        transform = getattr(self.pre_processor, "transform", None)
        return self.regions.look(images, paths or [None] * len(images), transform)

    def cut(
        self,
        prediction: InferenceBatch,
        paths: Sequence[str | Path | None] | None,
        whole: Sequence[int] | None = None,
    ) -> InferenceBatch:
        """A prediction whose maps are 0 outside of the regions of the images.

        Args:
            prediction: Scores and maps of images as :meth:`look` returns them.
            paths: Their files.
            whole: Height and width of the transformed whole images; ``None``: those of the maps.
        """
        if self.regions is None:
            return prediction
        size = None if whole is None else (int(whole[0]), int(whole[1]))
        return self.regions.cut(prediction, paths or [None] * len(prediction.pred_score), size)

    def inside(self, paths: Sequence[str | Path | None] | None, size: tuple[int, int]) -> torch.Tensor | None:
        """Pixels of maps ``[B, H, W]`` that count; ``None``: all."""
        if self.regions is None:
            return None
        return self.regions.inside(size, paths or [None])

    def _cut_truth(self, batch: Batch) -> None:
        """Let defects outside of the regions be none, in masks and labels."""
        if self.regions is None or batch.gt_mask is None:
            return
        paths, size = batch.image_path or [None], tuple(batch.gt_mask.shape[-2:])
        inside = self.regions.inside(size, paths).to(batch.gt_mask.device)
        cut = batch.gt_mask.bool() & inside
        if batch.gt_label is not None:
            outside = batch.gt_mask.bool().flatten(1).any(dim=1) & ~cut.flatten(1).any(dim=1)
            if outside.any() and not self._warned_outside:
                self._warned_outside = True
                name = batch.image_path[int(outside.nonzero()[0])] if batch.image_path else "an image"
                logger.warning("All defects of %s are outside of its region: it is normal. (Reported once.)", name)
            batch.gt_label = batch.gt_label & ~outside
        batch.gt_mask = cut

    def remark(self, path: str) -> str:  # noqa: PLR6301  # models have their own
        """What there is to say of an image of the running prediction beside its verdict, for the table; else empty."""
        del path
        return ""

    def _log_losses(self, parts: dict[str, torch.Tensor], images: int) -> None:
        """Log the loss and its parts, ``"total"`` among them, of a step with so many images."""
        # Lightning would read each from the device by itself, the loss twice for the progress bar.
        read = dict(zip(parts, torch.stack(list(parts.values())).detach().cpu(), strict=True))
        self.log("train_loss", read.pop("total"), prog_bar=True, on_step=True, on_epoch=True, batch_size=images)
        self.log_dict({f"train_{name}": part for name, part in read.items()}, on_epoch=True, batch_size=images)

    def check_images(self, batch: Batch, *flags: torch.Tensor) -> list[list[bool]]:
        """Name the files that hold NaN; warn once of images of one uniform colour.

        Args:
            batch: The images.
            *flags: Other truth values ``[B]``, to be read with the same copy from the device.

        Returns:
            list: The flags.

        Raises:
            ValueError: If an image holds NaN or infinity.
        """
        low, high = torch.aminmax(batch.image.flatten(2), dim=-1)
        spread = high - low
        # One copy from the device for the whole batch.
        own = spread.isfinite().all(dim=-1), (spread < 1e-3).all(dim=-1)
        finite, uniform, *rest = torch.stack((*own, *flags)).tolist()
        names = batch.image_path or [f"number {index} of the batch" for index in range(len(batch.image))]
        bad = [name for name, fine in zip(names, finite, strict=False) if not fine]
        if bad:
            msg = f"NaN or infinite pixels in {bad}: remove or repair these images."
            raise ValueError(msg)
        if any(uniform) and not self._warned_uniform:
            self._warned_uniform = True
            logger.warning(
                "%s is one uniform colour: its score means nothing. (Reported once.)",
                names[uniform.index(True)],
            )
        return rest


def _warn_of_no_masks(datamodules: Sequence[Any]) -> None:
    for datamodule in datamodules:
        samples = getattr(getattr(datamodule, "test_data", None), "samples", None)
        if samples is None or (samples["label_index"] == 0).all():
            return
        if "mask_path" in samples and samples["mask_path"].fillna("").astype(bool).any():
            return
    if datamodules:
        logger.warning("The test split has no masks: pixel metrics are missing.")


def _warn_of_one_class(datamodules: Sequence[Any]) -> None:
    labels: set[int] = set()
    for datamodule in datamodules:
        samples = getattr(getattr(datamodule, "test_data", None), "samples", None)
        if samples is None or "label_index" not in samples:
            return
        labels |= set(samples["label_index"])
    if len(labels) == 1:
        logger.warning(
            "The test split holds %s images only: image metrics are not defined. metrics='full' gives NaN, "
            "anomalib's own give 0.",
            "anomalous" if labels == {1} else "normal",
        )
