# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""One process that times, or weighs, all forms at one size, batch and precision; ``python -m recipes.speed`` starts it.

Each form runs once to warm up, and to be compiled; then the process says so and waits for a line of its standard input.
Time: the forms take turns, so that a disturbance of the machine meets all of them; the median counts. Memory on a CPU:
the process' peak resident memory above what it held before the run, reset before each form (Linux only), with an
allocator that gives every large block back at once. Memory on a GPU: torch's own peak, in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from anomalib_fbclip.afclip.torch_model import AFCLIPModel
from anomalib_fbclip.anomalyclip.torch_model import AnomalyCLIPModel
from anomalib_fbclip.clip.build import EMBEDDED, load_clip
from anomalib_fbclip.clip.vision import resize_position_embedding
from anomalib_fbclip.fbclip.loss import FBCLIPLoss
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel

FORMS = (
    "bare tower",
    "open_clip's tower",
    "literal form",
    "FB-CLIP",
    "FB-CLIP, compiled",
    "FB-CLIP, compiled in place",
    "FiSeCLIP",
    "AnomalyCLIP",
    "AnomalyCLIP, literal form",
    "AF-CLIP",
    "AF-CLIP, literal form",
    "training step",
    "cached training step",
)
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARM = "WARM"
_MARK = "RESULTS "


def read_results(output: str) -> dict[str, dict[str, float]]:
    """What the process printed: seconds and bytes, ``{"time" or "memory": {form: value}}``."""
    return json.loads(next(line for line in output.splitlines() if line.startswith(_MARK))[len(_MARK) :])


Form = Callable[[torch.Tensor], object]
_clip = functools.cache(load_clip)


def build_forms(backbone: str, size: int, images: torch.Tensor, names: list[str]) -> dict[str, Form]:
    """What is measured: each a call with images."""
    torch.manual_seed(0)
    pretrained = "openai" if backbone in EMBEDDED else None
    clip = _clip(backbone, pretrained, size).to(images.device)
    model = FBCLIPModel(clip).to(images.device).eval()
    # A model of its own: each of its steps makes what is kept of the text tower out of date.
    trained = FBCLIPModel(clip).to(images.device)
    optimiser = torch.optim.Adam([parameter for parameter in trained.parameters() if parameter.requires_grad], lr=5e-5)
    loss_of = FBCLIPLoss()
    tokens: list[torch.Tensor] = []

    def open_clip_tower(images: torch.Tensor) -> torch.Tensor:
        visual = clip.visual
        kept = visual.positional_embedding
        visual.positional_embedding = torch.nn.Parameter(
            resize_position_embedding(kept, size // clip.patch_size),
            requires_grad=False,
        )
        try:
            return visual(images)
        finally:
            visual.positional_embedding = kept

    def step(images: torch.Tensor, cached: bool) -> None:
        labels = torch.arange(len(images), device=images.device) % 2
        masks = torch.zeros(len(images), size, size, device=images.device)
        known = [block[: len(images)] for block in tokens] if cached else None
        with torch.enable_grad():
            scores = trained.score(images, tokens=known)
            anomaly_map = trained.upsample(scores.grid_map, size, sigma=0)
            loss_of(scores.pred_score, anomaly_map, labels=labels, masks=masks, **scores.loss_terms)["total"].backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def fise(images: torch.Tensor) -> object:
        from anomalib_fbclip.fiseclip.torch_model import FiSeCLIPModel

        if not hasattr(model, "fise"):
            model.fise = [FiSeCLIPModel(clip).to(images.device).eval()]
        return model.fise[0](images)

    in_place = FBCLIPModel(clip).to(images.device).eval()
    in_place.compile(fullgraph=True)
    literal = FBCLIPModel(clip, literal=True).to(images.device).eval()
    others = {
        f"{name}{', literal form' if literal else ''}": model_class(clip, literal=literal).to(images.device).eval()
        for name, model_class in (("AnomalyCLIP", AnomalyCLIPModel), ("AF-CLIP", AFCLIPModel))
        for literal in (False, True)
    }
    forms = {
        "bare tower": lambda images: clip.encode_image(images, [clip.num_layers]),
        "open_clip's tower": open_clip_tower,
        "literal form": literal,
        "FB-CLIP": model,
        "FB-CLIP, compiled": torch.compile(model, fullgraph=True),
        "FB-CLIP, compiled in place": in_place,
        "FiSeCLIP": fise,
        **others,
        "training step": lambda images: step(images, cached=False),
        "cached training step": lambda images: step(images, cached=True),
    }
    if "cached training step" in names:
        tokens += clip.encode_image(images, model.feature_layers)
    return {name: forms[name] for name in forms if name in names}


def measure_times(forms: dict[str, Form], images: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of a run, the forms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            _wait(images)
            start = time.perf_counter()
            form(images)
            _wait(images)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(forms: dict[str, Form], images: torch.Tensor) -> dict[str, float]:
    """Peak bytes of a run above what was held before it."""
    result = {}
    for name, form in forms.items():
        if images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            form(images)
            result[name] = torch.cuda.max_memory_allocated() - before
            continue
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        form(images)
        result[name] = _status("VmHWM") - before
    return result


def _wait(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--forms", nargs="+", required=True)
    parser.add_argument("--what", nargs="+", choices=("time", "memory"), required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dtype = getattr(torch, options.precision)
    autocast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(options.device, dtype)
    results = {}
    with torch.no_grad(), autocast:
        images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
        forms = build_forms(options.backbone, options.size, images, options.forms)
        for form in forms.values():  # on a CPU one image is enough, where it takes seconds
            form(images if images.is_cuda else images[:1])
        if images.is_cuda:
            torch.cuda.empty_cache()  # for the processes beside this one
        sys.stdout.write(f"{WARM}\n")
        sys.stdout.flush()
        sys.stdin.readline()
        if "time" in options.what:
            results["time"] = measure_times(forms, images, options.repeats)
        if "memory" in options.what:
            results["memory"] = measure_memory(forms, images)
    sys.stdout.write(_MARK + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
