# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Reader of the AF-CLIP weights that the authors publish: ``*_prompt.pt`` and, beside it, ``*_adaptor.pt``."""

from pathlib import Path
from typing import Any

import torch

from anomalib_fbclip.adapted.adapter_file import AdapterMetadata, register_reader
from anomalib_fbclip.adapted.pickled_module import read_module_tensors

_NAMES = {
    "attention.norm.weight": "adaptor.norm.weight",
    "attention.norm.bias": "adaptor.norm.bias",
    "attention.attn.to_q.weight": "adaptor.to_q.weight",
    "attention.attn.to_k.weight": "adaptor.to_k.weight",
    "attention.attn.to_v.weight": "adaptor.to_v.weight",
    "attention.attn.to_out.0.weight": "adaptor.to_out.weight",
    "attention.attn.to_out.0.bias": "adaptor.to_out.bias",
}


@register_reader("AFCLIP", main_file="prompt.pt", beside="adaptor.pt")
def read_published(loaded: Any, path: Path) -> tuple[dict[str, torch.Tensor], AdapterMetadata] | None:  # noqa: ANN401
    """Tensors under our names, and the sizes that they imply; ``None`` for a file of another format.

    Args:
        loaded: Content of the prompt file: a bare parameter ``[1, n_ctx, W]``.
        path: The prompt file; the adaptor lies beside it, under the same name with ``adaptor`` for ``prompt``.

    Raises:
        FileNotFoundError: If there is no adaptor file.
        ValueError: If a file holds something else, or code.
    """
    if not isinstance(loaded, torch.Tensor):
        return None
    if loaded.ndim != 3 or loaded.shape[0] != 1:
        msg = f"the prompt is {tuple(loaded.shape)}, expected (1, learnable vectors, width)"
        raise ValueError(msg)
    before, found, after = path.name.rpartition("prompt")
    adaptor = path.with_name(f"{before}adaptor{after}")
    if not found or not adaptor.is_file():
        msg = f"it is the prompt of AF-CLIP, whose adaptor is missing beside it: expected {adaptor.name!r}"
        raise FileNotFoundError(msg)
    content = read_module_tensors(adaptor, packages=("clip.adaptor",))
    if content.keys() != _NAMES.keys():
        missing, unknown = sorted(_NAMES.keys() - content.keys()), sorted(content.keys() - _NAMES.keys())
        msg = f"{adaptor.name!r}: missing tensors {missing}, unknown {unknown}"
        raise ValueError(msg)
    tensors = {_NAMES[name]: tensor for name, tensor in content.items()}
    return {"prompts.context": loaded.detach(), **tensors}, {"n_ctx": loaded.shape[1]}
