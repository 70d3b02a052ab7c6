# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Tiles: a large image is scored as a whole and in square tiles, for defects that are small in the whole image.

anomalib's ``Tiler`` cuts and joins, too, and is not used: it reaches the border by padding with black, which is scored
as a defect; it joins overlapping tiles by their plain mean, which leaves seams; and it holds all tiles at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from .pre_processing import FittingResize, linear_matrix, resize_images


class Place(NamedTuple):
    """Where a tile is in its image.

    Attributes:
        number: Of the tile, row by row from 1; 0: the whole image.
        rows: Tiles of the image from top to bottom.
        columns: From left to right.
    """

    number: int
    rows: int
    columns: int


WHOLE = Place(0, 0, 0)
"""Of an image that is no tile."""

Score = Callable[[torch.Tensor], InferenceBatch]
"""Images ``[B, 3, h, w]`` to scores ``[B]`` and maps ``[B, h, w]``, both in [0, 1]."""

ScoreTiles = Callable[[torch.Tensor, Sequence[Place]], InferenceBatch]
"""Likewise of tiles ``[T * B, 3, h, w]``, tile by tile, with the place of each of the T tiles."""

WHOLE_WEIGHT = 0.25
"""Of the whole image in the joined map."""

ROWS_AT_ONCE = 512
"""Of the map, when tiles and whole image are joined: one map of an image of 8000 x 6000 pixels has 190 MB."""


