# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The sixteen data sets of the paper: which data module reads each, and its categories. Standard library only."""

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One data set of the paper.

    Args:
        name: Name in the paper's tables, and in ``published/results.csv``.
        class_path: Data module, by its bare name.
        categories: Module that lists its categories as ``CATEGORIES``; ``None``: the data set has none.
        domain: ``Industrial`` or ``Medical``.
        init_args: Arguments of the data module.
    """

    name: str
    class_path: str
    categories: str | None
    domain: str
    init_args: dict[str, Any] = field(default_factory=dict)

    @property
    def category_names(self) -> tuple[str, ...]:
        """Its categories; empty where it has none."""
        return tuple(import_module(self.categories).CATEGORIES) if self.categories else ()


_HOST = "anomalib.data.datasets.image"
_OURS = "anomalib_fbclip.data"


def _masked(name: str, category: str, abnormal_dir: str, mask_dir: str, **more: str | int) -> Benchmark:
    folders = {"root": f"./datasets/{name}", "abnormal_dir": abnormal_dir, "mask_dir": mask_dir, **more}
    return Benchmark(name, "LabelledFolder", None, "Medical", {**folders, "name": name, "category": category})


def _labelled(name: str, normal_dir: str, abnormal_dir: str) -> Benchmark:
    folders = {"root": f"./datasets/{name}", "normal_dir": normal_dir, "abnormal_dir": abnormal_dir}
    return Benchmark(name, "LabelledFolder", None, "Medical", {**folders, "name": name, "category": "brain"})


BENCHMARKS = (
    Benchmark("MVTec", "MVTecAD", f"{_HOST}.mvtecad", "Industrial", {"root": "./datasets/MVTecAD"}),
    Benchmark("VisA", "Visa", f"{_HOST}.visa", "Industrial", {"root": "./datasets/visa"}),
    Benchmark("MPDD", "MPDD", f"{_HOST}.mpdd", "Industrial", {"root": "./datasets/MPDD"}),
    Benchmark("BTAD", "BTech", f"{_HOST}.btech", "Industrial", {"root": "./datasets/BTech"}),
    Benchmark("DAGM", "DAGM", f"{_OURS}.dagm", "Industrial", {"root": "./datasets/DAGM"}),
    Benchmark("DTD", "DTDSynthetic", f"{_OURS}.dtd_synthetic", "Industrial", {"root": "./datasets/DTD-Synthetic"}),
    Benchmark(
        "Real-IAD",
        "RealIAD",
        f"{_HOST}.realiad",
        "Industrial",
        # Left alone, anomalib's module drops the good images of the test split.
        {"root": "./datasets/Real-IAD", "resolution": 1024, "test_split_mode": "from_dir"},
    ),
    Benchmark("HeadCT", "HeadCT", None, "Medical", {"root": "./datasets/HeadCT", "category": "brain"}),
    _labelled("BrainMRI", "no", "yes"),
    _labelled("Br35H", "no", "yes"),
    _masked(
        "ISIC",
        "skin",
        "ISBI2016_ISIC_Part1_Test_Data",
        "ISBI2016_ISIC_Part1_Test_GroundTruth",
        mask_suffix="_Segmentation",
    ),
    _masked("ClinicDB", "colon", "Original", "Ground Truth"),
    _masked("ColonDB", "colon", "images", "masks"),
    # Masks of these three are JPEG files: mask_threshold=127 leaves their noise out, the paper's reading takes it in.
    _masked("Kvasir", "colon", "images", "masks"),
    _masked("Endo", "colon", "images", "masks"),
    _masked("TN3K", "thyroid", "test-image", "test-mask"),
)

BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}
BY_CLASS = {benchmark.class_path: benchmark for benchmark in BENCHMARKS if benchmark.categories}
