# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Fields, colours and shapes that every surface and defect is made of. Nothing here knows what a defect is."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np


class Surface(NamedTuple):
    """A defect-free image.

    Attributes:
        image: Colours, float32 ``[S, S, 3]`` in 0..1.
        part: True where the inspected thing is (a texture fills the frame), bool ``[S, S]``.
    """

    image: np.ndarray
    part: np.ndarray


def grid(size: int, angle: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the pixels, rotated by ``angle`` radians around the centre.

    Returns:
        ``(x, y)``, float32 ``[S, S]`` each, -0.5..0.5 when not rotated.
    """
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = np.meshgrid(line, line)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def noise(rng: np.random.Generator, size: int, cells: tuple[float, float] | float) -> np.ndarray:
    """Smooth noise with about ``cells`` = (down, across) bumps; zero mean, unit deviation, float32 ``[S, S]``."""
    down, across = (cells, cells) if isinstance(cells, int | float) else cells
    shape = (int(np.clip(round(down), 2, size)), int(np.clip(round(across), 2, size)))
    small = rng.standard_normal(shape, dtype=np.float32)
    field = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC) if shape != (size, size) else small
    return (field - field.mean()) / (field.std() + 1e-6)


def fractal(rng: np.random.Generator, size: int, cells: float = 3, octaves: int = 4, fall: float = 0.55) -> np.ndarray:
    """Sum of noises, each twice as fine and ``fall`` times as strong; unit deviation, float32 ``[S, S]``."""
    total = np.zeros((size, size), dtype=np.float32)
    for octave in range(octaves):
        total += np.float32(fall**octave) * noise(rng, size, cells * 2**octave)
    return total / (total.std() + 1e-6)


def cells(rng: np.random.Generator, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi cells of ``count`` jittered seeds.

    Returns:
        ``(edge, label)``: distance to the nearest cell border in cell widths (float32, 0 on the border), and the
        cell's number (int32), ``[S, S]`` each.
    """
    side = max(2, round(count**0.5))
    place = (np.stack(np.meshgrid(np.arange(-1, side + 1), np.arange(-1, side + 1)), -1).reshape(-1, 2) + 0.5) / side
    place = (place + rng.uniform(-0.42, 0.42, place.shape) / side) * size
    seeds = np.full((size, size), 255, dtype=np.uint8)
    inside = place[((place >= 0) & (place < size)).all(axis=1)].astype(int)
    seeds[inside[:, 1], inside[:, 0]] = 0
    _, label = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    border = np.zeros((size, size), dtype=bool)
    border[:, 1:] |= label[:, 1:] != label[:, :-1]
    border[1:] |= label[1:] != label[:-1]
    edge = cv2.distanceTransform((~border).astype(np.uint8), cv2.DIST_L2, 5) * (side / size)
    return edge.astype(np.float32), label


def smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below ``low``, 1 above ``high``, an S between."""
    ramp = np.clip((value - low) / (high - low), 0, 1)
    return (ramp * ramp * (3 - 2 * ramp)).astype(np.float32)


def colour(
    rng: np.random.Generator,
    saturation: tuple[float, float] = (0.0, 0.6),
    value: tuple = (0.2, 0.9),
) -> np.ndarray:
    """A random colour, float32 ``[3]`` in 0..1."""
    hue, sat, val = rng.uniform(0, 1), rng.uniform(*saturation), rng.uniform(*value)
    wheel = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return (val * (1 - sat * (1 - np.clip(wheel, 0, 1)))).astype(np.float32)


def two_colours(
    rng: np.random.Generator,
    contrast: float = 0.2,
    **ranges: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours whose brightness differs by at least ``contrast`` (pushed apart if need be)."""
    one, two = colour(rng, **ranges), colour(rng, **ranges)
    gap = float(two.mean() - one.mean())
    if abs(gap) < contrast:
        push = np.float32((contrast - abs(gap)) / 2 * (1 if gap >= 0 else -1))
        one, two = one - push, two + push
    return np.clip(one, 0, 1), np.clip(two, 0, 1)


def blend(one: np.ndarray, two: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Colour ``one`` where ``share`` is 0, ``two`` where it is 1, ``[S, S, 3]``."""
    share = np.clip(share, 0, 1).astype(np.float32)[..., None]
    return one * (1 - share) + two * share


def blob(rng: np.random.Generator, size: int, centre: tuple[float, float], radius: float, rough: float) -> np.ndarray:
    """Signed distance, in radii, to an irregular stretched outline: positive inside, float32 ``[S, S]``.

    Args:
        rng: Source of randomness.
        size: Side of the image in pixels.
        centre: ``(x, y)`` in pixels.
        radius: Mean radius in pixels.
        rough: 0 for an ellipse, 0.5 for a ragged patch.
    """
    line = np.arange(size, dtype=np.float32)
    x, y = np.meshgrid(line - centre[0], line - centre[1])
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.8)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u, v = (cos * x + sin * y) / np.float32(stretch**0.5), (cos * y - sin * x) * np.float32(stretch**0.5)
    distance = np.sqrt(u * u + v * v) / np.float32(radius)
    if rough > 0:
        distance = distance + np.float32(rough) * 0.5 * fractal(rng, size, size / max(radius, 2.0), 3, 0.6)
    return 1 - distance


def walk(
    rng: np.random.Generator,
    start: tuple[float, float],
    length: float,
    bend: float,
    steps: int = 12,
) -> np.ndarray:
    """A wandering polyline from ``start``, float64 ``[steps + 1, 2]``; ``bend`` is radians of turn a step."""
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, bend, steps))
    moves = np.stack([np.cos(heading), np.sin(heading)], 1) * (length / steps)
    points = np.concatenate([np.zeros((1, 2)), np.cumsum(moves, 0)])
    return points - points.mean(0) + np.asarray(start)


def draw(size: int, points: np.ndarray, width: float) -> np.ndarray:
    """Coverage of a polyline ``width`` pixels wide (sub-pixel), float32 ``[S, S]`` in 0..1."""
    scale = 4
    canvas = np.zeros((size * scale, size * scale), dtype=np.uint8)
    path = np.round(points * scale).astype(np.int32).reshape(-1, 1, 2)
    cv2.polylines(canvas, [path], isClosed=False, color=255, thickness=max(1, round(width * scale)))
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def stamp(image: np.ndarray, text: str, at: tuple[int, int], scale: float, ink: np.ndarray) -> np.ndarray:
    """Print ``text`` with its lower left corner at pixel ``at``; returns a new image."""
    size = image.shape[0]
    cover = np.zeros((size, size), dtype=np.uint8)
    cv2.putText(cover, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, max(1, size // 80), cv2.LINE_AA)
    return blend(image, ink, cover.astype(np.float32) / 255)
