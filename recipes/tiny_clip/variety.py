# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What training images have beyond the data module's: rough metals, soft and faint defects, cameras of every quality.

The data module's own images stay as they are, because their seeds are promised to give the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from anomalib_fbclip.data.procedural.fields import Surface, blob, colour, draw, fractal, noise, smoothstep, walk

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST_STEP = 5.0
"""Mean change inside a mask, of 255, that a camera must leave of a defect; otherwise it is not used."""


def spectrum(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise of a random power law, stretched along a random direction; unit deviation, float32 ``[S, S]``."""
    side = cv2.getOptimalDFTSize(size)
    down, across = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    turn, stretch = rng.uniform(0, np.pi), np.exp(rng.uniform(0, 2.5)) if rng.random() < 0.6 else 1.0
    u, v = np.cos(turn) * across + np.sin(turn) * down, np.cos(turn) * down - np.sin(turn) * across
    # No structures as large as patches of rust: those are defects.
    radius = np.sqrt((u * stretch) ** 2 + v**2) + rng.uniform(2, 16) / side
    white = rng.standard_normal((side, side), dtype=np.float32)
    field = np.fft.irfft2(np.fft.rfft2(white) * radius ** -rng.uniform(0.3, 1.8), (side, side))[:size, :size]
    return ((field - field.mean()) / (field.std() + 1e-6)).astype(np.float32)


def _streaks(rng: np.random.Generator, size: int, across: float) -> np.ndarray:
    """Parallel marks of every width, turned by a few degrees or a quarter; unit deviation."""
    field = sum(
        rng.uniform(0.2, 1.0) * noise(rng, size, (size / 2**octave, across * rng.uniform(0.5, 2)))
        for octave in range(int(rng.integers(2, 5)))
    )
    middle = (size / 2, size / 2)
    warp = cv2.getRotationMatrix2D(middle, rng.choice([0, 90]) + rng.normal(0, 8), 1.1)
    field = cv2.warpAffine(field, warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    return field / (field.std() + 1e-6)


def ground_metal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Grinding marks of uneven strength on a grey base."""
    where = 1 + rng.uniform(0, 0.8) * np.clip(noise(rng, size, 3), -1, 1.5)
    tone = rng.uniform(0.03, 0.18) * _streaks(rng, size, rng.uniform(1, 6)) * where
    tone = tone + rng.uniform(0.0, 0.08) * spectrum(rng, size) + rng.uniform(0, 0.08) * noise(rng, size, 2)
    return colour(rng, (0.0, 0.12), (0.25, 0.8)) * (1 + tone)[..., None]


def rolled_metal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Long faint marks along the rolling direction, and grain of any size: short marks and clouds are defects."""
    tone = rng.uniform(0.0, 0.08) * _streaks(rng, size, rng.uniform(0.7, 3))
    tone = tone + rng.uniform(0.0, 0.05) * noise(rng, size, rng.uniform(1.5, 3))
    tone = tone + rng.choice([0.03, 0.3]) * rng.uniform(0.1, 1) * noise(rng, size, size / rng.uniform(1, 5))
    return colour(rng, (0.0, 0.15), (0.2, 0.85)) * (1 + tone)[..., None]


def rough_surface(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cast, blasted or broken material: noise of any spectrum, in one tone or between two."""
    field = spectrum(rng, size)
    one, two = colour(rng, (0.0, 0.4), (0.1, 0.9)), colour(rng, (0.0, 0.4), (0.1, 0.9))
    if rng.random() < 0.5:
        return one * (1 + rng.uniform(0.04, 0.3) * field)[..., None]
    share = smoothstep(field, rng.uniform(-2.5, 0), rng.uniform(0.3, 2.5))[..., None]
    return one + (two - one) * share * rng.uniform(0.3, 1.0)


SURFACES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "ground_metal": ground_metal,
    "rolled_metal": rolled_metal,
    "rough_surface": rough_surface,
}
"""Surfaces of the recipe alone, by the names that their captions use."""


def _spot(rng: np.random.Generator, part: np.ndarray) -> tuple[float, float]:
    ys, xs = np.nonzero(part)
    pick = rng.integers(len(ys))
    return float(xs[pick]), float(ys[pick])


