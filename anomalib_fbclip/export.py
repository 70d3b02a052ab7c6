# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Exports through anomalib's own ``export``, whose files say what they are and hold all that they need."""

import gc
import json
from pathlib import Path
from typing import Any

import anomalib
import torch

import anomalib_fbclip
from anomalib_fbclip.calibration import CalibratedModule

_OPSET = 18
_ONE_FILE = 1_500_000_000  # bytes of parameters; protobuf stops at 2 GiB


class ExportedModule(CalibratedModule):
    """Mixin of a Lightning module whose exports carry thresholds, sizes, backbone and versions.

    Where the metadata is: ``torch.load(path, weights_only=False)["model"].export_metadata``; ONNX's ``metadata_props``
    (``session.get_modelmeta().custom_metadata_map`` in ONNX Runtime); OpenVINO's ``rt_info``
    (``model.get_rt_info(["framework", "thresholds"])``). Values are JSON in the last two.
    """

    export_metadata: dict[str, Any] | None = None

    def describe(self, input_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """What an exported file says about itself, in types that JSON knows.

        Args:
            input_size: Height and width of the raw images that the file takes; ``None`` for any.
        """
        transform = getattr(self.pre_processor, "transform", None)
        return {
            "model": type(self).__name__,
            "backbone": self.model.clip.name,
            "backbone_fingerprint": self.model.clip.fingerprint(),
            "image_size": self.model.clip.image_size,
            "input_size": list(input_size) if input_size else None,
            "input": "RGB in [0, 1], [batch, 3, height, width]; resizing and normalisation are part of the model",
            "pre_processing": [str(step) for step in getattr(transform, "transforms", [transform])],
            "thresholds": self.thresholds,
            "normalised": bool(getattr(self.post_processor, "enable_normalization", False)),
            "output": "pred_score and anomaly_map in [0, 1]; normalised ones have their threshold at 0.5",
            "source": self.source,
            "versions": {
                "anomalib_fbclip": anomalib_fbclip.__version__,
                "anomalib": anomalib.__version__,
                "torch": str(torch.__version__),
            },
        }

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as anomalib does, with thresholds and metadata."""
        self.calibrate_once()
        self.export_metadata = self.describe()
        return super().to_torch(export_root, model_file_name)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401  # passed through to torch.onnx.export
    ) -> Path:
        """Export as anomalib does, with thresholds and metadata, in one file and without the exporter's detours.

        Args:
            export_root: Folder to write to.
            model_file_name: Name of the file.
            input_size: Height and width of the raw images. ``None``: the file takes images of any size.
            **kwargs: Passed through to ``torch.onnx.export``; ``dynamic_axes={}`` fixes the batch to one image.
        """
        self.calibrate_once()
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        # anomalib asks for operator set 14, to which the exporter converts after it has built set 18; and the
        # exporter's own graph optimiser costs minutes. The runtimes optimise the graph anyway when they load it.
        kwargs = {"opset_version": _OPSET, "optimize": False, "external_data": size > _ONE_FILE, **kwargs}
        path = super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        # torch's tracing leaves a subclass under our name, which the host's command line finds as a second FBCLIP.
        gc.collect()
        _annotate(path, self.describe(input_size))
        return path


def _annotate(path: Path, metadata: dict[str, Any]) -> None:
    """Write metadata into an ONNX file, and take out what the exporter notes about the machine that it ran on."""
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