@dataclass(frozen=True)
class Tiling:
    """Score images as wholes and in tiles, with any model that gives a score and a map.

    It takes canvases: images of their own size, or reduced, where a tile has more pixels than the model's input.

    Args:
        side: Side of a tile in pixels of the original image. Where an image has a shorter side, that one counts.
        overlap: Share of its side that a tile has in common with the next one, at least, in [0, 0.9].
        size: Side of the square that the model takes of a tile, in pixels.
        batch_size: Tiles that are scored together.
        fit: How the whole image is resized; ``None``: to the square.

    Raises:
        ValueError: If a number is out of range.
    """

    side: int
    overlap: float
    size: int
    batch_size: int
    fit: FittingResize | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        if self.side < 1:
            msg = f"tiles={self.side}: give the side of a tile in pixels of the image, or None for no tiles."
            raise ValueError(msg)
        if not 0 <= self.overlap <= 0.9:
            msg = f"overlap={self.overlap}: give a share of the tile's side, from 0 to 0.9."
            raise ValueError(msg)
        if self.batch_size < 1:
            msg = f"tile_batch_size={self.batch_size}: give 1 or more."
            raise ValueError(msg)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image's canvas: its own, or reduced where tiles exceed the model's input."""
        side = min(self.side, height, width)
        if side <= self.size:
            return height, width
        return round(height * self.size / side), round(width * self.size / side)

    def places(self, height: int, width: int) -> tuple[int, list[int], list[int]]:
        """Side of the tiles of a canvas, and their first rows and columns: evenly spread, border to border."""
        side = min(self.side, self.size, height, width)
        return side, self._starts(height, side), self._starts(width, side)

    def _starts(self, length: int, side: int) -> list[int]:
        steps = math.ceil((length - side) / max(1.0, side * (1 - self.overlap)) - 1e-9)
        return [round(index * (length - side) / steps) for index in range(steps + 1)] if steps else [0]

    def whole(self, images: torch.Tensor) -> torch.Tensor:
        """Canvases ``[B, 3, H, W]`` as the model takes whole images."""
        size = self.fit.fit(*images.shape[-2:]) if self.fit is not None else (self.size, self.size)
        return resize_images(images, *size)

    def cut(self, images: torch.Tensor, places: Sequence[tuple[int, int]], side: int) -> torch.Tensor:
        """Tiles as the model takes them.

        Args:
            images: Canvases ``[B, 3, H, W]``.
            places: First row and column of each of T tiles.
            side: Side of the tiles on the canvas.

        Returns:
            torch.Tensor: ``[T * B, 3, size, size]``, tile by tile.
        """
        tiles = [images[..., top : top + side, left : left + side] for top, left in places]
        return resize_images(torch.cat(tiles), self.size, self.size)

    def pieces(
        self,
        image: torch.Tensor,
        most: int,
        first: int = 0,
        region: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """A whole canvas and its tiles, evenly chosen.

        Args:
            image: Canvas ``[1, 3, H, W]``.
            most: Tiles at most.
            first: Number of the first tile that is taken, of any size: other numbers take other tiles.
            region: See :meth:`__call__`.

        Returns:
            list: The whole ``[3, h, w]``, and tiles ``[3, size, size]``.
        """
        side, rows, columns = self.places(*image.shape[-2:])
        places = list(product(rows, columns))
        chosen = self.chosen(image, most, first, region)[1:]
        if not chosen:
            return [self.whole(image)[0]]
        return [self.whole(image)[0], *self.cut(image, [places[place.number - 1] for place in chosen], side)]

    def chosen(
        self,
        image: torch.Tensor,
        most: int,
        first: int = 0,
        region: torch.Tensor | None = None,
    ) -> list[Place]:
        """Places of what :meth:`pieces` gives, the whole canvas first."""
        side, rows, columns = self.places(*image.shape[-2:])
        places = list(product(rows, columns))
        if len(places) == 1:
            return [WHOLE]
        numbers = list(range(len(places)))
        if region is not None:
            shown = show(region, places, side)[:, 0].tolist()
            numbers = [number for number, any_shown in zip(numbers, shown, strict=True) if any_shown]
        step = max(1.0, len(numbers) / most)
        taken = [numbers[(int(index * step) + first) % len(numbers)] for index in range(min(most, len(numbers)))]
        return [WHOLE, *(Place(number + 1, len(rows), len(columns)) for number in taken)]

    def draw(self, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw for training: of each image at random the whole or a tile; of one with a defect, a tile that shows it.

        Args:
            images: Canvases ``[B, 3, H, W]``.
            masks: ``[B, H, W]``, above 0 in defects.

        Returns:
            tuple: Images ``[B, 3, size, size]``, whole ones squashed, and their masks ``[B, size, size]``.
        """
        height, width = images.shape[-2:]
        side, tiles, shown = self.places(height, width)[0], [], []
        for image, mask in zip(images, masks, strict=True):
            top, left, tall, wide = 0, 0, height, width
            if torch.rand(()) < 0.5:
                tall = wide = side
                defect = mask.nonzero()
                if len(defect):
                    row, column = defect[int(torch.randint(len(defect), ()))].tolist()
                    # Any tile that holds this pixel and lies in the image.
                    top, left = (
                        int(torch.randint(max(0, at - side + 1), min(at, length - side) + 1, ()))
                        for at, length in ((row, height), (column, width))
                    )
                else:
                    top, left = (int(torch.randint(length - side + 1, ())) for length in (height, width))
            tiles.append(resize_images(image[None, :, top : top + tall, left : left + wide], self.size, self.size))
            part = mask[None, None, top : top + tall, left : left + wide].float()
            # No defect is lost between the rows that a nearest neighbour would take.
            shown.append(F.adaptive_max_pool2d(part, self.size)[:, 0])
        return torch.cat(tiles), torch.cat(shown)

    def __call__(
        self,
        score: Score,
        images: torch.Tensor,
        of_tiles: ScoreTiles | None = None,
        region: torch.Tensor | None = None,
    ) -> InferenceBatch:
        """Score whole images and their tiles, and join them.

        Args:
            score: The model.
            images: Canvases ``[B, 3, H, W]``.
            of_tiles: The model of tiles. ``None``: the same.
            region: Pixels of the canvases that count ``[B, H, W]``, or ``[1, H, W]``: tiles that show none of them have
                neither score nor map. ``None``: all.

        Returns:
            InferenceBatch: ``pred_score`` ``[B]`` and ``anomaly_map`` ``[B, H, W]``.
        """
        height, width = images.shape[-2:]
        whole = score(self.whole(images))
        tall, wide = (
            linear_matrix(whole.anomaly_map.shape[axis], length).to(images.device)
            for axis, length in ((1, height), (2, width))
        )
        found = whole.anomaly_map.float() @ wide.T  # [B, h, W]
        side, rows, columns = self.places(height, width)
        if len(rows) * len(columns) == 1:
            return InferenceBatch(pred_score=whole.pred_score, anomaly_map=tall @ found)
        blend = self._blend_at_once if torch.compiler.is_exporting() else self.blend
        scores, tiled = blend(of_tiles or (lambda tiles, _: score(tiles)), images, side, rows, columns, region)
        if torch.compiler.is_exporting():
            tiled = join_maps(tall @ found, tiled)
        else:
            for band in (slice(top, top + ROWS_AT_ONCE) for top in range(0, height, ROWS_AT_ONCE)):
                tiled[:, band] = join_maps(tall[band] @ found, tiled[:, band])
        return InferenceBatch(pred_score=join_scores(whole.pred_score, scores), anomaly_map=tiled)

    def blend(
        self,
        score: ScoreTiles,
        images: torch.Tensor,
        side: int,
        rows: list[int],
        columns: list[int],
        region: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores ``[T, B]`` and the blended map ``[B, H, W]`` of the tiles, a few of them at a time."""
        count, _, height, width = images.shape
        reduce = linear_matrix(self.size, side).to(images.device)
        down = blend_weights(rows, side, height).to(images.device)
        across = blend_weights(columns, side, width).to(images.device)
        blended = images.new_zeros(count, height, width, dtype=torch.float32)
        scores = []
        every, step = list(product(enumerate(rows), enumerate(columns))), max(1, self.batch_size // count)
        if region is not None:
            shown = show(region, list(product(rows, columns)), side)
            every = [place for place, any_shown in zip(every, shown.any(dim=1).tolist(), strict=True) if any_shown]
        for start in range(0, len(every), step):
            places = every[start : start + step]
            numbers = [
                Place(1 + row * len(columns) + column, len(rows), len(columns)) for (row, _), (column, _) in places
            ]
            found = score(self.cut(images, [(top, left) for (_, top), (_, left) in places], side), numbers)
            scores.append(found.pred_score.unflatten(0, (len(places), count)))
            maps = (reduce @ found.anomaly_map.float() @ reduce.T).unflatten(0, (len(places), count))
            for ((row, top), (column, left)), tile in zip(places, maps, strict=True):
                weights = torch.outer(down[row, top : top + side], across[column, left : left + side])
                blended[:, top : top + side, left : left + side] += weights.to(tile) * tile
        joined = torch.cat(scores)
        return joined if region is None else joined * shown[shown.any(dim=1)].to(joined), blended

    def _blend_at_once(
        self,
        score: ScoreTiles,
        images: torch.Tensor,
        side: int,
        rows: list[int],
        columns: list[int],
        region: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in two matrix products, for a recorded graph."""
        places = list(product(rows, columns))
        numbers = [Place(1 + number, len(rows), len(columns)) for number in range(len(places))]
        found = score(self.cut(images, places, side), numbers)
        reduce = linear_matrix(self.size, side)
        axes = []
        for starts, length in ((rows, images.shape[-2]), (columns, images.shape[-1])):
            weights = blend_weights(starts, side, length)  # [T, length]
            placed = [F.pad(reduce, (0, 0, start, length - start - side)) for start in starts]
            axes.append(torch.cat([own[:, None] * tile for own, tile in zip(weights, placed, strict=True)], dim=1))
        tiles = found.anomaly_map.float().unflatten(0, (len(rows), len(columns), -1))  # [R, C, B, size, size]
        tiles = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)  # [B, R * size, C * size]
        down, across = (axis.to(tiles) for axis in axes)
        scores = found.pred_score.unflatten(0, (len(rows) * len(columns), -1))
        if region is not None:
            scores = scores * show(region, list(product(rows, columns)), side).to(scores)
        return scores, down @ tiles @ across.T


