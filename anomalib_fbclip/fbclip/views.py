# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Identity, semantic and spatial view of a token set (FB-CLIP, https://arxiv.org/abs/2603.19608, eq. 9-21).

Axes: B images, L patches in raster order of a grid of g_h rows and g_w columns, D width of the visual tokens. The class
token comes first and no view changes it. First the equations, which return a view's tokens. Below them the fast forms:
every view is a linear mixture of tokens, so a fast form returns the mixture, which can be applied to the tokens or to a
projection of them.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.common.functional import Grid, grid_of

from .foreground import BACKGROUND_VALUE, class_similarity
from .neighbourhoods import WINDOW, neighbour_mixing, neighbour_products

VIEWS = ("id", "sem", "spa")
SEMANTIC_STRENGTH = 0.6
"""Share of the aggregated tokens in the semantic view (eq. 15)."""
_EPS = 1e-8

Mixing = Callable[[torch.Tensor], torch.Tensor]
"""A linear mixture of tokens ``[B, 1 + L, C]``, class token first, for any width C."""


def identity_view(tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """ID (eq. 9): the tokens ``[B, 1 + L, D]`` themselves."""
    del mask, grid
    return tokens


def semantic_view(tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """SEM (eq. 10-15): each patch drawn to the foreground and the background patches of the whole image.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``.
        mask: Foreground mask ``[B, L]``.
        grid: Not used: every patch sees the whole image.

    Returns:
        torch.Tensor: ``[B, 1 + L, D]``.
    """
    del grid
    c, x, p = tokens[:, :1], tokens[:, 1:], mask[..., None]  # [B, 1, D], [B, L, D], [B, L, 1]
    similarity = F.cosine_similarity(x, c, dim=-1)[..., None]  # [B, L, 1]
    foreground = ((1 - similarity) * (p @ p.mT)).softmax(dim=-1)  # eq. 10-12, [B, L, L]
    background = (similarity * ((1 - p) @ (1 - p).mT)).softmax(dim=-1)  # eq. 10, 13, [B, L, L]
    aggregated = p * (foreground @ x) + (1 - p) * (background @ x)  # eq. 14
    view = SEMANTIC_STRENGTH * aggregated + (1 - SEMANTIC_STRENGTH) * x  # eq. 15
    return torch.cat((c, view), dim=1)


def spatial_view(tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
    """SPA (eq. 16-20): each patch rebuilt from its 5 x 5 neighbourhood, foreground and background apart.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``.
        mask: Foreground mask ``[B, L]``.
        grid: Rows and columns of the patches; ``None``: a square.

    Returns:
        torch.Tensor: ``[B, 1 + L, D]``.
    """
    c, x = tokens[:, :1], tokens[:, 1:]
    grid = grid_of(x.shape[1]) if grid is None else grid
    p = _unfold(mask[..., None], grid)  # eq. 16, [B, L, 25, 1]; 0 outside the grid
    window = _unfold(x, grid)  # eq. 16, [B, L, 25, D]
    a, b = window * p, window * (1 - p)
    stability = F.cosine_similarity(b, c[:, None], dim=-1) * b.norm(dim=-1)  # eq. 17, [B, L, 25]
    richness = (1 - F.cosine_similarity(a, c[:, None], dim=-1)) * (a - a.mean(dim=2, keepdim=True)).norm(dim=-1)
    foreground = (richness.softmax(dim=-1)[..., None] * a).sum(dim=2)  # eq. 18-19
    background = (stability.softmax(dim=-1)[..., None] * b).sum(dim=2)
    view = foreground / p.sum(dim=2).clamp(min=_EPS) + background / (1 - p).sum(dim=2).clamp(min=_EPS)  # eq. 20
    return torch.cat((c, view), dim=1)


def _unfold(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The 25 neighbours of each patch, zero outside the grid: ``[B, L, C]`` to ``[B, L, 25, C]``."""
    batch, length, width = values.shape
    image = values.mT.reshape(batch, width, *grid)
    return F.unfold(image, WINDOW, padding=WINDOW // 2).view(batch, width, WINDOW**2, length).permute(0, 3, 2, 1)


def identity_mixing(tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> Mixing:
    """Fast form of :func:`identity_view`."""
    del tokens, mask, grid
    return lambda values: values


def semantic_mixing(tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> Mixing:
    """Fast form of :func:`semantic_view`, without L x L matrices.

    The mask takes two values, so a row of each softmax holds two distinct weights: one for all foreground columns and
    one for all background columns. A row therefore mixes the patch with the means of both groups.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``.
        mask: Foreground mask ``[B, L]``.
        grid: Not used: every patch sees the whole image.

    Returns:
        Mixing: Keeps the class token.
    """
    del grid
    similarity = class_similarity(tokens)
    foreground = (mask > BACKGROUND_VALUE).to(tokens.dtype)
    to_foreground = _two_masses((1 - similarity) * mask, 1.0, BACKGROUND_VALUE, foreground)
    to_background = _two_masses(similarity * (1 - mask), 0.0, 1 - BACKGROUND_VALUE, foreground)
    share = mask[..., None] * to_foreground + (1 - mask[..., None]) * to_background
    members = torch.stack((foreground, 1 - foreground), dim=1)
    members /= members.sum(dim=-1, keepdim=True).clamp(min=1)

    def mix(values: torch.Tensor) -> torch.Tensor:
        class_value, patch_values = values[:, :1], values[:, 1:]
        means = members.to(values.dtype) @ patch_values
        strength = SEMANTIC_STRENGTH
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


def spatial_mixing(tokens: torch.Tensor, mask: torch.Tensor, grid: Grid | None = None) -> Mixing:
    """Fast form of :func:`spatial_view`, without 25 copies of the tokens.

    Norms, cosines and distances within a window follow from dot products of neighbouring tokens.

    Args:
        tokens: Tokens ``[B, 1 + L, D]``.
        mask: Foreground mask ``[B, L]``.
        grid: Rows and columns of the patches; ``None``: a square.

    Returns:
        Mixing: Keeps the class token.
    """
    class_token, patches = tokens[:, :1], tokens[:, 1:]
    grid = grid_of(patches.shape[1]) if grid is None else grid
    places = (patches.shape[0], *grid)  # len() would fix the batch size of a graph
    direction = class_token[:, 0] / class_token[:, 0].norm(dim=-1, keepdim=True).clamp(min=_EPS)
    along = (patches @ direction[..., None]).view(places)
    norm = patches.norm(dim=-1).view(places)
    p = mask.view(places)

    # Outside the grid a = b = 0: cosine 0, so 1 - cos = 1; p = 0 there, so 1 - p = 1.
    background_logits = _windows((1 - p) * along)
    a = p[..., None] * patches.unflatten(1, grid)
    mean = F.avg_pool2d(a.permute(0, 3, 1, 2), WINDOW, stride=1, padding=WINDOW // 2).permute(0, 2, 3, 1)
    products = neighbour_products(mean, a)
    # |a - mean|^2; the mean times itself is the mean of its products.
    squared_distance = _windows((p * norm) ** 2) - 2 * products + products.mean(dim=-1, keepdim=True)
    inconsistency = _windows(1 - along / norm.clamp(min=_EPS), outside=1.0)
    foreground_logits = inconsistency * squared_distance.clamp(min=0).sqrt()

    p_window = _windows(p)
    foreground = foreground_logits.softmax(dim=-1) * p_window / p_window.sum(dim=-1, keepdim=True).clamp(min=_EPS)
    remainder = 1 - p_window
    background = background_logits.softmax(dim=-1) * remainder / remainder.sum(dim=-1, keepdim=True).clamp(min=_EPS)
    return neighbour_mixing(foreground + background, grid)


def _windows(values: torch.Tensor, outside: float = 0.0) -> torch.Tensor:
    """Scalars ``[B, g_h, g_w]`` to the 25 of each neighbourhood ``[B, L, 25]``."""
    padded = F.pad(values, (2, 2, 2, 2), value=outside)
    return padded.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1).reshape(values.shape[0], -1, WINDOW**2)


LITERAL = {"id": identity_view, "sem": semantic_view, "spa": spatial_view}
FAST = {"id": identity_mixing, "sem": semantic_mixing, "spa": spatial_mixing}
