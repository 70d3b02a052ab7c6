# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Golden tensors of the published method, and small backbones with random weights."""

import gc
import json
import os
import sys
from pathlib import Path

if sys.dont_write_bytecode:
    # Images of containers often set PYTHONDONTWRITEBYTECODE: each process, also one that a test starts, would compile
    # torch and anomalib anew, which takes ten seconds. Compiled once, they lie in pytest's own cache.
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "bytecode")
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import pytest
import torch
from safetensors.torch import load_file

from anomalib_fbclip.clip import FrozenCLIP
from anomalib_fbclip.fbclip.torch_model import FBCLIPModel

# Small tensors gain nothing from threads and lose much on a busy machine; the variable reaches processes of the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_configure(config):
    # The files as they are listed: by itself xdist begins with those of most tests, and ends with the longest, alone.
    config.option.loadscopereorder = False


def pytest_collection_finish():
    # What was imported stays: hundreds of thousands of objects that no later collection has to look at.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


GOLDEN = Path(__file__).parent / "golden" / "fbclip_reference_a.safetensors"
VOCABULARY = 49408


def clip_of(golden):
    """The backbone that lies in a golden file."""
    state = {name[5:]: tensor for name, tensor in golden.items() if name.startswith("clip.")}
    table = torch.zeros(VOCABULARY, golden["clip_token_embedding.rows"].shape[1])
    table[golden["clip_token_embedding.ids"]] = golden["clip_token_embedding.rows"]
    return FrozenCLIP.from_state_dict({**state, "token_embedding.weight": table}, image_size=84)


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="session")
def golden_clip(golden):
    return clip_of(golden)


@pytest.fixture(scope="session")
def golden_of():
    """Path without suffix, tensors, backbone and settings of another method's golden file."""

    def read(method):
        path = GOLDEN.with_name(f"{method}_reference_a")
        tensors = load_file(path.with_suffix(".safetensors"))
        return path, tensors, clip_of(tensors), json.loads(path.with_suffix(".json").read_text())

    return read


@pytest.fixture
def golden_model(golden_clip):
    def build(**arguments):
        model = FBCLIPModel(clip=golden_clip, feature_layers=(1, 2, 4, 6), n_ctx=12, **arguments)
        model.load_adapter(GOLDEN.with_suffix(".pth"))
        return model.eval()

    return build


def random_state_dict(width=64, layers=4, patch=8, grid=4, embed_dim=32, text_layers=2, seed=0):
    """OpenAI-format weights of any size, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=0.15):
        return std * torch.randn(shape, generator=generator)

    def blocks(prefix, depth, size):
        state = {}
        for index in range(depth):
            at = f"{prefix}.resblocks.{index}."
            state |= {
                at + "attn.in_proj_weight": normal(3 * size, size),
                at + "attn.in_proj_bias": normal(3 * size),
                at + "attn.out_proj.weight": normal(size, size),
                at + "attn.out_proj.bias": normal(size),
                at + "mlp.c_fc.weight": normal(4 * size, size),
                at + "mlp.c_fc.bias": normal(4 * size),
                at + "mlp.c_proj.weight": normal(size, 4 * size),
                at + "mlp.c_proj.bias": normal(size),
            }
            for norm in ("ln_1", "ln_2"):
                state |= {f"{at}{norm}.weight": 1 + normal(size), f"{at}{norm}.bias": normal(size)}
        return state

    state = {
        "visual.conv1.weight": normal(width, 3, patch, patch),
        "visual.class_embedding": normal(width),
        "visual.positional_embedding": normal(1 + grid * grid, width),
        "visual.proj": normal(width, embed_dim),
        "token_embedding.weight": normal(VOCABULARY, 64),
        "positional_embedding": normal(77, 64),
        "text_projection": normal(64, embed_dim),
        "logit_scale": torch.tensor(4.6),
    }
    for norm, size in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", 64)):
        state |= {f"{norm}.weight": 1 + normal(size), f"{norm}.bias": normal(size)}
    return state | blocks("visual.transformer", layers, width) | blocks("transformer", text_layers, 64)


@pytest.fixture(scope="session")
def small_state():
    return random_state_dict


@pytest.fixture(scope="session")
def small_clip():
    def build(image_size=None, **sizes):
        return FrozenCLIP.from_state_dict(random_state_dict(**sizes), image_size=image_size, name="small")

    return build
