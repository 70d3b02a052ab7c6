# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``FBCLIP``: the Lightning module that anomalib's engine, CLI and pipelines run."""

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from anomalib_fbclip import checkpoints, hub, registration
from anomalib_fbclip.arguments import check_arguments
from anomalib_fbclip.callbacks import AdapterCheckpoint
from anomalib_fbclip.clip.build import EMBEDDED, check_backbone, load_clip
from anomalib_fbclip.clip.token_cache import TokenCache
from anomalib_fbclip.lightning import PAPER_IMAGE_SIZE, CLIPModule, check_metrics
from anomalib_fbclip.metrics import FullEvaluator
from anomalib_fbclip.model_card import Results

from . import adapters
from .loss import FBCLIPLoss
from .references import collect_references, files_in
from .text_fusion import POOLINGS
from .torch_model import FBCLIPModel
from .training_data import AnomalySynthesis, Supervision, describe_training_data, epoch_seed, repeat_order
from .views import VIEWS

logger = logging.getLogger(__name__)

PAPER_EPOCHS = 2
_LIGHTNING_DEFAULT_EPOCHS = 1000


class FBCLIP(CLIPModule, AnomalibModule):
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
        text_poolings: Out of ``global``, ``attention``, ``eot`` (paper, Table 3).
        views: Out of ``id``, ``sem``, ``spa`` (paper, Table 4).
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
        token_cache: Folder for the frozen tokens of training pictures, so that later epochs skip the visual tower; see
            :class:`anomalib_fbclip.clip.TokenCache`. ``None``: none.
        token_cache_limit: Gigabytes that the cache may fill; 14 MB a picture for ViT-L/14 at 518 x 518.
        max_epochs: Epochs of training where the trainer sets no limit, or Lightning's default of 1000, which it cannot
            be told from. ``None``: the paper's 2.
        k_shot: Normal pictures whose patch tokens join the text's score, see :class:`NormalMemory`. 0: the paper's
            method. Checkpoints and exports carry the memory; adapters do not.
        few_shot_source: Folder of the normal pictures, of which the first ``k_shot`` by name are taken. ``None``: a
            random choice from the data module's train split. Read once, when the first run begins.
        normal_source: A normal picture or a folder of them, for thresholds without labels: see
            :meth:`CalibratedModule.calibrate`. They win over labelled validation data.
        false_alarm_rate: Wanted share of normal pictures above each threshold; needs ``normal_source``.
        threshold: Threshold of score and map, such as 0.5, whatever the data say. ``None``: from ``normal_source``,
            else the adapter's from normal pictures, else from labelled validation data, else the adapter's other, else
            0.5.
        metrics: ``"default"``: anomalib's four, so that benchmark grids with its models work. ``"full"``: image
            AUROC, AUPR, F1Max and pixel AUROC, AUPR, AUPRO, F1Max.
        quick_gelu: Activation of a local weights file, see :func:`anomalib_fbclip.clip.load_clip`.
        seed: Seeds the first values of the trained part, and training. ``None``: unseeded.
        pre_processor: As in every anomalib model.
        post_processor: As in every anomalib model.
        evaluator: As in every anomalib model; overrides ``metrics``.
        visualizer: As in every anomalib model.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or the adapter was made for another model.
        FileNotFoundError: If a weights file does not exist.
        ConnectionError: If backbone weights are neither on this machine nor to be downloaded.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_fbclip import FBCLIP, ProceduralSurfaces
        >>> Engine().test(FBCLIP(backbone="tiny"), datamodule=ProceduralSurfaces(category="wood"))  # doctest: +SKIP
    """

    _has_learned = False
    _remembered: Sequence[Path] = ()

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
        token_cache: str | None = None,
        token_cache_limit: float = 50.0,
        max_epochs: int | None = None,
        k_shot: int = 0,
        few_shot_source: str | Path | None = None,
        normal_source: str | None = None,
        false_alarm_rate: float = 0.05,
        threshold: float | None = None,
        metrics: str = "default",
        quick_gelu: bool | None = None,
        seed: int | None = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(FBCLIP.__init__, locals())
        # Checkpoints hold plain types only, and get_model hands over OmegaConf's lists.
        pretrained = str(pretrained) if pretrained is not None and pre_trained else None
        weights = str(weights) if weights is not None else None
        feature_layers = tuple(feature_layers) if feature_layers is not None else None
        text_poolings, views, betas = tuple(text_poolings), tuple(views), (float(betas[0]), float(betas[1]))
        few_shot_source = str(few_shot_source) if few_shot_source is not None else None
        _check(metrics, learning_rate, max_epochs)
        _check_few_shot(k_shot, few_shot_source)

        if weights not in {None, "auto", checkpoints.FROM_CHECKPOINT}:
            # Before the backbone, which may be a long download; and that, by its name, before the adapter.
            check_backbone(backbone)
            adapters.check_backbone(weights, backbone)
        clip = load_clip(backbone, pretrained, image_size=image_size, quick_gelu=quick_gelu)
        if image_size is None and clip.patch_size == 14:
            clip.image_size = PAPER_IMAGE_SIZE
        if pre_processor is True:
            pre_processor = self.configure_pre_processor((clip.image_size, clip.image_size), clip.mean, clip.std)
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
                few_shot=k_shot > 0,
            )
            # The host's generator draws the threshold of one of its distortions when it is made.
            self.synthesis = AnomalySynthesis(clip.mean, clip.std)
        self.loss = FBCLIPLoss(focal_gamma, dice_weight, scr_weight)
        self.image_size = clip.image_size
        self.learning_rate = learning_rate
        self.betas = betas
        self.max_epochs = max_epochs
        self.k_shot = k_shot
        self.few_shot_source = few_shot_source
        self.token_cache = None
        if token_cache is not None:
            self.token_cache = TokenCache(clip, self.model.feature_layers, token_cache, token_cache_limit * 1e9)
        self.seed = seed
        self.source: str | None = None
        self.set_calibration(str(normal_source) if normal_source is not None else None, false_alarm_rate, threshold)
        self.supervision = Supervision.LABELS_AND_MASKS
        self.weights = self._load_weights(backbone, weights)

    def _load_weights(self, backbone: str, weights: str | None) -> str | None:
        if weights == "auto":
            embedded = EMBEDDED[backbone] / "adapter.safetensors" if backbone in EMBEDDED else None
            weights = str(embedded) if embedded is not None and embedded.is_file() else None
        if weights not in {None, checkpoints.FROM_CHECKPOINT}:
            metadata = self.model.load_adapter(weights)
            self.source = metadata.get("source") or metadata.get("source_domain")
            self.restore_thresholds(metadata)
        return weights

    @property
    def learning_type(self) -> LearningType:
        """``ZERO_SHOT`` or ``FEW_SHOT`` with an adapter, ``ONE_CLASS`` (anomalib's word for "trains") without."""
        if self.weights is None:
            return LearningType.ONE_CLASS
        return LearningType.FEW_SHOT if self.k_shot else LearningType.ZERO_SHOT

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the trained part (the backbone is frozen), without a schedule."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.learning_rate, betas=self.betas)

    def setup(self, stage: str) -> None:
        """Smooth the host's edges that a user would meet first: endless epochs, unseeded runs, ``latest`` folders."""
        super().setup(stage)
        if stage != "fit":
            return
        unlimited = self.trainer.max_steps == -1 and self.trainer.fit_loop.max_epochs in {
            None,
            _LIGHTNING_DEFAULT_EPOCHS,
        }
        if unlimited:
            self.trainer.fit_loop.max_epochs = self.max_epochs or PAPER_EPOCHS
            logger.info(
                "Training for %d epochs; --trainer.max_epochs sets another number (1000, which is Lightning's default "
                "and not heard here, by --model.max_epochs).",
                self.trainer.max_epochs,
            )
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
        if self.seed is not None and isinstance(self.trainer.train_dataloader, DataLoader):
            repeat_order(self.trainer.train_dataloader, self.seed)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            here = "-".join(filter(None, (datamodule.name, str(datamodule.category or ""))))
            self.source = getattr(datamodule, "source_name", here)

    def on_train_start(self) -> None:
        """Note that there is something to score by, and repeat the order of the pictures."""
        self._has_learned = True
        self._repeat_order()

    def _repeat_order(self) -> None:
        """Draw the order of the pictures where the epoch is known; workers began before that."""
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if self.seed is not None and sampler is not None and hasattr(sampler, "set_epoch"):
            self._seed_epoch()
            sampler.set_epoch(self.trainer.current_epoch)
            iter(self.trainer.fit_loop._data_fetcher)  # noqa: SLF001  # Lightning draws too early, and only once

    def on_train_epoch_start(self) -> None:
        """Tie what workers draw at random to the epoch; Lightning does not call this in a resumed run's first one."""
        self._seed_epoch()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tie what is drawn at random in training to the epoch, such as synthesised anomalies."""
        del batch
        if batch_idx == 0:
            self._seed_epoch()

    def _seed_epoch(self) -> None:
        if self.seed is not None:
            # Processes that share a run synthesise different anomalies.
            own = self.trainer.current_epoch * self.trainer.world_size + self.global_rank
            torch.manual_seed(epoch_seed(self.seed, own))

    def training_step(self, batch: Batch, *args, **kwargs) -> torch.Tensor:
        """Loss of one batch, all its parts logged."""
        del args, kwargs
        self._check_pictures(batch)
        images, labels, masks = batch.image, batch.gt_label, batch.gt_mask
        if self.supervision is Supervision.NORMAL_ONLY:
            images, labels, masks = self.synthesis(images)
        elif self.supervision is Supervision.LABELS:
            masks = None
        # Synthesised anomalies are new in every step: a cache of them would only fill the disk.
        cache = self.token_cache if self.supervision is not Supervision.NORMAL_ONLY else None
        scores = self.model.score(images, tokens=None if cache is None else cache.encode_image(images))
        anomaly_map = self.model.upsample(scores.grid_map, images.shape[-1], sigma=0)
        parts = self.loss(scores.pred_score, anomaly_map, scores.similarity, labels, masks)
        total = parts.pop("total")
        self.log("train_loss", total, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(images))
        self.log_dict({f"train_{name}": part for name, part in parts.items()}, on_epoch=True, batch_size=len(images))
        return total

    def fill_memory(self) -> None:
        """Read the normal pictures of a few-shot model, unless it holds some: read before, or from a checkpoint.

        Raises:
            ValueError: If there are none to read.
        """
        if self.model.memory is None or self.model.memory.num_images:
            return
        datamodule = getattr(self._trainer, "datamodule", None)
        transform = getattr(self.pre_processor, "transform", None)
        images, self._remembered = collect_references(
            self.k_shot,
            self.few_shot_source,
            datamodule,
            transform,
            self.seed,
        )
        self.model.remember(images.to(self.device))
        logger.info("%d normal pictures remembered.", len(images))

    def on_validation_start(self) -> None:
        """Fill the memory of a few-shot model; a checkpoint has been read by now."""
        self.fill_memory()

    def on_test_start(self) -> None:
        """Fill the memory of a few-shot model; warn of one that never learned anything."""
        self._warn_if_untrained()
        self.fill_memory()
        super().on_test_start()

    def on_predict_start(self) -> None:
        """Fill the memory of a few-shot model; warn of one that never learned anything."""
        self._warn_if_untrained()
        self.fill_memory()
        super().on_predict_start()

    def _warn_if_untrained(self) -> None:
        if self.weights is None and not self._has_learned:
            logger.warning(
                "This model has no adapter and was not trained: scores and maps mean nothing. Give weights=<adapter> "
                "(on the command line --model.weights), a checkpoint, or train it first.",
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of a few-shot model where this one has no memory."""
        tokens = checkpoint["state_dict"].get("model.memory.tokens")
        if tokens is not None and self.model.memory is None:
            msg = f"The checkpoint holds a memory of {tokens.shape[1]} normal pictures: give k_shot={tokens.shape[1]}."
            raise ValueError(msg)
        self._has_learned = True
        super().on_load_checkpoint(checkpoint)

    def to_torch(self, *args, **kwargs) -> Path:
        """Export as anomalib does, with a full memory."""
        self.fill_memory()
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args, **kwargs) -> Path:
        """Export as anomalib does, with a full memory."""
        self.fill_memory()
        return super().to_onnx(*args, **kwargs)

    def calibrate(self, normal_source: str | Path, false_alarm_rate: float = 0.05) -> dict[str, Any]:
        """Set the thresholds from normal pictures, with a full memory; see :meth:`CalibratedModule.calibrate`.

        Pictures of the memory are left out: they are nearer to themselves than any other picture will be.
        """
        self.fill_memory()
        return super().calibrate(normal_source, false_alarm_rate)

    @property
    def _known_pictures(self) -> Sequence[Path]:
        if self.k_shot and not self._remembered and self.few_shot_source is not None:
            # The memory came with a checkpoint; where its pictures are still there, they are known by name.
            with suppress(OSError, ValueError):
                return files_in(self.k_shot, self.few_shot_source)
        return self._remembered

    def _calibration_state(self) -> object:
        # A memory of other pictures is another tensor of the same shape.
        memory = self.model.memory
        return super()._calibration_state(), None if memory is None else float(memory.tokens.double().sum())

    def save_adapter(self, path: str | Path, **extra: str | float | None) -> Path:
        """Write the trained part as an adapter file, see :func:`anomalib_fbclip.fbclip.adapters.save`.

        The thresholds of a few-shot model are left out: they are for scores with a memory, which adapters do not hold.
        """
        if not self.k_shot:
            self.calibrate_once()
        thresholds = None if self.k_shot else self.thresholds
        known = {"source": self.source, "pretrained": self.hparams.get("pretrained"), "thresholds": thresholds}
        return adapters.save(self.model, path, **known, **extra)

    def push_to_hub(
        self,
        repo_id: str,
        results: Results | None = None,
        private: bool = False,
        license_name: str | None = None,
    ) -> str:
        """Share the trained part with a model card, see :func:`anomalib_fbclip.hub.share`.

        Returns:
            str: ``hf://owner/name/adapter.safetensors``, as ``weights`` takes it.
        """
        with TemporaryDirectory() as folder:
            path = self.save_adapter(Path(folder, "adapter.safetensors"))
            return hub.share(path, repo_id, results=results, private=private, license_name=license_name)


def _check_few_shot(k_shot: int, few_shot_source: str | None) -> None:
    if k_shot < 0:
        msg = f"k_shot={k_shot}: give 0 (no normal pictures) or more."
        raise ValueError(msg)
    if few_shot_source is not None and not k_shot:
        msg = f"few_shot_source={few_shot_source!r} is not used with k_shot=0: say how many of its pictures to take."
        raise ValueError(msg)


def _check(metrics: str, learning_rate: float, max_epochs: int | None) -> None:
    check_metrics(metrics)
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        msg = f"learning_rate={learning_rate}: give a positive number (the paper's is 5e-5)."
        raise ValueError(msg)
    if max_epochs is not None and max_epochs < 1:
        msg = f"max_epochs={max_epochs}: give 1 or more, or None for the paper's {PAPER_EPOCHS}."
        raise ValueError(msg)


registration.register_models()
