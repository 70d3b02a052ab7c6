# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What the Lightning modules of our models share: pictures in, predictions out, and the host's edges."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import Batch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import create_versioned_dir
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_fbclip import checkpoints
from anomalib_fbclip.callbacks import PredictionIndex
from anomalib_fbclip.data.sets import shares_source
from anomalib_fbclip.distributed import share_folder
from anomalib_fbclip.export import ExportedModule
from anomalib_fbclip.post_processing import ProbabilityPostProcessor
from anomalib_fbclip.pre_processing import CLIP_MEAN, CLIP_STD, ExactPreProcessor
from anomalib_fbclip.unreadable import name_unreadable, restore
from anomalib_fbclip.visualization import PredictionVisualizer

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as _Base
else:
    # The host finds models among the direct subclasses of its base: a model names it itself, beside this mixin.
    _Base = object

logger = logging.getLogger(__name__)

PAPER_IMAGE_SIZE = 518


class CLIPModule(ExportedModule, _Base):
    """Mixin of a Lightning module whose ``model`` scores batches of images with a frozen CLIP.

    Attributes:
        image_size: Side of the square input in pixels; set by the model.
        weights: The adapter of a model that has one.
        source: What the adapter was trained on, as far as it is known.
    """

    image_size: int
    weights: str | None = None
    source: str | None = None
    _warned_uniform = False
    _named: Sequence[Any] = ()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing: what the user's trainer says wins."""
        return {}

    def setup(self, stage: str) -> None:
        """Have unreadable files and checkpoints named, warn of tests that tell little, keep ``latest`` a link.

        A run of test or predict would otherwise leave a real folder of that name.
        """
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
        self._named = name_unreadable(self.trainer, stage)
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

    def configure_callbacks(self) -> list[Callback]:
        """The host's components, and a table of scores for each prediction: :class:`PredictionIndex`."""
        # Named here even if the trainer has one: Lightning then moves it behind the post-processor.
        given = [callback for callback in self.trainer.callbacks if isinstance(callback, PredictionIndex)]
        return [*super().configure_callbacks(), *(given or [PredictionIndex()])]

    def validation_step(self, batch: Batch, *args, **kwargs) -> Batch:
        """Scores and maps of one batch."""
        del args, kwargs
        return self._predict(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> Batch:
        """Scores and maps of one batch."""
        del batch_idx, args, kwargs
        return self._predict(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Batch:
        """Scores and maps of one batch."""
        del batch_idx, dataloader_idx
        return self._predict(batch)

    def on_validation_epoch_end(self) -> None:
        """Let thresholds from normal pictures follow what was trained."""
        self.calibrate_once()

    def on_test_start(self) -> None:
        """Set the thresholds that the user asked for."""
        self.calibrate_once()

    def on_predict_start(self) -> None:
        """Set the thresholds that the user asked for."""
        self.calibrate_once()

    def on_test_end(self) -> None:
        """Say where the pictures are."""
        directory = getattr(self.visualizer, "output_dir", None)
        if directory is not None and Path(directory).is_dir():
            logger.info("Pictures: %s", directory)

    def on_predict_end(self) -> None:
        """Say where the pictures are."""
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
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args, **kwargs) -> "CLIPModule":
        """Load a model from a checkpoint, as Lightning's, and name a file that cannot be read.

        Raises:
            ValueError: If the file is cut off, altered, of another kind, or holds code.
        """
        with checkpoints.named(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> object:
        """Load a state dict with or without backbone and evaluator."""
        return super().load_state_dict(checkpoints.refill(self, state_dict), strict=strict, assign=assign)

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> PreProcessor:
        """Resize (bicubic, to a square, without keeping the aspect ratio) and normalise with CLIP's statistics.

        Args:
            image_size: Height and width in pixels. ``None``: 518 x 518.
            mean: Of each colour, ``mean`` of the backbone.
            std: Standard deviation of each colour, ``std`` of the backbone.
        """
        size = image_size or (PAPER_IMAGE_SIZE, PAPER_IMAGE_SIZE)
        resize = Resize(size, antialias=True, interpolation=InterpolationMode.BICUBIC)
        return ExactPreProcessor(transform=Compose([resize, Normalize(mean=mean, std=std)]))

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Thresholds from 0.5 on, on a fixed scale: :class:`ProbabilityPostProcessor`."""
        return ProbabilityPostProcessor()

    @staticmethod
    def configure_visualizer() -> Visualizer:
        """Pictures as anomalib's, one for each predicted file also in nested folders: :class:`PredictionVisualizer`."""
        return PredictionVisualizer()

    def _predict(self, batch: Batch) -> Batch:
        self._check_pictures(batch)
        return batch.update(**self.model(batch.image)._asdict())

    def _check_pictures(self, batch: Batch) -> None:
        """Name the files that hold NaN; warn once of pictures that hold nothing."""
        low, high = torch.aminmax(batch.image.flatten(2), dim=-1)
        names = batch.image_path or [f"number {index} of the batch" for index in range(len(batch.image))]
        bad = [name for name, finite in zip(names, (high - low).isfinite().all(dim=-1), strict=False) if not finite]
        if bad:
            msg = f"NaN or infinite pixels in {bad}: remove or repair these pictures."
            raise ValueError(msg)
        uniform = [name for name, flat in zip(names, (high - low < 1e-3).all(dim=-1), strict=False) if flat]
        if uniform and not self._warned_uniform:
            self._warned_uniform = True
            logger.warning(
                "%s is one uniform colour: nothing can be told of it. (Said once.)",
                uniform[0],
            )


def check_metrics(metrics: str) -> None:
    """Refuse another name than those of the two sets of metrics.

    Raises:
        ValueError: If ``metrics`` is neither ``"default"`` nor ``"full"``.
    """
    if metrics not in {"default", "full"}:
        msg = f"metrics={metrics!r}: choose 'default' or 'full'."
        raise ValueError(msg)


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
            "The test split holds %s pictures only: image metrics are not defined. metrics='full' gives NaN, "
            "anomalib's own give 0.",
            "anomalous" if labels == {1} else "normal",
        )
