# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Reader of the AnomalyCLIP weights that the authors publish (``epoch_15.pth``)."""

import re
from pathlib import Path
from typing import Any

import torch

from anomalib_fbclip.adapted.adapter_file import AdapterMetadata, register_reader
from anomalib_fbclip.common import safe_load

_NAMES = {"ctx_pos": "prompts.normal_context", "ctx_neg": "prompts.abnormal_context"}
_DEEP = "compound_prompts_text."
_UNUSED = re.compile(r"^(token_(prefix|suffix)|tokenized_prompts|compound_prompt_projections)")


@register_reader("AnomalyCLIP")
def read_published(loaded: Any, path: Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata] | None:  # noqa: ANN401
    """Tensors under our names, and the sizes that they imply; ``None`` for a file of another format.

    Args:
        loaded: Content of the file.
        path: Not used: the file holds everything.

    Raises:
        ValueError: If a tensor belongs to no part of AnomalyCLIP, or one is missing.
    """
    del path
    if not isinstance(loaded, dict) or "model_trainable_params" in loaded:
        return None
    content = loaded.get("prompt_learner")
    if not isinstance(content, dict):
        return None
    content = safe_load.without_prefix(content)
    if not _NAMES.keys() <= content.keys():
        return None
    unknown = [n for n in content if n not in _NAMES and not n.startswith(_DEEP) and not _UNUSED.match(n)]
    if unknown:
        msg = f"unknown tensors {sorted(unknown)}"
        raise ValueError(msg)
    tensors = {}
    for published, name in _NAMES.items():
        tensor = content[published]
        if tensor.ndim != 4 or tensor.shape[:2] != (1, 1):
            msg = f"{published} is {tuple(tensor.shape)}, expected (1, 1, context tokens, width)"
            raise ValueError(msg)
        tensors[name] = tensor[0]
    deep = [name for name in content if name.startswith(_DEEP)]
    expected = [f"{_DEEP}{index}" for index in range(len(deep))]
    if sorted(deep) != sorted(expected):
        msg = f"deep prompts {sorted(deep)} are not numbered from 0 without a gap"
        raise ValueError(msg)
    metadata: AdapterMetadata = {"n_ctx": tensors["prompts.normal_context"].shape[1], "prompt_depth": 1 + len(deep)}
    if deep:
        tensors["prompts.deep_prompts"] = torch.stack([content[name] for name in expected])
        metadata["deep_tokens"] = tensors["prompts.deep_prompts"].shape[1]
    return tensors, metadata
