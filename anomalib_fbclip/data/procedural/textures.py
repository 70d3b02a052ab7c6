# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Textures: surfaces that fill the frame. Every function is ``(rng, size) -> float32 [S, S, 3]`` in about 0..1."""

from __future__ import annotations

import numpy as np

from anomalib_fbclip.data.procedural.fields import blend, cells, colour, fractal, grid, noise, smoothstep, two_colours

TAU = np.float32(2 * np.pi)


def fabric(rng: np.random.Generator, size: int) -> np.ndarray:
    """Woven threads, over and under."""
    x, y = grid(size, rng.normal(0, 0.06))
    count = rng.uniform(9, 24)
    warp = 0.012 * noise(rng, size, 4)
    u, v = (x + warp) * count, (y - warp) * count * rng.uniform(0.8, 1.25)
    over = (np.floor(u) + np.floor(v) * rng.integers(1, 3)) % 2
    thread = np.where(over > 0, np.abs(np.sin(np.pi * u)), np.abs(np.sin(np.pi * v)))
    one, two = two_colours(rng, 0.1)
    tone = 0.55 + 0.45 * thread + 0.06 * noise(rng, size, 50)
    return blend(one, two, over * 0.9) * tone[..., None]


def brushed_metal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Fine parallel lines on a grey base."""
    lines = 0.5 * noise(rng, size, (size, 3)) + 0.5 * noise(rng, size, (size / 2, 2)) + 0.3 * noise(rng, size, (8, 2))
    base = colour(rng, (0.0, 0.15), (0.4, 0.8))
    return base * (1 + rng.uniform(0.06, 0.16) * lines)[..., None]


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Regular bands of two colours."""
    x, _ = grid(size, rng.uniform(0, np.pi))
    wave = np.sin(TAU * (x * rng.uniform(3, 14) + rng.uniform()) + 0.25 * noise(rng, size, 3))
    one, two = two_colours(rng, 0.15)
    duty, soft = rng.uniform(-0.5, 0.5), rng.uniform(0.15, 1.0)
    return blend(one, two, smoothstep(wave, duty - soft, duty + soft)) * (1 + 0.04 * noise(rng, size, 60))[..., None]


def dots(rng: np.random.Generator, size: int) -> np.ndarray:
    """A lattice of round dots."""
    x, y = grid(size, rng.uniform(0, np.pi / 2))
    count = rng.uniform(5, 13)
    row = np.floor(y * count)
    u = (x * count + 0.5 * (row % 2) * rng.integers(0, 2)) % 1 - 0.5
    v = (y * count) % 1 - 0.5
    one, two = two_colours(rng, 0.2)
    spot = 1 - smoothstep(np.hypot(u, v), *(rng.uniform(0.2, 0.34) + np.array([-0.05, 0.05])))
    return blend(one, two, spot) * (1 + 0.04 * noise(rng, size, 40))[..., None]


def marble(rng: np.random.Generator, size: int) -> np.ndarray:
    """Veins: the zero lines of a turbulent field."""
    x, _ = grid(size, rng.uniform(0, np.pi))
    field = x * rng.uniform(2, 6) + rng.uniform(0.25, 0.6) * fractal(rng, size, 3, 5, 0.6)
    vein = np.abs(np.sin(np.pi * field)) ** rng.uniform(0.3, 1.0)
    one, two = two_colours(rng, 0.25, saturation=(0.0, 0.35))
    return blend(one, two, vein) * (1 + 0.05 * fractal(rng, size, 8, 3))[..., None]


def gravel(rng: np.random.Generator, size: int) -> np.ndarray:
    """Stones of many tones with dark gaps."""
    edge, label = cells(rng, size, int(rng.integers(80, 400)))
    tones = rng.uniform(0.55, 1.0, int(label.max()) + 1).astype(np.float32)
    stone = tones[label] * (0.35 + 0.65 * smoothstep(edge, 0.0, rng.uniform(0.15, 0.4)))
    return colour(rng, (0.0, 0.35), (0.5, 0.95)) * (stone * (1 + 0.08 * noise(rng, size, 60)))[..., None]


def plain(rng: np.random.Generator, size: int) -> np.ndarray:
    """A painted plate: nearly one colour, with orange peel."""
    peel = rng.uniform(0.005, 0.05) * noise(rng, size, rng.uniform(10, 90)) + 0.02 * noise(rng, size, 2)
    return colour(rng, (0.0, 0.8), (0.2, 0.9)) * (1 + peel)[..., None]


def carpet(rng: np.random.Generator, size: int) -> np.ndarray:
    """Short pile: fine strong speckle in clumps."""
    pile = noise(rng, size, size / rng.uniform(1.0, 3.0)) * (1 + 0.3 * noise(rng, size, 20))
    one, two = two_colours(rng, 0.15)
    return blend(one, two, 0.5 + rng.uniform(0.15, 0.35) * pile)


