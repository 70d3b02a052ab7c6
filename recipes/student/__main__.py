# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""How near a student comes to its teacher, and how fast it is.

    python -m recipes.student --products wood tiles leather --images 160 --pasted 3 --epochs 40 --seeds 0 1 2
    python -m recipes.student --families wood leather --seeds 0 1 2    # as many products as images
    python -m recipes.student --magnetic-tile magnetic_tile/ --kinds MT_Blowhole MT_Break --seeds 0 1 2
    python -m recipes.student --families wood --backbone-weights tf_efficientnet_lite0.safetensors
    python -m recipes.student --families leather --images 320 --pasted 3 --epochs 40 --accelerator gpu

The teacher is FB-CLIP on the embedded backbone with a memory of ``--k-shot`` good images of the train split. Labels
and masks serve the last two lines alone: nothing is trained or chosen by them. Times are of one thread.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from anomalib.engine import Engine

from anomalib_fbclip import FBCLIP, MagneticTile, ProceduralSurfaces, Student

from .product import write_product

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anomalib.data import AnomalibDataModule

TESTED = 60
"""Drawn images of a family to test, half of them bad."""
PRODUCT_TESTED = 240
"""Those of a product: among thirty bad ones a single large defect decided over three points of pixel AUROC."""
KEYS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
TEACHER = {"backbone": "tiny"}


def engine(folder: Path, accelerator: str = "cpu") -> Engine:
    """A quiet one."""
    return Engine(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def median_time(call: object, repeats: int = 20) -> float:
    """Median milliseconds of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()  # type: ignore[operator]
        times.append(time.perf_counter() - begin)
    return 1000 * sorted(times)[repeats // 2]


def speed(student: Student, k_shot: int, folder: Path) -> str:
    """Time of an image of the student's size: teacher, student, and its exported files, on one thread."""
    import openvino

    torch.set_num_threads(1)
    height, width = student.pre_processor.transform.transforms[0].size
    image = torch.rand(1, 3, height, width)
    patch = 8
    size = [side // patch * patch for side in (height, width)]
    teacher = FBCLIP(**TEACHER, k_shot=k_shot, image_size=size).eval()
    teacher.model.remember(torch.rand(k_shot, 3, *size))
    path = engine(folder).export(student.eval(), "onnx", export_root=folder, input_size=(height, width))
    settings = {"INFERENCE_NUM_THREADS": 1}
    exact, coarse = (
        openvino.Core().compile_model(path, "CPU", {**settings, "INFERENCE_PRECISION_HINT": precision})
        for precision in ("f32", "bf16")
    )
    with torch.no_grad():
        rows = {
            "teacher, eager": median_time(lambda: teacher(image), 5),
            "student, eager": median_time(lambda: student(image)),
            "student, OpenVINO float32": median_time(lambda: exact(image.numpy()), 100),
            "student, OpenVINO bfloat16": median_time(lambda: coarse(image.numpy()), 100),
        }
    words = ", ".join(f"{name} {value:.1f} ms" for name, value in rows.items())
    return f"{height} x {width} px, one thread: {words}; file {path.stat().st_size / 1e6:.1f} MB"


def score_teacher(datamodule: AnomalibDataModule, arguments: argparse.Namespace, folder: Path) -> str:
    """The teacher's numbers."""
    teacher = FBCLIP(**TEACHER, k_shot=arguments.k_shot, metrics="full", visualizer=False)
    (result,) = engine(folder, arguments.accelerator).test(teacher, datamodule=datamodule, verbose=False)
    return percent(result)


def percent(result: Mapping[str, float]) -> str:
    """Image AUROC / pixel AUROC / AUPRO."""
    return " / ".join(f"{100 * result[key]:.1f}" for key in KEYS)


def compare(
    datamodule: AnomalibDataModule,
    seed: int,
    theirs: str,
    arguments: argparse.Namespace,
    folder: Path,
) -> Student:
    """Train one student and print its row beside its teacher's numbers."""
    student = Student(
        teacher="FBCLIP",
        teacher_arguments={**TEACHER, "k_shot": arguments.k_shot},
        backbone_weights=arguments.backbone_weights,
        image_size=arguments.image_size,
        pasted=arguments.pasted,
        max_epochs=arguments.epochs,
        target_cache=str(arguments.cache),
        metrics="full",
        visualizer=False,
        seed=seed,
    )
    begin = time.perf_counter()
    engine(folder, arguments.accelerator).fit(student, datamodule=datamodule)
    took = time.perf_counter() - begin
    epochs = student.trainer.current_epoch
    (ours,) = engine(folder, arguments.accelerator).test(student, datamodule=datamodule, verbose=False)
    agreement = " / ".join(f"{value:.2f}" for value in student.agreement.values())
    name = f"{datamodule.name} {getattr(datamodule, 'category', '')}"
    row = (name, seed, theirs, percent(ours), agreement, f"{took:.0f} s, {epochs} epochs")
    sys.stdout.write("| " + " | ".join(map(str, row)) + " |\n")
    sys.stdout.flush()
    return student


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", nargs="*", default=[], help="families of which one surface is drawn each")
    parser.add_argument("--families", nargs="*", default=[], help="of ProceduralSurfaces")
    parser.add_argument("--images", type=int, default=64, help="training images of each product or family")
    parser.add_argument("--magnetic-tile", type=Path, help="folder of MT_Blowhole, ..., MT_Free")
    parser.add_argument("--kinds", nargs="*", default=["MT_Blowhole"], help="kinds of defect")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--k-shot", type=int, default=8, help="good images in the teacher's memory")
    parser.add_argument("--backbone-weights", help="file under timm's names; default: random weights")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--pasted", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--accelerator", default="cpu", help="of the engine; the times at the end are a CPU's")
    parser.add_argument("--cache", type=Path, default=Path("results/teacher"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.write("image AUROC / pixel AUROC / AUPRO of teacher and student; agreement on held-out images:\n")
    sys.stdout.write("rank correlation of scores, of pixels, AUROC of the teacher's highest against lowest quarter\n")
    sys.stdout.write(
        "| data | seed | teacher | student | agreement | training |\n|---|---|---|---|---|---|\n",
    )
    sets = [
        ProceduralSurfaces(
            category=family,
            num_train=arguments.images,
            num_test=TESTED,
            image_size=256,
            train_batch_size=8,
        )
        for family in arguments.families
    ]
    if arguments.magnetic_tile is not None:
        sets += [MagneticTile(arguments.magnetic_tile, category=kind, train_batch_size=8) for kind in arguments.kinds]
    with tempfile.TemporaryDirectory() as name:
        for family in arguments.products:
            sets.append(write_product(Path(name) / family, family, arguments.images, PRODUCT_TESTED))
        for datamodule in sets:
            theirs = score_teacher(datamodule, arguments, Path(name))
            for seed in arguments.seeds:
                student = compare(datamodule, seed, theirs, arguments, Path(name))
        sys.stdout.write(speed(student.cpu(), arguments.k_shot, Path(name)) + "\n")


if __name__ == "__main__":
    main()
