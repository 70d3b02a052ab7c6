# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What is killed: five jobs of a user, small enough for many tries.

``run(folder)`` does the job, or goes on with it where a killed run stopped. ``done(folder)`` names the files that a run
left behind, ``damaged(folder)`` those that would be taken for whole and are not. ``result(folder)`` is what the job was
done for.
"""

from __future__ import annotations

import csv
import hashlib
import json
from typing import TYPE_CHECKING

import torch
import yaml
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from jsonargparse import Namespace
from safetensors import SafetensorError
from safetensors.torch import load_file

from anomalib_fbclip import FBCLIP, ProceduralSurfaces
from anomalib_fbclip.clip.build import load_clip
from anomalib_fbclip.clip.token_cache import TokenCache
from anomalib_fbclip.data.procedural.cache import CacheSpec, write_family
from anomalib_fbclip.pipelines.table import Table

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 56
EPOCHS = 4


def surfaces(root: Path) -> ProceduralSurfaces:
    """Sixteen images of wood to train on, half of them defective."""
    return ProceduralSurfaces(
        root=root,
        category="wood",
        image_size=SIZE,
        num_train=16,
        num_test=8,
        train_anomalous=True,
        train_batch_size=4,
    )


def engine(folder: Path, **arguments: object) -> Engine:
    """Anomalib's engine, on the processor."""
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, **arguments)


def unreadable(files: list[Path], read: object) -> list[Path]:
    """Those of ``files`` that ``read`` fails on; not hidden ones, which are in writing and taken for nothing yet."""
    bad = []
    for file in (file for file in files if not file.name.startswith(".")):
        try:
            read(file)  # type: ignore[operator]
        except (OSError, RuntimeError, ValueError, SafetensorError):  # noqa: PERF203  # each file by itself
            bad.append(file)
    return bad


class Training:
    """Four epochs; goes on from the newest checkpoint that can be read."""

    def __init__(self, shared: Path) -> None:
        self.data = shared / "surfaces"

    def run(self, folder: Path) -> None:
        """Train."""
        model = FBCLIP(backbone="tiny", image_size=SIZE, weights=None, learning_rate=1e-3)
        checkpoints = sorted(self.done(folder), key=lambda file: file.stat().st_mtime)
        torn = self.damaged(folder)
        last = next((file for file in reversed(checkpoints) if file not in torn), None)
        engine(folder, max_epochs=EPOCHS).fit(model, datamodule=surfaces(self.data), ckpt_path=last)
        model.save_adapter(folder / "final.safetensors")

    @staticmethod
    def done(folder: Path) -> list[Path]:
        """Checkpoints."""
        return list(folder.rglob("*.ckpt"))

    @staticmethod
    def damaged(folder: Path) -> list[Path]:
        """Checkpoints and adapters that cannot be read."""
        torn = unreadable(list(folder.rglob("*.ckpt")), lambda file: torch.load(file, weights_only=False))
        return torn + unreadable(list(folder.rglob("*.safetensors")), load_file)

    @staticmethod
    def result(folder: Path) -> torch.Tensor:
        """All trained weights."""
        return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "final.safetensors").items())])


class TableRun:
    """A table with a zero-shot model and one that trains its adapter first, on two families."""

    def __init__(self, shared: Path) -> None:
        self.data = shared / "surfaces"

    def run(self, folder: Path) -> None:
        """Fill the table."""
        test = {"root": str(self.data), "image_size": SIZE, "num_train": 1, "num_test": 8}
        source = {**test, "category": "leather", "num_test": 4}
        tiny = {"class_path": "FBCLIP", "init_args": {"backbone": "tiny", "image_size": SIZE}, "published": None}
        trained = {**tiny, "name": "trained", "auxiliary": {"class_path": "ProceduralSurfaces", "init_args": source}}
        trained["init_args"] = {**trained["init_args"], "max_epochs": 1}
        sets = [
            {"name": family, "class_path": "ProceduralSurfaces", "init_args": {**test, "category": family}}
            for family in ("wood", "tiles")
        ]
        models = [{**tiny, "name": "tiny"}, trained]
        table = {"results": str(folder), "seed": 0, "loader": {"num_workers": 0}, "models": models, "datasets": sets}
        config = folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump({"table": table}), encoding="utf-8")
        Table().run(Namespace(config=str(config), results=None, root=None))

    @staticmethod
    def done(folder: Path) -> list[Path]:
        """Cells and adapters."""
        return [*folder.rglob("*.json"), *folder.rglob("*.safetensors")]

    @staticmethod
    def damaged(folder: Path) -> list[Path]:
        """Cells and adapters that cannot be read."""
        cells = unreadable(list(folder.rglob("*.json")), lambda file: json.loads(file.read_text(encoding="utf-8")))
        return cells + unreadable(list(folder.rglob("*.safetensors")), load_file)

    @staticmethod
    def result(folder: Path) -> list[tuple[str, ...]]:
        """All rows, without what differs between any two runs: time and memory."""
        with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        left_out = ("seconds", "memory")
        return [tuple(value for name, value in row.items() if not any(w in name for w in left_out)) for row in rows]


