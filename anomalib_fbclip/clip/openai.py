# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""An open_clip model from weights in OpenAI's format, whose sizes are read from the tensors."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from .stem import StemmedPatches

OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI's state dicts hold beside the weights, and open_clip's do not."""

UNUSED = {*OPENAI_NUMBERS, "attn_mask", "logit_bias"}


def build_from_openai_state_dict(state_dict: Mapping[str, torch.Tensor], quick_gelu: bool = True) -> nn.Module:
    """Build an open_clip ``CLIP`` in float32 whose sizes are read from OpenAI-format weights.

    Heads are 64 wide in both towers, as in every CLIP of OpenAI; a narrower tower has one head.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    def depth(prefix: str) -> int:
        return len({name.split(".resblocks.")[1].split(".")[0] for name in state_dict if name.startswith(prefix)})

    try:
        width, _, _, patch = state_dict["visual.conv1.weight"].shape
        grid = math.isqrt(max(state_dict["visual.positional_embedding"].shape[0] - 1, 0))
        vocabulary, text_width = state_dict["token_embedding.weight"].shape
        context_length = state_dict["positional_embedding"].shape[0]
        projected, embed_dim = state_dict["text_projection"].shape
    except KeyError as error:
        msg = f"CLIP weights lack the tensor {error}: a state dict of a ViT in OpenAI's format is needed."
        raise ValueError(msg) from error
    except (ValueError, IndexError) as error:
        msg = "CLIP weights hold a tensor of another number of axes than a ViT in OpenAI's format: give its state dict."
        raise ValueError(msg) from error
    if not min(width, patch, grid, vocabulary, text_width, context_length, embed_dim):
        msg = "CLIP weights hold an empty tensor: fetch them again."
        raise ValueError(msg)
    if (projected, state_dict["visual.positional_embedding"].shape[-1]) != (text_width, width):
        # Before anything is built: one transposed tensor would ask for tens of gigabytes.
        msg = "CLIP weights hold tensors whose widths do not fit each other: fetch them again."
        raise ValueError(msg)
    vision = CLIPVisionCfg(
        layers=depth("visual.transformer.resblocks."),
        width=width,
        head_width=min(64, width),
        patch_size=patch,
        image_size=grid * patch,
    )
    text = CLIPTextCfg(
        context_length=context_length,
        vocab_size=vocabulary,
        width=text_width,
        heads=max(1, text_width // 64),
        layers=depth("transformer.resblocks."),
    )
    clip = CLIP(embed_dim, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu)
    if "visual.conv1.fine.weight" in state_dict:
        clip.visual.conv1 = StemmedPatches(width)
    load_strictly(clip, state_dict, "the given state dict")
    return clip.eval()


def load_strictly(clip: nn.Module, state_dict: Mapping[str, torch.Tensor], what: str) -> None:
    """Load weights under OpenAI's names into an open_clip model, in float32.

    Args:
        clip: ``CLIP`` or ``CustomTextCLIP`` of open_clip.
        state_dict: All weights; the logit scale may be missing.
        what: Begin of the sentence that reports weights of another backbone.

    Raises:
        ValueError: If a weight is missing, unexpected or of another shape.
    """
    weights = {name: tensor.float() for name, tensor in state_dict.items() if name not in UNUSED}
    weights.setdefault("logit_scale", torch.zeros(()))
    if not hasattr(clip, "token_embedding"):  # CustomTextCLIP has a module around its text tower
        ours = ("visual.", "logit_scale")
        weights = {name if name.startswith(ours) else f"text.{name}": tensor for name, tensor in weights.items()}
    try:
        clip.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        msg = f"{what} does not fit the backbone, give the name that the weights were made for: {reason}"
        raise ValueError(msg) from error