def concrete(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cloudy grey with many small pores, all of them normal."""
    pores = smoothstep(noise(rng, size, size / rng.uniform(1.5, 3)), 1.7, 2.6)
    tone = 1 + 0.08 * fractal(rng, size, 3, 6, 0.75) - rng.uniform(0.1, 0.35) * pores
    return colour(rng, (0.0, 0.2), (0.4, 0.85)) * tone[..., None]


def mesh(rng: np.random.Generator, size: int) -> np.ndarray:
    """A wire screen: two families of thin lines over a dark or bright gap."""
    x, y = grid(size, rng.uniform(0, np.pi / 2))
    count, thick = rng.uniform(5, 16), rng.uniform(0.1, 0.3)
    shear = rng.uniform(-0.4, 0.4)
    u, v = ((x + shear * y) * count) % 1 - 0.5, (y * count) % 1 - 0.5
    wire = np.maximum(1 - smoothstep(np.abs(u), thick * 0.5, thick), 1 - smoothstep(np.abs(v), thick * 0.5, thick))
    one, two = two_colours(rng, 0.3)
    return blend(one, two, wire) * (1 + 0.04 * noise(rng, size, 50))[..., None]


def plaid(rng: np.random.Generator, size: int) -> np.ndarray:
    """Crossing bands of several widths."""
    x, y = grid(size, rng.normal(0, 0.1))
    period = rng.uniform(2.5, 6)
    edges, tones = np.sort(rng.uniform(0, 1, 4)), rng.uniform(0, 1, 5).astype(np.float32)
    band_x, band_y = (tones[np.searchsorted(edges, (axis * period) % 1)] for axis in (x, y))
    one, two = two_colours(rng, 0.25)
    return blend(one, two, 0.5 * band_x + 0.5 * band_y) * (1 + 0.06 * noise(rng, size, size / 2))[..., None]


def corrugated(rng: np.random.Generator, size: int) -> np.ndarray:
    """Rounded ribs lit from the side."""
    x, _ = grid(size, rng.uniform(0, np.pi))
    phase = TAU * (x * rng.uniform(4, 12) + rng.uniform())
    light = 0.6 + 0.3 * np.sin(phase) + 0.12 * np.sin(2 * phase + rng.uniform(0, 6))
    return colour(rng, (0.0, 0.5), (0.4, 0.95)) * (light + 0.03 * noise(rng, size, 40))[..., None]


def foam(rng: np.random.Generator, size: int) -> np.ndarray:
    """Bubbles with bright or dark walls."""
    edge, label = cells(rng, size, int(rng.integers(60, 300)))
    one, two = two_colours(rng, 0.2, saturation=(0.0, 0.4))
    depth = rng.uniform(-0.15, 0.15, int(label.max()) + 1).astype(np.float32)[label]
    return blend(one, two, smoothstep(edge, 0.0, rng.uniform(0.3, 0.6)) + depth)


def paper(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cardboard: cloudy, with short fibres all over it, all of them normal."""
    fibres = noise(rng, size, (size / 2, size / 8)) + noise(rng, size, (size / 8, size / 2))
    tone = 1 + 0.035 * fibres + 0.04 * fractal(rng, size, 4, 4)
    return colour(rng, (0.0, 0.45), (0.5, 0.95)) * tone[..., None]


def hammered(rng: np.random.Generator, size: int) -> np.ndarray:
    """Overlapping soft facets lit from one side."""
    height = noise(rng, size, rng.uniform(9, 26)) + 0.3 * noise(rng, size, 40)
    down, across = np.gradient(height)
    turn = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(turn) * across + np.sin(turn) * down) * (size / 100)
    return colour(rng, (0.0, 0.5), (0.4, 0.8)) * (1 + rng.uniform(0.3, 0.9) * np.tanh(slope))[..., None]


def wood(rng: np.random.Generator, size: int) -> np.ndarray:
    """Growth rings stretched along the grain, with pores; for testing only."""
    turn = rng.uniform(0, np.pi)
    x, y = grid(size, turn)
    bend = noise(rng, size, 2) * 0.05 + noise(rng, size, 4) * 0.012
    ring = np.sin(TAU * ((y + bend) * rng.uniform(5, 11) + 0.5 * np.sin(x * rng.uniform(1, 4))))
    streak = noise(rng, size, (size, 4)) if abs(np.sin(turn)) < 0.7 else noise(rng, size, (4, size))
    hue = np.array([1.0, rng.uniform(0.62, 0.8), rng.uniform(0.35, 0.55)], dtype=np.float32)
    tone = rng.uniform(0.4, 0.9) * (1 + 0.16 * ring + 0.05 * streak + 0.04 * noise(rng, size, 50))
    return hue * tone[..., None]


def tiles(rng: np.random.Generator, size: int) -> np.ndarray:
    """Glazed tiles of slightly different tone, with grout; for testing only."""
    x, y = grid(size, rng.normal(0, 0.08))
    count = rng.uniform(2.5, 6)
    row = np.floor(y * count + 0.3)
    u, v = x * count * rng.uniform(0.5, 1.0) + 0.5 * (row % 2) * rng.integers(0, 2) + 0.4, y * count + 0.3
    gap = rng.uniform(0.02, 0.06)
    edge = np.minimum(np.minimum(u % 1, 1 - u % 1), np.minimum(v % 1, 1 - v % 1))
    tone = 1 + 0.07 * np.sin(12.9898 * np.floor(u) + 78.233 * row) + 0.03 * fractal(rng, size, 6, 3)
    one, two = two_colours(rng, 0.2, saturation=(0.0, 0.5))
    return blend(one, two, smoothstep(edge, gap, gap + 0.04)) * tone[..., None].astype(np.float32)


def leather(rng: np.random.Generator, size: int) -> np.ndarray:
    """Small grains between fine creases, lit from the side; for testing only."""
    edge, _ = cells(rng, size, int(rng.integers(350, 900)))
    grain = smoothstep(edge, 0.0, 0.5) + 0.15 * fractal(rng, size, 5, 4)
    hue = np.array([1.0, rng.uniform(0.6, 0.95), rng.uniform(0.45, 0.9)], dtype=np.float32)
    return hue * (rng.uniform(0.3, 0.75) * (0.72 + 0.32 * grain) * (1 + 0.07 * noise(rng, size, 4)))[..., None]
