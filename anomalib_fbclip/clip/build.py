# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Name and weights to a CLIP: hub tag, local file, embedded or random weights.

open_clip is imported when a backbone is built and not before, so that importing this package stays cheap.
"""

import logging
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anomalib_fbclip.common import safe_load
from anomalib_fbclip.common.functional import is_dense

from .frozen import FrozenCLIP
from .openai import OPENAI_NUMBERS, UNUSED, load_strictly

logger = logging.getLogger(__name__)

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
"""Backbones whose weights lie inside this package: name -> folder with ``clip.safetensors``."""

VOCABULARY = 49408
"""Tokens of CLIP's own tokenizer, which all prompts go through."""

_TRANSFORMERS = (
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.", "visual."),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.embeddings.", ""),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    (".self_attn.", ".attn."),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
"""Parts of the names in transformers' ``CLIPModel``, and OpenAI's for them, replaced in this order."""


def load_clip(
    backbone: str = "ViT-L-14-336",
    pretrained: str | Path | None = "openai",
    image_size: int | Sequence[int] | None = None,
    quick_gelu: bool | None = None,
) -> FrozenCLIP:
    """Build the frozen CLIP.

    Args:
        backbone: open_clip model name, or ``"tiny"`` for the backbone inside this package.
        pretrained: open_clip tag (``"openai"``), a weights file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``,
            ``.safetensors``; see :func:`read_weights`; the network is then never touched), or ``None`` for random
            weights. Not used by an embedded backbone.
        image_size: Height and width of the input in pixels, one number for a square; ``None``: the size that the
            weights were trained with.
        quick_gelu: Force QuickGELU (``True``) or GELU (``False``). ``None``: what open_clip's registry says for a tag,
            and always QuickGELU for ``"openai"``. For a file QuickGELU only where it shows it: OpenAI's TorchScript
            archive or state dict with the numbers of that archive, or ``quickgelu`` in its name; else what the
            backbone's configuration says, with a warning.

    Returns:
        FrozenCLIP: Both towers, in evaluation mode, without gradients, in float32, with the mean and the standard
            deviation that the tag's images were normalised with (OpenAI's for a file).

    Raises:
        ValueError: If the name is unknown, the backbone does not suit or the file does not hold this backbone.
        FileNotFoundError: If ``pretrained`` looks like a file and does not exist.
        ConnectionError: If the tag's weights are neither cached nor to be downloaded.
    """
    if backbone in EMBEDDED:
        state_dict = read_weights(EMBEDDED[backbone] / "clip.safetensors")
        return FrozenCLIP.from_state_dict(state_dict, image_size=image_size, name=backbone)

    config = check_backbone(backbone)
    registered: Mapping[str, Any] = {}
    if pretrained is None:
        logger.warning("backbone %s has random weights (pretrained=None): for tests, not for results.", backbone)
        clip = _build(backbone, config.get("quick_gelu", False) if quick_gelu is None else quick_gelu)
    else:
        if is_file(pretrained):
            path = Path(pretrained).expanduser()
        else:
            registered = _registered(backbone, str(pretrained))
            path = _download(backbone, str(pretrained), registered)
        # Read first: a large tower is not built for a file that cannot be used.
        state_dict = read_weights(path)
        if quick_gelu is None:
            if registered:
                quick_gelu = tag_needs_quick_gelu(str(pretrained), registered, config)
            else:
                quick_gelu = _file_needs_quick_gelu(path, state_dict, config)
        clip = _build(backbone, quick_gelu)
        load_strictly(clip, state_dict, f"{str(path)!r}, as weights of {backbone!r},")
    statistics = {key: tuple(map(float, registered[key])) for key in ("mean", "std") if key in registered}
    return FrozenCLIP(clip.float(), image_size=image_size, name=f"{backbone}/{_tag(pretrained)}", **statistics)


