# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Defects, each with its exact mask.

A defect is drawn as ``(layer, alpha)``: the image becomes ``image * (1 - alpha) + layer * alpha`` and the mask is
where ``alpha`` is above :data:`EDGE`; below that it is set to zero, so that nothing outside the mask changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from anomalib_fbclip.data.procedural.fields import Surface, blob, colour, draw, fractal, noise, smoothstep, walk

if TYPE_CHECKING:
    from collections.abc import Callable

EDGE = 0.12
MIN_CHANGE = 0.06
Layer = tuple[np.ndarray, np.ndarray]


class Defect(NamedTuple):
    """An image with a defect: ``image`` float32 ``[S, S, 3]``, ``mask`` bool ``[S, S]``, and the ``kind``'s name."""

    image: np.ndarray
    mask: np.ndarray
    kind: str


def _place(rng: np.random.Generator, part: np.ndarray) -> tuple[float, float]:
    """A point ``(x, y)`` on the part, away from the frame's border."""
    size = part.shape[0]
    for _ in range(12):
        x, y = rng.uniform(0.1, 0.9, 2) * size
        if part[int(y), int(x)]:
            return float(x), float(y)
    ys, xs = np.nonzero(part)
    pick = rng.integers(len(ys))
    return float(xs[pick]), float(ys[pick])


