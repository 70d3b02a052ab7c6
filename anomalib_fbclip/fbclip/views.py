# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The semantic and the spatial view of a token set (paper, eq. 9-21), in reduced form.

The mask takes two values, so a row of SEM's L x L softmax holds two distinct weights; SPA is built from dot products of
neighbouring tokens, so it runs as products of bands of one grid row with another. The literal forms, with the L x L
matrices and the 25 copies of the tokens, are in ``tests/reference`` and give the same values.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

Mixing = Callable[[torch.Tensor], torch.Tensor]
"""A view as what it is: a linear mixture of tokens ``[B, 1 + L, C]``, class token first, whatever their width C."""

VIEWS = ("id", "sem", "spa")
WINDOW = 5
_EPS = 1e-8


def identity_mixing(values: torch.Tensor) -> torch.Tensor:
    """ID: the tokens themselves."""
    return values


def semantic_mixing(tokens: torch.Tensor, mask: torch.Tensor, strength: float = 0.6) -> Mixing:
    """SEM: each patch drawn to the foreground and background patches of the whole image.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``, class token first.
        mask: Foreground mask ``[B, L]``, values 0.5 and 1.
        strength: Share of the aggregated tokens; ``1 - strength`` stays with the token itself.

    Returns:
        Mixing: Keeps the class token.
    """
    class_token, patches = tokens[:, :1], tokens[:, 1:]
    similarity = F.cosine_similarity(patches, class_token, dim=-1)
    foreground = (mask > 0.5).to(tokens.dtype)
    # Rows of the softmax: one weight for all foreground columns (p = 1), one for all background columns (p = 0.5).
    to_foreground = _two_masses((1 - similarity) * mask, 1.0, 0.5, foreground)
    to_background = _two_masses(similarity * (1 - mask), 0.0, 0.5, foreground)
    share = mask[..., None] * to_foreground + (1 - mask[..., None]) * to_background
    members = torch.stack((foreground, 1 - foreground), dim=1)
    members /= members.sum(dim=-1, keepdim=True).clamp(min=1)

    def mix(values: torch.Tensor) -> torch.Tensor:
        class_value, patch_values = values[:, :1], values[:, 1:]
        means = members.to(values.dtype) @ patch_values
        mixed = torch.baddbmm(patch_values, share.to(values.dtype), means, beta=1 - strength, alpha=strength)
        return torch.cat((class_value, mixed), dim=1)

    return mix


def _two_masses(logit: torch.Tensor, on: float, off: float, foreground: torch.Tensor) -> torch.Tensor:
    """Softmax of ``logit * on`` over the foreground and ``logit * off`` over the background: both masses [B, L, 2]."""
    count = foreground.sum(dim=-1, keepdim=True)
    peak = torch.maximum(logit * on, logit * off)
    masses = torch.stack(
        ((logit * on - peak).exp() * count, (logit * off - peak).exp() * (foreground.shape[-1] - count)),
        dim=-1,
    )
    return masses / masses.sum(dim=-1, keepdim=True)


