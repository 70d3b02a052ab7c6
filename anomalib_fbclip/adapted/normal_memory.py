# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A memory of normal patch tokens: what a few normal images add to the text score.

This is no part of the paper. Tokens of the tapped blocks, or features of a network under them, are compared with those
of the normal images, as PatchCore and WinCLIP do. A patch's odds of being abnormal are multiplied by a power of its
distance over the largest that the normal images have among each other. They tell it themselves, so nothing else
depends on the backbone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses
from torchmetrics.functional.classification import binary_auroc

from anomalib_fbclip.clip.stem import local_features
from anomalib_fbclip.common.functional import Grid, full_precision, grid_of
from anomalib_fbclip.host.tiling import WHOLE, Place

PATCH_WEIGHT = 3.0
"""Power of the relative distance in a patch's odds."""

IMAGE_WEIGHT = 0.5
"""Share of the most abnormal patch's logit that joins the image's."""

NEAR = 2
"""With one image alone, its patches nearer than this (in patches) are not compared with each other."""

AUTO_RADIUS = 1
"""What :func:`choose_radius` chooses where a place says something."""

PLACE_TELLS = 0.75
"""Least AUROC of displaced patches, see :func:`choose_radius`."""

LEAST_JUDGED, MOST_JUDGED = 4, 8
"""Normal images that :func:`choose_radius` asks."""


