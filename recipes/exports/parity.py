# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""How far the exported tiny model with its adapter is from the model itself, on raw photographs of any size.

    python -m recipes.exports.parity <folder> --number 24

One ONNX file for images of any size is written, as anomalib's ``export`` without ``--input_size`` does it, and run by
ONNX Runtime and OpenVINO on one thread. OpenVINO computes in bfloat16 by default where the processor can, so it runs in
float32 and in bfloat16, each stated when the graph is compiled. The largest differences of scores and maps are printed,
and the exit code is 1 where one is above the tolerance of its precision.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from anomalib.data.utils import get_image_filenames, read_image

from anomalib_fbclip import FBCLIP

TOLERANCES = {"ONNX Runtime": 1e-4, "OpenVINO f32": 1e-4, "OpenVINO bf16": 0.2}
OUTPUTS = ("pred_score", "anomaly_map")


def main() -> int:
    """Print a Markdown table.

    Returns:
        int: Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, in subfolders too")
    parser.add_argument("--number", type=int, default=24, help="photographs to take, evenly spread over the folder")
    parser.add_argument("--suffix", default=".jpg", help="suffix of a photograph; masks may lie beside them")
    arguments = parser.parse_args()
    found = [path for path in get_image_filenames(arguments.folder) if path.suffix == arguments.suffix]
    photos = [found[index] for index in np.linspace(0, len(found) - 1, min(arguments.number, len(found)), dtype=int)]
    model = FBCLIP(backbone="tiny").eval()
    with TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        path = model.to_onnx(Path(folder))
        sys.stdout.write(
            f"export: {time.perf_counter() - start:.0f} s ({time.process_time() - cpu:.0f} s of the processor), "
            f"{path.stat().st_size / 1e6:.1f} MB, {len(onnx.load(path).graph.node)} nodes\n\n",
        )
        runtimes = {
            "ONNX Runtime": _onnx_runtime(path),
            "OpenVINO f32": _openvino(path, "f32"),
            "OpenVINO bf16": _openvino(path, "bf16"),
        }
    worst = {name: dict.fromkeys(OUTPUTS, 0.0) for name in runtimes}
    sizes = set()
    for photo in photos:
        image = read_image(photo, as_tensor=True)[None]
        sizes.add(tuple(image.shape[-2:]))
        with torch.no_grad():
            wanted = model(image)
        for name, run in runtimes.items():
            got = run(image.numpy())
            for output in OUTPUTS:
                difference = np.abs(got[output].reshape(-1) - getattr(wanted, output).flatten().numpy()).max()
                worst[name][output] = max(worst[name][output], float(difference))
    sys.stdout.write(f"{len(photos)} photographs of {len(sizes)} sizes, largest difference\n\n")
    sys.stdout.write("| | score | map |\n| --- | --- | --- |\n")
    for name, values in worst.items():
        sys.stdout.write(f"| {name} | {values['pred_score']:.1e} | {values['anomaly_map']:.1e} |\n")
    return int(not photos or any(max(values.values()) > TOLERANCES[name] for name, values in worst.items()))


def _onnx_runtime(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: dict(zip(OUTPUTS, session.run(list(OUTPUTS), {name: images}), strict=True))


def _openvino(path: Path, precision: str) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(path, "CPU", hints)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        result = compiled(images)
        return {name: result[name] for name in OUTPUTS}

    return run


if __name__ == "__main__":
    sys.exit(main())