def _soft_alpha(rng: np.random.Generator, part: np.ndarray, kind: str) -> np.ndarray:
    """Strength of a defect without an outline, float32 ``[S, S]`` in 0..1."""
    size, at = len(part), _spot(rng, part)
    if kind == "cloud":
        depth = blob(rng, size, at, size * rng.uniform(0.04, 0.3), rng.uniform(0, 0.6))
        return smoothstep(depth, 0.0, rng.uniform(0.3, 1.2))
    if kind == "blotches":
        depth = fractal(rng, size, rng.uniform(2, 8), 4, rng.uniform(0.4, 0.7))
        long = rng.uniform(0.8, 3.0)
        depth = cv2.resize(depth[:, : max(8, round(size / long))], (size, size), interpolation=cv2.INTER_LINEAR)
        depth = np.rot90(depth) if rng.random() < 0.5 else depth
        low = rng.uniform(0.4, 1.6)
        return smoothstep(depth, low, low + rng.uniform(0.1, 0.8))
    if kind == "line":
        alpha = np.zeros(part.shape, dtype=np.float32)
        for _ in range(int(rng.integers(1, 4))):
            near = tuple(np.asarray(at) + rng.normal(0, size * 0.1, 2))
            bend = float(rng.choice([0.02, 0.1, 0.5]))
            path = walk(rng, near, size * rng.uniform(0.12, 1.1), bend, 16)
            alpha = np.maximum(alpha, draw(size, path, size * rng.uniform(0.004, 0.02)))
        if rng.random() < 0.5:  # interrupted
            alpha = alpha * smoothstep(noise(rng, size, rng.uniform(6, 20)), -1.0, 0.3)
        return cv2.GaussianBlur(alpha, (0, 0), size * rng.uniform(0.002, 0.008))
    if kind == "bundle":  # straight parallel marks of uneven strength, often longer than the image
        turn, length, wide = rng.uniform(0, np.pi), size * rng.uniform(0.2, 2.0), size * rng.uniform(0.0, 0.08)
        along, across = (np.array([np.cos(turn + quarter), np.sin(turn + quarter)]) for quarter in (0, np.pi / 2))
        alpha = np.zeros(part.shape, dtype=np.float32)
        for _ in range(int(rng.integers(1, 8))):
            middle = np.asarray(at) + rng.normal(0, wide) * across + rng.normal(0, 0.1 * length) * along
            half = (0.5 * length * rng.uniform(0.3, 1)) * (along + rng.normal(0, 0.04) * across)
            mark = draw(size, np.stack([middle - half, middle + half]), size * rng.uniform(0.004, 0.025))
            alpha = np.maximum(alpha, rng.uniform(0.4, 1.0) * mark)
        alpha = alpha * (1 - rng.uniform(0, 0.6) * smoothstep(noise(rng, size, rng.uniform(4, 30)), -0.5, 1.5))
        return cv2.GaussianBlur(alpha, (0, 0), size * rng.uniform(0.001, 0.006))
    if kind == "crack":  # thin, irregular, with branches
        alpha, width = np.zeros(part.shape, dtype=np.float32), size * rng.uniform(0.004, 0.014)
        path = walk(rng, at, size * rng.uniform(0.3, 1.3), rng.uniform(0.15, 0.5), 24)
        for branch in range(int(rng.integers(1, 5))):
            alpha = np.maximum(alpha, draw(size, path, width * (0.7 if branch else 1.0)))
            joint = path[rng.integers(len(path))]
            path = walk(rng, tuple(joint), size * rng.uniform(0.1, 0.5), rng.uniform(0.15, 0.5), 16)
        return np.clip(1.2 * cv2.GaussianBlur(alpha, (0, 0), size * rng.uniform(0.001, 0.004)), 0, 1)
    # beads: small spots along a line, as inclusions lie along the rolling direction
    turn, length = rng.choice([0, np.pi / 2]) + rng.normal(0, 0.12), size * rng.uniform(0.03, 0.9)
    if rng.random() < 0.3:
        turn = rng.uniform(0, np.pi)
    alpha = np.zeros(part.shape, dtype=np.float32)
    for _ in range(int(rng.integers(1, 9))):
        along = rng.uniform(-0.5, 0.5) * length
        middle = np.asarray(at) + along * np.array([np.cos(turn), np.sin(turn)]) + rng.normal(0, size * 0.01, 2)
        half = size * rng.uniform(0.006, 0.12) * np.array([np.cos(turn), np.sin(turn)])
        path = np.stack([middle - half, middle + half])
        alpha = np.maximum(alpha, draw(size, path, size * rng.uniform(0.008, 0.035)))
    return np.clip(1.3 * cv2.GaussianBlur(alpha, (0, 0), size * rng.uniform(0.002, 0.012)), 0, 1)


