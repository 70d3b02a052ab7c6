# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Seconds an image of every form that a model runs in: eager, ONNX Runtime, OpenVINO with weights of several kinds.

    python -m recipes.exports.formats                       # the paper's model, a camera image of 1080 x 1920 pixels
    python -m recipes.exports.formats --backbone tiny --image 256 256 --threads 1

Backbones have random weights (``tiny`` its own): time and size do not depend on them, and nothing is said of accuracy,
which ``recipes.exports.precision`` measures. INT8 needs ``nncf``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import openvino
import torch

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.clip.build import EMBEDDED
from anomalib_fbclip.host.export import quantize


class Form(NamedTuple):
    """A way to run the model.

    Attributes:
        name: What runs it.
        computes: Precision of the arithmetic.
        call: Scores the image.
        size: Of the weights.
    """

    name: str
    computes: str
    call: Callable[[], object]
    size: str = ""


def take_turns(forms: Sequence[Form], repeats: int) -> None:
    """Print the median time of each form after one to warm up. They take turns: a slow minute is then all forms'."""
    times: dict[Form, list[float]] = {form: [] for form in forms}
    for _ in range(repeats + 1):
        for form, taken in times.items():
            begin = time.perf_counter()
            form.call()
            taken.append(time.perf_counter() - begin)
    medians = {form: statistics.median(taken[1:]) for form, taken in times.items()}
    first = medians[forms[0]]
    sys.stdout.write("| form | computes in | weights | seconds | of the first |\n| --- | --- | --- | --- | --- |\n")
    for form, median in medians.items():
        sys.stdout.write(
            f"| {form.name} | {form.computes} | {form.size} | {median:.3f} | {median / first:.2f} |\n",
        )


def eager(backbone: str, image: torch.Tensor, folder: Path) -> tuple[list[Form], Path]:
    """The model itself, and its ONNX file."""
    model = FBCLIP(backbone=backbone, pretrained="openai" if backbone in EMBEDDED else None).eval()
    begin = time.perf_counter()
    path = model.to_onnx(folder, input_size=tuple(image.shape[-2:]))
    sys.stdout.write(f"export to ONNX: {time.perf_counter() - begin:.1f} s\n")

    def in_bfloat16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(image)

    return [Form("eager", "float32", lambda: model(image)), Form("eager", "bfloat16", in_bfloat16)], path


def onnx_runtime(path: Path, image: torch.Tensor, threads: int) -> Form:
    """The file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image.numpy()}
    return Form("ONNX Runtime", "float32", lambda: session.run(None, feed))


def convert(path: Path, weights: str, images: Sequence[torch.Tensor] = ()) -> tuple[Path, str]:
    """An OpenVINO file beside an ONNX file, and the size of its weights.

    Args:
        path: ONNX file.
        weights: ``"FP32"``, ``"FP16"``, ``"INT8"`` or ``"INT8 and activations"``.
        images: Raw images ``[3, H, W]`` that the last one calibrates on.
    """
    model = openvino.convert_model(path)
    if weights == "INT8":
        import nncf

        model = nncf.compress_weights(model)
    elif weights == "INT8 and activations":
        model = quantize(model, images)
    file = path.with_name(f"{weights}.xml")
    openvino.save_model(model, file, compress_to_fp16=weights == "FP16")
    return file, f"{file.with_suffix('.bin').stat().st_size / 1e6:.1f} MB"


def open_vino(path: Path, image: torch.Tensor, threads: int, weights: str) -> Iterator[Form]:
    """OpenVINO with one kind of weights, in both precisions."""
    file, size = convert(path, weights, image)
    for precision in ("f32", "bf16"):
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(file, "CPU", settings)
        yield Form(f"OpenVINO {weights}", precision, lambda run=compiled: run(image.numpy()), size)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="ViT-L-14-336")
    parser.add_argument("--image", type=int, nargs=2, default=[1080, 1920], help="height and width of the raw image")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    image = torch.rand(1, 3, *arguments.image)
    with TemporaryDirectory() as folder, torch.no_grad():
        forms, path = eager(arguments.backbone, image, Path(folder))
        if find_spec("onnxruntime"):
            forms.append(onnx_runtime(path, image, arguments.threads))
        for weights in ("FP32", "INT8", "INT8 and activations") if find_spec("nncf") else ("FP32",):
            forms += open_vino(path, image, arguments.threads, weights)
        take_turns(forms, arguments.repeats)


if __name__ == "__main__":
    main()
