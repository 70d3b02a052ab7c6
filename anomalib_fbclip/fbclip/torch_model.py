# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FB-CLIP as one readable pipeline: image tokens, mask, views, attention, suppression, scores."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.functional import check_finite, grid_to_map, map_matrix, relative_layers, tokens_to_grid
from anomalib_fbclip.prompts import PromptLearner

from . import adapters
from .attention import ForegroundBackgroundAttention
from .background import BANKS, background_prototype, suppress_background, suppressed_similarity
from .foreground import foreground_mask
from .memory import NormalMemory
from .stages import Stages
from .text_fusion import POOLINGS, TextFeatureFusion, TextFeatures
from .views import VIEWS, Mixing, identity_mixing, semantic_mixing, spatial_mixing

PAPER_LAYERS = (1, 6, 12, 18, 24)
_SCALE_WEIGHTS = 6
TOKENS_AT_ONCE = 1370
"""On a CPU, from the views on: one image of 518 pixels. Eight together take 1.4 times as long as one by one."""
_NOT_TRAINED = ("clip.", "memory.")


class Scores(NamedTuple):
    """What the losses need.

    Attributes:
        pred_score: Abnormal probability of the class token ``[B]``.
        grid_map: Abnormal probability of the patches ``[B, g, g]``.
        similarity: Similarity over temperature of the image's mean feature to both texts ``[B, 2]`` (SCR).
    """

    pred_score: torch.Tensor
    grid_map: torch.Tensor
    similarity: torch.Tensor


def default_layers(num_layers: int) -> tuple[int, ...]:
    """The paper's blocks 1, 6, 12, 18, 24, at the same relative depth in a tower of another depth."""
    return relative_layers(PAPER_LAYERS, num_layers)


