# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What differs between two good images: placement, borders, markings, light, gloss, camera. All of it is normal."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from anomalib_fbclip.data.procedural.fields import Surface, blob, colour, draw, noise, smoothstep, stamp


class Light(NamedTuple):
    """Light on an image: ``image * gain + gloss``; float32 ``[S, S, 1]`` and ``[S, S, 3]``."""

    gain: np.ndarray
    gloss: np.ndarray


def place(rng: np.random.Generator, surface: Surface, size: int, turn: bool = True) -> Surface:
    """Cut, turn and scale a surface into a frame of ``size`` pixels.

    Args:
        rng: Source of randomness.
        surface: Rendered surface, of any side.
        size: Side of the result.
        turn: Turn freely; otherwise by a few degrees only.
    """
    side, full = surface.image.shape[0], bool(surface.part.all())
    angle = rng.uniform(0, 360) if turn and rng.random() < 0.6 else rng.normal(0, 3)
    if full:
        room = abs(np.cos(np.radians(angle))) + abs(np.sin(np.radians(angle)))
        share = rng.uniform(0.62, 1.0) / room
    else:
        share = rng.uniform(0.8, 1.15)
    warp = cv2.getRotationMatrix2D((side / 2, side / 2), angle, size / (side * share))
    slack = max(0.0, 1 - share * (room if full else 1)) * size / share / 2
    warp[:, 2] += size / 2 - side / 2 + rng.uniform(-1, 1, 2) * slack
    image = cv2.warpAffine(surface.image, warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    if full:
        return Surface(np.clip(image, 0, 1), np.ones((size, size), dtype=bool))
    part = cv2.warpAffine(surface.part.astype(np.uint8), warp, (size, size), flags=cv2.INTER_NEAREST) > 0
    return Surface(np.clip(image, 0, 1), part)


def border(rng: np.random.Generator, surface: Surface) -> Surface:
    """Let the edge of the part lie in the frame: on one to four sides something else shows, with a bevel."""
    size = surface.image.shape[0]
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    inside = np.full((size, size), 1.0, dtype=np.float32)
    for side in rng.choice(4, int(rng.integers(1, 5)), replace=False):
        slant = line * rng.normal(0, 0.06) + rng.uniform(0.03, 0.2)
        edge = [line[None] - slant[:, None], line[:, None] - slant[None], 1 - line[None] - slant[:, None]]
        edge.append(1 - line[:, None] - slant[None])
        inside = np.minimum(inside, edge[side])
    part = inside > 0
    behind = colour(rng, (0.0, 0.3), (0.0, 1.0)) * (1 + 0.03 * noise(rng, size, 4))[..., None]
    bevel = 1 + rng.uniform(-0.5, 0.5) * (1 - smoothstep(inside, 0, rng.uniform(0.01, 0.05)))
    image = np.where(part[..., None], surface.image * bevel[..., None], behind)
    return Surface(np.clip(image, 0, 1).astype(np.float32), surface.part & part)


def markings(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Harmless marks that belong to the thing: a seam across the frame, a stamped number, a screw, a label's edge."""
    size, choice = image.shape[0], rng.integers(0, 4)
    if choice == 0:
        start, heading = rng.uniform(0.2, 0.8, 2) * size, rng.choice([0, np.pi / 2]) + rng.normal(0, 0.05)
        way = np.array([np.cos(heading), np.sin(heading)]) * size * 1.5
        seam = draw(size, np.stack([start - way, start + way]), size * rng.uniform(0.008, 0.03))[..., None]
        return image * (1 - seam) + image * np.float32(rng.uniform(0.3, 0.75)) * seam
    if choice == 1:
        ink = np.clip(image.mean((0, 1)) + np.float32(rng.choice([-0.35, 0.35])), 0, 1)
        text = "".join(rng.choice(list("0123456789ABCDEFHKLMNPRSTXZ"), int(rng.integers(2, 6))))
        at = (int(rng.uniform(0.05, 0.5) * size), int(rng.uniform(0.15, 0.95) * size))
        return stamp(image, text, at, size / 100 * rng.uniform(0.35, 0.8), ink)
    if choice == 2:
        radius, tone = size * rng.uniform(0.03, 0.06), rng.uniform(115, 215)
        canvas = np.round(image * 255).astype(np.uint8)
        for corner in ((0.1, 0.1), (0.9, 0.1), (0.1, 0.9), (0.9, 0.9))[: int(rng.integers(1, 5))]:
            at = (int(corner[0] * size), int(corner[1] * size))
            cv2.circle(canvas, at, int(radius), (tone, tone, tone), -1, cv2.LINE_AA)
            cv2.circle(canvas, at, int(radius), (tone / 2, tone / 2, tone / 2), 1, cv2.LINE_AA)
            tip = (int(at[0] + radius * 0.6), int(at[1] + radius * 0.3))
            cv2.line(
                canvas,
                (2 * at[0] - tip[0], 2 * at[1] - tip[1]),
                tip,
                (tone / 3, tone / 3, tone / 3),
                max(1, size // 90),
            )
        return canvas.astype(np.float32) / 255
    streak = noise(rng, size, (rng.uniform(6, 30), 2))
    streak = streak if rng.random() < 0.5 else streak.T
    return np.clip(image * (1 + rng.uniform(0.02, 0.06) * streak)[..., None], 0, 1)


def light(rng: np.random.Generator, size: int, strength: float = 1.0) -> Light:
    """Draw slopes, vignetting, shadows, specular spots and glare bands.

    Args:
        rng: Source of randomness.
        size: Side in pixels.
        strength: 0 for even light, 1 for the full range.
    """
    line = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    turn = rng.uniform(0, 2 * np.pi)
    gain = rng.uniform(0.7, 1.2) + strength * rng.uniform(0, 0.35) * (np.cos(turn) * x + np.sin(turn) * y)
    if rng.random() < 0.4:
        gain = gain * (1 - strength * rng.uniform(0.1, 0.4) * (x * x + y * y) / 2)
    if rng.random() < 0.3:
        gain = gain * (1 + strength * rng.uniform(0.04, 0.15) * noise(rng, size, 2.6))
    if rng.random() < 0.15:
        shade = smoothstep(
            np.cos(turn + 1) * x + np.sin(turn + 1) * y + rng.uniform(-0.7, 0.7),
            0,
            rng.uniform(0.1, 0.6),
        )
        gain = gain * (1 - strength * rng.uniform(0.15, 0.45) * shade)
    gloss = np.zeros((size, size), dtype=np.float32)
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.4 else 0):
        u, v = x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)
        lean, wide = rng.uniform(0, np.pi), rng.uniform(0.08, 0.5)
        u, v = np.cos(lean) * u + np.sin(lean) * v, np.cos(lean) * v - np.sin(lean) * u
        spot = np.exp(-(((u / (wide * rng.uniform(1, 3))) ** 2 + (v / wide) ** 2) ** rng.uniform(0.8, 2.0)))
        gloss += np.float32(rng.uniform(0.1, 0.65)) * spot.astype(np.float32)
    if rng.random() < 0.15:
        lean = rng.uniform(0, np.pi)
        across = np.cos(lean) * x + np.sin(lean) * y - rng.uniform(-0.8, 0.8)
        gloss += np.float32(rng.uniform(0.08, 0.35)) * np.exp(-((across / rng.uniform(0.05, 0.25)) ** 2)).astype(
            np.float32,
        )
    tint = 1 + rng.normal(0, 0.04, 3).astype(np.float32)
    return Light(gain.astype(np.float32)[..., None], strength * gloss[..., None] * tint)


def expose(rng: np.random.Generator, image: np.ndarray, lit: Light, shiny: float) -> np.ndarray:
    """Apply light, contrast, gamma, colour, grain: every pixel by itself, so that a mask stays exact.

    Args:
        rng: Source of randomness.
        image: Float32 ``[S, S, 3]``.
        lit: The light.
        shiny: 0..1, how much gloss the surface returns.

    Returns:
        Float32 ``[S, S, 3]`` in 0..1.
    """
    if rng.random() < 0.08:
        image = 1 - image
    image = image * lit.gain + np.float32(shiny) * lit.gloss
    if rng.random() < 0.35:
        image = np.broadcast_to(image @ np.array([0.3, 0.59, 0.11], dtype=np.float32)[:, None], image.shape)
    middle = np.float32(rng.uniform(0.35, 0.6))
    image = (image - middle) * np.float32(rng.uniform(0.75, 1.2)) + middle
    image = np.clip(image, 0, 1) ** np.float32(np.exp(rng.normal(0, 0.2)))
    grain = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None]
    return np.clip(image + np.float32(rng.uniform(0, 0.025)) * grain, 0, 1)


def soften(rng: np.random.Generator, image: np.ndarray, most: float = 1.4) -> np.ndarray:
    """A little out of focus: Gaussian of up to ``most`` pixels per 128 of the side."""
    spread = rng.uniform(0.3, most) * image.shape[0] / 128
    return cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), spread)


def speckle(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Faint grease or dust haze: wide, without an outline, too weak to be a defect."""
    size = image.shape[0]
    haze = np.clip(blob(rng, size, tuple(rng.uniform(0, size, 2)), size * rng.uniform(0.2, 0.5), 0.2), 0, 1)
    return np.clip(image + np.float32(rng.uniform(-0.05, 0.05)) * haze[..., None], 0, 1)
