# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Train the embedded CLIP on procedural surfaces: one command, two CPU cores, a fixed number of minutes.

    python -m recipes.tiny_clip.train_backbone --minutes 70 --out plain.safetensors

The second stage (``--images rough --start plain.safetensors --skip 0.4``) goes on from there with other images; the
recipe's ``__main__`` has both. Two processes of one thread each average their gradients. Schedules follow the share of
the time that is used up, so the learning rate always ends at zero in time, on any machine. Started again with the same
``--work``, it goes on. On a GPU one process trains, and others draw its images:

    python -m recipes.tiny_clip.train_backbone --device cuda --drawing 15 --images-factor 8 --minutes 7
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from anomalib_fbclip.common.files import replacing
from anomalib_fbclip.data.procedural.families import TRAIN_FAMILIES
from recipes.tiny_clip.batches import make_batch
from recipes.tiny_clip.evaluate import PLAIN, drawn, evaluate, varied
from recipes.tiny_clip.evaluate import build as build_model
from recipes.tiny_clip.losses import compute
from recipes.tiny_clip.optim import build_optimisers
from recipes.tiny_clip.stem import fill
from recipes.tiny_clip.towers import IMAGE_SIZE, Vocabulary, build
from recipes.tiny_clip.weights import export, load

if TYPE_CHECKING:
    from collections.abc import Iterator

    from open_clip.model import CLIP

    from recipes.tiny_clip.batches import Batch

logger = logging.getLogger("tiny_clip")

IMAGES = {64: 40, 96: 32, 112: 28, 144: 18, 176: 12, 224: 8, 256: 6}
"""Images a process and step, by image size."""
STAGES = (
    (0.12, {64: 1.0}),
    (0.25, {96: 1.0}),
    (0.4, {112: 0.75, 144: 0.25}),
    (1.0, {112: 0.15, 144: 0.25, 176: 0.2, 224: 0.3, 256: 0.1}),
)
"""(until this share of the time, share of the steps of each image size): many sizes, so that each can be used later."""
WARM_UP = 60
"""Steps over which the rates rise, also after a start from other weights."""
SAVE_EVERY_S, LOOK_EVERY_S = 180.0, 600.0


def schedule(used: float) -> float:
    """Factor on the learning rates: hold, then cosine to zero over the last 65 % of the time."""
    return 1.0 if used < 0.35 else 0.5 * (1 + math.cos(math.pi * min((used - 0.35) / 0.65, 1.0)))


def average_gradients(model: CLIP, world: int, used: float) -> tuple[float, float]:
    """Average the gradients and the clocks of all processes, clip to norm 1; returns (clock, norm before)."""
    grads = []
    for param in (param for param in model.parameters() if param.requires_grad):
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        grads.append(param.grad)
    flat = torch.cat([grad.flatten() for grad in grads] + [grads[0].new_tensor([used])])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    norm = flat[:-1].norm()
    flat[:-1] *= (1.0 / (norm + 1e-6)).clamp(max=1.0)
    start = 0
    for grad in grads:
        grad.copy_(flat[start : start + grad.numel()].view_as(grad))
        start += grad.numel()
    return float(flat[-1]), float(norm)


def save(path: Path, content: dict) -> None:
    """``torch.save`` that leaves a whole file or the former one."""
    with replacing(path) as file:
        torch.save(content, file)


class Clock:
    """Share of the time budget that is used up; a start from other weights skips the first part.

    Args:
        minutes: The whole budget.
        skipped: Share that is skipped at the start.
        seconds: Spent in an earlier run.
    """

    def __init__(self, minutes: float, skipped: float, seconds: float) -> None:
        self.budget, self.skipped, self.start = minutes * 60.0, skipped, time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return time.monotonic() - self.start

    @property
    def used(self) -> float:
        """Share in 0..1, above 1 when the time is over."""
        return self.skipped + (1 - self.skipped) * self.seconds / self.budget


