# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``Student``: the Lightning module that anomalib's engine, CLI and pipelines run."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import gaussian_blur, normalize

from anomalib_fbclip import registration
from anomalib_fbclip.adapted.lightning_model import AdaptedModule
from anomalib_fbclip.adapted.load import find_model, load_module
from anomalib_fbclip.adapted.training_data import epoch_seed, repeat_order
from anomalib_fbclip.common.arguments import plain
from anomalib_fbclip.common.functional import one_or_pair, pair
from anomalib_fbclip.host.epochs import limit_epochs
from anomalib_fbclip.host.module import ScoringModule
from anomalib_fbclip.host.pre_processing import squash
from anomalib_fbclip.host.thresholds import normal_quantile
from anomalib_fbclip.host.unreadable import files_of

from .loss import StudentLoss
from .targets import Target, TeacherTargets, load_target
from .torch_model import COARSE, StudentModel

logger = logging.getLogger(__name__)

UNFAMILIAR_RATE = 0.01
"""Share of the training images, each measured against the others, that counts as unfamiliar."""

ALARMING_RATE = 0.05
"""Share of unfamiliar images of a run above which it warns."""

UNFAMILIAR = "unlike the images that the student was trained on"
_FOLDS = 5
_BATCH = 32
_BLUR_KERNEL, _LARGEST_BLUR, _LARGEST_NOISE = 9, 1.6, 0.04
"""Of training images: side and largest standard deviation in pixels, largest standard deviation of noise in 0..1."""
_MONITOR = "held_out_loss"