def check_backbone(backbone: str) -> dict[str, Any]:
    """Refuse a backbone that the models cannot use, by its name and open_clip's configuration alone.

    Args:
        backbone: Embedded name or open_clip model name.

    Returns:
        dict[str, Any]: open_clip's configuration of the model; empty for an embedded backbone.

    Raises:
        ValueError: If the name is unknown, or its model has another tokenizer than CLIP's, an attentional pooling, or
            no plain vision transformer.
    """
    if backbone in EMBEDDED:
        return {}
    import open_clip

    if backbone not in open_clip.list_models():
        near = get_close_matches(backbone, [*EMBEDDED, *open_clip.list_models()], n=1)
        msg = f"backbone={backbone!r} is not known: "
        msg += f"did you mean {near[0]!r}? Or " if near else ""
        msg += "use 'ViT-L-14-336' (the paper's), 'tiny', or another ViT of open_clip.list_models()."
        raise ValueError(msg)
    config = open_clip.get_model_config(backbone)
    if (why := _unsuitable(config)) is not None:
        msg = f"backbone={backbone!r} cannot be used: {why}. Use 'ViT-L-14-336' (the paper's), 'tiny', or another of "
        msg += "docs/backbones.md."
        raise ValueError(msg)
    return config


def _unsuitable(config: Mapping[str, Any]) -> str | None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    tokenizer, words = text.get("hf_tokenizer_name") or text.get("hf_model_name"), text.get("vocab_size", VOCABULARY)
    reasons = {
        f"its texts need another tokenizer than CLIP's ({tokenizer or f'of {words} tokens'})": (
            tokenizer or words != VOCABULARY
        ),
        "it pools its tokens by attention (CoCa), so they share no space with the texts": (
            "multimodal_cfg" in config or vision.get("attentional_pool") or text.get("embed_cls")
        ),
        f"its image tower is timm's {vision.get('timm_model_name')}, not open_clip's plain vision transformer": (
            "timm_model_name" in vision
        ),
        "its image tower is convolutional, without patch tokens": isinstance(vision.get("layers"), list),
    }
    return "; ".join(reason for reason, applies in reasons.items() if applies) or None


def tag_needs_quick_gelu(tag: str, registered: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a tag's weights need QuickGELU: open_clip says so in its registry, configurations or file names.

    Args:
        tag: ``"openai"`` and ``"dfn2b"`` need it, which only some versions of open_clip know.
        registered: What open_clip's registry says of the tag.
        config: open_clip's configuration of the model.
    """
    said = config.get("quick_gelu", False) or registered.get("quick_gelu", False)
    return said or tag in {"openai", "dfn2b"} or "quickgelu" in registered.get("url", "")


def _file_needs_quick_gelu(path: Path, state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a file's weights need QuickGELU: of GELU's weights no name and no shape differs."""
    shown = "quickgelu" in path.name.lower() or state_dict.keys() >= OPENAI_NUMBERS or _is_archive(path)
    if shown or config.get("quick_gelu", False):
        return True
    logger.warning(
        "%s does not show which activation it was trained with: GELU is used, as the backbone's configuration says. "
        "Weights of OpenAI, and most of MetaCLIP and DFN, need quick_gelu=True (--model.quick_gelu true); "
        "quick_gelu=False silences this warning.",
        path,
    )
    return False


def is_file(pretrained: str | Path) -> bool:
    """Tell a weights file from a tag of open_clip, by its look: the file need not exist."""
    path = Path(pretrained).expanduser()
    suffixes = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}
    return path.suffix.lower() in suffixes or path.is_file() or len(path.parts) > 1


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict without running any code from the file.

    Args:
        path: ``.safetensors``, a ``torch.save`` file or OpenAI's TorchScript archive. It may be a checkpoint of
            open_clip's training, and have the names of open_clip's ``CustomTextCLIP`` or transformers' ``CLIPModel``.

    Returns:
        dict[str, torch.Tensor]: The weights under OpenAI's names, with OpenAI's three numbers where they are there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds something else than tensors, or NaN.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        msg = f"CLIP weights {str(path)!r} are no file: give an existing one, or a tag such as 'openai' to download."
        raise FileNotFoundError(msg)
    try:
        state_dict = _read(path)
        if isinstance(state_dict, Mapping):
            state_dict = _openai_names(state_dict)
    except Exception as error:
        msg = f"CLIP weights {str(path)!r} cannot be read, the file is damaged or of another kind: {error}"
        raise ValueError(msg) from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        msg = f"CLIP weights {str(path)!r} hold something else than named tensors: give a state dict of the backbone."
        raise ValueError(msg)
    for name, tensor in state_dict.items():
        if name in OPENAI_NUMBERS:
            continue
        if not is_dense(tensor):
            msg = f"CLIP weights {str(path)!r}: {name} is no dense tensor of floating-point numbers: fetch them again."
            raise ValueError(msg)
        # Both extremes show NaN and infinite values, without a copy of a large tensor.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            msg = f"CLIP weights {str(path)!r}: {name} holds NaN or infinite values: fetch them again."
            raise ValueError(msg)
    return dict(state_dict)


