# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Memory of normal patch tokens (AF-CLIP, https://arxiv.org/abs/2507.19949).

Axes: S blocks, K normal images, L patches, D width of the visual tokens. The distance of a patch in one token set is
(1 - largest cosine to the memory) / 2, its memory score the mean over all token sets (blocks and windows). The literal
form is fast enough, as the tower takes far longer. What is stored are blocks, a third of what their windows would be.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.adapted.normal_memory import TokenMemory
from anomalib_fbclip.common.functional import Grid, full_precision
from anomalib_fbclip.host.tiling import Place

from .aggregation import WINDOWS, mixing

TEXT_WEIGHT = 0.1
"""Weight of the text's probability beside the memory's score."""


class WindowMemory(TokenMemory):
    """Patch tokens of normal images, compared in each window.

    Args:
        num_layers: Blocks S.
        width: Width D of the tokens.
        radius: See :class:`~anomalib_fbclip.adapted.normal_memory.TokenMemory`.
    """

    def __init__(self, num_layers: int, width: int, radius: int | None = None) -> None:
        super().__init__(num_layers, width, dtype=torch.float32, radius=radius)

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
            tokens: Tokens of the K images, for each block ``[K, 1 + L, D]``, class token first.
            grid: Rows and columns of the patches; ``None``: a square.
            names: See :class:`~anomalib_fbclip.adapted.normal_memory.TokenMemory`.
            places: See :class:`~anomalib_fbclip.adapted.normal_memory.TokenMemory`.
        """
        self.describe(tokens, grid, names, places)
        self.tokens = torch.stack([block[:, 1:].float() for block in tokens])

    def forward(
        self,
        tokens: Sequence[torch.Tensor],
        text: torch.Tensor,
        grid: Grid | None = None,
        places: Sequence[Place] = (),
    ) -> torch.Tensor:
        """The memory scores as logits ``[B, 1 + L]``, the image's first, for the record of the stages.

        Args:
            tokens: Tokens of the images, for each block ``[B, 1 + L, D]``, class token first.
            text: Not used: the text joins as a probability, see :meth:`score`.
            grid: Of the images, see :meth:`fill`.
            places: See :meth:`TokenMemory.closest`.
        """
        del text
        return self.score(tokens, grid, places).logit(eps=1e-6)

    def score(
        self,
        tokens: Sequence[torch.Tensor],
        grid: Grid | None = None,
        places: Sequence[Place] = (),
    ) -> torch.Tensor:
        """Memory scores in [0, 1]: of the image, the largest of its patches, and of the patches ``[B, 1 + L]``.

        Args:
            tokens: See :meth:`forward`.
            grid: Of the images, see :meth:`fill`.
            places: See :meth:`TokenMemory.closest`.

        Raises:
            RuntimeError: If the memory is empty.
        """
        self.check_filled()
        with full_precision(tokens[0].device):
            distances = []
            for block, memory in zip(tokens, self.tokens, strict=True):
                # The class token of a memory is not stored and not mixed with anything.
                normal = F.pad(memory.float(), (0, 0, 1, 0))
                for window in WINDOWS:
                    sets = ((block.float(), grid), (normal, self.grid))
                    patches, known = (F.normalize(mixing(window, g)(each)[:, 1:], dim=-1) for each, g in sets)
                    distances.append((1 - self.closest(patches, known, grid, places)) / 2)
            patches = torch.stack(distances).mean(dim=0).clamp(0, 1)  # rounding leaves -1e-8 of equal tokens
        return torch.cat((patches.amax(dim=-1, keepdim=True), patches), dim=-1)