class Student(ScoringModule, AnomalibModule):
    """A small network that learns a teacher's maps and scores from unlabelled images of one product.

    ``anomalib train`` has the teacher score the train split once, with and without pasted defects, and trains the
    network on what it said. Labels and masks are not used for training. A share of the images is held out: on them the
    log compares student and teacher, the learning rate falls where the distance no longer does, and training stops.
    Trained, it is used as any model of anomalib: checkpoint, thresholds, exports.

    A student knows one product. Images that differ from those of its training are marked in the table of a prediction,
    and a run with many of them ends with a warning.

    Args:
        teacher: Line or adapter file; or the name of an adapted model, such as ``FBCLIP``. Needed for training only.
        teacher_arguments: Arguments of the teacher, such as ``{"backbone": "tiny", "k_shot": 8}``.
        backbone: ``"tiny"``: the convolutional network inside the embedded CLIP, with its weights. Else the name of a
            timm network with features at strides 8 and 16.
        backbone_weights: File with a timm network's weights under timm's names. ``None``: random ones.
        width: Channels of the heads.
        image_size: Height and width of the input in pixels, multiples of 16; one number for a square. Images are
            squashed to it.
        pasted: Variants of each training image with a pasted defect, beside the image itself.
        flip: Also train on mirrored and turned images, with the teacher's map mirrored and turned alike; by quarters
            of a turn where images are square.
        held_out: Share of the training images that is held out, in (0, 0.5].
        target_cache: Folder for what the teacher said; a run that was interrupted, or is repeated, finds it there.
        top_weight: See :class:`StudentLoss`.
        rank_weight: See :class:`StudentLoss`.
        learning_rate: Of AdamW, at the start.
        weight_decay: Of AdamW.
        patience: Epochs without a smaller distance on the held-out images after which the learning rate falls to a
            fifth; after three times as many training stops.
        max_epochs: Most epochs, where the trainer sets no limit.
        seed: Of first values, pasted defects, held-out images and training.
        **kwargs: Arguments of :class:`~anomalib_fbclip.host.module.ScoringModule`: ``normal_source``, ``metrics``, ...

    Attributes:
        agreement: After training: ``score_rank`` and ``pixel_rank``, Spearman correlations with the teacher on the
            held-out images, and ``score_auroc``, the AUROC of the student's score at telling the teacher's highest
            quarter from its lowest.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range.
        FileNotFoundError: If a weights file does not exist.

    Example:
        >>> from anomalib_fbclip import Student
        >>> Student().learning_type
        <LearningType.ONE_CLASS: 'one_class'>
    """

    def __init__(
        self,
        teacher: str | None = None,
        teacher_arguments: dict[str, Any] | None = None,
        backbone: str = "tiny",
        backbone_weights: str | None = None,
        *,
        width: int = 64,
        image_size: int | Sequence[int] = 256,
        pasted: int = 4,
        flip: bool = True,
        held_out: float = 0.15,
        target_cache: str = "results/teacher",
        top_weight: float = 1.0,
        rank_weight: float = 0.2,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        patience: int = 4,
        max_epochs: int = 60,
        seed: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        size = pair(plain(image_size))
        for side in size:
            if side < COARSE or side % COARSE:
                low = max(COARSE, side // COARSE * COARSE)
                msg = f"image_size={image_size} is not a multiple of {COARSE}: use {low} or {low + COARSE}."
                raise ValueError(msg)
        if not 0 < held_out <= 0.5:
            msg = f"held_out={held_out}: give a share in (0, 0.5]."
            raise ValueError(msg)
        for name, value, least in (("pasted", pasted, 0), ("patience", patience, 1), ("max_epochs", max_epochs, 1)):
            if value < least:
                msg = f"{name}={value}: give {least} or more."
                raise ValueError(msg)
        if learning_rate <= 0 or weight_decay < 0:
            msg = f"learning_rate={learning_rate}, weight_decay={weight_decay}: give a positive rate, and 0 or more."
            raise ValueError(msg)
        self.teacher = str(teacher) if teacher is not None else None
        self.teacher_arguments: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(teacher_arguments or {}))  # type: ignore[assignment]
        self.hparams["teacher_arguments"] = self.teacher_arguments
        self.image_size = one_or_pair(size)
        self.pasted = pasted
        self.flip = flip
        self.held_out = held_out
        self.target_cache = target_cache
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.patience = patience
        self.max_epochs = max_epochs
        self.seed = seed
        with torch.inference_mode(mode=False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = StudentModel(backbone, backbone_weights, width)
        self.hparams["backbone_weights"] = None  # a checkpoint holds them
        self.loss = StudentLoss(top_weight, rank_weight)
        if self._own_pre_processor:
            self.pre_processor = self.configure_pre_processor(
                size,
                self.model.mean,
                self.model.std,
            )
        self.agreement: dict[str, float] | None = None
        self._targets: dict[str, list[Path]] = {}
        self._held: list[str] = []
        self._learned: list[str] = []
        self._unfamiliar: dict[str, bool] = {}

    @property
    def learning_type(self) -> LearningType:
        """``ONE_CLASS``: anomalib trains it."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> PreProcessor:
        """Resize to a square (bicubic, without keeping the aspect ratio) and normalise.

        Args:
            image_size: Height and width in pixels. ``None``: 256 x 256.
            mean: Mean of each colour, that of the network.
            std: Standard deviation of each colour, that of the network.
        """
        return squash(image_size or (256, 256), mean, std)

    def identity(self) -> dict[str, str]:
        """The network; its weights are trained, so nothing but its name tells it."""
        return {
            "backbone": self.model.backbone,
            "fingerprint": f"{self.model.backbone}-{self.model.map_head.in_channels}",
        }

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, whose rate falls where the held-out images are no longer met better."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=self.patience)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": _MONITOR}}

    def configure_callbacks(self) -> list[Callback]:
        """As every model of the package; and an end of training that has stopped to help."""
        callbacks = [*super().configure_callbacks()]
        if not any(isinstance(callback, EarlyStopping) for callback in self.trainer.callbacks):
            callbacks.append(EarlyStopping(_MONITOR, patience=3 * self.patience, check_on_train_epoch_end=True))
        return callbacks

    def setup(self, stage: str) -> None:
        """Set the epochs where the trainer sets none; the rest as :meth:`ScoringModule.setup`."""
        super().setup(stage)
        if stage == "fit":
            limit_epochs(self.trainer, self.max_epochs)

    def load_teacher(self) -> AdaptedModule:
        """The teacher, with its memory filled.

        Raises:
            ValueError: If there is none, it is no adapted model, or it learned nothing.
        """
        if self.teacher is None:
            msg = (
                "A student learns from a teacher: give teacher (--model.teacher), a line or adapter file, or the name "
            )
            msg += "of a model, such as FBCLIP."
            raise ValueError(msg)
        is_file = self.teacher.startswith("hf://") or Path(self.teacher).suffix
        try:
            teacher = (load_module if is_file else _build)(self.teacher, **self.teacher_arguments)
        except TypeError as error:
            msg = f"teacher={self.teacher!r} with teacher_arguments={self.teacher_arguments}: {error}."
            raise ValueError(msg) from error
        if teacher.weights is None:
            msg = f"teacher={self.teacher!r} with {self.teacher_arguments} has no adapter and was not trained: give "
            msg += "weights among teacher_arguments."
            raise ValueError(msg)
        teacher = teacher.to(self.device).eval()
        teacher.trainer = self.trainer
        teacher.fill_memory()
        return teacher

    def on_fit_start(self) -> None:
        """Have the teacher score the train split, and hold a share of it out.

        Raises:
            ValueError: If there are too few images to train on.
        """
        self.trainer.fit_loop.setup_data()
        loader = self.trainer.train_dataloader
        if isinstance(loader, DataLoader):
            repeat_order(loader, self.seed)
        files = files_of(getattr(loader, "dataset", None))
        teacher = self.load_teacher()
        targets = TeacherTargets(teacher, self.target_cache, pair(self.image_size), self.pasted, self.seed)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if world > 1:
            targets.compute(files[rank::world])
            self.trainer.strategy.barrier()
        self._targets = targets.compute(files)
        self.source = teacher.source
        logger.info("The teacher's maps and scores of %d images: %s", len(self._targets), targets.folder)
        names = sorted(self._targets)
        number = round(self.held_out * len(names))
        if number < 2 or len(names) - number < 2:
            msg = f"{len(names)} images of the train split, of which {number} are held out: give more images."
            raise ValueError(msg)
        # Not an epoch's seed: with the order of the first one its first batches would hold held-out images alone.
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(epoch_seed(self.seed, -1)))
        self._held, self._learned = ([names[index] for index in part.tolist()] for part in order.tensor_split([number]))
        self._standardise()
        self.model.to(memory_format=torch.channels_last)  # a quarter less time on a CPU

    def _standardise(self) -> None:
        """Measure the teacher's logits on the images that are trained on."""
        targets = [load_target(place) for name in self._learned for place in self._targets[name]]
        scores = torch.stack([target.score_logit for target in targets])
        maps = torch.stack([target.map_logit for target in targets])
        for name, values in (("score", scores), ("map", maps)):
            getattr(self.model, f"{name}_offset").fill_(values.mean())
            getattr(self.model, f"{name}_scale").fill_(values.std().clamp(min=1e-3))

    def training_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> torch.Tensor:
        """Loss of one batch: of each of its images the image itself or one of its variants."""
        del args, kwargs
        learned = set(self._learned)
        # Never none: several processes wait for each other in every step.
        names = [path for path in batch.image_path if path in learned] or [self._learned[batch_idx % len(learned)]]
        places = [self._targets[name] for name in names]
        # Anew in each step, so that a run that goes on after an interruption draws the same.
        step = self.trainer.current_epoch * 2**20 + batch_idx * self.trainer.world_size + self.global_rank
        torch.manual_seed(epoch_seed(self.seed, step))
        targets = [load_target(self._choose(variants)) for variants in places]
        images, maps, scores = self._stack(targets)
        if self.flip:
            images, maps = flip(images, maps, int(torch.randint(8, ())))
        images = self._normalise(photograph(images))
        parts = self._distance(*self.model.decode(self.model.encode(images)), maps, scores)
        self._log_losses(parts, len(images))
        return parts["total"]

    @staticmethod
    def _choose(variants: list[Path]) -> Path:
        """The image itself as often as all its variants with pasted defects together."""
        if len(variants) == 1 or torch.rand(()) < 0.5:
            return variants[0]
        return variants[int(torch.randint(1, len(variants), ()))]

    def _stack(self, targets: Sequence[Target]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images ``[B, 3, H, W]`` in [0, 1], and the teacher's logits of maps and scores."""
        images, maps, scores = (torch.stack(parts).to(self.device) for parts in zip(*targets, strict=True))
        return images / 255, maps, scores

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        images = normalize(images, list(self.model.mean), list(self.model.std))
        return images.contiguous(memory_format=torch.channels_last)

    def _distance(
        self,
        score: torch.Tensor,
        grid_map: torch.Tensor,
        maps: torch.Tensor,
        scores: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Loss of what the student says of a batch, and what the teacher does."""
        return self.loss(
            score,
            grid_map,
            (scores - self.model.score_offset) / self.model.score_scale,
            (maps - self.model.map_offset) / self.model.map_scale,
        )

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        """Compare student and teacher on the held-out images, and note what the product looks like.

        In each epoch, since the trainer writes its checkpoint at the end of one and not at the end of training.
        """
        self.model.eval()
        self._compare()
        self._note_product()
        self.model.train()

    def _held_batches(self) -> Any:  # noqa: ANN401  # generator of three tensors
        places = [place for name in self._held for place in self._targets[name]]
        for start in range(0, len(places), _BATCH):
            images, maps, scores = self._stack([load_target(place) for place in places[start : start + _BATCH]])
            yield self._normalise(images), maps, scores

    def _compare(self) -> None:
        losses, scores, theirs, pixels = [], [], [], []
        for images, maps, targets in self._held_batches():
            score, grid_map = self.model.decode(self.model.encode(images))
            losses += [self._distance(score, grid_map, maps, targets)["total"]] * len(images)
            scores.append(score.cpu())
            theirs.append(targets.cpu())
            pixels.append(torch.stack([grid_map.flatten().cpu(), maps.flatten().cpu()]))
        self.log(_MONITOR, torch.stack(losses).mean(), prog_bar=True, sync_dist=True)
        score, target, pixel = torch.cat(scores), torch.cat(theirs), torch.cat(pixels, dim=1)
        quarter = max(1, len(target) // 4)
        order = target.argsort()
        ends = torch.cat([order[:quarter], order[-quarter:]])
        high = torch.arange(len(ends)) >= quarter
        self.agreement = {
            "score_rank": float(spearman_corrcoef(score, target)),
            "pixel_rank": float(spearman_corrcoef(*pixel)),
            "score_auroc": float(binary_auroc(score[ends], high.long())),
        }

    def _note_product(self) -> None:
        """Fit the distance by which unfamiliar images are known."""
        names = sorted(self._targets)
        pooled = []
        for start in range(0, len(names), _BATCH):
            targets = [load_target(self._targets[name][0]) for name in names[start : start + _BATCH]]
            pooled.append(self.model.encode(self._normalise(self._stack(targets)[0])).pooled.cpu().double())
        values = torch.cat(pooled)
        folds = torch.arange(len(values)) % min(_FOLDS, len(values))
        distances = torch.empty(len(values), dtype=torch.float64)
        for fold in folds.unique():
            mean, whitening = _fit(values[folds != fold])
            distances[folds == fold] = ((values[folds == fold] - mean) @ whitening).norm(dim=1)
        mean, whitening = _fit(values)
        self.model.pooled_mean.copy_(mean)
        self.model.pooled_whitening.copy_(whitening)
        self.model.usual_distance.fill_(normal_quantile(distances, UNFAMILIAR_RATE).threshold)

    def on_train_end(self) -> None:
        """Say how student and teacher agree."""
        self.model.eval()
        self.model.to(memory_format=torch.contiguous_format)
        if self.agreement is not None:
            logger.info(
                "Student and teacher on %d held-out images and their variants: rank correlation of scores %.3f, of "
                "pixels %.3f; the teacher's highest quarter told from its lowest with AUROC %.3f.",
                len(self._held),
                *self.agreement.values(),
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out of it: the student no longer needs one."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["student_agreement"] = self.agreement

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read how student and teacher agreed."""
        super().on_load_checkpoint(checkpoint)
        self.agreement = checkpoint.get("student_agreement")

    def on_test_start(self) -> None:
        """Forget the images of the run before; warn of a student that never learned anything."""
        self._begin()
        super().on_test_start()

    def on_predict_start(self) -> None:
        """Forget the images of the run before; warn of a student that never learned anything."""
        self._begin()
        super().on_predict_start()

    def _begin(self) -> None:
        self._unfamiliar = {}
        if not self.model.map_offset:
            logger.warning(
                "This student was not trained: scores and maps mean nothing. Give its checkpoint (--ckpt_path), or "
                "train it first (anomalib train).",
            )

    def _predict(self, batch: Batch) -> Batch:
        features = self.model.encode(self.look(batch.image, batch.image_path))
        (unlike,) = self.check_images(batch, self.model.distance(features.pooled) > 1)
        self._unfamiliar |= dict(zip(batch.image_path or [], unlike, strict=False))
        found = self.model.predict(features, batch.image.shape[-2:])
        return batch.update(**self.cut(found, batch.image_path)._asdict())

    def remark(self, path: str) -> str:
        """Whether an image is unlike those of the training."""
        return UNFAMILIAR if self._unfamiliar.get(path) else ""

    def on_test_end(self) -> None:
        """As every model; and a warning where many images are unlike those of the training."""
        super().on_test_end()
        number = sum(self._unfamiliar.values())
        if number > ALARMING_RATE * len(self._unfamiliar):
            logger.warning(
                "%d of %d images are %s (of those %.0f %% were, each measured against the others): their scores may "
                "mean little. Train a student on such images, too.",
                number,
                len(self._unfamiliar),
                UNFAMILIAR,
                100 * UNFAMILIAR_RATE,
            )


def _build(name: str, **arguments: Any) -> AdaptedModule:  # noqa: ANN401  # of any model
    return find_model(name)(**arguments)


def flip(images: torch.Tensor, maps: torch.Tensor, way: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror and turn images ``[B, 3, H, W]`` and their maps ``[B, h, w]`` alike.

    Args:
        images: Images.
        maps: Maps.
        way: 0 to 7. Where images are not square, quarters of a turn are halves.
    """
    if images.shape[-2] != images.shape[-1]:
        way = 2 * (way % 4) if way < 4 else 4 + 2 * (way % 2)
    turned = (torch.rot90(values, way % 4, dims=(-2, -1)) for values in (images, maps))
    images, maps = (values.flip(-1) if way >= 4 else values for values in turned)
    return images, maps


def photograph(images: torch.Tensor) -> torch.Tensor:
    """Photograph images ``[B, 3, H, W]`` in [0, 1] again: light, focus and noise of another camera.

    Brightness and contrast change by up to a tenth each, a half of the images is blurred, a fifth loses its colours,
    all get noise. Pasted defects are sharper, more colourful and freer of noise than the image around them, and a
    network would learn to find just that.
    """
    gain, shift = (0.1 * (2 * torch.rand(2, len(images)) - 1)).to(images)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * (1 + gain.view(-1, 1, 1, 1)) + mean + shift.view(-1, 1, 1, 1)
    sharp, sigmas = torch.rand(len(images)) < 0.5, torch.empty(len(images)).uniform_(0.1, _LARGEST_BLUR).tolist()
    images = torch.stack([
        image if keep else gaussian_blur(image, [_BLUR_KERNEL] * 2, [sigma] * 2)
        for image, keep, sigma in zip(images, sharp, sigmas, strict=True)
    ])
    grey = (torch.rand(len(images), 1, 1, 1) < 0.2).to(images.device)
    images = torch.where(grey, images.mean(dim=1, keepdim=True), images)
    noise = _LARGEST_NOISE * torch.rand(len(images), 1, 1, 1) * torch.randn(images.shape)
    return (images + noise.to(images)).clamp(0, 1)


def _fit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``[C]`` and whitening ``[C, C]`` of features ``[N, C]``, with a covariance shrunk for few images."""
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(values.numpy())
    precision = torch.from_numpy(fitted.precision_)
    return torch.from_numpy(fitted.location_), torch.linalg.cholesky((precision + precision.T) / 2)


registration.register_models()
