# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Exports through anomalib's own ``export``, whose files say what they are and hold all that they need.

Where the metadata is: ``torch.load(path, weights_only=False)["model"].export_metadata``; ONNX's ``metadata_props``
(``session.get_modelmeta().custom_metadata_map`` in ONNX Runtime); OpenVINO's ``rt_info``
(``model.get_rt_info(["framework", "thresholds"])``). Values are JSON in the last two.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anomalib
import torch
from lightning.pytorch import LightningModule
from torch import nn

import anomalib_fbclip
from anomalib_fbclip.common.functional import as_json

_OPSET = 18
_ONE_FILE = 1_500_000_000  # bytes of parameters; protobuf stops at 2 GiB


_NOT_QUANTIZED = (
    "Add",
    "Multiply",
    "Subtract",
    "Divide",
    "Maximum",
    "Minimum",
    "ReduceMean",
    "ReduceSum",
    "Concat",
    "Pad",
    "Convolution",  # the first layer: in 8 bit, scores of drawn families moved by up to 0.86
)
_SMALLEST_LAYER = 64


def describe(module: LightningModule, input_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """What an exported file says about itself, in types that JSON knows.

    Args:
        module: A :class:`~anomalib_fbclip.host.module.ScoringModule`.
        input_size: Height and width of the raw images that the file takes; ``None`` for any.
    """
    transform = getattr(module.pre_processor, "transform", None)
    identity = module.identity()
    return {
        "model": type(module).__name__,
        "backbone": identity["backbone"],
        "backbone_fingerprint": identity["fingerprint"],
        "image_size": as_json(module.image_size),
        **{name: module.calibration_settings().get(name) for name in ("resize", "tiles")},
        "input_size": list(input_size) if input_size else None,
        "input": "RGB in [0, 1], [batch, 3, height, width]; resizing and normalisation are part of the model",
        "pre_processing": [str(step) for step in getattr(transform, "transforms", [transform])],
        "thresholds": module.thresholds,
        "region": None if module.regions is None else module.regions.digest(),
        "min_area": getattr(module.post_processor, "min_area", 0),
        "normalised": bool(getattr(module.post_processor, "enable_normalization", False)),
        "output": "pred_score and anomaly_map in [0, 1]; normalised ones have their threshold at 0.5",
        "source": module.source,
        "versions": {
            "anomalib_fbclip": anomalib_fbclip.__version__,
            "anomalib": anomalib.__version__,
            "torch": str(torch.__version__),
        },
    }


def onnx_options(model: nn.Module) -> dict[str, Any]:
    """Options of ``torch.onnx.export`` for one file, without the exporter's detours."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # anomalib asks for operator set 14, to which the exporter converts after it has built set 18; and the
    # exporter's own graph optimiser costs minutes. The runtimes optimise the graph anyway when they load it.
    return {"opset_version": _OPSET, "optimize": False, "external_data": size > _ONE_FILE}


def quantize(model: Any, images: Iterable[torch.Tensor]) -> Any:  # noqa: ANN401  # OpenVINO's
    """Weights and activations of an OpenVINO model in 8 bit, where that saves time: the layers of the towers.

    Other products stay as they are. A constant on the left, as in the matrices that resize images and maps, would get
    one scale for each of its rows, which are not the channels of the result: OpenVINO's processor plug-in stops there
    ("Check 'any_of(scale.size(), OC, 1U)' failed"), or scales columns where both are equally many. Products of two
    tensors, such as the method's bands and attention, decide by small differences.

    Args:
        model: An ``openvino.Model`` in float32.
        images: Normal images ``[3, H, W]`` in [0, 1], of the model's input size where that is fixed.

    Returns:
        openvino.Model: The quantised model.
    """
    import nncf

    products = [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]
    kept = [op.get_friendly_name() for op in products if not is_layer(op)]
    calibration = [image[None].numpy() for image in images]
    return nncf.quantize(
        model,
        nncf.Dataset(calibration),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=kept, types=list(_NOT_QUANTIZED), validate=False),
        # Smoothing moved the scores of the drawn families six times as far.
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1),
        ),
    )


def is_layer(product: Any) -> bool:  # noqa: ANN401  # OpenVINO's
    """Whether a product of an OpenVINO model is one of tokens with a large constant weight on its right."""
    shape = product.input_value(1).get_partial_shape()
    weight = product.input_value(1).get_node()
    while weight.get_type_name() in {"Convert", "Reshape", "Transpose", "Unsqueeze"}:
        weight = weight.input_value(0).get_node()
    constant = weight.get_type_name() == "Constant" and len(product.input_value(0).get_partial_shape()) == 3
    # The cosines with both texts are the result, and take no time.
    return constant and len(shape) == 2 and min(side.get_length() for side in shape) >= _SMALLEST_LAYER


def annotate(path: Path, metadata: dict[str, Any]) -> None:
    """Write metadata into an ONNX file, and remove what the exporter notes about the machine that it ran on."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            # A stack trace for each node: three quarters of the file, and the exporting user's folders.
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    onnx.save(model, path)