SOFT = {
    "cloud": "stain",
    "blotches": "discolouration",
    "line": "scratch",
    "bundle": "scratch",
    "crack": "crack",
    "beads": "contamination",
}
"""Soft defects, and the kinds of the data module whose words describe them."""


def add_soft_defect(rng: np.random.Generator, surface: Surface) -> tuple[np.ndarray, np.ndarray, str]:
    """Change tone, grain or structure where a strength without an outline says so; the mask is its upper part.

    Returns:
        ``(image, mask, kind)``; the mask is empty where nothing could be drawn.
    """
    image, part = surface
    name = str(rng.choice(list(SOFT)))
    alpha = _soft_alpha(rng, part, name) * part
    size = len(part)
    choice = rng.random()
    if name in {"cloud", "blotches"} and choice < 0.2:  # rougher or smoother
        smooth = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), size * rng.uniform(0.01, 0.04))
        other = smooth + (image - smooth) * rng.choice([0.1, 2.5])
        other = other + rng.normal(0, 0.05)
    elif name in {"cloud", "blotches"} and choice < 0.35:  # another structure
        other = image.mean((0, 1)) * (1 + rng.uniform(0.05, 0.3) * spectrum(rng, size))[..., None]
    else:
        # Scratches shine, cracks and inclusions are dark, most of the time.
        bright = {"bundle": 0.8, "crack": 0.1, "beads": 0.2}.get(name, 0.5)
        shift = rng.uniform(0.08, 0.6) if rng.random() < bright else -rng.uniform(0.08, 0.6)
        tint = rng.normal(0, 0.06, 3) if rng.random() < 0.5 else np.zeros(3)
        grain = 1 + rng.uniform(0, 0.3) * spectrum(rng, size)[..., None]
        other = np.clip(image * (1 + shift) + 0.5 * shift * grain + tint, 0, 1)
    changed = (image + (other - image) * alpha[..., None]).astype(np.float32)
    mask = alpha > rng.uniform(0.25, 0.45)
    if mask.any() and np.abs(changed - image).mean(2)[mask].mean() < 0.035:
        mask = np.zeros_like(mask)
    if not mask.any() or mask.mean() > 0.55:
        return image, np.zeros_like(mask), "good"
    return np.clip(changed, 0, 1), mask, SOFT[name]


def dark_frame(rng: np.random.Generator, surface: Surface) -> Surface:
    """The part ends inside the image: background, a bright or dark rim and round corners. All of it is normal."""
    size = len(surface.part)
    line = np.arange(size, dtype=np.float32) + 0.5
    low, high = rng.uniform(-0.1, 0.22, 2) * size, size - rng.uniform(-0.1, 0.22, 2) * size
    wobble = size * rng.uniform(0, 0.012) * noise(rng, size, rng.uniform(2, 30))
    x, y = line[None] + wobble, line[:, None] + wobble
    inside = np.minimum(np.minimum(x - low[0], high[0] - x), np.minimum(y - low[1], high[1] - y)) / size
    part = inside > 0
    if part.mean() < 0.3:
        return surface
    behind = colour(rng, (0.0, 0.2), (0.0, 0.35) if rng.random() < 0.7 else (0.3, 1.0))
    behind = behind * (1 + rng.uniform(0, 0.2) * fractal(rng, size, 4, 3))[..., None]
    rim = 1 + rng.uniform(-0.7, 0.9) * (1 - smoothstep(inside, 0, rng.uniform(0.01, 0.1)))
    soft = smoothstep(inside, -rng.uniform(0.002, 0.02), 0.003)[..., None]
    image = surface.image * rim[..., None] * soft + behind * (1 - soft)
    return Surface(np.clip(image, 0, 1).astype(np.float32), surface.part & part)


