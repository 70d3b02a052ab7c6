# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``AdaptedCLIP``: the base of torch models that score images with a frozen CLIP and a small trained part."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib.data import InferenceBatch
from torch import nn

from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.clip.stem import local_width
from anomalib_fbclip.common.functional import (
    Grid,
    as_json,
    check_finite,
    full_precision,
    is_exporting,
    pair,
    relative_layers,
    tokens_to_grid,
    upsample,
)
from anomalib_fbclip.host.tiling import Place

from . import adapter_file
from .normal_memory import LocalFeatureMemory, NormalMemory, at_hand
from .stages import Stages

TOKENS_AT_ONCE = 1370
"""On a CPU, behind the visual tower: one image of 518 pixels. One by one takes as long as together, and less memory."""
_REMEMBERED_AT_ONCE = 32
_NOT_TRAINED = ("clip.", "memory.")
_EPS = 1e-12


@dataclass
class Detection:
    """What a model makes of the tokens of its images.

    Attributes:
        logit: Abnormal minus normal logit of class token and patches ``[B, 1 + L]``.
        loss_terms: What the model's loss needs beside image score and map, by the names of its arguments. The first
            axis of each tensor counts images.
        memory_evidence: What a memory adds to the logits ``[B, 1 + L]``, where the stages are recorded.
    """

    logit: torch.Tensor
    loss_terms: dict[str, torch.Tensor] = field(default_factory=dict)
    memory_evidence: torch.Tensor | None = field(default=None, kw_only=True)


@dataclass
class Scores:
    """Probabilities of images and patches.

    Attributes:
        pred_score: Abnormal probability of the class token ``[B]``.
        grid_map: Abnormal probability of the patches ``[B, g_h, g_w]``.
        loss_terms: See :class:`Detection`.
    """

    pred_score: torch.Tensor
    grid_map: torch.Tensor
    loss_terms: dict[str, torch.Tensor] = field(default_factory=dict)