class FBCLIPModel(nn.Module):
    """FB-CLIP (Hu et al., CVPR 2026).

    Args:
        clip: Frozen backbone.
        feature_layers: Blocks whose tokens are read, counted from 1. ``None``: 1, 6, 12, 18, 24 for a tower of 24
            blocks, the same relative depths for another.
        n_ctx: Learnable places of each prompt.
        text_poolings: Poolings of the text tokens, out of ``"global"``, ``"attention"``, ``"eot"`` (Table 3).
        views: Views of the image tokens, out of ``"id"``, ``"sem"``, ``"spa"`` (Table 4).
        attention: Foreground-background attention on or off (Table 2).
        suppression: Background suppression on or off (Table 2).
        bank: Tokens behind the background prototype, ``"half"`` or ``"full"`` (Table 5).
        causal_text: CLIP's causal mask in the text transformer. The released weights were trained without it.
        temperature: Divides the cosine of tokens and text.
        smoothing_sigma: Gaussian smoothing of the returned map, in pixels of the input; 0 switches it off.
        few_shot: Let a memory of normal pictures join the text's score, see :meth:`remember`. Not part of the paper.

    Raises:
        ValueError: If an argument is out of range; the message names the value.

    Example:
        >>> model = FBCLIPModel(clip=load_clip("ViT-L-14-336", "openai", image_size=518))  # doctest: +SKIP
        >>> model.load_adapter("adapter.safetensors")  # doctest: +SKIP
        >>> model.eval()(images).pred_score  # doctest: +SKIP
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        feature_layers: Sequence[int] | None = None,
        n_ctx: int = 12,
        text_poolings: Sequence[str] = tuple(POOLINGS),
        views: Sequence[str] = VIEWS,
        attention: bool = True,
        suppression: bool = True,
        bank: str = "half",
        causal_text: bool = False,
        temperature: float = 0.07,
        smoothing_sigma: float = 4.0,
        few_shot: bool = False,
    ) -> None:
        super().__init__()
        _check(views, bank, temperature, smoothing_sigma, clip.image_size)
        self.clip = clip
        layers = default_layers(clip.num_layers) if feature_layers is None else feature_layers
        self.feature_layers = clip.check_layers(layers)
        self.views = tuple(view for view in VIEWS if view in views)
        self.suppression = suppression
        self.bank = bank
        self.causal_text = causal_text
        self.temperature = temperature
        self.smoothing_sigma = smoothing_sigma

        self.prompts = PromptLearner(clip, n_ctx)
        self.text_fusion = TextFeatureFusion(clip, text_poolings)
        self.attention = ForegroundBackgroundAttention(clip.vision_width) if attention else None
        self.scale_weights = nn.Parameter(torch.ones(max(_SCALE_WEIGHTS, len(self.feature_layers))))
        self.memory = NormalMemory(len(self.feature_layers), clip.vision_width) if few_shot else None
        self._text_cache: tuple[object, torch.Tensor] | None = None

    def forward(
        self,
        images: torch.Tensor,
        return_stages: bool = False,
    ) -> InferenceBatch | tuple[InferenceBatch, Stages]:
        """Score images.

        Args:
            images: Images ``[B, 3, H, H]`` normalised with CLIP's statistics, H a multiple of the patch size.
            return_stages: Also return the tensors of every stage, for pictures and for tests.

        Returns:
            InferenceBatch: ``pred_score`` ``[B]`` and smoothed ``anomaly_map`` ``[B, H, H]``, both probabilities.
            With ``return_stages``, a tuple of it and :class:`Stages`.

        Raises:
            ValueError: If the images are empty, not square, no multiple of the patch size, or hold NaN or infinity.
        """
        stages = Stages() if return_stages else None
        scores = self.score(images, stages)
        anomaly_map = self.upsample(scores.grid_map, images.shape[-1], self.smoothing_sigma)
        batch = InferenceBatch(pred_score=scores.pred_score, anomaly_map=anomaly_map)
        if stages is None:
            return batch
        stages.anomaly_map_upsampled = self.upsample(scores.grid_map, images.shape[-1], sigma=0)
        stages.anomaly_map_smoothed = anomaly_map
        stages.derive(self)
        return batch, stages

    def score(
        self,
        images: torch.Tensor,
        stages: Stages | None = None,
        tokens: Sequence[torch.Tensor] | None = None,
    ) -> Scores:
        """The method up to the probabilities of class token and patches; differentiable in training mode.

        Axes: B images, N = 1 + L tokens, D vision width, d joint width.

        Args:
            images: See :meth:`forward`.
            stages: Record to fill.
            tokens: Tokens of the images where they are at hand, such as a :class:`TokenCache`'s: one ``[B, N, D]`` a
                layer. The visual tower is then not run.
        """
        check_finite(images)
        text_features = self.text_features(stages)
        # One [B, N, D] a layer; only what is read again is held beside the features.
        blocks = self.clip.encode_image(images, self.feature_layers) if tokens is None else list(tokens)
        recorded = torch.is_grad_enabled() or torch.compiler.is_exporting() or stages is not None
        if recorded or images.device.type != "cpu" or len(images) * blocks[0].shape[1] <= TOKENS_AT_ONCE:
            return self._score_tokens(blocks, text_features, stages)
        size = max(1, TOKENS_AT_ONCE // blocks[0].shape[1])
        parts = zip(*(block.split(size) for block in blocks), strict=True)
        scores = [self._score_tokens(list(part), text_features) for part in parts]
        return Scores(*(torch.cat(values) for values in zip(*scores, strict=True)))

    def _score_tokens(
        self,
        blocks: list[torch.Tensor],
        text_features: torch.Tensor,
        stages: Stages | None = None,
    ) -> Scores:
        """From the tokens of the blocks, which are used up, and the text features to the probabilities."""
        tokens = [*blocks] if self.memory is not None or stages is not None else None
        features = self.attended_views(_drain(blocks), stages)  # layer by layer ID, SEM, SPA: each [B, N, D]
        prototype = background_prototype(features, self.bank) if self.suppression else None  # [B, D]
        layer_weights = self.scale_weights.softmax(dim=0)
        logits = torch.zeros((), device=text_features.device)
        for index, feature in enumerate(features):
            similarity = suppressed_similarity(feature, prototype, self.clip.visual.proj, text_features)  # [B, N, 2]
            logits = logits + layer_weights[index // len(self.views)] * similarity / self.temperature
        evidence = None
        if self.memory is not None and tokens is not None and not self.training:
            evidence = self.memory(tokens, logits[..., 1] - logits[..., 0])  # [B, N]
            logits = logits + F.pad(evidence[..., None], (1, 0))
        abnormal = logits.softmax(dim=-1)[..., 1]  # [B, N]
        mean_feature = self.clip.project(self._suppress(features[-1], prototype).mean(dim=1))
        similarity = F.normalize(mean_feature, dim=-1) @ text_features.T / self.temperature
        scores = Scores(abnormal[:, 0], tokens_to_grid(abnormal[:, 1:]), similarity)
        if stages is not None and tokens is not None:
            stages.image_tokens, stages.background_prototype = tokens, prototype
            stages.suppressed_projected = [self.clip.project(self._suppress(f, prototype)) for f in features]
            stages.pred_score, stages.anomaly_map_grid = scores.pred_score, scores.grid_map
            stages.memory_evidence = evidence
        return scores

    def attended_views(self, tokens: Iterable[torch.Tensor], stages: Stages | None = None) -> list[torch.Tensor]:
        """Views of every layer, through the attention that all of them share.

        Masks and views hold no learnable parameter, so they are built without gradients.
        """
        features = []
        previous = None
        for layer_tokens in tokens:
            exact = layer_tokens.float()
            with torch.no_grad(), torch.autocast(exact.device.type, enabled=False):
                # Single weights decide here, and they cost little: in float32 whatever the precision around.
                mask = foreground_mask(exact, previous)
                previous = None
                mixings = [self._mixing(name, exact, mask) for name in self.views]
            if self.attention is None:
                attended = [mix(exact) for mix in mixings]
            else:
                variances = [mix(exact).var(dim=-1, correction=0, keepdim=True) for mix in mixings]
                attended = self.attention.attend(layer_tokens, mixings, variances)
            features += attended
            previous = exact
            if stages is not None:
                stages.add_layer(
                    mask,
                    {name: mix(exact) for name, mix in zip(self.views, mixings, strict=True)},
                    dict(zip(self.views, attended, strict=True)),
                )
        return features

    def text_features(self, stages: Stages | None = None) -> torch.Tensor:
        """Normal and abnormal text feature ``[2, d]``, of unit length.

        They depend on the parameters alone, so outside training they are computed once and again only when a
        parameter has changed.
        """
        if torch.compiler.is_exporting() and not self.training and self._text_cache is not None:
            # An exported graph sees images only: the text tower becomes a constant of it.
            return self._text_cache[1]
        if self.training or stages is not None:
            return self._fuse_text(stages).fused
        state = self._text_state()
        if torch.is_grad_enabled() or self._text_cache is None or self._text_cache[0] != state:
            features = self._fuse_text().fused
            self._text_cache = (state, features.detach())
            return features
        return self._text_cache[1]

    @staticmethod
    def upsample(grid_map: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
        """Map ``[B, g, g]`` to pixels ``[B, size, size]``, smoothed with ``sigma`` pixels (0: not)."""
        with torch.autocast(grid_map.device.type, enabled=False):  # half precision would tie neighbouring pixels
            return grid_to_map(grid_map, map_matrix(grid_map.shape[-1], size, sigma).to(grid_map.device))

    def load_adapter(self, path: str | Path) -> adapters.AdapterMetadata:
        """Load trained tensors: our adapter file, the published ``.pth`` format, or ``hf://owner/repo/file``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or was made for another backbone, layer set or architecture.
        """
        return adapters.load_into(self, path)

    def remember(self, images: torch.Tensor) -> None:
        """Fill the memory of a few-shot model with normal pictures, instead of those before.

        Args:
            images: See :meth:`forward`; one picture or more.

        Raises:
            RuntimeError: If the model was built without ``few_shot``.
        """
        if self.memory is None:
            msg = "This model has no memory: build it with few_shot=True (FBCLIP: k_shot=1 or more)."
            raise RuntimeError(msg)
        check_finite(images)
        self.memory.fill(self.clip.encode_image(images, self.feature_layers))

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

    @staticmethod
    def _mixing(name: str, tokens: torch.Tensor, mask: torch.Tensor) -> Mixing:
        if name == "id":
            return identity_mixing
        return semantic_mixing(tokens, mask) if name == "sem" else spatial_mixing(tokens, mask)

    @staticmethod
    def _suppress(feature: torch.Tensor, prototype: torch.Tensor | None) -> torch.Tensor:
        return feature if prototype is None else suppress_background(feature, prototype)

    def _fuse_text(self, stages: Stages | None = None) -> TextFeatures:
        embeddings = self.prompts()
        tokens = self.clip.encode_text(embeddings, causal=self.causal_text)
        features = self.text_fusion(tokens, self.prompts.end_of_text, self.clip)
        if stages is not None:
            stages.prompt_embeddings, stages.text_tokens, stages.text_features = embeddings, tokens, features.fused
            stages.text_eot, stages.text_global = features.eot, features.global_
            stages.text_attention = features.attention
        return features

    def _text_state(self) -> tuple[object, ...]:
        parameters = [*self.prompts.parameters(), *self.text_fusion.parameters(), self.clip.text.text_projection]
        device = parameters[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return (self.causal_text, autocast, *((id(p), p.data_ptr(), _version(p)) for p in parameters))

    def __getstate__(self) -> dict[str, object]:
        """Leave the cached text features out of copies: a copy has its own parameters."""
        return {**self.__dict__, "_text_cache": None}


def _drain(tokens: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Hand the blocks on and let each go, so that the last attention does not share the memory with all of them."""
    while tokens:
        yield tokens.pop(0)


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version  # noqa: SLF001  # torch has no public name for it


def _check(views: Sequence[str], bank: str, temperature: float, smoothing_sigma: float, image_size: int) -> None:
    if not views or set(views) - set(VIEWS):
        msg = f"views={list(views)}: choose one or more of {list(VIEWS)}."
        raise ValueError(msg)
    if bank not in BANKS:
        msg = f"bank={bank!r}: choose one of {list(BANKS)}."
        raise ValueError(msg)
    if temperature <= 0:
        msg = f"temperature={temperature}: give a positive number (the paper's is 0.07)."
        raise ValueError(msg)
    if not 0 <= smoothing_sigma <= image_size:
        msg = f"smoothing_sigma={smoothing_sigma}: give pixels from 0 (no smoothing) to the image size, {image_size}."
        raise ValueError(msg)
