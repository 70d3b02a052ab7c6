# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``AdaptedModule``: the base of Lightning modules whose torch model is an :class:`AdaptedCLIP`."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from anomalib import LearningType
from anomalib.data import Batch, InferenceBatch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.clip.build import EMBEDDED, check_backbone
from anomalib_fbclip.clip.token_cache import TokenCache
from anomalib_fbclip.common.arguments import check_arguments, default_values, plain
from anomalib_fbclip.common.files import file_digest
from anomalib_fbclip.common.functional import pixels_checked
from anomalib_fbclip.host.checkpoints import FROM_CHECKPOINT, stored_memory_names, stored_memory_radius
from anomalib_fbclip.host.clip_module import CLIPModule
from anomalib_fbclip.host.epochs import limit_epochs
from anomalib_fbclip.host.module import ScoringModule
from anomalib_fbclip.host.pre_processing import resize_images
from anomalib_fbclip.host.regions import Regions
from anomalib_fbclip.host.tiling import WHOLE, Place

from . import adapter_file, sharing
from .adapter_checkpoint import AdapterCheckpoint
from .adapter_comparison import AdapterComparison
from .model_card import Results
from .normal_memory import MOST_JUDGED, choose_radius
from .references import collect_references
from .torch_model import AdaptedCLIP
from .training_data import AnomalySynthesis, Supervision, describe_training_data, epoch_seed, repeat_order

logger = logging.getLogger(__name__)

MEMORY_TILES = 64
"""Tiles of all normal images together that a memory holds at most: each patch is compared with all of them."""

PLACED_TILES = 256
"""Likewise with a ``memory_radius``, where a patch is compared with few: for the memory alone."""

DATA_FETCHER = "_data_fetcher"
"""Private name of Lightning's training loop. Where a release has another, a resumed run may draw another order."""


