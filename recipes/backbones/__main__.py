# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Which of open_clip's models work as a backbone, as a page of Markdown.

    python -m recipes.backbones > docs/backbones.md

Each model that is not refused by its name is built from its own configuration with fewer and narrower blocks and
random weights, and FB-CLIP and FiSeCLIP score one image with it. Nothing is downloaded.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from open_clip.version import __version__

from anomalib_fbclip.clip.build import check_backbone, load_clip, tag_needs_quick_gelu
from anomalib_fbclip.clip.frozen import CLIP_MEAN
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel
from anomalib_fbclip.fiseclip.torch_model import FiSeCLIPModel

BLOCKS = 2
HEAD = """\
# Backbones

Written by `python -m recipes.backbones > docs/backbones.md` with open_clip {version} (older versions list fewer). Each
of its {count} models was either refused by its name, or built at a small size ({blocks} blocks, random weights) and run
once in FB-CLIP and in FiSeCLIP. The embedded `tiny` works beside them.

The tags are what `pretrained` takes beside a file. `q`: trained with QuickGELU. `m`: trained on images that were
normalised with another mean and deviation than OpenAI's. Both are set automatically for a tag. Most files show neither:
give `quick_gelu` where the log asks for it, and a `pre_processor` where mean and deviation are not OpenAI's: drawn
defects and adapters take them from its `Normalize`. A file may have open_clip's names, also those of its training
checkpoints and of `CustomTextCLIP`, or those of transformers' `CLIPModel`; paths may begin with `~`.

## Work

| backbone | patch | pixels | blocks | tags |
| --- | --- | --- | --- | --- |
"""
REFUSED = """
## Are refused

| why | backbones |
| --- | --- |
"""


def main() -> int:
    """Write the page to standard output.

    Returns:
        int: Exit code; 1 where a model that is not refused does not run.
    """
    names = open_clip.list_models()
    sys.stdout.write(HEAD.format(version=__version__, count=len(names), blocks=BLOCKS))
    refused, failed = defaultdict(list), False
    for name in names:
        try:
            config = check_backbone(name)
        except ValueError as error:
            reason = str(error).partition("cannot be used: ")[2].partition(". Use ")[0]
            # One row a kind: without the names of towers and tokenizers.
            kind = re.sub(r"(CLIP's) \([^)]*\)|(timm's) [^,]*", r"\1\2", reason)
            refused[kind].append(name)
            continue
        vision = config["vision_cfg"]
        try:
            run_small(name, config)
            tags = ", ".join(_tag(name, tag, config) for tag in open_clip.list_pretrained_tags_by_model(name))
        except Exception as error:  # noqa: BLE001  # a page with the failure in it says more than a traceback
            failed, tags = True, f"does not run: {type(error).__name__}: {error}"
        row = (f"`{name}`", vision["patch_size"], vision["image_size"], vision["layers"], tags or "none")
        sys.stdout.write(f"| {' | '.join(map(str, row))} |\n")
    sys.stdout.write(REFUSED)
    for reason, backbones in refused.items():
        sys.stdout.write(f"| {reason} | {', '.join(f'`{backbone}`' for backbone in backbones)} |\n")
    return int(failed)


def run_small(name: str, config: dict[str, Any]) -> None:
    """Build a model at a small size and score one image with it.

    Args:
        name: open_clip model name.
        config: Its configuration.

    Raises:
        ValueError: If a score is not a finite number.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    head = vision.get("head_width", 64)
    small = {
        **config,
        "embed_dim": 32,
        "vision_cfg": {**vision, "layers": BLOCKS, "width": head},
        "text_cfg": {**text, "layers": 1, "width": 64, "heads": 1},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder, f"small-{name}.json")
        path.write_text(json.dumps(small), encoding="utf-8")
        open_clip.add_model_config(path)
    clip = load_clip(path.stem, pretrained=None)
    image = torch.rand(1, 3, clip.image_size, clip.image_size)
    for model in (FBCLIPModel(clip), FiSeCLIPModel(clip)):
        with torch.no_grad():
            scored = model.eval()(image)
        if not (torch.isfinite(scored.pred_score).all() and torch.isfinite(scored.anomaly_map).all()):
            msg = f"{type(model).__name__} gives NaN"
            raise ValueError(msg)


def _tag(name: str, tag: str, config: dict[str, Any]) -> str:
    registered = open_clip.get_pretrained_cfg(name, tag)
    own = tuple(registered["mean"]) != CLIP_MEAN
    marks = "".join(
        mark for mark, applies in (("q", tag_needs_quick_gelu(tag, registered, config)), ("m", own)) if applies
    )
    return f"`{tag}`" + (f" ({marks})" if marks else "")


if __name__ == "__main__":
    sys.exit(main())
