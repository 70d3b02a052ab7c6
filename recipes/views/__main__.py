# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Rules that make the score of a part from those of its views, on drawn parts that are partly hidden.

    python -m recipes.views
    python -m recipes.views --model AFCLIP --seeds 0 1 2 --parts 32 --views 4

The embedded backbone, the families that it has never seen. AUROC and best F1 of parts, in percent, are means over
families and seeds; the difference to the maximum has a 95 % interval from drawing parts again.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch

import anomalib_fbclip
from anomalib_fbclip.data.procedural.defects import KINDS
from anomalib_fbclip.data.procedural.families import FAMILIES, TEST_ONLY_FAMILIES
from anomalib_fbclip.data.procedural.views import generate_views
from anomalib_fbclip.host.metrics import ImageScores
from anomalib_fbclip.host.parts import RULES

if TYPE_CHECKING:
    from collections.abc import Callable

DRAWS = 400


def scores_of(model: torch.nn.Module, family: str, seed: int, parts: int, views: int) -> torch.Tensor:
    """Score of each view, whether its part is defective, and how many views show it ``[parts, views + 2]``."""
    rows = []
    for number in range(parts):
        kind = KINDS[number // 2 % len(KINDS)] if number % 2 else "good"
        drawn = generate_views(family, kind, model.image_size, (seed, FAMILIES.index(family), 1, number), views, 0.5)
        images = torch.stack([torch.from_numpy(view.image).permute(2, 0, 1) / 255 for view in drawn])
        with torch.no_grad():
            scores = model.model(model.pre_processor.transform(images)).pred_score
        seen = sum(bool(view.mask.any()) for view in drawn)
        rows.append(torch.tensor([*scores.tolist(), number % 2, seen]))
    return torch.stack(rows)


def measure(rows: torch.Tensor, rule: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    """AUROC and best F1 of parts."""
    metric = ImageScores()
    metric.update(torch.stack([rule(row[:-2]) for row in rows]), rows[:, -2])
    values = metric.compute()
    return 100 * values["AUROC"], 100 * values["F1Max"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="FBCLIP", help="class of the package with an embedded adapter")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the parts")
    parser.add_argument("--parts", type=int, default=32, help="of each family and seed, half of them defective")
    parser.add_argument("--views", type=int, default=4, help="of each part")
    arguments = parser.parse_args()
    model = getattr(anomalib_fbclip, arguments.model)(backbone="tiny").eval()
    sets = [
        scores_of(model, family, seed, arguments.parts, arguments.views)
        for seed in arguments.seeds
        for family in TEST_ONLY_FAMILIES
    ]
    seen = torch.cat([rows[rows[:, -2] == 1, -1] for rows in sets]).long().bincount(minlength=arguments.views + 1)
    sys.stdout.write(f"Views that show the defect of a part: {dict(enumerate(seen.tolist()))}\n\n")
    sys.stdout.write("| rule | AUROC | F1 | AUROC minus that of max |\n|---|---|---|---|\n")
    for name, rule in RULES.items():
        values = np.mean([measure(rows, rule) for rows in sets], axis=0)
        low, high = _interval(sets, rule)
        gain = values[0] - np.mean([measure(rows, RULES["max"])[0] for rows in sets])
        sys.stdout.write(f"| {name} | {values[0]:.1f} | {values[1]:.1f} | {gain:+.1f} ({low:+.1f} to {high:+.1f}) |\n")


def _interval(sets: list[torch.Tensor], rule: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    """95 % interval of the mean difference in AUROC, from drawing the parts of each set again."""
    generator = torch.Generator().manual_seed(0)
    scored = [
        (torch.stack([rule(row[:-2]) for row in rows]), torch.stack([RULES["max"](row[:-2]) for row in rows]))
        for rows in sets
    ]
    found = []
    for _ in range(DRAWS):
        gains = []
        for rows, (ours, highest) in zip(sets, scored, strict=True):
            again = torch.randint(len(rows), (len(rows),), generator=generator)
            labels = rows[again, -2] > 0
            if 0 < labels.sum() < len(labels):
                gains.append(100 * (_auroc(ours[again], labels) - _auroc(highest[again], labels)))
        found.append(np.mean(gains))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _auroc(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pairs of a defective and a good part in the right order, ties half."""
    bad, good = scores[labels][:, None], scores[~labels]
    return float(((bad > good) + 0.5 * (bad == good)).mean())


if __name__ == "__main__":
    main()
