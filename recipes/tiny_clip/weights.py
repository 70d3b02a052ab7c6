# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Reading and writing ``clip.safetensors``: OpenAI's keys in half precision, the token table cut to known words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from anomalib_fbclip.clip.vision import resize_position_embedding
from anomalib_fbclip.common.files import replacing
from anomalib_fbclip.data.procedural.families import TRAIN_FAMILIES
from recipes.tiny_clip.towers import IMAGE_SIZE, PATCH, Vocabulary, build

if TYPE_CHECKING:
    from pathlib import Path

    from open_clip.model import CLIP

TABLE = "token_embedding.weight"
FORMAT = "openai-clip-cut-vocabulary"


def export(state: dict[str, torch.Tensor], vocabulary: Vocabulary, path: Path, **notes: str) -> None:
    """Write the weights; the file appears whole or not at all.

    Args:
        state: Keys and float32 tensors of the model.
        vocabulary: Gives the ids of the token table's rows.
        path: Where to.
        notes: More entries for the metadata.
    """
    state = {key: value.detach() for key, value in state.items() if key != "attn_mask"}
    table = state.pop(TABLE)
    out = {key: value.half().contiguous() for key, value in state.items()}
    out["token_embedding.ids"] = vocabulary.ids.clone()
    out["token_embedding.rows"] = table[:-1].half().contiguous()
    out["token_embedding.unknown"] = table[-1].half().contiguous()
    notes = {"format": FORMAT, "image_size": str(IMAGE_SIZE), "families": ",".join(TRAIN_FAMILIES), **notes}
    with replacing(path) as file:
        save_file(out, file, metadata=notes)


def load(path: str | Path, vocabulary: Vocabulary) -> CLIP:
    """Read the weights back into the recipe's towers, float32, eval mode; positions of another grid are resized.

    A file without the convolutional network, as an earlier recipe wrote it, is read with the network switched off.

    Raises:
        ValueError: If the file was written with another vocabulary.
    """
    state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    ids = state.pop("token_embedding.ids")
    if not torch.equal(ids, vocabulary.ids):
        msg = f"{path} holds {len(ids)} words, this recipe {len(vocabulary.ids)}: use the captions that wrote it."
        raise ValueError(msg)
    state[TABLE] = torch.cat([state.pop("token_embedding.rows"), state.pop("token_embedding.unknown")[None]])
    model = build(vocabulary)
    positions = state["visual.positional_embedding"]
    state["visual.positional_embedding"] = resize_position_embedding(positions, IMAGE_SIZE // PATCH)
    model.load_state_dict(state, strict=False)
    return model.eval()
