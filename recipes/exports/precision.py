# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What half precision and 8-bit weights cost: image and pixel AUROC of the same export in OpenVINO.

    python -m recipes.exports.precision --number 12 --size 224

One ONNX file is written and converted as anomalib's ``export --compression_type`` converts it: FP32, FP16, and INT8
where ``nncf`` is installed (weights only). Each is compiled to compute in float32 and in bfloat16, which OpenVINO takes
by default where the processor can. All see the same images of families that the embedded adapter never saw.
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import openvino
import torch
from anomalib.data.utils import read_image, read_mask
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import resize

from anomalib_fbclip import FBCLIP, ProceduralSurfaces
from recipes.exports.formats import convert


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=12, help="images a family, half of them defective")
    parser.add_argument("--size", type=int, default=224, help="side of the raw images in pixels")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        root = Path(folder)
        data = ProceduralSurfaces(category="test", num_test=arguments.number, num_train=1, image_size=arguments.size)
        data.setup()
        start = time.perf_counter()
        path = FBCLIP(backbone="tiny").eval().to_onnx(root, input_size=(arguments.size, arguments.size))
        sys.stdout.write(f"ONNX export: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.1f} MB\n\n")
        sys.stdout.write("| weights | size | computes in | image AUROC | pixel AUROC | ms an image |\n")
        sys.stdout.write("| --- | --- | --- | --- | --- | --- |\n")
        for name in ("FP32", "FP16", "INT8") if find_spec("nncf") else ("FP32", "FP16"):
            file, size = convert(path, name)
            for precision in ("f32", "bf16"):
                image, pixel, seconds = _auroc(file, precision, data.test_data.samples)
                values = f"{100 * image:.2f} | {100 * pixel:.2f} | {1e3 * seconds:.1f}"
                sys.stdout.write(f"| {name} | {size} | {precision} | {values} |\n")
                sys.stdout.flush()


def _auroc(file: Path, precision: str, samples) -> tuple[float, float, float]:  # noqa: ANN001  # anomalib's table
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    scores, maps, masks, seconds = [], [], [], []
    for sample in samples.itertuples():
        image = read_image(sample.image_path, as_tensor=True)[None].numpy()
        start = time.perf_counter()
        result = compiled(image)
        seconds.append(time.perf_counter() - start)
        scores.append(float(result["pred_score"].item()))
        maps.append(torch.from_numpy(result["anomaly_map"]).reshape(1, *result["anomaly_map"].shape[-2:]))
        mask = read_mask(sample.mask_path, as_tensor=True)[None] if sample.mask_path else torch.zeros_like(maps[-1])
        masks.append((resize(mask.float(), list(maps[-1].shape[-2:])) > 0).long())
    image = binary_auroc(torch.tensor(scores), torch.tensor(samples.label_index.to_numpy()))
    pixel = binary_auroc(torch.stack(maps).flatten(), torch.stack(masks).flatten())
    return float(image), float(pixel), median(seconds)


if __name__ == "__main__":
    main()