class AdaptedCLIP(nn.Module, ABC):  # noqa: PLR0904  # four of them replace torch's
    """A frozen CLIP with a small trained part.

    A model defines its trained tensors in the constructor, :meth:`encode_text`, :meth:`detect` (the equations) and
    :meth:`architecture`. Everything else is here: tokens of the backbone, cached text features, large batches in parts,
    the memory of a few-shot model, up-sampling, the record of the stages, adapter files.

    Args:
        clip: Frozen backbone.
        feature_layers: Blocks whose tokens are read, counted from 1. ``None``: the paper's for a tower of 24 blocks,
            the same relative depths for another.
        temperature: Divides the cosine of tokens and text.
        smoothing_sigma: Gaussian smoothing of the returned map, in pixels of the input; 0 switches it off.
        few_shot: Let a memory of normal images join the text's score, see :meth:`remember`.
        literal: Compute the equations in their literal form: slower, the same values up to rounding.
        memory_radius: A patch is compared with remembered patches at most so many rows and columns from its own place,
            0 or more; ``None``: with all. Tiles are compared with the same tile of other images.

    Attributes:
        memory_names: SHA-256 of the files that the memory was filled with, in its order, as far as they are known. Each
            tile of an image has the image's.

    Raises:
        ValueError: If an argument is out of range; the message holds the value.
    """

    model_name: ClassVar[str]
    """Name of the Lightning class, which adapter files record."""

    paper_layers: ClassVar[tuple[int, ...]] = (6, 12, 18, 24)
    """Blocks that the paper reads from a tower of 24."""

    token_key = ""
    """Names a way through the visual tower that differs from the plain one, for the cache of tokens."""

    def __init__(
        self,
        clip: FrozenCLIP,
        feature_layers: Sequence[int] | None = None,
        temperature: float = 0.07,
        smoothing_sigma: float = 4.0,
        few_shot: bool = False,
        literal: bool = False,
        memory_radius: int | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            msg = f"temperature={temperature}: give a positive number (the paper's is 0.07)."
            raise ValueError(msg)
        if not 0 <= smoothing_sigma <= min(pair(clip.image_size)):
            msg = f"smoothing_sigma={smoothing_sigma}: give pixels from 0 (none) to the image size, {clip.image_size}."
            raise ValueError(msg)
        self.clip = clip
        layers = relative_layers(self.paper_layers, clip.num_layers) if feature_layers is None else feature_layers
        self.feature_layers = clip.check_layers(layers)
        self.temperature = temperature
        self.smoothing_sigma = smoothing_sigma
        self.literal = literal
        self._memory_radius = _checked_radius(memory_radius)
        self.memory = self.make_memory() if few_shot else None
        self._text_cache: tuple[object, torch.Tensor] | None = None
        self._compiled_scoring: Callable[..., Scores] | None = None

    @property
    def memory_names(self) -> tuple[str, ...]:
        """See the class."""
        return () if self.memory is None else self.memory.names  # type: ignore[return-value]

    @memory_names.setter
    def memory_names(self, names: Sequence[str]) -> None:
        if self.memory is not None:
            self.memory.names = tuple(names)

    @property
    def memory_radius(self) -> int | None:
        """See the class."""
        return self._memory_radius

    @memory_radius.setter
    def memory_radius(self, radius: int | None) -> None:
        self._memory_radius = _checked_radius(radius)
        if self.memory is not None:
            self.memory.radius = radius  # type: ignore[assignment]

    @abstractmethod
    def encode_text(self) -> torch.Tensor:
        """Normal and abnormal text feature ``[2, d]``, of unit length, from the trained prompts."""

    @abstractmethod
    def detect(
        self,
        tokens: Iterable[torch.Tensor],
        text_features: torch.Tensor,
        grid: Grid | None = None,
    ) -> Detection:
        """The method, from the tokens of the blocks and the text features to logits.

        Args:
            tokens: Tokens of each chosen block ``[B, 1 + L, D]``, class token first. Read once, in order.
            text_features: ``[2, d]``, of unit length, normal first.
            grid: Rows and columns of the patches; ``None``: a square.
        """

    def architecture(self) -> dict[str, Any]:
        """What a model and an adapter must have in common, in types that JSON knows.

        ``image_size`` and ``smoothing_sigma`` are recorded and may differ.
        """
        return {
            "backbone": self.clip.name,
            "backbone_fingerprint": self.clip.fingerprint(),
            "feature_layers": list(self.feature_layers),
            "temperature": self.temperature,
            "mean": list(self.clip.mean),
            "std": list(self.clip.std),
            "quick_gelu": self.clip.quick_gelu,
            "image_size": as_json(self.clip.image_size),
            "smoothing_sigma": self.smoothing_sigma,
        }

    def encode_image(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Frozen tokens of the chosen blocks, each ``[B, 1 + L, D]``, class token first."""
        return self.clip.encode_image(images, self.feature_layers)

    def similarity(self, joint: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Cosine over temperature of joint vectors ``[..., d]`` with both texts: ``[..., 2]`` in float32."""
        with full_precision(joint.device):
            joint = joint.float()
            # The product before the division: what is divided has 2 entries for each vector and not d.
            along = joint @ text_features.float().T
            return along / joint.norm(dim=-1, keepdim=True).clamp(min=_EPS) / self.temperature

    def make_memory(self) -> nn.Module:
        """The empty memory of a few-shot model, with what :class:`NormalMemory` has: ``fill``, ``part``, ``tokens``."""
        width = local_width(self.clip.visual)
        if width:
            return LocalFeatureMemory(1, width, self.memory_radius)
        return NormalMemory(len(self.feature_layers), self.clip.vision_width, self.memory_radius)

    def abnormal_probability(
        self,
        logit: torch.Tensor,
        tokens: Sequence[torch.Tensor],
        grid: Grid | None = None,
        places: Sequence[Place] = (),
    ) -> torch.Tensor:
        """Probability of class token and patches ``[B, 1 + L]``, with what the memory of a few-shot model adds.

        Args:
            logit: Of the text ``[B, 1 + L]``.
            tokens: See :meth:`TokenMemory.compared`; none: no memory is asked.
            grid: See :meth:`detect`.
            places: See :meth:`score`.
        """
        if self.memory is not None and tokens:
            logit = logit + self.memory(tokens, logit, grid, places)
        return logit.sigmoid()

    def forward(
        self,
        images: torch.Tensor,
        return_stages: bool = False,
        places: Sequence[Place] = (),
    ) -> InferenceBatch | tuple[InferenceBatch, Stages]:
        """Score images.

        Args:
            images: Images ``[B, 3, H, W]`` normalised with the backbone's statistics, H and W multiples of the patch
                size.
            return_stages: Also return the tensors of every stage, of whole images, for images and for tests.
            places: See :meth:`score`.

        Returns:
            InferenceBatch: ``pred_score`` ``[B]`` and smoothed ``anomaly_map`` ``[B, H, W]``, both probabilities.
            With ``return_stages``, a tuple of it and the model's :class:`Stages`.

        Raises:
            ValueError: If the images are empty, their sides no multiples of the patch size, or they hold NaN or
                infinity.
        """
        if not return_stages:
            scores = self.score(images, places=places)
            anomaly_map = self.smooth(scores.grid_map, images.shape[-2:], self.smoothing_sigma)
            return InferenceBatch(pred_score=scores.pred_score, anomaly_map=anomaly_map)
        check_finite(images)
        tokens, grid = self.encode_image(images), self.clip.grid_of_images(images)
        detection = self.detect(tokens, self.text_features(), grid)
        compared = self._compared(images, tokens)
        scores = self._scores(detection, compared, grid)
        if self.memory is not None:
            detection.memory_evidence = self.memory(compared, detection.logit, grid)
        stages = self.record(tokens, detection, grid)
        stages.grid = grid
        stages.memory_evidence = detection.memory_evidence
        stages.pred_score, stages.anomaly_map_grid = scores.pred_score, scores.grid_map
        stages.anomaly_map_upsampled = self.upsample(scores.grid_map, images.shape[-2:], sigma=0)
        stages.anomaly_map_smoothed = self.smooth(scores.grid_map, images.shape[-2:], self.smoothing_sigma)
        return InferenceBatch(pred_score=scores.pred_score, anomaly_map=stages.anomaly_map_smoothed), stages

    def record(self, tokens: list[torch.Tensor], detection: Detection, grid: Grid | None = None) -> Stages:
        """The record of the model's own stages, see :class:`Stages`; what all models have is filled in afterwards.

        Args:
            tokens: Tokens of the images, see :meth:`detect`.
            detection: What :meth:`detect` made of them.
            grid: See :meth:`detect`.
        """
        del detection, grid
        return Stages(text_features=self.text_features(), image_tokens=tokens)

    def score(
        self,
        images: torch.Tensor,
        tokens: Sequence[torch.Tensor] | None = None,
        places: Sequence[Place] = (),
    ) -> Scores:
        """The method up to the probabilities of class token and patches; differentiable in training mode.

        Args:
            images: See :meth:`forward`.
            tokens: Tokens of the images where they are at hand, such as a :class:`TokenCache`'s: one ``[B, N, D]`` for
                each block. The visual tower is then not run.
            places: Of T tiles, in whose order the images come, each B / T times: what a memory with a radius compares
                them by. Empty: whole images.
        """
        check_finite(images)
        text_features = self.text_features()
        blocks = self.encode_image(images) if tokens is None else list(tokens)
        compared = [] if self.training else self._compared(images, blocks)
        grid = self.clip.grid_of_images(images)
        score_blocks = self._compiled_scoring or self._score_blocks
        together = torch.is_grad_enabled() or torch.compiler.is_compiling() or images.device.type != "cpu"
        if together or len(images) * blocks[0].shape[1] <= TOKENS_AT_ONCE:
            return score_blocks(blocks, compared, text_features, grid, places)
        size = max(1, TOKENS_AT_ONCE // blocks[0].shape[1])
        parts = zip(*(block.split(size) for block in blocks), strict=True)
        others = zip(*(tokens.split(size) for tokens in compared), strict=True) if compared else repeat(())
        each = [place for place in places for _ in range(len(images) // len(places))]
        scores = [
            score_blocks(list(part), other, text_features, grid, each[number * size : (number + 1) * size])
            for number, (part, other) in enumerate(zip(parts, others, strict=False))
        ]
        return Scores(
            torch.cat([part.pred_score for part in scores]),
            torch.cat([part.grid_map for part in scores]),
            {name: torch.cat([part.loss_terms[name] for part in scores]) for name in scores[0].loss_terms},
        )

    def _compared(self, images: torch.Tensor, blocks: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What the memory compares; without one nothing."""
        if self.memory is None:
            return []
        if blocks is None:
            self.clip._check_images(images)  # noqa: SLF001  # as encode_image does, which is not always asked
        return self.memory.compared(self.clip.visual, images, self.encode_image if blocks is None else at_hand(blocks))

    def _score_blocks(
        self,
        blocks: list[torch.Tensor],
        compared: Sequence[torch.Tensor],
        text_features: torch.Tensor,
        grid: Grid,
        places: Sequence[Place],
    ) -> Scores:
        """Score one part of a batch; the blocks are consumed, and freed on the way unless a memory compares them."""
        return self._scores(self.detect(_drain(blocks), text_features, grid), compared, grid, places)

    def _scores(
        self,
        detection: Detection,
        tokens: Sequence[torch.Tensor],
        grid: Grid,
        places: Sequence[Place] = (),
    ) -> Scores:
        abnormal = self.abnormal_probability(detection.logit, tokens, grid, places)
        return Scores(abnormal[:, 0], tokens_to_grid(abnormal[:, 1:], grid), detection.loss_terms)

    def compile(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # torch's own
        """Compile in place what follows the visual tower: many small steps, where a tower is few large products.

        The check of the pixels and the text tower, whose features are kept, stay outside, as they cannot be in a graph.

        Args:
            *args: Of :func:`torch.compile`.
            **kwargs: Of :func:`torch.compile`.
        """
        self._compiled_scoring = torch.compile(self._score_blocks, *args, **kwargs)

    def text_features(self) -> torch.Tensor:
        """Normal and abnormal text feature ``[2, d]``, of unit length.

        They depend on the parameters alone, so outside training they are computed once and again only when a
        parameter has changed.
        """
        if is_exporting() and not self.training and self._text_cache is not None:
            # An exported graph sees images only: the text tower becomes a constant of it.
            return self._text_cache[1]
        if self.training or torch.compiler.is_compiling():
            # A compiled graph cannot look whether a parameter has changed.
            return self.encode_text()
        state = self._text_state()
        if torch.is_grad_enabled() or self._text_cache is None or self._text_cache[0] != state:
            features = self.encode_text()
            self._text_cache = (state, features.detach())
            return features
        return self._text_cache[1]

    def _text_state(self) -> tuple[object, ...]:
        parameters = [p for name, p in self.named_parameters() if not name.startswith(_NOT_TRAINED)]
        parameters.append(self.clip.text.text_projection)
        device = parameters[-1].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (autocast, *((id(p), p.data_ptr(), _version(p)) for p in parameters))

    @staticmethod
    def upsample(grid_map: torch.Tensor, size: int | Sequence[int], sigma: float) -> torch.Tensor:
        """Map ``[B, g_h, g_w]`` to pixels ``[B, H, W]`` (one number: a square), smoothed with ``sigma`` pixels."""
        with full_precision(grid_map.device):  # half precision would tie neighbouring pixels
            return upsample(grid_map, size, sigma)

    def smooth(self, grid_map: torch.Tensor, size: int | Sequence[int], sigma: float) -> torch.Tensor:
        """The map that the model returns: :meth:`upsample`, unless a model smooths in another way."""
        return self.upsample(grid_map, size, sigma)

    def remember(self, images: torch.Tensor, names: Sequence[str] = (), places: Sequence[Place] = ()) -> None:
        """Fill the memory of a few-shot model with normal images, instead of those before.

        Args:
            images: See :meth:`forward`; one image or more, or tiles.
            names: A name for each, see :attr:`memory_names`.
            places: A place for each, where they are tiles; used with a ``memory_radius``.

        Raises:
            RuntimeError: If the model was built without ``few_shot``.
        """
        if self.memory is None:
            msg = "This model has no memory: build it with few_shot=True (Lightning classes: k_shot=1 or more)."
            raise RuntimeError(msg)
        check_finite(images)
        with torch.inference_mode(mode=False):  # in which a trainer tests; a checkpoint could not replace the tensors
            parts = [self._compared(part) for part in images.split(_REMEMBERED_AT_ONCE)]
            tokens = [torch.cat(blocks) for blocks in zip(*parts, strict=True)]
            self.memory.fill(tokens, self.clip.grid_of_images(images), names, places)

    def load_adapter(self, path: str | Path) -> adapter_file.AdapterMetadata:
        """Load trained tensors: our adapter file, the model's published format, or ``hf://owner/repo/file``.

        A line file fills the memory, too: build the model with ``few_shot=True``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or was made for another model, backbone, layer set or architecture.
        """
        return adapter_file.load_into(self, path)

    def trained_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained tensors, without the frozen backbone and without the memory."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(_NOT_TRAINED)}

    def load_state_dict(
        self,
        state_dict: Mapping[str, torch.Tensor],
        strict: bool = True,
        assign: bool = False,
    ) -> object:
        """Load a state dict with or without the tensors of the frozen backbone and the memory."""
        frozen = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(_NOT_TRAINED)}
        return super().load_state_dict({**frozen, **state_dict}, strict=strict, assign=assign)

    def __getstate__(self) -> dict[str, object]:
        """Leave cached text features and graph out of copies: a copy has its own parameters."""
        return {**self.__dict__, "_text_cache": None, "_compiled_scoring": None}


def _checked_radius(radius: int | None) -> int | None:
    if radius is not None and radius < 0:
        msg = f"memory_radius={radius}: give rows and columns of patches, 0 or more, or None to compare with all."
        raise ValueError(msg)
    return radius


def _drain(tokens: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Hand the blocks on and let each go, so that the last stage does not share the memory with all of them."""
    while tokens:
        yield tokens.pop(0)


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version  # noqa: SLF001  # torch has no public name for it
