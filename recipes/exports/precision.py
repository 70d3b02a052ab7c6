# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What half precision and 8-bit weights cost: image and pixel AUROC of the same export in OpenVINO.

    python -m recipes.exports.precision --number 12 --size 224

One ONNX file is written and converted as anomalib's ``export --compression_type`` converts it: FP32, FP16, and, where
``nncf`` is installed, INT8 weights alone and INT8 weights and activations, calibrated on good images of the same
families. Each is compiled to compute in float32 and in bfloat16, which OpenVINO takes by default where the processor
can. All see the same images of families that the embedded adapter never saw; scores and maps are compared with the
first row's.
"""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import openvino
import torch
from anomalib.data.utils import read_image, read_mask
from torchmetrics.functional import spearman_corrcoef
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
        data = ProceduralSurfaces(category="test", num_test=arguments.number, num_train=8, image_size=arguments.size)
        data.setup()
        good = [read_image(path, as_tensor=True) for path in data.train_data.samples.image_path]
        start = time.perf_counter()
        path = FBCLIP(backbone="tiny").eval().to_onnx(root, input_size=(arguments.size, arguments.size))
        sys.stdout.write(f"ONNX export: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.1f} MB\n\n")
        sys.stdout.write(
            "| weights | size | computes in | image AUROC | pixel AUROC | scores move by | rank of maps |\n",
        )
        sys.stdout.write("| --- | --- | --- | --- | --- | --- | --- |\n")
        first: tuple[torch.Tensor, torch.Tensor] | None = None
        for name in ("FP32", "FP16", *(("INT8", "INT8 and activations") if find_spec("nncf") else ())):
            file, size = convert(path, name, good)
            for precision in ("f32", "bf16"):
                image, pixel, scores, maps = _measure(file, precision, data.test_data.samples)
                first = first or (scores, maps)
                moved = (scores - first[0]).abs().max()
                # Image by image: torchmetrics' ranks of millions of values with ties are wrong.
                rank = torch.stack([spearman_corrcoef(*pair) for pair in zip(maps, first[1], strict=True)]).mean()
                values = f"{100 * image:.2f} | {100 * pixel:.2f} | {moved:.3f} | {rank:.4f}"
                sys.stdout.write(f"| {name} | {size} | {precision} | {values} |\n")
                sys.stdout.flush()


def _measure(file: Path, precision: str, samples) -> tuple[float, float, torch.Tensor, torch.Tensor]:  # noqa: ANN001  # anomalib's table
    """Image and pixel AUROC, scores ``[M]`` and maps ``[M, S * S]``."""
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    scores, maps, masks = [], [], []
    for sample in samples.itertuples():
        result = compiled(read_image(sample.image_path, as_tensor=True)[None].numpy())
        scores.append(float(result["pred_score"].item()))
        maps.append(torch.from_numpy(result["anomaly_map"]).reshape(1, *result["anomaly_map"].shape[-2:]))
        mask = read_mask(sample.mask_path, as_tensor=True)[None] if sample.mask_path else torch.zeros_like(maps[-1])
        masks.append((resize(mask.float(), list(maps[-1].shape[-2:])) > 0).long())
    found, flat = torch.tensor(scores), torch.stack(maps).flatten(1)
    image = binary_auroc(found, torch.tensor(samples.label_index.to_numpy()))
    pixel = binary_auroc(flat.flatten(), torch.stack(masks).flatten())
    return float(image), float(pixel), found, flat


if __name__ == "__main__":
    main()
