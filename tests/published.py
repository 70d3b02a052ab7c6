# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Writers of trained tensors in the forms in which the authors of the methods publish theirs."""

import re
import sys
from types import ModuleType

import torch
from torch import nn

_FBCLIP = (
    (r"^attention\.(f|b)\w+ground\.to_out\.(.+)$", r"fb_Attention.\1g_to_out.0.\2"),
    (r"^attention\.(f|b)\w+ground\.scale$", r"fb_Attention.\1g_scale"),
    (r"^attention\.(f|b)\w+ground\.(norm|to_.)\.(.+)$", r"fb_Attention.\1g_\2.\3"),
    (r"^attention\.(gate|norm)\.", r"fb_Attention.\1."),
    (r"^text_fusion\.token_selector\.", "token_selector."),
    (r"^text_fusion\.projection\.", "text_projection_mlp."),
)


def write_fbclip(model, path):
    """One file, which says its source itself."""
    tensors = model.trained_state_dict()
    prompts = {
        "ctx_pos": tensors.pop("prompts.normal_context")[None],
        "ctx_neg": tensors.pop("prompts.abnormal_context")[None],
    }
    trained = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _FBCLIP:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        trained[name] = tensor
    content = {"prompt_learner": prompts, "model_trainable_params": trained, "epoch": 2, "source_domain": "mvtec"}
    torch.save(content, path)
    return path


def write_anomalyclip(model, path, **changes):
    """One file; ``changes`` replace or add tensors of it."""
    prompts = model.prompts
    content = {
        "ctx_pos": prompts.normal_context.detach()[None],
        "ctx_neg": prompts.abnormal_context.detach()[None],
        "token_prefix_pos": torch.zeros(1, 1, 1, 4),
        "tokenized_prompts_pos": torch.zeros(1, 1, 77, dtype=torch.int),
        "compound_prompt_projections.0.weight": torch.zeros(8, 4),
        **{
            f"compound_prompts_text.{i}": tensor.detach()
            for i, tensor in enumerate(prompts.deep_prompts if prompts.depth > 1 else ())
        },
        **changes,
    }
    torch.save({"prompt_learner": content}, path)
    return path


def pickle_as(path, names, build):
    """``torch.save`` what ``build(classes)`` makes of classes that no longer exist when the file is read."""
    module = ModuleType("clip.adaptor")
    classes = [type(name, (nn.Module,), {"__module__": "clip.adaptor"}) for name in names]
    for each in classes:
        setattr(module, each.__name__, each)
    known = {name: sys.modules.get(name) for name in ("clip", "clip.adaptor")}
    sys.modules |= {"clip": ModuleType("clip"), "clip.adaptor": module}
    try:
        torch.save(build(*classes), path)
    finally:
        for name, before in known.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    return path


def write_afclip(model, folder, name):
    """``<name>_prompt.pt`` and ``<name>_adaptor.pt``; the path of the first."""

    def build(adaptor_class, block_class, attention_class):
        own = model.adaptor
        attention = attention_class()
        attention.to_q, attention.to_k, attention.to_v = own.to_q, own.to_k, own.to_v
        attention.to_out = nn.Sequential(own.to_out, nn.Dropout(0.0))
        block = block_class()
        block.attn, block.norm = attention, own.norm
        adaptor = adaptor_class()
        adaptor.attention = block
        return adaptor

    folder.mkdir(exist_ok=True)
    pickle_as(folder / f"{name}_adaptor.pt", ("Adaptor", "BasicTransformerBlock", "CrossAttention"), build)
    torch.save(nn.Parameter(model.prompts.context.detach()), folder / f"{name}_prompt.pt")
    return folder / f"{name}_prompt.pt"