def _tint(rng: np.random.Generator, image: np.ndarray, at: tuple[float, float], gap: float = 0.2) -> np.ndarray:
    """A colour that differs from the image's around ``at`` by ``gap`` in brightness, darker or brighter."""
    size = image.shape[0]
    reach = max(2, size // 12)
    x, y = int(at[0]), int(at[1])
    near = image[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach].mean((0, 1))
    step = rng.uniform(gap, gap + 0.3)
    level = float(near.mean())
    darker = level > rng.uniform(0.25, 0.65)
    other = near * (1 - step / max(level, 0.05)) if darker else near + step
    return np.clip(0.7 * other + 0.3 * (colour(rng) - 0.5 + other), 0.0, 1.0).astype(np.float32)


def scratch(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """One to three nearly straight thin lines."""
    size, at = image.shape[0], _place(rng, part)
    alpha = np.zeros((size, size), dtype=np.float32)
    for _ in range(int(rng.integers(1, 4))):
        near = np.asarray(at) + rng.normal(0, size * 0.05, 2)
        line = walk(rng, tuple(near), size * rng.uniform(0.15, 0.7), rng.uniform(0, 0.08), 10)
        alpha = np.maximum(alpha, draw(size, line, size * rng.uniform(0.008, 0.022)))
    return np.broadcast_to(_tint(rng, image, at, 0.25), image.shape), alpha * rng.uniform(0.8, 1.0)


def crack(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A jagged dark line with branches."""
    size, at = image.shape[0], _place(rng, part)
    trunk = walk(rng, at, size * rng.uniform(0.25, 0.75), 0.5, 14)
    alpha = draw(size, trunk, size * rng.uniform(0.01, 0.028))
    for _ in range(int(rng.integers(0, 4))):
        twig = walk(rng, (0, 0), size * rng.uniform(0.08, 0.25), 0.5, 6)
        alpha = np.maximum(alpha, draw(size, twig - twig[0] + trunk[rng.integers(3, 12)], size * 0.01))
    return image * np.float32(rng.uniform(0.1, 0.45)), alpha


def pit(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A cluster of small round holes with a lit lower edge."""
    size, at = image.shape[0], _place(rng, part)
    alpha, layer = np.zeros((size, size), dtype=np.float32), image * np.float32(rng.uniform(0.1, 0.45))
    for _ in range(int(rng.integers(1, 8))):
        near = np.asarray(at) + rng.normal(0, size * 0.06, 2)
        deep = smoothstep(blob(rng, size, tuple(near), size * rng.uniform(0.014, 0.035), 0.0), 0.0, 0.3)
        alpha = np.maximum(alpha, deep)
    light = np.roll(alpha, (-1, -1), (0, 1)) < alpha - 0.3
    return np.where(light[..., None], np.clip(image * 1.5 + 0.1, 0, 1), layer), alpha


def stain(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A see-through patch with a ragged outline, often darker at its rim."""
    size, at = image.shape[0], _place(rng, part)
    depth = blob(rng, size, at, size * rng.uniform(0.05, 0.24), rng.uniform(0.15, 0.5))
    rim = smoothstep(depth, 0, 0.1) * (1 - 0.5 * rng.random() * smoothstep(depth, 0.1, 0.35))
    return np.broadcast_to(_tint(rng, image, at, 0.25), image.shape), rim * rng.uniform(0.45, 0.9)


def discolouration(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A large area of another tone or hue with a soft edge; the texture stays."""
    size, at = image.shape[0], _place(rng, part)
    depth = blob(rng, size, at, size * rng.uniform(0.12, 0.34), rng.uniform(0.1, 0.4))
    shift = _tint(rng, image, at, 0.16) + 0.02
    base = image.reshape(-1, 3).mean(0) + 0.02
    return np.clip(image * (shift / base), 0, 1), smoothstep(depth, 0, rng.uniform(0.15, 0.45)) * rng.uniform(0.75, 1)


def missing_patch(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A piece with straight edges is gone; something plain and shaded shows."""
    size, at = image.shape[0], _place(rng, part)
    corners = int(rng.integers(3, 6))
    angle = np.sort(
        rng.uniform(0, 2 * np.pi) + 2 * np.pi * (np.arange(corners) + rng.uniform(-0.25, 0.25, corners)) / corners,
    )
    outline = np.stack([np.cos(angle), np.sin(angle)], 1) * size * rng.uniform(0.06, 0.2) + np.asarray(at)
    cover = np.zeros((size, size), dtype=np.uint8)
    cv2.fillPoly(cover, [np.round(outline * 8).astype(np.int32)], 255, cv2.LINE_AA, 3)
    alpha = cover.astype(np.float32) / 255
    ground = _tint(rng, image, at, 0.2) * (1 + 0.06 * noise(rng, size, rng.uniform(3, 40)))[..., None]
    shade = 1 - 0.35 * (alpha - cv2.GaussianBlur(alpha, (0, 0), size * 0.012)).clip(0, 1)
    return np.clip(ground * shade[..., None], 0, 1), alpha


def shifted_patch(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A piece put back displaced, turned or mirrored: only the structure is wrong."""
    size, at = image.shape[0], _place(rng, part)
    depth = blob(rng, size, at, size * rng.uniform(0.09, 0.26), 0.0)
    if rng.random() < 0.5:
        line = np.arange(size)
        wide, tall = rng.uniform(0.08, 0.22, 2) * size
        depth = np.minimum(1 - np.abs(line[None] - at[0]) / wide, 1 - np.abs(line[:, None] - at[1]) / tall)
    turn = rng.choice([0, 0, 30, 60, 90, 180]) + rng.uniform(-15, 15)
    warp = cv2.getRotationMatrix2D(at, float(turn), float(rng.uniform(0.75, 1.3)))
    warp[:, 2] += rng.uniform(0.06, 0.2, 2) * size * rng.choice([-1, 1], 2)
    moved = cv2.warpAffine(
        np.ascontiguousarray(image),
        warp,
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )
    return np.clip(moved, 0, 1), smoothstep(depth.astype(np.float32), 0.0, 0.06)


def fibre(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A curled thread lying on the surface, with its shadow."""
    size, at = image.shape[0], _place(rng, part)
    line = walk(rng, at, size * rng.uniform(0.3, 1.0), rng.uniform(0.2, 0.5), 40)
    width = size * rng.uniform(0.009, 0.024)
    thread = draw(size, line, width)
    shadow = draw(size, line + width * 1.1, width) * 0.6
    layer = image * 0.35 * (1 - thread[..., None]) + _tint(rng, image, at, 0.3) * thread[..., None]
    return layer, np.maximum(thread, shadow)


def dent(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A large pushed-in or raised place, seen by its shading only."""
    size, at = image.shape[0], _place(rng, part)
    depth = np.clip(blob(rng, size, at, size * rng.uniform(0.07, 0.24), 0.08), 0, 1)
    height = smoothstep(depth, 0, 1)
    down, across = np.gradient(height)
    turn = rng.uniform(0, 2 * np.pi)
    slope = np.cos(turn) * across + np.sin(turn) * down
    shade = (
        rng.uniform(0.4, 0.8) * slope / (np.abs(slope).max() + 1e-6)
        + rng.choice([-1, 1]) * rng.uniform(0, 0.25) * height
    )
    lit = image * (1 + shade)[..., None] + 0.15 * np.clip(shade, 0, None)[..., None]
    return np.clip(lit, 0, 1), smoothstep(depth, 0, 0.12)


def worn(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A place where the texture is rubbed off: blurred, and a little paler or darker."""
    size, at = image.shape[0], _place(rng, part)
    depth = blob(rng, size, at, size * rng.uniform(0.1, 0.28), rng.uniform(0.1, 0.4))
    smooth = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), size * rng.uniform(0.02, 0.05))
    pale = smooth + np.float32(rng.choice([-1, 1]) * rng.uniform(0.03, 0.14))
    return np.clip(pale, 0, 1), smoothstep(depth, 0, rng.uniform(0.1, 0.3))


def hole(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """A round or torn opening, nearly black or bright, with a rim."""
    size, at = image.shape[0], _place(rng, part)
    depth = blob(rng, size, at, size * rng.uniform(0.035, 0.13), rng.uniform(0.0, 0.3))
    behind = np.full(3, rng.uniform(0.0, 0.12) if image.mean() > 0.3 else rng.uniform(0.75, 1.0), dtype=np.float32)
    inner = smoothstep(depth, 0.12, 0.22)[..., None]
    return np.clip(image * rng.uniform(1.2, 1.6), 0, 1) * (1 - inner) + behind * inner, smoothstep(depth, 0, 0.08)


def contamination(rng: np.random.Generator, image: np.ndarray, part: np.ndarray) -> Layer:
    """Crumbs or a smear of another material, itself textured."""
    size, at = image.shape[0], _place(rng, part)
    depth = blob(rng, size, at, size * rng.uniform(0.06, 0.2), 0.3)
    crumbs = noise(rng, size, size / rng.uniform(3, 9)) + 2.2 * np.clip(depth, -1, 1) - rng.uniform(0.0, 1.0)
    alpha = smoothstep(crumbs, 0.6, 1.0) * (depth > -0.5)
    return _tint(rng, image, at, 0.22) * (1 + 0.12 * fractal(rng, size, 12, 3))[..., None], alpha * rng.uniform(0.75, 1)


DEFECTS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], Layer]] = {
    function.__name__: function
    for function in (scratch, crack, pit, stain, discolouration, missing_patch, shifted_patch, fibre, dent, worn, hole)
} | {"contamination": contamination}
KINDS = tuple(DEFECTS)


def add_defect(rng: np.random.Generator, surface: Surface, kind: str, tries: int = 5) -> Defect:
    """Draw one defect on the part, visible by construction.

    A draw whose mean change inside the mask is below :data:`MIN_CHANGE` plus a quarter of the image's own deviation
    (capped) is discarded; after ``tries`` of them a stain is drawn instead, which is visible on anything.

    Args:
        rng: Source of randomness.
        surface: What to spoil.
        kind: One of :data:`KINDS`.
        tries: Draws before giving up on this kind.

    Raises:
        ValueError: If ``kind`` is unknown.
    """
    if kind not in DEFECTS:
        msg = f"kind must be one of {KINDS}, got {kind!r}."
        raise ValueError(msg)
    image, part = surface
    need = MIN_CHANGE + min(0.25 * float(image[part].std(0).mean()), 0.05)
    for attempt in range(4 * tries):
        name = kind if attempt < tries else "stain"
        layer, alpha = DEFECTS[name](rng, image, part)
        alpha = np.where((alpha > EDGE) & part, alpha, 0).astype(np.float32)
        mask = alpha > 0
        if mask.mean() < 4e-4 or mask.mean() > 0.5:
            continue
        changed = image + (layer - image) * alpha[..., None]
        if float(np.abs(changed - image).mean(2)[mask].mean()) >= need:
            break
    else:
        flipped = np.where(image.mean() > 0.5, 0.1, 0.9)
        alpha = (smoothstep(blob(rng, len(part), _place(rng, part), len(part) * 0.1, 0.2), 0, 0.1) * part).astype(
            np.float32,
        )
        mask, changed, name = alpha > 0, image + (flipped - image) * alpha[..., None], "stain"
    return Defect(changed.astype(np.float32), mask, name)
