# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A model card from what an adapter says about itself, and from measured results."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

Results = str | Path | Mapping[str, float]

_FACTS = {
    "backbone": "Backbone",
    "pretrained": "Backbone weights",
    "backbone_fingerprint": "Fingerprint of the backbone",
    "feature_layers": "Blocks read, from 1",
    "image_size": "Image size",
    "source": "Trained on",
    "epoch": "Epochs",
    "n_ctx": "Context tokens of a prompt",
    "prompt_depth": "Text blocks with learnable tokens",
    "local_blocks": "Visual blocks with a local path",
    "text_poolings": "Text poolings",
    "views": "Views",
    "k_shot": "Normal images whose features it holds",
    "sha256": "SHA-256 of content",
    "versions": "Written with",
}

_TEXT = """\
{front}
# {model} adapter, {title}

Trained part of {model}, a zero-shot visual anomaly detector, for
[anomalib](https://github.com/open-edge-platform/anomalib) with the plug-in `anomalib-fbclip`. The frozen CLIP backbone
is not in this file.

```bash
pip install anomalib-fbclip
anomalib predict --model {model} {arguments} --data <image or folder>
```

## What it is

{facts}

## Thresholds

{thresholds}

## Results

{results}
"""


def model_card(
    metadata: Mapping[str, Any],
    place: str,
    results: Results | None = None,
    license_name: str | None = None,
) -> str:
    """Write a model card in the hub's form: front matter, use, facts, thresholds, results.

    Args:
        metadata: Of the adapter, see :func:`anomalib_fbclip.adapted.adapter_file.read`.
        place: What ``weights`` takes to load it, such as ``hf://owner/name/file``.
        results: Metrics: a CSV file, or names and values. ``None``: the card says that there are none.
        license_name: Licence for the front matter.

    Returns:
        str: Markdown.

    Raises:
        ValueError: If the CSV file is empty or its rows differ in length.
        FileNotFoundError: If there is no such CSV file.
    """
    front = ModelCardData(
        license=license_name,
        library_name="anomalib",
        pipeline_tag="image-segmentation",
        tags=["anomaly-detection", "zero-shot", metadata["model"].lower(), "clip"],
    )
    facts = [(title, _plain(metadata[key])) for key, title in _FACTS.items() if metadata.get(key) is not None]
    backbone, _, weights = str(metadata.get("backbone") or "").partition("/")
    # A tag of open_clip goes into the command; a file of whoever trained the adapter is said among the facts alone.
    pretrained = metadata.get("pretrained") if weights and metadata.get("pretrained") == weights else None
    arguments = {
        "backbone": backbone or None,
        "pretrained": None if pretrained == "openai" else pretrained,
        "image_size": str(metadata.get("image_size")).replace(" ", "") if "image_size" in metadata else None,
        "resize": metadata["resize"] if metadata.get("resize", "squash") != "squash" else None,
        "weights": place,
    }
    return _TEXT.format(
        front=f"---\n{front.to_yaml().strip()}\n---",
        model=metadata["model"],
        title=f"{metadata.get('backbone')} at {metadata.get('image_size')}",
        arguments=" ".join(f"--model.{key} {value}" for key, value in arguments.items() if value is not None),
        facts=_table([("", ""), *facts]),
        thresholds=_thresholds(metadata.get("thresholds")),
        results=_results(results),
    )


def _thresholds(stored: Mapping[str, Any] | None) -> str:
    if stored is None or stored["origin"] == "fixed":
        value = 0.5 if stored is None else stored["image"]
        return f"The plain {value:g} for score and map: not calibrated on any data."
    values = f"Score {stored['image']:.4f}, map {stored['pixel']:.4f}"
    if "pictures" not in stored:
        return f"{values}: where F1 is largest on labelled validation data."
    low, high = stored["interval"]
    return (
        f"{values}: from {stored['pictures']} normal images at a wanted false-alarm rate of "
        f"{stored['false_alarm_rate']:.3g}. The rate to expect is {stored['expected_rate']:.3g}, with a 95 % interval "
        f"from {low:.3g} to {high:.3g}. On other surfaces or cameras: calibrate again."
    )


def _results(results: Results | None) -> str:
    if results is None:
        return "None were given when this card was written."
    if isinstance(results, Mapping):
        return _table([("Metric", "Value"), *((name, f"{value:.4g}") for name, value in results.items())])
    with Path(results).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2 or len({len(row) for row in rows}) > 1:
        msg = f"results={str(results)!r}: give a CSV file with a heading and rows of equal length."
        raise ValueError(msg)
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
