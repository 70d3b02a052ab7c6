# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Reader of the FB-CLIP weights that the authors publish (``.pth``)."""

import re
from pathlib import Path
from typing import Any

import torch

from anomalib_fbclip.adapted.adapter_file import AdapterMetadata, register_reader
from anomalib_fbclip.common import safe_load

_NAMES = (
    (r"^fb_Attention\.([fb]g)_(norm|to_q|to_k|to_v)\.(.+)$", r"attention.\1.\2.\3"),
    (r"^fb_Attention\.([fb]g)_to_out\.0\.(.+)$", r"attention.\1.to_out.\2"),
    (r"^fb_Attention\.([fb]g)_scale$", r"attention.\1.scale"),
    (r"^fb_Attention\.(gate|norm)\.(.+)$", r"attention.\1.\2"),
    (r"^token_selector\.(.+)$", r"text_fusion.token_selector.\1"),
    (r"^text_projection_mlp\.(.+)$", r"text_fusion.projection.\1"),
    (r"^scale_weights$", r"scale_weights"),
    (r"^prompt_learner\.ctx_pos$", r"prompts.normal_context"),
    (r"^prompt_learner\.ctx_neg$", r"prompts.abnormal_context"),
)
_UNUSED = re.compile(
    r"^(layer_selector|fusion_weights?|gate_network)\b"
    r"|^prompt_learner\.(token_(prefix|suffix)|tokenized_prompts|compound_prompts_text|compound_prompt_projections)",
)


@register_reader("FBCLIP")
def read_published(loaded: Any, path: Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata] | None:  # noqa: ANN401
    """Tensors under our names, and the file's own metadata; ``None`` for a file of another format.

    Args:
        loaded: Content of the file.
        path: Not used: the file holds everything.

    Raises:
        ValueError: If a tensor belongs to no part of FB-CLIP.
    """
    del path
    if not isinstance(loaded, dict) or not {"prompt_learner", "model_trainable_params"} <= loaded.keys():
        return None
    prompts, trained = (safe_load.without_prefix(loaded[key]) for key in ("prompt_learner", "model_trainable_params"))
    tensors = {}
    for published, tensor in {**{f"prompt_learner.{name}": prompts[name] for name in prompts}, **trained}.items():
        name = our_name(published)
        if name is not None:
            tensors[name] = tensor
    metadata = {key: loaded[key] for key in ("epoch", "loss", "source_domain") if key in loaded}
    if "loss" in metadata:
        metadata["loss"] = float(metadata["loss"])  # a NumPy scalar there
    return tensors, metadata


def our_name(published: str) -> str | None:
    """Translate a parameter name of the published format; ``None`` for one that its method never uses.

    Raises:
        ValueError: If the name belongs to neither.
    """
    for pattern, replacement in _NAMES:
        if re.match(pattern, published):
            name = re.sub(pattern, replacement, published)
            return name.replace(".fg.", ".foreground.").replace(".bg.", ".background.")
    if _UNUSED.match(published):
        return None
    msg = f"unknown tensor {published!r}"
    raise ValueError(msg)
