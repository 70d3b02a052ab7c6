# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Objects on a background. Every function is ``(rng, size) -> Surface``, the part being where the object is."""

from __future__ import annotations

import cv2
import numpy as np

from anomalib_fbclip.data.procedural.fields import (
    Surface,
    blend,
    colour,
    fractal,
    grid,
    noise,
    smoothstep,
    stamp,
    two_colours,
)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """What lies behind an object: nearly plain, dark or bright, float32 ``[S, S, 3]``."""
    base = colour(rng, (0.0, 0.3), (0.02, 0.95))
    return base * (1 + 0.03 * noise(rng, size, 3) + 0.02 * noise(rng, size, 50))[..., None]


def machined_part(rng: np.random.Generator, size: int) -> Surface:
    """A turned disc with a bore and bolt holes, concentric tool marks and bevelled rims."""
    x, y = grid(size)
    x, y = x - rng.normal(0, 0.02), y - rng.normal(0, 0.02)
    radius, turn = np.hypot(x, y), np.arctan2(y, x)
    outer, inner = rng.uniform(0.38, 0.48), rng.uniform(0.08, 0.18)
    part = (radius < outer) & (radius > inner)
    holes, ring, hole = int(rng.integers(0, 7)), (outer + inner) / 2, rng.uniform(0.025, 0.05)
    for number in range(holes):
        angle = 2 * np.pi * number / holes
        part &= np.hypot(x - ring * np.cos(angle), y - ring * np.sin(angle)) > hole
    marks = 0.07 * np.sin(radius * rng.uniform(150, 420)) + 0.12 * np.cos(2 * (turn - rng.uniform(0, 3)))
    rim = smoothstep(np.abs(radius - outer), 0.0, 0.03) * smoothstep(np.abs(radius - inner), 0.0, 0.02)
    steel = (
        colour(rng, (0.0, 0.3), (0.5, 0.85))
        * ((0.7 + 0.3 * rim) * (1 + marks) + 0.02 * noise(rng, size, 60))[..., None]
    )
    return Surface(np.where(part[..., None], steel, background(rng, size)).astype(np.float32), part)


def printed_board(rng: np.random.Generator, size: int) -> Surface:
    """A board with tracks, pads and chips on a regular layout."""
    green = colour(rng, (0.4, 0.8), (0.2, 0.5))
    if rng.random() < 0.7:
        green = np.array([0.08, 0.36, 0.18], dtype=np.float32) * np.float32(rng.uniform(0.7, 1.5))
    canvas = np.full((size, size, 3), np.round(green * 255), dtype=np.uint8)
    copper, dark = np.clip(green * 1.6 + 0.06, 0, 1) * 255, np.full(3, rng.uniform(13, 50))
    pitch, thick = size / rng.integers(7, 12), max(1, size // 80)
    for line in np.arange(pitch / 2, size, pitch):
        if rng.random() < 0.8:
            bend = int(line + pitch * rng.integers(-1, 2))
            path = np.array([[0, line], [size * rng.uniform(0.2, 0.8), line], [size, bend]], dtype=np.int32)
            path = path if rng.random() < 0.6 else path[:, ::-1]
            cv2.polylines(
                canvas,
                [path.reshape(-1, 1, 2)],
                isClosed=False,
                color=copper.tolist(),
                thickness=thick,
                lineType=cv2.LINE_AA,
            )
    for _ in range(int(rng.integers(2, 6))):
        wide, tall = (rng.uniform(1.2, 3.0, 2) * pitch).astype(int)
        left, top = rng.integers(0, size - wide), rng.integers(0, size - tall)
        pad = max(1, int(pitch * 0.16))
        for step in range(left + pad, left + wide - pad, max(3, 3 * pad)):
            cv2.rectangle(canvas, (step, top - pad * 2), (step + pad, top + tall + pad * 2), (191, 186, 168), -1)
        cv2.rectangle(canvas, (left, top), (left + int(wide), top + int(tall)), dark.tolist(), -1)
    for spot in rng.uniform(0, size, (int(rng.integers(4, 16)), 2)):
        cv2.circle(canvas, spot.astype(int).tolist(), max(2, size // 45), (184, 168, 115), -1, cv2.LINE_AA)
        cv2.circle(canvas, spot.astype(int).tolist(), max(1, size // 110), (15, 15, 15), -1, cv2.LINE_AA)
    return Surface(
        canvas / np.float32(255) * (1 + 0.03 * noise(rng, size, 60))[..., None],
        np.ones((size, size), dtype=bool),
    )


def pill(rng: np.random.Generator, size: int) -> Surface:
    """A rounded capsule or tablet, sometimes of two colours with a seam, shaded towards its rim."""
    x, y = grid(size, rng.uniform(0, np.pi))
    half, wide = rng.uniform(0.0, 0.22), rng.uniform(0.18, 0.26)
    depth = 1 - np.hypot(x - np.clip(x, -half, half), y) / wide
    part = depth > 0
    one, two = two_colours(rng, 0.05, value=(0.4, 0.95))
    seam = smoothstep(x, -0.004, 0.004) if rng.random() < 0.6 else np.zeros_like(x)
    shade = (0.55 + 0.45 * np.sqrt(np.clip(depth, 0, 1) * 1.6).clip(0, 1)) * (1 - 0.25 * (np.abs(x) < 0.006))
    body = blend(one, two, seam) * (shade + 0.015 * noise(rng, size, 60))[..., None]
    return Surface(np.where(part[..., None], body, background(rng, size)).astype(np.float32), part)


def gear(rng: np.random.Generator, size: int) -> Surface:
    """A toothed wheel with spokes or a plain web."""
    x, y = grid(size)
    radius, turn = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 6)
    teeth, root = int(rng.integers(9, 28)), rng.uniform(0.34, 0.42)
    tooth = smoothstep(np.sin(turn * teeth), -0.4, 0.4) * rng.uniform(0.03, 0.06)
    part = (radius < root + tooth) & (radius > rng.uniform(0.06, 0.12))
    if rng.random() < 0.5:
        spokes = int(rng.integers(3, 7))
        part &= ~((radius > 0.17) & (radius < root - 0.08) & (np.sin(turn * spokes) > 0.1))
    distance = cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 3) / size
    tone = 0.7 + 0.3 * smoothstep(distance, 0, 0.02) + 0.06 * fractal(rng, size, 10, 3)
    body = colour(rng, (0.0, 0.5), (0.35, 0.9)) * tone[..., None]
    return Surface(np.where(part[..., None], body, background(rng, size)).astype(np.float32), part)


def cap(rng: np.random.Generator, size: int) -> Surface:
    """A bottle cap from above: fluted rim, raised rings, a printed letter."""
    x, y = grid(size)
    radius, turn = np.hypot(x, y), np.arctan2(y, x) + rng.uniform(0, 6)
    outer = rng.uniform(0.38, 0.47)
    part = radius < outer + 0.01 * np.sign(np.sin(turn * rng.integers(24, 60)))
    tone = 0.8 + 0.25 * np.sin(radius * rng.uniform(30, 70) + rng.uniform(0, 6)) * smoothstep(radius, 0.15, 0.3)
    body = colour(rng, (0.2, 0.8), (0.3, 0.9)) * (tone + 0.015 * noise(rng, size, 60))[..., None]
    letter, ink = chr(int(rng.integers(65, 91))), colour(rng)
    scale = size / 60 * rng.uniform(0.5, 0.9)
    body = stamp(body, letter, (int(size * 0.5 - 10 * scale), int(size * 0.5 + 11 * scale)), scale, ink)
    return Surface(np.where(part[..., None], body, background(rng, size)).astype(np.float32), part)
