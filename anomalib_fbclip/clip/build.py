# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Name and weights to a CLIP: hub tag, local file, embedded or random weights.

open_clip is imported when a backbone is built and not before, so that importing this package stays cheap.
"""

import logging
import math
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from anomalib_fbclip.common.functional import is_dense

if TYPE_CHECKING:
    from .frozen import FrozenCLIP

logger = logging.getLogger(__name__)

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
"""Backbones whose weights lie inside this package: name -> folder with ``clip.safetensors``."""

_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


def load_clip(
    backbone: str = "ViT-L-14-336",
    pretrained: str | Path | None = "openai",
    image_size: int | None = None,
    quick_gelu: bool | None = None,
) -> "FrozenCLIP":
    """Build the frozen CLIP.

    Args:
        backbone: open_clip model name, or ``"tiny"`` for the backbone inside this package.
        pretrained: open_clip tag (``"openai"``), a weights file (``.pt``, ``.pth``, ``.safetensors``; the network is
            then never touched), or ``None`` for random weights. Not used by an embedded backbone.
        image_size: Side of the square input in pixels; ``None``: the size that the weights were trained with.
        quick_gelu: Force QuickGELU (``True``) or GELU (``False``). ``None``: what open_clip's registry says for a tag;
            QuickGELU, as OpenAI's weights need it, for a file.

    Returns:
        FrozenCLIP: Both towers, in evaluation mode, without gradients, in float32.

    Raises:
        ValueError: If the name is unknown or the file does not hold this backbone.
        FileNotFoundError: If ``pretrained`` looks like a file and does not exist.
        ConnectionError: If the tag's weights are neither cached nor to be downloaded.
    """
    from .frozen import FrozenCLIP

    if backbone in EMBEDDED:
        state_dict = read_weights(EMBEDDED[backbone] / "clip.safetensors")
        return FrozenCLIP.from_state_dict(state_dict, image_size=image_size, name=backbone)

    import open_clip

    if backbone not in open_clip.list_models():
        near = get_close_matches(backbone, [*EMBEDDED, *open_clip.list_models()], n=1)
        msg = f"backbone={backbone!r} is not known: "
        msg += f"did you mean {near[0]!r}? Or " if near else ""
        msg += "use 'ViT-L-14-336' (the paper's), 'tiny', or another ViT of open_clip.list_models()."
        raise ValueError(msg)
    if pretrained is None:
        logger.warning("backbone %s has random weights (pretrained=None): for tests, not for results.", backbone)
        clip = open_clip.create_model(backbone, force_quick_gelu=bool(quick_gelu))
    elif is_file(pretrained):
        # Read first: a large tower is not built for a file that cannot be used.
        state_dict = read_weights(pretrained)
        clip = open_clip.create_model(backbone, force_quick_gelu=quick_gelu is not False)
        _load_strictly(clip, state_dict, f"{str(pretrained)!r}, as weights of {backbone!r},")
    else:
        clip = _download(backbone, str(pretrained), bool(quick_gelu))
    return FrozenCLIP(clip.float(), image_size=image_size, name=f"{backbone}/{_tag(pretrained)}")


def is_file(pretrained: str | Path) -> bool:
    """Tell a weights file from a tag of open_clip, by its look: the file need not exist."""
    path = Path(pretrained)
    return path.suffix in {".pt", ".pth", ".safetensors", ".bin"} or path.is_file() or len(path.parts) > 1


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict without running any code from the file.

    Args:
        path: ``.safetensors``, a ``torch.save`` file (read with ``weights_only=True``) or OpenAI's TorchScript archive.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds something else than tensors, or NaN.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"CLIP weights {str(path)!r} do not exist: give an existing file, or a tag such as 'openai' to download."
        raise FileNotFoundError(msg)
    try:
        state_dict = _read(path)
        if isinstance(state_dict, Mapping) and "token_embedding.rows" in state_dict:
            state_dict = _expand_vocabulary(state_dict)
    except Exception as error:
        msg = f"CLIP weights {str(path)!r} cannot be read, the file is damaged or of another kind: {error}"
        raise ValueError(msg) from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        msg = f"CLIP weights {str(path)!r} hold something else than named tensors: give a state dict of the backbone."
        raise ValueError(msg)
    weights = {name: tensor for name, tensor in state_dict.items() if name not in _NOT_WEIGHTS}
    for name, tensor in weights.items():
        if not is_dense(tensor):
            msg = f"CLIP weights {str(path)!r}: {name} is no dense tensor of floating-point numbers: fetch them again."
            raise ValueError(msg)
        if not torch.isfinite(tensor).all():
            msg = f"CLIP weights {str(path)!r}: {name} holds NaN or infinite values: fetch them again."
            raise ValueError(msg)
    return weights


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
    _load_strictly(clip, state_dict, "the given state dict")
    return clip.eval()


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        return torch.jit.load(path, map_location="cpu").state_dict()
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded)


def _expand_vocabulary(state_dict: dict[str, torch.Tensor], vocabulary: int = 49408) -> dict[str, torch.Tensor]:
    """Give each known token id its row and every other id the row of the unknown word."""
    rest = dict(state_dict)
    ids, rows = rest.pop("token_embedding.ids"), rest.pop("token_embedding.rows").float()
    table = rest.pop("token_embedding.unknown").float().expand(vocabulary, -1).clone()
    table[ids.long()] = rows
    return {**rest, "token_embedding.weight": table}


def _load_strictly(clip: nn.Module, state_dict: Mapping[str, torch.Tensor], what: str) -> None:
    weights = {name: tensor.float() for name, tensor in state_dict.items() if name not in _NOT_WEIGHTS}
    weights.setdefault("logit_scale", torch.zeros(()))
    try:
        clip.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        msg = f"{what} does not fit the backbone, give the name that the weights were made for: {reason}"
        raise ValueError(msg) from error


def _download(backbone: str, tag: str, quick_gelu: bool) -> nn.Module:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(backbone)
    if tag not in tags:
        msg = f"pretrained={tag!r} is no tag of {backbone}: use one of {tags}, a weights file, or None."
        raise ValueError(msg)
    try:
        return open_clip.create_model(backbone, pretrained=tag, precision="fp32", force_quick_gelu=quick_gelu)
    except Exception as error:
        source = open_clip.pretrained.get_pretrained_cfg(backbone, tag)
        where = source.get("url") or source.get("hf_hub")
        msg = (
            f"The weights of {backbone}/{tag} are not on this machine and could not be downloaded. On a machine with "
            f"a network fetch {where}, copy the file here and pass its path as "
            f"pretrained='/path/to/file' (CLI: --model.pretrained). To try without any weights: backbone='tiny'. "
            f"({type(error).__name__}: {error})"
        )
        raise ConnectionError(msg) from error


def _tag(pretrained: str | Path | None) -> str:
    if pretrained is None:
        return "random"
    return Path(pretrained).name if is_file(pretrained) else str(pretrained)