class Batches(IterableDataset):
    """Training images without end, of the sizes that the clock asks for; drawn here or in a loader's processes.

    Args:
        clock: Of the training.
        rough: Also draw what :mod:`variety` has.
        factor: Times the images of :data:`IMAGES` in a batch.
        seed: Of the images, with the numbers of the process and of the first step.
        step: First step.
    """

    def __init__(self, clock: Clock, rough: bool, factor: int, seed: tuple[int, ...], step: int) -> None:
        self.clock, self.rough, self.factor, self.seed, self.step = clock, rough, factor, seed, step

    def __iter__(self) -> Iterator[Batch]:
        """Batches; each process of a loader draws its own."""
        worker = get_worker_info()
        cv2.setNumThreads(1)
        rng = np.random.default_rng((*self.seed, self.step, worker.id if worker else 0))
        for step in itertools.count(self.step):
            shares = next(shares for until, shares in STAGES if min(self.clock.used, 0.999) < until)
            # Of the step alone, so that all processes that train take as long.
            size = int(np.random.default_rng(step).choice(list(shares), p=list(shares.values())))
            yield make_batch(rng, IMAGES[size] * self.factor, size, rough=self.rough)


class Trainer:
    """One process of the training: model, average, optimisers, clock, and what of it goes to disk.

    Args:
        rank: Number of this process; the first one writes.
        arguments: Of the command line.
    """

    def __init__(self, rank: int, arguments: argparse.Namespace) -> None:
        self.rank, self.arguments, self.folder = rank, arguments, Path(arguments.work)
        self.notes = {"recipe": "recipes/tiny_clip/train_backbone.py", "seed": str(arguments.seed)}
        torch.manual_seed(arguments.seed)
        self.vocabulary = Vocabulary()
        if arguments.start:
            self.model = load(arguments.start, self.vocabulary).train()
            self.notes["start"] = Path(arguments.start).name
        else:
            self.model = build(self.vocabulary)
        fill(self.model.visual.conv1)
        self.model.to(arguments.device)
        self.average = copy.deepcopy(self.model).requires_grad_(requires_grad=False)
        self.optimisers = build_optimisers(self.model, arguments.muon_lr, arguments.adam_lr)
        self.rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in self.optimisers]
        self.step, self.pictures, before = 0, 0, 0.0
        if (self.folder / "checkpoint.pt").exists():
            before = self._restore()
        self.clock, self.first = Clock(arguments.minutes, arguments.skip, before), self.step
        self.rng = np.random.default_rng((arguments.seed, rank, self.step))
        torch.manual_seed(int(self.rng.integers(2**31)))
        seed, rough = (arguments.seed, rank), arguments.images == "rough"
        batches = Batches(self.clock, rough, arguments.images_factor, seed, self.step)
        self.batches = iter(DataLoader(batches, batch_size=None, num_workers=arguments.drawing))

    def _restore(self) -> float:
        """Go on from the checkpoint; returns the seconds that it had taken."""
        kept = torch.load(self.folder / "checkpoint.pt", weights_only=True, map_location=self.arguments.device)
        self.model.load_state_dict(kept["model"])
        self.average.load_state_dict(kept["average"])
        for optimiser, state in zip(self.optimisers, kept["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.step, self.pictures = kept["step"], kept["pictures"]
        return kept["seconds"]

    def train_step(self) -> tuple[float, dict[str, float]]:
        """One batch, one update; returns the averaged clock and the losses."""
        batch: Batch = next(self.batches)
        losses = compute(self.model, self.vocabulary, batch, self.rng, self.step)
        self.model.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        used, norm = average_gradients(self.model, self.arguments.processes, self.clock.used)
        for optimiser, rates in zip(self.optimisers, self.rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(used) * min(1.0, (self.step - self.first + 1) / WARM_UP)
            optimiser.step()
        self.step += 1
        self.pictures += len(batch.images) * self.arguments.processes
        decay = min(0.998, (self.step + 1) / (self.step + 10)) if used < 0.9 else 0.99
        with torch.no_grad():
            for kept, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                kept.lerp_(now, 1 - decay)
        return used, {"norm": norm} | {name: float(loss.detach()) for name, loss in losses.items()}

    def save(self) -> None:
        """Write the checkpoint, and what could be used already."""
        state = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        state |= {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers], "step": self.step}
        state |= {"pictures": self.pictures, "seconds": self.clock.seconds}
        save(self.folder / "checkpoint.pt", state)
        self.export(self.folder / "latest.safetensors")

    def export(self, path: Path) -> None:
        """Write the averaged weights, mixed with those of the start (Wortsman et al., CVPR 2022)."""
        notes = self.notes | {"pictures": str(self.pictures), "minutes": str(self.arguments.minutes)}
        state = {key: value.cpu() for key, value in self.average.state_dict().items()}
        if self.arguments.start:
            beginning = load(self.arguments.start, self.vocabulary).state_dict()
            share = self.arguments.share_of_start
            notes["share_of_start"] = str(share)
            # The convolutional network is the same in both, or not yet in the start.
            state = {
                key: value if ".conv1.first." in key or ".conv1.blocks." in key else value.lerp(beginning[key], share)
                for key, value in state.items()
            }
        export(state, self.vocabulary, path, **notes)

    def look(self, name: str) -> None:
        """Log the numbers of plain similarity, of what was last saved, on images that no training sees."""
        model = build_model(self.folder / "latest.safetensors")
        for what, images in {"held out": drawn(TRAIN_FAMILIES, 4, 77), "varied": varied(48)}.items():
            logger.info("%s: %s %s", name, what, evaluate(model, images, IMAGE_SIZE, [PLAIN])[PLAIN])


def work(rank: int, arguments: argparse.Namespace) -> None:
    """Run one process from start to end."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    world = arguments.processes
    if world > 1:
        meet = f"file://{Path(arguments.work).resolve()}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    trainer = Trainer(rank, arguments)
    words = trainer.vocabulary.unknown
    logger.info("seed %d, %d words, step %d, %g minutes", arguments.seed, words, trainer.step, arguments.minutes)
    used, sums = trainer.clock.used, {}
    saved = looked = time.monotonic()
    while used < 1.0:
        used, losses = trainer.train_step()
        for name, loss in losses.items():
            sums.setdefault(name, []).append(loss)
        if rank:
            continue
        if trainer.step % 50 == 0:
            line = "  ".join(f"{name} {np.mean(values):.3f}" for name, values in sums.items())
            logger.info("%5.1f %%  step %d  images %d  %s", 100 * used, trainer.step, trainer.pictures, line)
            sums = {}
        now = time.monotonic()
        if now - saved > SAVE_EVERY_S:
            saved = now
            trainer.save()
        if now - looked > LOOK_EVERY_S:
            looked = now
            trainer.save()
            trainer.look("look")
    if rank == 0:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        trainer.save()
        trainer.export(Path(arguments.out))
        logger.info("trained %d steps, %d images -> %s", trainer.step, trainer.pictures, arguments.out)
        trainer.look("final")
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=70.0, help="time budget; the schedules follow it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", default="./tiny_clip", help="folder for checkpoints")
    parser.add_argument("--out", default="anomalib_fbclip/clip/tiny/clip.safetensors")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--device", default="cpu", help="cuda: one process trains there")
    parser.add_argument("--drawing", type=int, default=0, help="processes that draw images; 0: drawn where it trains")
    parser.add_argument("--images-factor", type=int, default=1, help="times the images of a step")
    parser.add_argument("--images", choices=("plain", "rough"), default="plain", help="rough: with variety.py")
    parser.add_argument("--start", help="a clip.safetensors to start from, with --skip; default: from scratch")
    parser.add_argument("--skip", type=float, default=0.0, help="share of the schedules that is skipped at the start")
    parser.add_argument("--share-of-start", type=float, default=0.5, help="of the start's weights in the result")
    parser.add_argument("--muon-lr", type=float, default=0.006)
    parser.add_argument("--adam-lr", type=float, default=1.2e-3)
    arguments = parser.parse_args()
    Path(arguments.work).mkdir(parents=True, exist_ok=True)
    (Path(arguments.work) / "meet").unlink(missing_ok=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if arguments.processes == 1 or arguments.device != "cpu":
        arguments.processes = 1
        work(0, arguments)
    else:
        torch.multiprocessing.spawn(work, (arguments,), arguments.processes)


if __name__ == "__main__":
    main()
