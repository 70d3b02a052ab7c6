# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A memory of normal patch tokens: what a few normal images add to the text score.

This is no part of the paper. Tokens of the tapped blocks are compared with those of the normal images, as PatchCore
and WinCLIP do. A patch's odds of being abnormal are multiplied by a power of its distance over the largest that the
normal images have among each other. They tell it themselves, so nothing depends on the backbone.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import Grid, full_precision, grid_of

PATCH_WEIGHT = 3.0
"""Power of the relative distance in a patch's odds."""

IMAGE_WEIGHT = 0.5
"""Share of the most abnormal patch's logit that joins the image's."""

NEAR = 2
"""With one image alone, its patches nearer than this (in patches) are not compared with each other."""


class TokenMemory(nn.Module):
    """Patch tokens of normal images, part of the state dict: checkpoints and exports carry them.

    Args:
        num_layers: Blocks S.
        width: Width D of the tokens.
        dtype: Of the stored tokens.

    Attributes:
        tokens: Remembered patch tokens ``[S, K, L, D]``. In a state dict the patches of images that are not square
            have two axes, ``[S, K, g_h, g_w, D]``.
        grid: Rows and columns of the patches.
        names: What the K images are from; tiles of one image have one name. Empty: each is an image of its own.
    """

    tokens: torch.Tensor
    grid: Grid = (0, 0)
    names: tuple[str, ...] = ()

    def __init__(self, num_layers: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(num_layers, 0, 0, width, dtype=dtype))

    @property
    def num_images(self) -> int:
        """Images that the memory holds, or holds tiles of."""
        return len(set(self.names)) or self.tokens.shape[1]

    def others(self, index: int) -> list[int]:
        """Places of what is not from the same image as the one at place ``index``."""
        names = self.names or range(self.tokens.shape[1])
        return [place for place, name in enumerate(names) if name != names[index]]

    def check_filled(self) -> None:
        """Refuse to compare with nothing.

        Raises:
            RuntimeError: If the memory is empty.
        """
        if not self.num_images:
            msg = "The memory holds no normal image: call remember(images), or run test or predict by the engine."
            raise RuntimeError(msg)

    @torch.no_grad()
    def part(self, places: Sequence[int]) -> "TokenMemory":
        """The memory of some of the images, for leave-one-out.

        Args:
            places: Places of the images in this memory, one or more.
        """
        part = type(self)(self.tokens.shape[0], self.tokens.shape[3])  # type: ignore[call-arg]  # as subclasses are made
        part.tokens, part.grid = self.tokens[:, list(places)], self.grid
        part.names = tuple(self.names[place] for place in places) if self.names else ()
        return part

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        """Give the patches of images that are not square two axes: the shape tells the grid."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.grid[0] != self.grid[1]:
            destination[f"{prefix}tokens"] = destination[f"{prefix}tokens"].unflatten(2, self.grid)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
        """Take a memory of any number of images; keep the own one where the state dict has none."""
        stored = state_dict.get(f"{prefix}tokens")
        if stored is None:
            state_dict |= {f"{prefix}{name}": tensor for name, tensor in self.state_dict().items()}
        elif stored.ndim in {4, 5} and (stored.shape[0], stored.shape[-1]) == self.tokens.shape[::3]:
            if stored.numel():
                self.grid = grid_of(stored.shape[2]) if stored.ndim == 4 else (stored.shape[2], stored.shape[3])
            state_dict[f"{prefix}tokens"] = stored = stored.flatten(2, -2)
            self.tokens = self.tokens.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class NormalMemory(TokenMemory):
    """Patch tokens of normal images, and how far normal patches lie from them.

    The tensors are part of the state dict: checkpoints and exports carry them. Adapters do not, for an adapter is
    shared, and the images of a line are not. Both weights were chosen on training families of the procedural
    surfaces, see ``recipes/few_shot``.

    Args:
        num_layers: Tapped blocks S.
        width: Width D of the tokens.

    Attributes:
        tokens: Remembered patch tokens of unit length ``[S, K, L, D]``, float16.
        layer_scale: Mean distance of normal patches in each block ``[S]``.
        peak: Mean over the normal images of their largest distance, in units of ``layer_scale``.
    """

    layer_scale: torch.Tensor
    peak: torch.Tensor

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__(num_layers, width, dtype=torch.float16)
        self.register_buffer("layer_scale", torch.ones(num_layers))
        self.register_buffer("peak", torch.ones(()))
        self._pairs: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def fill(self, tokens: Sequence[torch.Tensor], grid: Grid | None = None, names: Sequence[str] = ()) -> None:
        """Remember normal images instead of those before.

        Args:
            tokens: Tokens of the K images, for each tapped block ``[K, 1 + L, D]``, class token first.
            grid: Rows and columns of the patches; ``None``: a square.
            names: See :class:`TokenMemory`.
        """
        self.grid = grid_of(tokens[0].shape[1] - 1) if grid is None else grid
        patches = torch.stack([F.normalize(layer[:, 1:].float(), dim=-1) for layer in tokens])
        self.tokens, self.names = patches.half(), tuple(names)
        distances = [_left_out(patches, index, self.grid, self.others(index)) for index in range(patches.shape[1])]
        self._measure(torch.stack(distances, dim=1))  # [S, K, L]

    @torch.no_grad()
    def part(self, places: Sequence[int]) -> "NormalMemory":
        """The memory of some of the images, as if it had been filled with these alone (up to float16 rounding).

        This is what leave-one-out needs: ``layer_scale`` and ``peak`` are those of the part, too. The images are
        compared with each other once, whatever the number of parts.

        Args:
            places: Places of the images in this memory, one or more.
        """
        if self._pairs is None or self._pairs[0] is not self.tokens:
            self._pairs = (self.tokens, _pairwise(self.tokens.float()))
        part = NormalMemory(self.tokens.shape[0], self.tokens.shape[3])
        chosen = list(places)
        part.tokens, part.grid = self.tokens[:, chosen], self.grid
        part.names = tuple(self.names[place] for place in chosen) if self.names else ()
        others = [part.others(index) for index in range(len(chosen))]
        if not others[0]:
            own = [_left_out(part.tokens.float(), index, self.grid, []) for index in range(len(chosen))]
            part._measure(torch.stack(own, dim=1))  # of this class
        else:
            cosine = self._pairs[1][:, chosen][:, :, chosen].clone()  # [S, k, k, L]
            for index, places_of_others in enumerate(others):
                same = [place for place in range(len(chosen)) if place not in places_of_others]
                cosine[:, index, same] = -1
            part._measure(1 - cosine.amax(dim=2))  # of this class
        return part

    def _measure(self, normal: torch.Tensor) -> None:
        """Scale and peak from the distances ``[S, K, L]`` of the normal images to each other."""
        self.layer_scale = normal.mean(dim=(1, 2)).clamp(min=1e-6)
        self.peak = (normal / self.layer_scale[:, None, None]).mean(dim=0).amax(dim=-1).mean().clamp(min=1e-6)

    def __getstate__(self) -> dict[str, object]:
        """Leave the comparison of the images with each other out of copies and exports."""
        return {**self.__dict__, "_pairs": None}

    def forward(
        self,
        tokens: Sequence[torch.Tensor],
        text: torch.Tensor,
        grid: Grid | None = None,
    ) -> torch.Tensor:
        """What joins the abnormal logits.

        Args:
            tokens: Tokens of the images, for each tapped block ``[B, 1 + L, D]``, class token first.
            text: The text's abnormal minus normal logits ``[B, 1 + L]``.
            grid: Not used: any patch is compared with any.

        Returns:
            torch.Tensor: ``[B, 1 + L]``. Of a patch ``3 log(distance / peak)``: 0 where it lies as far from the normal
            patches as the farthest of a normal image. Of the image half the largest logit of its patches.

        Raises:
            RuntimeError: If the memory is empty.
        """
        del grid
        self.check_filled()
        patches = PATCH_WEIGHT * (self.distance(tokens) / self.peak).clamp(min=1e-3).log()
        image = IMAGE_WEIGHT * (text[:, 1:] + patches).amax(dim=-1, keepdim=True)
        return torch.cat((image, patches), dim=-1).to(text.dtype)

    def distance(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Distance to the nearest remembered token, over that of normal patches, mean over the blocks: ``[B, L]``."""
        with full_precision(tokens[0].device):
            distances = [
                (1 - nearest(F.normalize(layer[:, 1:].float(), dim=-1), memory.float())) / scale
                for layer, memory, scale in zip(tokens, self.tokens, self.layer_scale, strict=True)
            ]
        return torch.stack(distances).mean(dim=0)


