# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``FBCLIP``: the Lightning module that anomalib's engine, CLI and pipelines run."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.utils.path import create_versioned_dir
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_fbclip import registration
from anomalib_fbclip.callbacks import AdapterCheckpoint
from anomalib_fbclip.clip.build import EMBEDDED, load_clip
from anomalib_fbclip.metrics import FullEvaluator
from anomalib_fbclip.post_processing import ProbabilityPostProcessor

from . import adapters, checkpoints
from .loss import FBCLIPLoss
from .text_fusion import POOLINGS
from .torch_model import FBCLIPModel
from .training_data import AnomalySynthesis, Supervision, describe_training_data
from .views import VIEWS

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAPER_IMAGE_SIZE = 518
PAPER_EPOCHS = 2
_LIGHTNING_DEFAULT_EPOCHS = 1000


class FBCLIP(AnomalibModule):
    """FB-CLIP: fine-grained zero-shot anomaly detection with foreground-background disentanglement (CVPR 2026).

    With ``weights`` the model is zero-shot: ``anomalib train``, ``test`` and ``predict`` need no training, as with
    WinCLIP. Without, it trains its small trainable part on the data module's train split: images with labels and masks
    (the paper's auxiliary protocol); labels alone, then without pixel losses; or normal images alone, then with
    synthetic anomalies.

    Args:
        backbone: open_clip model name, or ``"tiny"`` for the small trained backbone inside this package.
        pretrained: Backbone weights: an open_clip tag, a local file (the network is then never touched), or ``None``
            for random ones. Not used by ``"tiny"``.
        pre_trained: The name that anomalib's own models use, so that one benchmark grid holds both: ``False`` is short
            for ``pretrained=None``.
        image_size: Side of the square input in pixels, a multiple of the patch size. ``None``: the paper's 518 for
            patches of 14 pixels, else the size that the backbone was trained with.
        feature_layers: Blocks whose tokens are read, counted from 1. ``None``: the paper's 1, 6, 12, 18, 24, at the
            same relative depths in another tower.
        weights: Adapter: our ``.safetensors``, the published ``.pth``, or ``hf://owner/repo/file``. ``"auto"``: the
            adapter embedded with the backbone where it has one (``"tiny"``), else none. ``None``: none, train.
        n_ctx: Learnable places of each prompt.
        text_poolings: Out of ``global``, ``attention``, ``eot`` (paper, Table 4).
        views: Out of ``id``, ``sem``, ``spa`` (paper, Table 3).
        attention: Foreground-background attention on or off (paper, Table 2).
        suppression: Background suppression on or off (paper, Table 2).
        bank: ``half`` or ``full`` tokens behind the background prototype (paper, Table 5).
        causal_text: CLIP's causal text mask. The released weights were trained without it.
        temperature: Divides the cosine of tokens and text.
        smoothing_sigma: Gaussian smoothing of the map in pixels of the input; 0 switches it off.
        focal_gamma: Exponent of the focal losses.
        dice_weight: Weight of the dice loss.
        scr_weight: Weight of the semantic consistency loss; 0 switches it off (paper, Table 5).
        learning_rate: Of Adam.
        betas: Of Adam.
        max_epochs: Epochs of training where the trainer sets no limit. ``None``: the paper's 2.
        metrics: ``"default"``: anomalib's four, so that benchmark grids with its models work. ``"full"``: image
            AUROC, AUPR, F1Max and pixel AUROC, AUPR, AUPRO, F1Max.
        quick_gelu: Activation of a local weights file, see :func:`anomalib_fbclip.clip.load_clip`.
        seed: Seeds the first values of the trained part, and training. ``None``: unseeded.
        pre_processor: As in every anomalib model.
        post_processor: As in every anomalib model.
        evaluator: As in every anomalib model; overrides ``metrics``.
        visualizer: As in every anomalib model.

    Raises:
        ValueError: If an argument is out of range, or the adapter was made for another model.
        FileNotFoundError: If a weights file does not exist.
        ConnectionError: If backbone weights are neither on this machine nor to be downloaded.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_fbclip import FBCLIP, ProceduralSurfaces
        >>> Engine().test(FBCLIP(backbone="tiny"), datamodule=ProceduralSurfaces(category="wood"))  # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = "openai",
        pre_trained: bool = True,
        image_size: int | None = None,
        feature_layers: Sequence[int] | None = None,
        weights: str | None = "auto",
        n_ctx: int = 12,
        text_poolings: Sequence[str] = tuple(POOLINGS),
        views: Sequence[str] = VIEWS,
        attention: bool = True,
        suppression: bool = True,
        bank: str = "half",
        causal_text: bool = False,
        temperature: float = 0.07,
        smoothing_sigma: float = 4.0,
        focal_gamma: float = 4.0,
        dice_weight: float = 0.2,
        scr_weight: float = 0.15,
        learning_rate: float = 5e-5,
        betas: tuple[float, float] = (0.5, 0.999),
        max_epochs: int | None = None,
        metrics: str = "default",
        quick_gelu: bool | None = None,
        seed: int | None = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Checkpoints hold plain types only, and get_model hands over OmegaConf's lists.
        pretrained = str(pretrained) if pretrained is not None and pre_trained else None
        weights = str(weights) if weights is not None else None
        feature_layers = tuple(feature_layers) if feature_layers is not None else None
        text_poolings, views, betas = tuple(text_poolings), tuple(views), (float(betas[0]), float(betas[1]))
        _check(metrics, learning_rate, max_epochs)

        clip = load_clip(backbone, pretrained, image_size=image_size, quick_gelu=quick_gelu)
        if image_size is None and clip.patch_size == 14:
            clip.image_size = PAPER_IMAGE_SIZE
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((clip.image_size, clip.image_size))
        if evaluator is True and metrics == "full":
            evaluator = FullEvaluator()
        super().__init__(pre_processor, post_processor, evaluator, visualizer)

        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.model = FBCLIPModel(
                clip,
                feature_layers=feature_layers,
                n_ctx=n_ctx,
                text_poolings=text_poolings,
                views=views,
                attention=attention,
                suppression=suppression,
                bank=bank,
                causal_text=causal_text,
                temperature=temperature,
                smoothing_sigma=smoothing_sigma,
            )
        self.loss = FBCLIPLoss(focal_gamma, dice_weight, scr_weight)
        self.synthesis = AnomalySynthesis(CLIP_MEAN, CLIP_STD)
        self.image_size = clip.image_size
        self.learning_rate = learning_rate
        self.betas = betas
        self.max_epochs = max_epochs
        self.seed = seed
        self.source: str | None = None
        self.supervision = Supervision.LABELS_AND_MASKS
        self._warned_uniform = False
        self.weights = self._load_weights(backbone, weights)

    def _load_weights(self, backbone: str, weights: str | None) -> str | None:
        if weights == "auto":
            embedded = EMBEDDED[backbone] / "adapter.safetensors" if backbone in EMBEDDED else None
            weights = str(embedded) if embedded is not None and embedded.is_file() else None
        if weights not in {None, checkpoints.FROM_CHECKPOINT}:
            metadata = self.model.load_adapter(weights)
            self.source = metadata.get("source") or metadata.get("source_domain")
        return weights

    @property
    def learning_type(self) -> LearningType:
        """``ZERO_SHOT`` with an adapter, ``ONE_CLASS`` (anomalib's word for "trains") without."""
        return LearningType.ONE_CLASS if self.weights is None else LearningType.ZERO_SHOT

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing: what the user's trainer says wins, see :meth:`setup` for the epochs."""
        return {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the trained part (the backbone is frozen), without a schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.learning_rate, betas=self.betas)

    def setup(self, stage: str) -> None:
        """Smooth the host's edges that a user would meet first: endless epochs, unseeded runs, ``latest`` folders."""
        root = Path(self.trainer.default_root_dir)
        if root.name == "latest" and not root.exists() and self.trainer.is_global_zero:
            # A run of test or predict before the first train would leave a real folder where train expects a link.
            create_versioned_dir(root.parent)
        if stage != "fit":
            return
        unlimited = self.trainer.max_steps == -1 and self.trainer.fit_loop.max_epochs in {
            None,
            _LIGHTNING_DEFAULT_EPOCHS,
        }
        if unlimited:
            self.trainer.fit_loop.max_epochs = self.max_epochs or PAPER_EPOCHS
            logger.info("Training for %d epochs; --trainer.max_epochs sets another number.", self.trainer.max_epochs)
        if self.seed is not None:
            torch.manual_seed(self.seed)

    def configure_callbacks(self) -> list[Callback]:
        """The host's components, and :class:`AdapterCheckpoint` for runs that train."""
        callbacks = [*super().configure_callbacks()]
        if self.weights is None and not any(isinstance(c, AdapterCheckpoint) for c in self.trainer.callbacks):
            callbacks.append(AdapterCheckpoint())
        return callbacks

    def on_fit_start(self) -> None:
        """Look at the labels of the train split once, and say what they allow."""
        self.trainer.fit_loop.setup_data()
        self.supervision = describe_training_data(self.trainer.train_dataloader)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            here = "-".join(filter(None, (datamodule.name, str(datamodule.category or ""))))
            self.source = getattr(datamodule, "source_name", here)

    def training_step(self, batch: Batch, *args, **kwargs) -> torch.Tensor:
        """Loss of one batch, all its parts logged."""
        del args, kwargs
        self._check_pictures(batch)
        images, labels, masks = batch.image, batch.gt_label, batch.gt_mask
        if self.supervision is Supervision.NORMAL_ONLY:
            images, labels, masks = self.synthesis(images)
        elif self.supervision is Supervision.LABELS:
            masks = None
        scores = self.model.score(images)
        anomaly_map = self.model.upsample(scores.grid_map, images.shape[-1], sigma=0)
        parts = self.loss(scores.pred_score, anomaly_map, scores.similarity, labels, masks)
        total = parts.pop("total")
        self.log("train_loss", total, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(images))
        self.log_dict({f"train_{name}": part for name, part in parts.items()}, on_epoch=True, batch_size=len(images))
        return total

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

    def save_adapter(self, path: str | Path, **extra: str | float | None) -> Path:
        """Write the trained part as an adapter file, see :func:`anomalib_fbclip.fbclip.adapters.save`."""
        return adapters.save(self.model, path, source=self.source, pretrained=self.hparams.get("pretrained"), **extra)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone and the evaluator out of the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoints.strip(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone, keep this model's image size."""
        checkpoints.check(self, checkpoint)
        super().on_load_checkpoint(checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> object:
        """Load a state dict with or without backbone and evaluator."""
        return super().load_state_dict(checkpoints.refill(self, state_dict), strict=strict, assign=assign)

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize (bicubic, to a square, without keeping the aspect ratio) and normalise with CLIP's statistics.

        Args:
            image_size: Height and width in pixels. ``None``: 518 x 518.
        """
        size = image_size or (PAPER_IMAGE_SIZE, PAPER_IMAGE_SIZE)
        resize = Resize(size, antialias=True, interpolation=InterpolationMode.BICUBIC)
        return PreProcessor(transform=Compose([resize, Normalize(mean=CLIP_MEAN, std=CLIP_STD)]))

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Thresholds from 0.5 on, on a fixed scale: :class:`ProbabilityPostProcessor`."""
        return ProbabilityPostProcessor()

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
                "%s is one uniform colour. anomalib reads 16-bit pictures as plain white: convert them to 8 bit. "
                "(Said once.)",
                uniform[0],
            )


def _check(metrics: str, learning_rate: float, max_epochs: int | None) -> None:
    if metrics not in {"default", "full"}:
        msg = f"metrics={metrics!r}: choose 'default' or 'full'."
        raise ValueError(msg)
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        msg = f"learning_rate={learning_rate}: give a positive number (the paper's is 5e-5)."
        raise ValueError(msg)
    if max_epochs is not None and max_epochs < 1:
        msg = f"max_epochs={max_epochs}: give 1 or more, or None for the paper's {PAPER_EPOCHS}."
        raise ValueError(msg)


registration.register_models()
