# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Cached tokens are the tower's tokens, and the tower is not asked twice."""

import logging

import pytest
import torch
from safetensors.torch import save
from torch.testing import assert_close

from anomalib_fbclip.clip import TokenCache

LAYERS = (1, 3)


@pytest.fixture
def clip(small_clip):
    return small_clip()


@pytest.fixture
def calls(clip, monkeypatch):
    sizes = []
    encode = clip.encode_image

    def counted(images, layers):
        sizes.append(len(images))
        return encode(images, layers)

    monkeypatch.setattr(clip, "encode_image", counted)
    return sizes


def test_tower_runs_once_for_each_picture(clip, calls, tmp_path):
    images = torch.randn(3, 3, 32, 32)
    exact = clip.encode_image(images, LAYERS)
    calls.clear()
    first = TokenCache(clip, LAYERS, tmp_path).encode_image(images[:2])
    again = TokenCache(clip, LAYERS, tmp_path).encode_image(images[[1, 2, 0]])
    assert calls == [2, 1]
    for layer, tokens in enumerate(again):
        assert_close(tokens, exact[layer][[1, 2, 0]], rtol=1e-3, atol=1e-3)
        assert torch.equal(tokens[[2, 0]], first[layer])
        assert tokens.dtype == torch.float32


def test_other_pixels_sizes_layers_and_backbones_are_other_entries(clip, calls, small_clip, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    TokenCache(clip, LAYERS, tmp_path).encode_image(images)
    TokenCache(clip, LAYERS, tmp_path).encode_image(images + 1e-3)
    TokenCache(clip, LAYERS, tmp_path).encode_image(torch.randn(1, 3, 40, 40))
    TokenCache(clip, (2,), tmp_path).encode_image(images)
    assert calls == [1, 1, 1, 1]
    other = TokenCache(small_clip(seed=1), LAYERS, tmp_path).encode_image(images)
    assert (other[0] - clip.encode_image(images, LAYERS)[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0\0\0\0\0\0{}",
        b"half a file",
        save({"tokens": torch.zeros(2, 16, 64).half()}),
        save({"tokens": torch.zeros(2, 17, 64)}),
        save({"tokens": torch.full((2, 17, 64), torch.nan).half()}),
    ],
    ids=["empty", "nothing", "half", "shape", "type", "NaN"],
)
def test_damaged_entry_is_computed_anew(clip, calls, tmp_path, caplog, content):
    images = torch.randn(1, 3, 32, 32)
    cache = TokenCache(clip, LAYERS, tmp_path)
    expected = cache.encode_image(images)
    (entry,) = tmp_path.rglob("*.safetensors")
    entry.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert_close(cache.encode_image(images), expected)
    assert str(entry) in caplog.text
    assert calls == [1, 1]
    assert_close(cache.encode_image(images), expected)
    assert calls == [1, 1]


def test_limit(clip, calls, tmp_path, caplog):
    images = torch.randn(3, 3, 32, 32)
    entry = 2 * len(LAYERS) * 17 * 64
    cache = TokenCache(clip, LAYERS, tmp_path, limit=2.5 * entry)
    with caplog.at_level(logging.WARNING):
        cache.encode_image(images)
        cache.encode_image(images)
    assert calls == [3, 1]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) < 2.5 * entry
    assert caplog.text.count("is full") == 1
    with pytest.raises(ValueError, match="limit=0"):
        TokenCache(clip, LAYERS, tmp_path, limit=0)