def show(region: torch.Tensor, places: Sequence[tuple[int, int]], side: int) -> torch.Tensor:
    """Which of T tiles show anything of the regions ``[B, H, W]`` of images: ``[T, B]``."""
    return torch.stack([region[:, top : top + side, left : left + side].flatten(1).any(dim=1) for top, left in places])


def blend_weights(starts: Sequence[int], side: int, length: int) -> torch.Tensor:
    """Weight of each tile at each pixel along one axis; at each pixel the weights sum to 1.

    Args:
        starts: First pixel of each tile.
        side: Pixels of a tile.
        length: Pixels of the axis, all of them in some tile.

    Returns:
        torch.Tensor: ``[T, length]`` in float32: ``sin^2`` over the tile, 0 outside of it, over the sum.
    """
    within = torch.arange(length)[None] - torch.tensor(list(starts))[:, None]
    window = torch.sin(math.pi * (within.double() + 0.5) / side).square()
    window = torch.where((within >= 0) & (within < side), window, 0.0)
    return (window / window.sum(dim=0)).float()


def join_maps(whole: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Join the map of the whole image with that of its tiles: ``(sqrt(whole) / 4 + 3 sqrt(tiles) / 4) ** 2``.

    Chosen among means of probabilities, of logits, of powers, products and maxima, see ``docs/small_defects.md``. The
    tiles say where a defect is; the whole image, what a tile cannot know to be usual.
    """
    return (WHOLE_WEIGHT * whole.sqrt() + (1 - WHOLE_WEIGHT) * tiles.sqrt()).square()


def join_scores(whole: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Join the score of the whole image ``[B]`` with those of its tiles ``[T, B]``: the largest."""
    return torch.maximum(whole, tiles.amax(dim=0))