def _optics(rng: np.random.Generator, size: int) -> list[Callable[[np.ndarray], np.ndarray]]:
    """What a camera does to an image, drawn once, so that two images can be taken alike."""
    x, y = np.meshgrid(*(2 * [np.linspace(-1, 1, size, dtype=np.float32)]))
    steps: list[Callable[[np.ndarray], np.ndarray]] = []
    gain = np.ones((size, size), dtype=np.float32)
    if rng.random() < 0.35:
        cx, cy = rng.uniform(-0.6, 0.6, 2)
        gain *= 1 - rng.uniform(0.1, 0.7) * np.clip(((x - cx) ** 2 + (y - cy) ** 2) / 3, 0, 1)
    if rng.random() < 0.35:
        gain *= np.clip(1 + rng.uniform(0.05, 0.3) * noise(rng, size, rng.uniform(1.6, 4)), 0.3, 1.8)
    gloss = np.zeros((size, size), dtype=np.float32)
    if rng.random() < 0.2:
        for _ in range(int(rng.integers(1, 6))):
            sx, sy, wide = *rng.uniform(-1, 1, 2), rng.uniform(0.02, 0.4)
            turn, long = rng.uniform(0, np.pi), rng.uniform(1, 6)
            u = np.cos(turn) * (x - sx) + np.sin(turn) * (y - sy)
            v = np.cos(turn) * (y - sy) - np.sin(turn) * (x - sx)
            spot = np.exp(-(((u / (wide * long)) ** 2 + (v / wide) ** 2) ** rng.uniform(0.7, 1.5)))
            gloss += rng.uniform(0.05, 0.5) * spot * rng.uniform(0.5, 1)
    steps.append(lambda image: image * gain[..., None] + gloss[..., None])
    if rng.random() < 0.35:
        spread = rng.uniform(0.3, 2.0) * size / 160
        steps.append(lambda image: cv2.GaussianBlur(image, (0, 0), spread))
    if rng.random() < 0.35:
        low, high = rng.uniform(0, 0.35), rng.uniform(0.5, 1.0)
        steps.append(lambda image: low + (high - low) * image)
    if rng.random() < 0.3:
        power = np.float32(np.exp(rng.normal(0, 0.35)))
        steps.append(lambda image: np.clip(image, 0, 1) ** power)
    if rng.random() < 0.45:
        steps.append(lambda image: np.repeat(image.mean(2, keepdims=True), 3, 2))
    if rng.random() < 0.2:
        small = max(32, round(size * rng.uniform(0.4, 0.85)))
        steps.append(
            lambda image: cv2.resize(
                cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA),
                (size, size),
                interpolation=cv2.INTER_LINEAR,
            ),
        )
    if rng.random() < 0.5:
        strength, coarse = rng.uniform(0.005, 0.06), rng.random() < 0.3
        grain = rng.standard_normal((size, size, 1 if rng.random() < 0.7 else 3), dtype=np.float32)
        if coarse:
            grain = cv2.GaussianBlur(grain, (0, 0), 0.8).reshape(size, size, -1) * 2
        bright = rng.random() < 0.5
        steps.append(lambda image: image + strength * grain * (np.sqrt(np.clip(image, 0, 1)) if bright else 1))
    return steps


def photograph(rng: np.random.Generator, image: np.ndarray, clean: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Take an image through a random camera; as it is, where the camera would hide the defect.

    Args:
        rng: Source of randomness.
        image: uint8 ``[S, S, 3]``.
        clean: The same without the defect.
        mask: bool ``[S, S]``.

    Returns:
        uint8 ``[S, S, 3]``.
    """
    steps, quality = _optics(rng, len(image)), int(rng.integers(25, 96)) if rng.random() < 0.35 else None

    def take(one: np.ndarray) -> np.ndarray:
        out = one.astype(np.float32) / 255
        for step in steps:
            out = step(out)
        return np.round(np.clip(out, 0, 1) * 255).astype(np.uint8)

    out = take(image)
    if mask.any():
        step = np.abs(out.astype(np.float32) - take(clean))[mask].mean()
        if step < LEAST_STEP:
            return image
    if quality is not None:
        out = cv2.imdecode(cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
    return out