class TokenCacheRun:
    """Frozen tokens of forty images."""

    def __init__(self, shared: Path) -> None:
        del shared
        self.images = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def run(self, folder: Path) -> None:
        """Read what is there, compute the rest."""
        clip = load_clip("tiny", image_size=SIZE)
        cache = TokenCache(clip, (1, 2, 4, 6, 8), folder)
        tokens = [torch.stack(cache.encode_image(batch)) for batch in self.images.split(1)]
        torch.save(torch.cat(tokens, dim=1), folder / "tokens.pt")

    @staticmethod
    def done(folder: Path) -> list[Path]:
        """Entries."""
        return list(folder.rglob("*.safetensors"))

    @staticmethod
    def damaged(folder: Path) -> list[Path]:
        """Entries that cannot be read."""
        return unreadable(list(folder.rglob("*.safetensors")), load_file)

    @staticmethod
    def result(folder: Path) -> torch.Tensor:
        """All tokens."""
        return torch.load(folder / "tokens.pt")


class DrawnPictures:
    """The images that the first command draws, of one family."""

    spec = CacheSpec(image_size=SIZE, num_train=12, num_test=12)

    def __init__(self, shared: Path) -> None:
        del shared

    def run(self, folder: Path) -> None:
        """Draw what is not there."""
        write_family(folder, "wood", self.spec)

    @staticmethod
    def done(folder: Path) -> list[Path]:
        """Images, which the next run draws again: a family is kept whole or not at all."""
        return list(folder.rglob("*.png"))

    def damaged(self, folder: Path) -> list[Path]:
        """The family's folder, if it is there with fewer images than it should hold."""
        family = folder / self.spec.key / "wood"
        pictures = len(list(family.glob("t*/*/*.png")))
        return [family] if family.is_dir() and pictures != self.spec.num_train + self.spec.num_test else []

    def result(self, folder: Path) -> list[str]:
        """Digests of all images, in order of their names."""
        files = sorted((folder / self.spec.key / "wood").rglob("*.png"))
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


class Prediction:
    """Scores and heat maps of sixteen images."""

    def __init__(self, shared: Path) -> None:
        self.pictures = write_family(shared, "tiles", CacheSpec(image_size=SIZE, num_train=16, num_test=2)) / "train"

    def run(self, folder: Path) -> None:
        """Predict from the beginning."""
        model = FBCLIP(backbone="tiny", image_size=SIZE)
        engine(folder).predict(model, dataset=PredictDataset(self.pictures), return_predictions=False)

    @staticmethod
    def _index(folder: Path) -> list[Path]:
        return list(folder.rglob("predictions.csv"))

    @staticmethod
    def done(folder: Path) -> list[Path]:
        """Tables of scores that say in their name that they are not whole."""
        return list(folder.rglob("predictions.partial-*.csv"))

    def damaged(self, folder: Path) -> list[Path]:
        """A table of scores that is not whole."""
        return [file for file in self._index(folder) if len(file.read_text(encoding="utf-8").splitlines()) != 17]

    def result(self, folder: Path) -> str:
        """The newest table of scores."""
        newest = max(self._index(folder), key=lambda file: file.stat().st_mtime)
        return newest.read_text(encoding="utf-8")


JOBS = {
    "training": Training,
    "table": TableRun,
    "token cache": TokenCacheRun,
    "drawn images": DrawnPictures,
    "prediction": Prediction,
}