class AdaptedModule(CLIPModule):  # noqa: PLR0904  # hooks of Lightning
    """Two regimes, training, few normal images, adapter files and checkpoints of an adapted CLIP.

    With ``weights`` a model is zero-shot: ``anomalib train``, ``test`` and ``predict`` need no training, as with
    WinCLIP. Without, it trains its small trainable part on the data module's train split: images with labels and masks
    (the papers' auxiliary protocol); labels alone, then without pixel losses; or normal images alone, then with
    synthetic anomalies.

    A model is ``class Name(AdaptedModule, AnomalibModule)``, whose constructor passes ``**kwargs`` on and calls
    :meth:`build` with its torch model, its loss and its own arguments. The loss takes ``pred_score`` ``[B]``,
    ``anomaly_map`` ``[B, H, W]`` (up-sampled, not smoothed), ``labels`` ``[B]``, ``masks`` ``[B, H, W]`` or ``None``,
    and the torch model's ``loss_terms``; it returns its parts and their ``total`` in a dictionary.

    Args:
        feature_layers: Blocks whose tokens are read, counted from 1. ``None``: the paper's, at the same relative depths
            in another tower.
        weights: Adapter: our ``.safetensors``, the published weights, or ``hf://owner/repo/file``. ``"auto"``: the
            adapter embedded with the backbone where it has one (``"tiny"``), else none. ``None``: none, train. With a
            line file (``anomalib-fbclip setup``), each setting that is left at its default is the file's: backbone,
            image size, memory and all that the adapter depends on. Its memory and thresholds are used unless another
            ``k_shot`` or ``image_size``, or ``few_shot_source``, is given: the normal images are then read anew.
        source: Data set that the adapter was trained on, such as ``VisA``, where its file does not say it; a test on
            that data set then warns. Where the file says another one, this one counts.
        init_weights: Adapter from which training starts, in the same forms as ``weights``, which is then ``None``.
            ``"auto"``: the one embedded with the backbone. ``None``: training starts from random values. At the end of
            a run that trains, the log compares the new adapter with this one, or with the one embedded with the
            backbone, on the validation data.
        temperature: Divides the cosine of tokens and text.
        smoothing_sigma: Gaussian smoothing of the map in pixels of the input; 0 switches it off.
        literal: Compute the paper's equations in their literal form: slower, the same values up to rounding. For those
            who want to change an equation.
        learning_rate: Of Adam.
        betas: Of Adam.
        token_cache: Folder for the frozen tokens of training images, so that later epochs skip the visual tower; see
            :class:`anomalib_fbclip.clip.TokenCache`. ``None``: none.
        token_cache_limit: Gigabytes that the cache may fill; 14 MB an image for ViT-L/14 at 518 x 518.
        max_epochs: Epochs of training where the trainer sets no limit, or Lightning's default of 1000, which cannot be
            told from no limit. ``None``: the paper's.
        k_shot: Normal images whose patches join the text's score, see :class:`NormalMemory`. 0: zero-shot.
            Checkpoints and exports carry the memory; adapters do not.
        few_shot_source: Folder of the normal images, of which the first ``k_shot`` by name are taken. ``None``: a
            random choice from the data module's train split. Read once, when the first run begins.
        memory_radius: A patch is compared with remembered patches at most so many rows and columns of patches from its
            own place, 0 or more, and of tiles with the same tile: for products that lie in the same place in each
            image. Images have one size then. ``"auto"``: what the normal images say when they are read, see
            :func:`~anomalib_fbclip.adapted.normal_memory.choose_radius`. ``None``: with all.
        seed: Seeds the first values of the trained part, and training. ``None``: unseeded.
        **kwargs: Arguments of :class:`~anomalib_fbclip.host.clip_module.CLIPModule`.

    Attributes:
        model: The torch model.
        supervision: What the train split allows.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of range, or the adapter was made for another model.
        FileNotFoundError: If a weights file does not exist.
        ConnectionError: If backbone weights are neither on this machine nor to be downloaded.
    """

    paper_epochs: ClassVar[int]
    """Epochs of the paper's training."""

    _has_learned = False
    _takes_memory = False

    def __init__(
        self,
        feature_layers: Sequence[int] | None = None,
        weights: str | None = "auto",
        source: str | None = None,
        init_weights: str | None = None,
        temperature: float = 0.07,
        smoothing_sigma: float = 4.0,
        literal: bool = False,
        learning_rate: float = 5e-5,
        betas: tuple[float, float] = (0.5, 0.999),
        token_cache: str | None = None,
        token_cache_limit: float = 50.0,
        max_epochs: int | None = None,
        k_shot: int = 0,
        few_shot_source: str | Path | None = None,
        memory_radius: int | str | None = None,
        seed: int | None = 0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if not (learning_rate > 0 and math.isfinite(learning_rate)):
            msg = f"learning_rate={learning_rate}: give a positive number."
            raise ValueError(msg)
        if max_epochs is not None and max_epochs < 1:
            msg = f"max_epochs={max_epochs}: give 1 or more, or None for the paper's {self.paper_epochs}."
            raise ValueError(msg)
        if k_shot < 0:
            msg = f"k_shot={k_shot}: give 0 (no normal images) or more."
            raise ValueError(msg)
        if few_shot_source is not None and not k_shot:
            msg = f"few_shot_source={str(few_shot_source)!r} is not used with k_shot=0: give k_shot, how many to take."
            raise ValueError(msg)
        if init_weights is not None and weights not in {None, FROM_CHECKPOINT}:
            msg = f"init_weights={str(init_weights)!r} is what training starts from, and with weights={str(weights)!r} "
            msg += "nothing is trained: give weights=None (--model.weights null)."
            raise ValueError(msg)
        if isinstance(memory_radius, str) and memory_radius != "auto":
            msg = f"memory_radius={memory_radius!r}: give a number of patches, 'auto', or None."
            raise ValueError(msg)
        self._shared = {
            "feature_layers": feature_layers,
            "temperature": temperature,
            "smoothing_sigma": smoothing_sigma,
            "few_shot": k_shot > 0,
            "literal": literal,
            "memory_radius": memory_radius,
        }
        self.weights = str(weights) if weights is not None else None
        self._stated_source = source
        self.init_weights = str(init_weights) if init_weights is not None else None
        self.learning_rate = learning_rate
        self.betas = (float(betas[0]), float(betas[1]))
        self.max_epochs = max_epochs
        self.k_shot = k_shot
        self.few_shot_source = str(few_shot_source) if few_shot_source is not None else None
        self.seed = seed
        self.supervision = Supervision.LABELS_AND_MASKS
        self._token_cache = None if token_cache is None else (token_cache, token_cache_limit * 1e9)

    def build(self, model: type[AdaptedCLIP], loss: nn.Module, **arguments: Any) -> None:  # type: ignore[override]  # noqa: ANN401  # of any model
        """Load the backbone, build the torch model on it, load the adapter.

        Args:
            model: Class of the torch model.
            loss: See the class.
            **arguments: Arguments of the torch model beside those that all adapted models have. ``None`` is the value
                of the adapter embedded with the backbone where it has one, else the torch model's default.
        """
        self.model_name = model.model_name
        check_backbone(self.hparams["backbone"])  # by its name, before an adapter is fetched
        if self.init_weights == "auto":
            self.init_weights = self._embedded_adapter()
            if self.init_weights is None:
                msg = f"init_weights='auto': no {self.model_name} adapter comes with the backbone "
                msg += f"{self.hparams['backbone']!r}: give a file, or None to train from random values."
                raise ValueError(msg)
        arguments = self._of_embedded(self._settle(arguments))
        if self.k_shot and self._tiles["tiles"] is not None and self.resize == "keep":
            msg = f"resize='keep' with tiles={self._tiles['tiles']} and k_shot={self.k_shot}: tiles and whole images "
            msg += "share one memory, leave resize at None."
            raise ValueError(msg)
        if self._shared["memory_radius"] is not None and not self.k_shot:
            msg = f"memory_radius={self._shared['memory_radius']!r} is not used with k_shot=0: give k_shot, the number "
            msg += "of normal images."
            raise ValueError(msg)
        # The first values of the trained part are drawn here, and anomalib's generator draws the threshold of one of
        # its distortions when it is made.
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.manual_seed(self.seed)
            self._chooses_radius = self._shared["memory_radius"] == "auto"
            radius = None if self._chooses_radius else self._shared["memory_radius"]
            super().build(model, **{**self._shared, "memory_radius": radius}, **arguments)
            self.synthesis = AnomalySynthesis(self.model.clip.mean, self.model.clip.std)
        self.loss = loss
        self.token_cache = None
        if self._token_cache is not None:
            self.token_cache = TokenCache(
                self.model.clip,
                self.model.feature_layers,
                *self._token_cache,
                encode=self.model.encode_image,
                key=self.model.token_key,
            )
        self._load_weights()

    def _settle(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take each setting that was left at its default from the line file, where ``weights`` is one."""
        if self.weights in {None, "auto", FROM_CHECKPOINT}:
            return arguments
        metadata = adapter_file.read(self.weights)[1]
        if not adapter_file.is_line(metadata):
            return arguments
        adapter_file.check_model(metadata, self.model_name, self.weights)
        stored = {**metadata, "backbone": adapter_file.backbone_name(metadata)}
        defaults = default_values(type(self))
        used = {**self._backbone, **self._shared, **arguments, "k_shot": self.k_shot, "resize": self._resize}
        used |= {**self._tiles, "min_area": self.hparams["min_area"]}
        settled = {
            name: plain(stored[name]) if name in stored and value == plain(defaults.get(name)) else value
            for name, value in used.items()
        }
        self.hparams.update({name: value for name, value in settled.items() if name in self.hparams})
        for base in type(self).__mro__:
            if issubclass(base, ScoringModule):
                check_arguments(base.__init__, settled)
        self._backbone = {name: settled[name] for name in self._backbone}
        self.k_shot, self._resize = settled["k_shot"], settled["resize"]
        self._tiles = {name: settled[name] for name in self._tiles}
        self.set_min_area(settled["min_area"])
        self._shared = {**{name: settled[name] for name in self._shared}, "few_shot": self.k_shot > 0}
        kept = {"resize": "squash", "tiles": None, "memory_radius": None, **stored}  # files from before it was stored
        now = {**settled, "resize": self.resize}
        names = ("k_shot", "image_size", "resize", "tiles", "memory_radius")
        same = all(now[name] == plain(kept[name]) for name in names)
        self._takes_memory = same and self.few_shot_source is None
        return {name: settled[name] for name in arguments}

    def load_backbone(self) -> FrozenCLIP:
        """The frozen backbone; the adapter is checked first, as the backbone may be a long download."""
        for file in (self.weights, self.init_weights):
            if file not in {None, "auto", FROM_CHECKPOINT}:
                adapter_file.check_backbone(file, self.hparams["backbone"], self.model_name)
        return super().load_backbone()

    def _embedded_adapter(self) -> str | None:
        """The adapter that comes with the backbone."""
        folder = EMBEDDED.get(self.hparams["backbone"])
        embedded = folder / f"{self.model_name.lower()}.safetensors" if folder is not None else None
        return str(embedded) if embedded is not None and embedded.is_file() else None

    def _of_embedded(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take each argument that is ``None`` from the embedded adapter, or leave it to the torch model."""
        embedded = self._embedded_adapter()
        stored = {} if embedded is None else adapter_file.read(embedded)[1]
        chosen = {name: stored.get(name) if value is None else value for name, value in arguments.items()}
        return {name: value for name, value in chosen.items() if value is not None}

    def _load_weights(self) -> None:
        if self.weights == "auto":
            self.weights = self._embedded_adapter()
        if self.weights is None and self._stated_source is not None:
            msg = f"source={self._stated_source!r} says what an adapter was trained on: give weights, too."
            raise ValueError(msg)
        if self.weights is None and self.init_weights is not None:
            adapter_file.load_into(self.model, self.init_weights, memory=False)
        if self.weights not in {None, FROM_CHECKPOINT}:
            metadata = adapter_file.load_into(self.model, self.weights, memory=self._takes_memory)
            self.source = metadata.get("source") or metadata.get("source_domain")
            if self._stated_source is not None:
                if self.source not in {None, self._stated_source}:
                    logger.warning("source=%r counts; the adapter says %r.", self._stated_source, self.source)
                self.source = self._stated_source
            if adapter_file.is_line(metadata) and not self._takes_memory:
                logger.warning(
                    "Memory and thresholds of the line file %s, for k_shot=%d and image_size=%s, are not used with "
                    "k_shot=%d, image_size=%s, few_shot_source=%s, memory_radius=%s.",
                    self.weights,
                    metadata["k_shot"],
                    metadata["image_size"],
                    self.k_shot,
                    self.image_size,
                    self.few_shot_source,
                    self._shared["memory_radius"],
                )
                return
            if self.regions is None and self._takes_memory and metadata.get("region_mask"):
                self.regions = Regions.unpacked(metadata["region_mask"])
            self.restore_thresholds(metadata)

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
        """Set the epochs where the trainer sets none, seed training; the rest as :meth:`ScoringModule.setup`."""
        super().setup(stage)
        if stage != "fit":
            return
        limit_epochs(self.trainer, self.max_epochs or self.paper_epochs)
        if self.seed is not None:
            torch.manual_seed(self.seed)

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's components, and :class:`AdapterCheckpoint` for runs that train."""
        callbacks = [*super().configure_callbacks()]
        if self.weights is None and not any(isinstance(c, AdapterCheckpoint) for c in self.trainer.callbacks):
            callbacks.append(AdapterCheckpoint())
        if self.weights is None and not any(isinstance(c, AdapterComparison) for c in self.trainer.callbacks):
            callbacks.append(AdapterComparison(self.init_weights or self._embedded_adapter()))
        return callbacks

    def on_fit_start(self) -> None:
        """Read the labels of the train split once, and log what they allow."""
        self.trainer.fit_loop.setup_data()
        self.supervision = describe_training_data(self.trainer.train_dataloader)
        if self.seed is not None and isinstance(self.trainer.train_dataloader, DataLoader):
            repeat_order(self.trainer.train_dataloader, self.seed)
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            here = "-".join(filter(None, (datamodule.name, str(datamodule.category or ""))))
            self.source = getattr(datamodule, "source_name", here)

    def on_train_start(self) -> None:
        """Note that there is something to score by, and repeat the order of the images."""
        self._has_learned = True
        self._repeat_order()

    def _repeat_order(self) -> None:
        """Draw the order of the images where the epoch is known; workers began before that."""
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        fetcher = getattr(self.trainer.fit_loop, DATA_FETCHER, None)
        if self.seed is not None and sampler is not None and hasattr(sampler, "set_epoch") and fetcher is not None:
            self._seed_epoch()
            sampler.set_epoch(self.trainer.current_epoch)
            iter(fetcher)  # Lightning draws too early, and only once

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
        self.check_images(batch)
        images, labels, masks = batch.image, batch.gt_label, batch.gt_mask
        if self.tiling is not None:
            images, masks = self._draw_tiles(images, masks)
        if self.supervision is Supervision.NORMAL_ONLY:
            images, labels, masks = self.synthesis(images)
        elif self.supervision is Supervision.LABELS:
            masks = None
        # Synthesised anomalies and drawn tiles are new in every step: a cache of them would only fill the disk.
        cache = None if self.supervision is Supervision.NORMAL_ONLY or self.tiling is not None else self.token_cache
        with pixels_checked():
            scores = self.model.score(images, tokens=None if cache is None else cache.encode_image(images))
        anomaly_map = self.model.upsample(scores.grid_map, images.shape[-2:], sigma=0)
        parts = self.loss(
            pred_score=scores.pred_score,
            anomaly_map=anomaly_map,
            labels=labels,
            masks=masks,
            **scores.loss_terms,
        )
        self._log_losses(parts, len(images))
        return parts["total"]

    def _draw_tiles(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tiles and whole images to train on, see :meth:`Tiling.draw`; where nobody knows the defects, whole images."""
        tiling: Any = self.tiling
        if self.supervision is Supervision.LABELS:
            return resize_images(images, tiling.size, tiling.size), None
        known = images.new_zeros(len(images), *images.shape[-2:]) if masks is None else masks
        return tiling.draw(images, known.reshape(len(images), *images.shape[-2:]))

    def fill_memory(self) -> None:
        """Read the normal images of a few-shot model, unless it holds some: read before, or from a checkpoint.

        Raises:
            ValueError: If there are none to read.
        """
        if self.model.memory is None or self.model.memory.num_images:
            return
        datamodule = getattr(self._trainer, "datamodule", None)
        transform = getattr(self.pre_processor, "transform", None)
        images, files = collect_references(self.k_shot, self.few_shot_source, datamodule, transform, self.seed)
        seen = [self.look(image[None], [file])[0] for image, file in zip(images, files, strict=True)]
        self.remember(seen, files)
        logger.info("%d normal images remembered.", len(images))

    def remember(self, images: Sequence[torch.Tensor], files: Sequence[Path]) -> None:
        """Fill the memory with normal images, and with their tiles where the model scores in tiles.

        Args:
            images: Transformed images ``[3, H, W]``.
            files: Their files.

        Raises:
            ValueError: If images that are no tiles have several sizes, or with a ``memory_radius`` several numbers of
                tiles or too many.
        """
        whole = images if self.tiling is None else [self.tiling.whole(image[None])[0] for image in images]
        sizes = {f"{image.shape[-1]} x {image.shape[-2]}" for image in whole}
        if len(sizes) > 1:
            msg = f"The normal images have several sizes after the resize ({', '.join(sorted(sizes))}): a memory holds "
            msg += "one, give images of the same proportions."
            raise ValueError(msg)
        if self._chooses_radius:
            judged = torch.stack(list(whole[:MOST_JUDGED])).to(self.device)
            grid = self.model.clip.grid_of_images(judged)
            compared = self.model.memory.compared(self.model.clip.visual, judged, self.model.encode_image)
            self.model.memory_radius = choose_radius(compared, grid)
            logger.info("memory_radius=%s, chosen by %d normal images.", self.model.memory_radius, len(images))
        names, places = [file_digest(file) for file in files], []
        if self.tiling is not None:
            regions = [self.touched(image[None], [file]) for image, file in zip(images, files, strict=True)]
            each = list(zip(images, regions, strict=True))
            most = max(1, MEMORY_TILES // len(images))
            if self.model.memory_radius is not None:
                own = [self.tiling.chosen(image[None], PLACED_TILES, region=region) for image, region in each]
                places = self._check_places([place for chosen in own for place in chosen], len(images))
            if places:
                most = PLACED_TILES
            pieces = [self.tiling.pieces(image[None], most, region=region) for image, region in each]
            images = [piece for own in pieces for piece in own]
            names = [name for name, own in zip(names, pieces, strict=True) for _ in own]
        self.model.remember(torch.stack(list(images)).to(self.device), names, places)

    def _check_places(self, places: list[Place], number: int) -> list[Place]:
        """Refuse tiles of images of several sizes, and more than a memory holds, whose places would be missing.

        A radius that the images are to choose is ``None`` then, and there are no places.
        """
        cuts = sorted({(place.rows, place.columns) for place in places if place != WHOLE})
        msg = f"memory_radius={self.model.memory_radius}: the {number} normal images have "
        if len(cuts) > 1:
            found = " and ".join(f"{rows} x {columns}" for rows, columns in cuts)
            msg += f"{found} tiles, give images of one size, or memory_radius=None."
        elif len(places) > PLACED_TILES:
            msg += f"{len(places)} tiles together, give fewer images (k_shot) or larger tiles, for {PLACED_TILES} at "
            msg += "most, or memory_radius=None."
        else:
            return places
        if not self._chooses_radius:
            raise ValueError(msg)
        logger.warning("memory_radius=None is used. %s", msg)
        self.model.memory_radius = None
        return []

    def score_tiles(self, tiles: torch.Tensor, places: Sequence[Place]) -> InferenceBatch:
        """Score and map of tiles; with a ``memory_radius`` by what the memory holds of the same places."""
        return self.model(tiles) if self.model.memory_radius is None else self.model(tiles, places=places)

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
            number = len(set(stored_memory_names(checkpoint))) or tokens.shape[1]
            msg = f"The checkpoint holds a memory of {number} normal images: give k_shot={number}."
            raise ValueError(msg)
        radius = stored_memory_radius(checkpoint)
        if tokens is not None and self._chooses_radius:
            self.model.memory_radius = radius
        elif tokens is not None and radius != self.model.memory_radius:
            msg = f"The checkpoint's memory was made with memory_radius={radius}, this model has "
            msg += f"{self.model.memory_radius}: give memory_radius={radius}."
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

    def calibrate_once(self) -> None:
        """Set the thresholds that the user asked for, with a full memory."""
        if self.calibrator.normal_source is not None:
            self.fill_memory()
        super().calibrate_once()

    def score_unseen(self, images: torch.Tensor, path: Path) -> InferenceBatch | None:
        """Score and map of an image by a memory without this image; ``None`` where it holds no other.

        Images of the memory, known by their content, are nearer to themselves than any other image will be.
        """
        memory, names = self.model.memory, self.model.memory_names
        if memory is None or not names:
            return self.score_images(images, [path])
        own = file_digest(path)
        others = [place for place, name in enumerate(names) if name != own]
        if not others:
            return None
        if len(others) == len(names):
            return self.score_images(images, [path])
        self.model.memory = memory.part(others)
        try:
            return self.score_images(images, [path])
        finally:
            self.model.memory = memory

    def calibration_state(self) -> object:
        """What thresholds from normal images depend on: also the content of the memory."""
        # A memory of other images is another tensor of the same shape.
        memory = self.model.memory
        return super().calibration_state(), None if memory is None else float(memory.tokens.double().sum())

    def calibration_settings(self) -> dict[str, Any]:
        """Settings that thresholds hold for."""
        return {**super().calibration_settings(), "k_shot": self.k_shot, "memory_radius": self.model.memory_radius}

    def save_adapter(self, path: str | Path, **extra: Any) -> Path:  # noqa: ANN401  # what JSON holds
        """Write the trained part as an adapter file, see :func:`anomalib_fbclip.adapted.adapter_file.save`.

        The thresholds of a few-shot model are left out: they are for scores with a memory, which adapters do not hold.
        """
        if not self.k_shot:
            self.calibrate_once()
        thresholds = None if self.k_shot else self.thresholds
        return adapter_file.save(self.model, path, **self._known(thresholds), **extra)

    def _known(self, thresholds: dict[str, Any] | None) -> dict[str, Any]:
        """What the module knows beside its torch model, for the metadata of its files."""
        known = {
            "source": self.source,
            "pretrained": self.hparams.get("pretrained"),
            "thresholds": thresholds,
            "resize": self.resize,
            **self._tiles,
            "min_area": self.hparams["min_area"],
        }
        return known if self.regions is None else {**known, "region": self.regions.digest()}

    def save_line(self, path: str | Path, **extra: Any) -> Path:  # noqa: ANN401  # what JSON holds
        """Write a line file: the trained part, the memory of normal images, region, thresholds and settings.

        ``weights=`` takes it alone. It holds features of the line's images and is marked as private.

        Args:
            path: File to write, with suffix ``.safetensors``.
            **extra: Further metadata that JSON can hold.

        Raises:
            ValueError: If the model has no memory.
        """
        if self.model.memory is None:
            msg = "A line file holds a memory of normal images: give k_shot and few_shot_source."
            raise ValueError(msg)
        self.fill_memory()
        self.calibrate_once()
        known = self._known(self.thresholds)
        if self.regions is not None:
            known["region_mask"] = self.regions.packed()
        return adapter_file.save(self.model, path, memory=True, **known, **extra)

    def push_to_hub(
        self,
        repo_id: str,
        results: Results | None = None,
        private: bool = False,
        license_name: str | None = None,
    ) -> str:
        """Share the trained part with a model card, see :func:`anomalib_fbclip.adapted.sharing.share`.

        Returns:
            str: ``hf://owner/name/adapter.safetensors``, as ``weights`` takes it.
        """
        with TemporaryDirectory() as folder:
            path = self.save_adapter(Path(folder, "adapter.safetensors"))
            return sharing.share(path, repo_id, results=results, private=private, license_name=license_name)