def _read(path: Path) -> Any:  # noqa: ANN401  # whatever the file holds
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if _is_archive(path):
        return torch.jit.load(path, map_location="cpu").state_dict()
    loaded = safe_load.load(path)
    return loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded


def _is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form in which OpenAI published its weights."""
    return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())


def _openai_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the names of open_clip's ``CustomTextCLIP`` and of transformers' ``CLIPModel`` to OpenAI's."""
    named = safe_load.without_prefix(safe_load.without_prefix(state_dict), "text.")
    named = {name: value for name, value in named.items() if name not in UNUSED - OPENAI_NUMBERS}
    if any(name.startswith("vision_model.") for name in named):
        named = _from_transformers(named)
    return _expand_vocabulary(named) if "token_embedding.rows" in named else named


def _from_transformers(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        for theirs, ours in _TRANSFORMERS:
            name = name.replace(theirs, ours)  # noqa: PLW2901  # one part after the other
        # Their projections are linear layers, OpenAI's are plain matrices.
        renamed[name] = tensor.T if name in {"visual.proj", "text_projection"} else tensor
    merged = {}
    for name, tensor in renamed.items():
        if ".attn.q_proj." in name:
            parts = [renamed[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            merged[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name and not name.endswith("position_ids"):
            merged[name] = tensor
    return merged


def _expand_vocabulary(state_dict: dict[str, torch.Tensor], vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Give each known token id its row and every other id the row of the unknown word."""
    rest = dict(state_dict)
    ids, rows = rest.pop("token_embedding.ids"), rest.pop("token_embedding.rows").float()
    table = rest.pop("token_embedding.unknown").float().expand(vocabulary, -1).clone()
    table[ids.long()] = rows
    return {**rest, "token_embedding.weight": table}


def _build(backbone: str, quick_gelu: bool) -> nn.Module:
    import open_clip

    with _without_warnings():  # open_clip 3 warns of random weights, which are loaded or warned of here
        return open_clip.create_model(backbone, precision="fp32", quick_gelu=quick_gelu)


@contextmanager
def _without_warnings() -> Generator[None, None, None]:
    root = logging.getLogger()

    def refuse(record: logging.LogRecord) -> bool:
        return record.levelno != logging.WARNING

    root.addFilter(refuse)
    try:
        yield
    finally:
        root.removeFilter(refuse)


def _registered(backbone: str, tag: str) -> Mapping[str, Any]:
    """What open_clip's registry says of a tag: where its weights are, and the statistics of its images."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(backbone)
    if tag not in tags:
        msg = f"pretrained={tag!r} is no tag of {backbone}: use one of {tags}, a weights file, or None."
        raise ValueError(msg)
    return open_clip.get_pretrained_cfg(backbone, tag)


def _download(backbone: str, tag: str, registered: Mapping[str, Any]) -> Path:
    import open_clip

    try:
        return Path(open_clip.download_pretrained(registered))
    except Exception as error:
        where = registered.get("url") or registered.get("hf_hub")
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