def spatial_mixing(tokens: torch.Tensor, mask: torch.Tensor) -> Mixing:
    """SPA: each patch rebuilt from its 5 x 5 neighbourhood, foreground and background apart.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``, class token first, L a square.
        mask: Foreground mask ``[B, L]``, values 0.5 and 1.

    Returns:
        Mixing: Keeps the class token.
    """
    class_token, patches = tokens[:, :1], tokens[:, 1:]
    batch, length, width = patches.shape
    grid = round(length**0.5)
    places = (batch, grid, grid)
    direction = class_token[:, 0] / class_token[:, 0].norm(dim=-1, keepdim=True).clamp(min=_EPS)
    along = (patches @ direction[..., None]).view(places)
    norm = patches.norm(dim=-1).view(places)
    p = mask.view(places)

    # Outside the grid a = b = 0: cosine 0, so 1 - cos = 1; p = 0 there, so 1 - p = 1.
    background_logits = _windows((1 - p) * along)
    a = F.pad(p[..., None] * patches.view(batch, grid, grid, width), (0, 0, 2, 2, 2, 2))
    mean = _box(a) / WINDOW**2
    squared_distance = (
        _windows((p * norm) ** 2) - 2 * _banded_dot(mean, a) + mean.square().sum(dim=-1).view(batch, length, 1)
    )
    inconsistency = _windows(1 - along / norm.clamp(min=_EPS), outside=1.0)
    foreground_logits = inconsistency * squared_distance.clamp(min=0).sqrt()

    p_window = _windows(p)
    foreground = foreground_logits.softmax(dim=-1) * p_window / p_window.sum(dim=-1, keepdim=True).clamp(min=_EPS)
    remainder = 1 - p_window
    background = background_logits.softmax(dim=-1) * remainder / remainder.sum(dim=-1, keepdim=True).clamp(min=_EPS)
    bands = _bands(foreground + background, grid)

    def mix(values: torch.Tensor) -> torch.Tensor:
        image = F.pad(values[:, 1:].unflatten(1, (grid, grid)), (0, 0, 2, 2, 2, 2))
        return torch.cat((values[:, :1], _banded_sum(bands.to(values.dtype), image)), dim=1)

    return mix


def _windows(values: torch.Tensor, outside: float = 0.0) -> torch.Tensor:
    """Scalars ``[B, g, g]`` to the 25 of each neighbourhood ``[B, g * g, 25]``."""
    padded = F.pad(values, (2, 2, 2, 2), value=outside)
    return padded.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1).reshape(values.shape[0], -1, WINDOW**2)


def _box(padded: torch.Tensor) -> torch.Tensor:
    """Sum of each 5 x 5 neighbourhood: ``[B, g + 4, g + 4, D]`` to ``[B, g, g, D]``."""
    grid = padded.shape[1] - WINDOW + 1
    rows = sum(padded[:, shift : shift + grid] for shift in range(WINDOW))
    return sum(rows[:, :, shift : shift + grid] for shift in range(WINDOW))


def _banded_dot(centres: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """Dot products of each centre with the 25 tokens around it: ``[B, g, g, D]``, padded tokens -> ``[B, g * g, 25]``.

    Row times row costs g / 5 times the needed products and is still far cheaper than 25 shifted copies, because it is
    a matrix product; the band is then read out of each ``[g, g + 4]`` block by a change of stride.
    """
    batch, grid = centres.shape[:2]
    bands = []
    for shift in range(WINDOW):
        block = centres @ padded[:, shift : shift + grid].transpose(-1, -2)
        stretched = F.pad(block.flatten(-2), (0, grid)).unflatten(-1, (grid, grid + WINDOW))
        bands.append(stretched[..., :WINDOW])
    return torch.cat(bands, dim=-1).reshape(batch, grid * grid, WINDOW**2)


def _bands(weights: torch.Tensor, grid: int) -> torch.Tensor:
    """Weights of the 25 tokens around each place ``[B, g * g, 25]`` to row-by-row bands ``[5, B, g, g, g + 4]``."""
    rows = weights.unflatten(1, (grid, grid)).unflatten(-1, (WINDOW, WINDOW))
    padded = F.pad(rows.movedim(-2, 0), (0, grid)).flatten(-2)[..., : grid * (grid + WINDOW - 1)]
    return padded.unflatten(-1, (grid, grid + WINDOW - 1))


def _banded_sum(bands: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """Sum of the 25 tokens around each place: bands, padded tokens ``[B, g + 4, g + 4, C]`` -> ``[B, g * g, C]``."""
    grid = bands.shape[2]
    total = bands[0] @ padded[:, :grid]
    for shift in range(1, WINDOW):
        total = total + bands[shift] @ padded[:, shift : shift + grid]
    return total.flatten(1, 2)
