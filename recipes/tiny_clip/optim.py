# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Muon for the blocks' matrices (all of one shape at once), AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix of each, ``[K, m, n]`` with m <= n."""
    x = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, then an orthogonal step of the same shape; float32, matrices of one shape batched.

    Args:
        params: Matrices ``[out, in]``; ``in_proj`` weights (out = 3 in) are treated as three.
        lr: Step size.
        momentum: Nesterov momentum.
        weight_decay: Decoupled decay.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update."""
        del closure
        for group in self.param_groups:
            pieces: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(state["momentum"], group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                parts = 3 if param.shape[0] == 3 * param.shape[1] else 1
                for weight, change in zip(param.chunk(parts), update.chunk(parts), strict=True):
                    tall = weight.shape[0] > weight.shape[1]
                    pieces[tuple(sorted(weight.shape))].append((weight.T, change.T) if tall else (weight, change))
            for shape, pairs in pieces.items():
                steps = orthogonalise(torch.stack([change for _, change in pairs]))
                size = 0.2 * max(shape) ** 0.5
                for (weight, _), change in zip(pairs, steps, strict=True):
                    weight.sub_(change, alpha=group["lr"] * size)


def build_optimisers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the 2-D weights of the transformer blocks, AdamW on everything else."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if "resblocks" in name and p.ndim == 2]
    maps = [p for name, p in trained.items() if name.endswith(("conv1.fine.weight", "conv1.coarse.weight"))]
    chosen = {id(p) for p in (*matrices, *maps)}
    rest = [p for p in trained.values() if id(p) not in chosen]
    decay = [p for p in rest if p.ndim >= 2]
    plain = [p for p in rest if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    # Many channels of deviation 5 enter tokens of deviation 0.3.
    groups.append({"params": maps, "weight_decay": 0.02, "lr": 0.1 * adam_lr})
    return [Muon(matrices, muon_lr), torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.98), eps=1e-8)]