def _left_out(patches: torch.Tensor, index: int, grid: Grid, others: Sequence[int]) -> torch.Tensor:
    """Distances ``[S, L]`` of one image of ``[S, K, L, D]`` to the others; without any to its own farther patches."""
    if others:
        return torch.cat([1 - nearest(layer[index : index + 1], layer[others]) for layer in patches])
    places = torch.cartesian_prod(*(torch.arange(side, device=patches.device) for side in grid))
    near = (places[:, None] - places).abs().amax(dim=-1) < NEAR
    cosine = (patches[:, index] @ patches[:, index].mT).masked_fill(near, -1)
    return 1 - cosine.amax(dim=-1)


def _pairwise(patches: torch.Tensor) -> torch.Tensor:
    """Largest cosine of each patch of ``[S, K, L, D]`` to any patch of each image: ``[S, K, K, L]``."""
    return torch.stack([torch.stack([nearest(layer, image[None]) for image in layer], dim=1) for layer in patches])


def nearest(patches: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Largest cosine of each patch ``[B, L, D]`` to any token of ``[K, M, D]``: ``[B, L]``.

    Image by image, so that no more than one ``[B, L, M]`` is ever held.
    """
    best = (patches @ memory[0].T).amax(dim=-1)
    for picture in memory[1:]:
        best = torch.maximum(best, (patches @ picture.T).amax(dim=-1))
    return best
