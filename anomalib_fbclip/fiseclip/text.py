# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Normal and abnormal text features of a class, from the compositional prompt ensemble that anomalib ships."""

import torch
from torch.nn import functional as F  # noqa: N812  # the name that the field uses

from anomalib_fbclip.clip import FrozenCLIP

PROMPT_BATCH = 64


@torch.no_grad()
def class_text_features(clip: FrozenCLIP, class_name: str) -> torch.Tensor:
    """Mean end-of-text feature of every prompt of a state, as WinCLIP makes it.

    Args:
        clip: Backbone; its own causal mask is used.
        class_name: Noun in the prompts; underscores are read as spaces.

    Returns:
        torch.Tensor: ``[2, d]`` of unit length, normal first.
    """
    # Here and not above: this imports all models of anomalib, which in turn import ours.
    from anomalib.models.image.winclip.prompting import create_prompt_ensemble

    states = create_prompt_ensemble(class_name.replace("_", " "))
    return torch.stack([F.normalize(_encode(clip, prompts).mean(dim=0), dim=-1) for prompts in states])


def _encode(clip: FrozenCLIP, prompts: list[str]) -> torch.Tensor:
    from open_clip import tokenizer

    token_ids = tokenizer.tokenize(prompts, context_length=clip.context_length).to(clip.visual.proj.device)
    end_of_text = token_ids.argmax(dim=-1)
    # Causal tokens do not see what comes after them, so the padding behind the longest prompt can be left out.
    token_ids = token_ids[:, : int(end_of_text.max()) + 1]
    features = []
    for ids, end in zip(token_ids.split(PROMPT_BATCH), end_of_text.split(PROMPT_BATCH), strict=True):
        tokens = clip.encode_text(clip.embed_text(ids), causal=True)
        features.append(clip.project_text(tokens[torch.arange(len(ids), device=ids.device), end]))
    return F.normalize(torch.cat(features), dim=-1)
