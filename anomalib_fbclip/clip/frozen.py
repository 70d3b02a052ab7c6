# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``FrozenCLIP``: both towers of a CLIP, never trained, giving tokens instead of one vector."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from anomalib_fbclip.common.functional import Grid, grid_of, one_or_pair, pair

from .openai import build_from_openai_state_dict
from .text import BeforeBlock, text_tokens
from .vision import block_tokens

Tower = Callable[[nn.Module, torch.Tensor, Sequence[int]], list[torch.Tensor]]
"""Visual tower of open_clip, images and block numbers -> tokens of each block, as :func:`block_tokens`."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that OpenAI's weights, and nearly all others, were trained with."""

LARGEST_SIDE = 2**14
"""Pixels; attention over more patches than such a square has is hopeless on any machine of today."""


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of one image for the next one.

    It gives back what is free beyond twice the largest block that was ever freed, of at most 32 MB. Tokens of an image
    are blocks of a few MB: they would go back in the midst of it, and be paid again page by page.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class FrozenCLIP(nn.Module):
    """Frozen CLIP (paper, section 3.1): tokens of chosen blocks, and all text tokens.

    The module stays in evaluation mode whatever its parent does, and its parameters carry no gradient.

    Args:
        clip: An open_clip model whose visual tower is a plain ``VisionTransformer`` with a class token.
        image_size: Height and width of the input in pixels, multiples of the patch size; one number for a square.
            ``None``: the size that the weights were trained with.
        name: What the backbone is called in adapters and messages.
        mean: Of each colour, that the weights' images were normalised with.
        std: Standard deviation of each colour, that the weights' images were normalised with.

    Raises:
        TypeError: If the visual tower is not a plain vision transformer.
        ValueError: If ``image_size`` is not a positive multiple of the patch size, or absurdly large.

    Example:
        >>> from anomalib_fbclip.clip import load_clip
        >>> clip = load_clip("tiny", image_size=64)
        >>> tokens = clip.encode_image(torch.zeros(1, 3, 64, 64), layers=(4, 8))
        >>> [tuple(layer.shape) for layer in tokens]
        [(1, 65, 128), (1, 65, 128)]
    """

    def __init__(
        self,
        clip: nn.Module,
        image_size: int | Sequence[int] | None = None,
        name: str = "custom",
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ) -> None:
        super().__init__()
        visual = clip.visual
        if not all(hasattr(visual, part) for part in ("conv1", "class_embedding", "ln_pre", "transformer", "proj")):
            msg = f"FrozenCLIP needs a plain vision transformer with a class token, {name} has {type(visual).__name__}."
            raise TypeError(msg)
        self.name = name
        self.mean = mean
        self.std = std
        self.visual = visual
        self.text = clip if hasattr(clip, "token_embedding") else clip.text
        self.patch_size = int(visual.conv1.kernel_size[0])
        trained_size = grid_of(visual.positional_embedding.shape[0] - 1)[0] * self.patch_size
        self.image_size = trained_size if image_size is None else one_or_pair(image_size)
        self._check_size(self.image_size)
        self.requires_grad_(requires_grad=False)
        self.eval()
        _keep_freed_memory()

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        image_size: int | Sequence[int] | None = None,
        quick_gelu: bool = True,
        name: str = "custom",
    ) -> "FrozenCLIP":
        """Build from weights in OpenAI's format; every size is read from the tensors.

        Args:
            state_dict: Tensors under OpenAI's names (``visual.conv1.weight``, ``token_embedding.weight``, ...).
                It is not changed.
            image_size: See the class.
            quick_gelu: Activation; OpenAI's weights need QuickGELU.
            name: See the class.

        Raises:
            ValueError: If a tensor is missing, unexpected or of another shape than the others imply.
        """
        return cls(build_from_openai_state_dict(state_dict, quick_gelu=quick_gelu), image_size=image_size, name=name)

    @property
    def quick_gelu(self) -> bool:
        """Whether the activation is QuickGELU, and not GELU."""
        return any(type(module).__name__ == "QuickGELU" for module in self.visual.modules())

    @property
    def num_layers(self) -> int:
        """Number of blocks of the visual tower."""
        return len(self.visual.transformer.resblocks)

    @property
    def num_text_layers(self) -> int:
        """Number of blocks of the text tower."""
        return len(self.text.transformer.resblocks)

    @property
    def vision_width(self) -> int:
        """Width D of the visual tokens."""
        return self.visual.proj.shape[0]

    @property
    def embed_dim(self) -> int:
        """Width d of the joint image-text space."""
        return self.visual.proj.shape[1]

    @property
    def text_width(self) -> int:
        """Width W of the text tokens."""
        return self.text.positional_embedding.shape[1]

    @property
    def context_length(self) -> int:
        """Places of a prompt (77 for CLIP)."""
        return self.text.positional_embedding.shape[0]

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at ``image_size``."""
        height, width = pair(self.image_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def grid_size(self) -> int | Grid:
        """Patches along one side at a square ``image_size``, else :attr:`grid`."""
        return one_or_pair(self.grid)

    def grid_of_images(self, images: torch.Tensor) -> Grid:
        """Rows and columns of the patches of images ``[B, 3, H, W]``."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return ``layers`` as a tuple of block numbers, counted from 1.

        Raises:
            ValueError: If it is empty, out of range, repeated or not ascending.
        """
        chosen = tuple(int(layer) for layer in layers)
        if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] > self.num_layers:
            msg = (
                f"feature_layers={list(layers)} does not fit backbone {self.name!r}: "
                f"give ascending block numbers from 1 to {self.num_layers}, counted from 1."
            )
            raise ValueError(msg)
        return chosen

    def encode_image(
        self,
        images: torch.Tensor,
        layers: Sequence[int],
        tower: Tower = block_tokens,
    ) -> list[torch.Tensor]:
        """Tokens of chosen blocks.

        Args:
            images: Images ``[B, 3, H, W]`` normalised with ``mean`` and ``std``, H and W multiples of the patch size
                (positions are resized to them).
            layers: Block numbers, counted from 1, ascending.
            tower: Another way through the frozen blocks, for models that have one.

        Returns:
            list[torch.Tensor]: For each layer ``[B, 1 + g_h * g_w, D]``, class token first, without ``ln_post``.

        Raises:
            ValueError: If the images are empty, not RGB or their sides no multiples of the patch size.
        """
        self._check_images(images)
        layers = self.check_layers(layers)
        images = images.to(self.visual.conv1.weight.dtype)  # a whole model in half precision gets float32 images
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with torch.inference_mode():
                chosen = tower(self.visual, images, layers)
            # A tensor of inference mode cannot be kept for a backward pass, its copy can.
            return [tokens.clone() for tokens in chosen]
        with torch.no_grad():
            return tower(self.visual, images, layers)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Visual tokens ``[..., D]`` to the joint space ``[..., d]``, without ``ln_post``."""
        return tokens @ self.visual.proj

    def embed_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings ``[P, 77, W]`` of token ids ``[P, 77]``, without positions."""
        return self.text.token_embedding(token_ids.to(self.text.token_embedding.weight.device))

    def encode_text(
        self,
        embeddings: torch.Tensor,
        causal: bool = True,
        before_block: BeforeBlock | None = None,
    ) -> torch.Tensor:
        """All text tokens ``[P, 77, W]`` after ``ln_final``, see :func:`text_tokens`; gradients reach ``embeddings``.

        Args:
            embeddings: Word embeddings ``[P, 77, W]`` without positions.
            causal: CLIP's mask, or full attention.
            before_block: Changes the tokens before each block.
        """
        return text_tokens(self.text, embeddings, causal, before_block)

    def project_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Text tokens ``[..., W]`` to the joint space ``[..., d]``."""
        return tokens @ self.text.text_projection

    def fingerprint(self) -> str:
        """Sixteen hex digits that tell one set of weights from another, from 64 values of every tensor."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.state_dict().items()):
            values = tensor.detach().reshape(-1)
            # In whole numbers: float32 would round the last place of a large tensor past its end.
            sample = values[torch.arange(64, device=values.device) * (values.numel() - 1) // 63]
            digest.update(f"{key}{tuple(tensor.shape)}".encode())
            digest.update(sample.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def train(self, mode: bool = True) -> "FrozenCLIP":
        """Stay in evaluation mode: the backbone is frozen."""
        del mode
        return super().train(mode=False)

    def _check_size(self, size: int | Sequence[int]) -> None:
        for side in pair(size):
            if side < self.patch_size or side % self.patch_size:
                low = max(self.patch_size, side // self.patch_size * self.patch_size)
                msg = (
                    f"image_size={size} is not a multiple of the patch size {self.patch_size} of backbone "
                    f"{self.name!r}: use {low} or {low + self.patch_size}{'' if size == side else f' for {side}'}."
                )
                raise ValueError(msg)
            if side > LARGEST_SIDE:
                msg = f"image_size={size}: one such image does not fit in memory; use {LARGEST_SIDE} or less."
                raise ValueError(msg)

    def _check_images(self, images: torch.Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            msg = f"images of shape {tuple(images.shape)}: expected RGB images [B, 3, H, W]."
            raise ValueError(msg)
        if images.shape[0] == 0:
            msg = f"images of shape {tuple(images.shape)}: the batch is empty; give at least one image."
            raise ValueError(msg)
        self._check_size(one_or_pair(images.shape[-2:]))