Encode = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Images to the tokens of the tapped blocks."""


def at_hand(blocks: Sequence[torch.Tensor]) -> Encode:
    """For :meth:`TokenMemory.compared`, where the tokens of the tapped blocks are at hand."""
    return lambda _: blocks


class TokenMemory(nn.Module):
    """Patch tokens of normal images, part of the state dict: checkpoints and exports carry them.

    Args:
        num_layers: Blocks S.
        width: Width D of the tokens.
        dtype: Of the stored tokens.
        radius: A patch is compared with remembered patches at most so many rows and columns from its own place. 0: at
            the same place alone. ``None``: with all.

    Attributes:
        tokens: Remembered patch tokens ``[S, K, L, D]``. In a state dict the patches of images that are not square
            have two axes, ``[S, K, g_h, g_w, D]``.
        grid: Rows and columns of the patches.
        names: What the K images are from; tiles of one image have one name. Empty: each is an image of its own.
        places: Which tile each of the K images is; with a radius alone. Empty: each is a whole image.
    """

    tokens: torch.Tensor
    grid: Grid = (0, 0)
    names: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()

    def __init__(self, num_layers: int, width: int, dtype: torch.dtype, radius: int | None = None) -> None:
        super().__init__()
        self.radius = radius
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
        layers, _, _, width = self.tokens.shape
        part = type(self)(layers, width, radius=self.radius)  # type: ignore[call-arg]  # as subclasses are made
        part.tokens, part.grid = self.tokens[:, list(places)], self.grid
        part.names = tuple(self.names[place] for place in places) if self.names else ()
        part.places = tuple(self.places[place] for place in places) if self.places else ()
        return part

    def compared(self, visual: nn.Module, images: torch.Tensor, encode: Encode) -> list[torch.Tensor]:  # noqa: PLR6301
        """What is compared of images: here the tokens of the tapped blocks.

        Args:
            visual: Vision tower.
            images: Normalised images ``[B, 3, H, W]``.
            encode: Gives the tokens of the tapped blocks.

        Returns:
            list[torch.Tensor]: Each ``[B, 1 + L, D]``, class token first.
        """
        del visual
        return [*encode(images)]

    def describe(
        self,
        tokens: Sequence[torch.Tensor],
        grid: Grid | None,
        names: Sequence[str],
        places: Sequence[Place],
    ) -> None:
        """Note what the tokens of new images are of, see the attributes; places serve a radius alone."""
        self.grid = grid_of(tokens[0].shape[1] - 1) if grid is None else grid
        self.names, self.places = tuple(names), () if self.radius is None else tuple(places)

    def closest(
        self,
        patches: torch.Tensor,
        known: torch.Tensor,
        grid: Grid | None = None,
        places: Sequence[Place] = (),
        own: Sequence[Place] | None = None,
    ) -> torch.Tensor:
        """Largest cosine of each patch to the remembered ones that it is compared with.

        Args:
            patches: Of the images, of unit length ``[B, L, D]``.
            known: Remembered ones of the same block, of unit length ``[K, L', D]``.
            grid: Rows and columns of the patches; ``None``: a square.
            places: Of T tiles, in whose order the images come, each B / T times. Empty: whole images.
            own: Which tile each of the K remembered images is; ``None``: :attr:`places`.

        Returns:
            torch.Tensor: ``[B, L]``. A tile of which none is remembered, since it showed nothing of the region there,
            is compared with all.

        Raises:
            ValueError: If there is a radius and the images are of other grids or tiles than the remembered ones.
        """
        if self.radius is None:
            return nearest(patches, known)
        grid = grid_of(patches.shape[1]) if grid is None else grid
        if grid != self.grid:
            msg = f"memory_radius={self.radius} compares patches of the same place, and this image has "
            msg += f"{grid[0]} x {grid[1]} of them where the normal images have {self.grid[0]} x {self.grid[1]}: give "
            msg += "images of one size, or memory_radius=None."
            raise ValueError(msg)
        own = self.places if own is None else own
        if not own:
            return nearest_by_place(patches, known, grid, self.radius)
        asked = places or (WHOLE,)
        best: dict[int, torch.Tensor] = {}
        tiles = patches.unflatten(0, (len(asked), -1))  # a recorded graph has batches of any size
        for place in dict.fromkeys(asked):
            self._check_tiles(place, own)
            numbers = [number for number, each in enumerate(asked) if each == place]
            same = [index for index, each in enumerate(own) if each == place]
            here = tiles[numbers].flatten(0, 1)
            found = nearest_by_place(here, known[same], grid, self.radius) if same else nearest(here, known)
            best |= dict(zip(numbers, found.unflatten(0, (len(numbers), -1)), strict=True))
        return torch.cat([best[number] for number in range(len(asked))])

    def _check_tiles(self, place: Place, own: Sequence[Place]) -> None:
        """Refuse tiles of an image that is cut otherwise than the remembered ones."""
        cuts = {(each.rows, each.columns) for each in own if each != WHOLE}
        if place != WHOLE and cuts and (place.rows, place.columns) not in cuts:
            (rows, columns), *_ = cuts
            msg = f"memory_radius={self.radius} compares tiles of the same place, and this image has {place.rows} x "
            msg += f"{place.columns} of them where the normal images have {rows} x {columns}: give images of one size, "
            msg += "or memory_radius=None."
            raise ValueError(msg)

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
        else:
            known, own = [*stored.shape], [*self.tokens.shape]
            args[-1].append(
                f"The memory of normal images in it has tokens of shape {known}, where this model's have {own}: let "
                "the model read the good images again.",
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class NormalMemory(TokenMemory):
    """Patch tokens of normal images, and how far normal patches lie from them.

    The tensors are part of the state dict: checkpoints and exports carry them. Adapters do not, for an adapter is
    shared, and the images of a line are not. Both weights were chosen on training families of the procedural
    surfaces, see ``recipes/few_shot``.

    Args:
        num_layers: Tapped blocks S, or other kinds of tokens.
        width: Width D of the tokens.
        radius: See :class:`TokenMemory`.

    Attributes:
        tokens: Remembered patch tokens of unit length ``[S, K, L, D]``, float16.
        layer_scale: Mean distance of normal patches in each block ``[S]``.
        peak: Mean over the normal images of their largest distance, in units of ``layer_scale``.
    """

    layer_scale: torch.Tensor
    peak: torch.Tensor

    def __init__(self, num_layers: int, width: int, radius: int | None = None) -> None:
        super().__init__(num_layers, width, dtype=torch.float16, radius=radius)
        self.register_buffer("layer_scale", torch.ones(num_layers))
        self.register_buffer("peak", torch.ones(()))
        self._pairs: tuple[torch.Tensor, dict[Place, tuple[list[int], torch.Tensor]]] | None = None

    @torch.no_grad()
    def fill(
        self,
        tokens: Sequence[torch.Tensor],
        grid: Grid | None = None,
        names: Sequence[str] = (),
        places: Sequence[Place] = (),
    ) -> None:
        """Remember normal images instead of those before.

        Args:
            tokens: See :meth:`TokenMemory.compared`, of the K images: each ``[K, 1 + L, D]``.
            grid: Rows and columns of the patches; ``None``: a square.
            names: See :class:`TokenMemory`.
            places: See :class:`TokenMemory`.
        """
        self.describe(tokens, grid, names, places)
        patches = torch.stack([F.normalize(layer[:, 1:].float(), dim=-1) for layer in tokens])
        self.tokens = patches.half()
        distances = [self._left_out(patches, index) for index in range(patches.shape[1])]
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
            self._pairs = (self.tokens, self._pairwise())
        part = super().part(places)
        assert isinstance(part, NormalMemory)  # for the type checker
        kept = {place: index for index, place in enumerate(places)}
        distances = []
        for index, place in enumerate(places):
            rows, cosine = self._pairs[1][self.places[place] if self.places else WHOLE]
            others = set(part.others(index))
            columns = [column for column, row in enumerate(rows) if kept.get(row) in others]
            if columns:
                distances.append(1 - cosine[:, rows.index(place), columns].amax(dim=1))
            else:
                distances.append(part._left_out(part.tokens.float(), index))  # noqa: SLF001  # of this class
        part._measure(torch.stack(distances, dim=1))  # noqa: SLF001  # of this class
        return part

    def _pairwise(self) -> dict[Place, tuple[list[int], torch.Tensor]]:
        """Of each place its G images, and the largest cosine of each patch of each to each: ``[S, G, G, L]``."""
        places, pairs = self.places or (WHOLE,) * self.tokens.shape[1], {}
        for place in dict.fromkeys(places):
            rows = [row for row, each in enumerate(places) if each == place]
            layers = self.tokens[:, rows].float()
            asked = [place] * len(rows)
            found = [[self.closest(layer, each[None], self.grid, asked, [place]) for each in layer] for layer in layers]
            pairs[place] = (rows, torch.stack([torch.stack(each, dim=1) for each in found]))
        return pairs

    def _left_out(self, patches: torch.Tensor, index: int) -> torch.Tensor:
        """Distances ``[S, L]`` of one image of ``[S, K, L, D]`` to the others; without any to its own farther ones."""
        others = self.others(index)
        if not others:
            places = torch.cartesian_prod(*(torch.arange(side, device=patches.device) for side in self.grid))
            near = (places[:, None] - places).abs().amax(dim=-1) < NEAR
            cosine = (patches[:, index] @ patches[:, index].mT).masked_fill(near, -1)
            return 1 - cosine.amax(dim=-1)
        asked = self.places[index : index + 1]
        own = [self.places[other] for other in others] if self.places else ()
        return torch.cat([
            1 - self.closest(layer[index : index + 1], layer[others], self.grid, asked, own) for layer in patches
        ])

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
        places: Sequence[Place] = (),
    ) -> torch.Tensor:
        """What joins the abnormal logits.

        Args:
            tokens: See :meth:`TokenMemory.compared`: each ``[B, 1 + L, D]``.
            text: The text's abnormal minus normal logits ``[B, 1 + L]``.
            grid: Rows and columns of the patches; ``None``: a square.
            places: See :meth:`TokenMemory.closest`.

        Returns:
            torch.Tensor: ``[B, 1 + L]``. Of a patch ``3 log(distance / peak)``: 0 where it lies as far from the normal
            patches as the farthest of a normal image. Of the image half the largest logit of its patches.

        Raises:
            RuntimeError: If the memory is empty.
            ValueError: See :meth:`TokenMemory.closest`.
        """
        self.check_filled()
        patches = PATCH_WEIGHT * (self.distance(tokens, grid, places) / self.peak).clamp(min=1e-3).log()
        image = IMAGE_WEIGHT * (text[:, 1:] + patches).amax(dim=-1, keepdim=True)
        return torch.cat((image, patches), dim=-1).to(text.dtype)

    def distance(
        self,
        tokens: Sequence[torch.Tensor],
        grid: Grid | None = None,
        places: Sequence[Place] = (),
    ) -> torch.Tensor:
        """Distance to the nearest remembered token, over that of normal patches, mean over the blocks: ``[B, L]``."""
        with full_precision(tokens[0].device):
            distances = [
                (1 - self.closest(F.normalize(layer[:, 1:].float(), dim=-1), memory.float(), grid, places)) / scale
                for layer, memory, scale in zip(tokens, self.tokens, self.layer_scale, strict=True)
            ]
        return torch.stack(distances).mean(dim=0)


class LocalFeatureMemory(NormalMemory):
    """Features of the convolutional network under the patches instead of tokens, for the embedded backbone.

    They were trained on photographs, and the blocks above them on drawings: see ``docs/few_shot.md``.
    """

    def compared(self, visual: nn.Module, images: torch.Tensor, encode: Encode) -> list[torch.Tensor]:
        """See :func:`~anomalib_fbclip.clip.stem.local_features`."""
        del self, encode
        return [local_features(visual, images)]


def nearest(patches: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Largest cosine of each patch ``[B, L, D]`` to any token of ``[K, M, D]``: ``[B, L]``.

    Image by image, so that no more than one ``[B, L, M]`` is ever held.
    """
    best = (patches @ memory[0].T).amax(dim=-1)
    for picture in memory[1:]:
        best = torch.maximum(best, (patches @ picture.T).amax(dim=-1))
    return best


def nearest_by_place(patches: torch.Tensor, memory: torch.Tensor, grid: Grid, radius: int) -> torch.Tensor:
    """Largest cosine of each patch ``[B, L, D]`` to tokens of ``[K, L, D]`` near its place: ``[B, L]``.

    One product for each of the 2 * radius + 1 distances of rows: each row of patches with one row of each image, which
    is ``[g_h, B * g_w, K * g_w]``. This is g_h / (2 * radius + 1) times less than what :func:`nearest` computes.
    """
    height, width = grid
    rows = patches.unflatten(1, grid).transpose(0, 1).flatten(1, 2)  # [g_h, B * g_w, D]
    known = memory.unflatten(1, grid).transpose(0, 1).flatten(1, 2)  # [g_h, K * g_w, D]
    columns = torch.arange(width, device=patches.device)
    far = (columns[:, None] - columns).abs() > radius
    reach = min(radius, height - 1)
    found = []
    for step in range(-reach, reach + 1):
        first, last = max(0, -step), height - max(0, step)
        cosine = rows[first:last] @ known[first + step : last + step].mT
        cosine = cosine.unflatten(2, (-1, width)).unflatten(1, (-1, width)).amax(dim=3)  # [., B, g_w, g_w]
        cosine = cosine.masked_fill(far, -1).amax(dim=-1)
        found.append(F.pad(cosine, (0, 0, 0, 0, first, height - last), value=-1))
    return torch.stack(found).amax(dim=0).transpose(0, 1).flatten(1)


@torch.no_grad()
def choose_radius(tokens: Sequence[torch.Tensor], grid: Grid) -> int | None:
    """Let normal images say whether they are alike at each place.

    Each image is compared with the others within ``AUTO_RADIUS``: as it is, and displaced by half of its height, of its
    width, of both, and by a quarter of both. Where each place has its own look, displaced patches are farther from
    those of the others than patches of the same place are. One decision for all places: see ``docs/few_shot.md`` for
    this rule and others.

    Args:
        tokens: See :meth:`TokenMemory.compared`, of the K images: each ``[K, 1 + L, D]``. The first eight are
            asked.
        grid: Rows and columns of the patches.

    Returns:
        int | None: ``AUTO_RADIUS`` where the AUROC of displaced against other patches, by their distance, is
        ``PLACE_TELLS`` or more; ``None`` where it is less, and of fewer than four images, which say too little.
    """
    blocks = [F.normalize(block[:MOST_JUDGED, 1:].float(), dim=-1) for block in tokens]
    if len(blocks[0]) < LEAST_JUDGED:
        return None
    height, width = grid
    shifts = [(0, 0), (height // 2, 0), (0, width // 2), (height // 2, width // 2), (height // 4, width // 4)]
    distances: torch.Tensor | float = 0.0
    for block in blocks:
        moved = [block.unflatten(1, grid).roll(shift, (1, 2)).flatten(1, 2) for shift in shifts]
        found = torch.stack([_to_others(each, block, grid) for each in moved])  # [5, K, L]
        distances = distances + found / found[0].mean().clamp(min=1e-6)
    assert isinstance(distances, torch.Tensor)  # for the type checker
    labels = torch.ones_like(distances, dtype=torch.int)
    labels[0] = 0
    return AUTO_RADIUS if binary_auroc(distances.flatten(), labels.flatten()) >= PLACE_TELLS else None


def _to_others(asked: torch.Tensor, known: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Distance ``[K, L]`` of each of K images ``[K, L, D]`` to those of ``known`` at other indices."""
    distances = []
    for index in range(len(asked)):
        others = [other for other in range(len(known)) if other != index]
        distances.append(1 - nearest_by_place(asked[index : index + 1], known[others], grid, AUTO_RADIUS))
    return torch.cat(distances)
