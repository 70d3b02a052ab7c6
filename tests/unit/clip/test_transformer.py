# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Attention some heads at a time, as processors with AVX-512's bfloat16 and no AMX compute it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name that the field uses
from torch.testing import assert_close

from anomalib_fbclip.clip import transformer


@pytest.fixture
def fused_calls(monkeypatch):
    """The processor has these instructions; calls of torch's own attention are kept."""
    calls = []
    fused = F.scaled_dot_product_attention
    capabilities = {"avx512_bf16": True, "amx_tile": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or fused(*a, **k))
    return calls


@pytest.mark.parametrize("weights_at_once", [1, 2 * 5 * 9, 10**9])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_heads_in_turn(fused_calls, monkeypatch, weights_at_once, scale):
    monkeypatch.setattr(transformer, "WEIGHTS_AT_ONCE", weights_at_once)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, count, 16, generator=generator) for count in (5, 9, 9))
    exact = F.scaled_dot_product_attention(query, key, value, scale=scale)
    fused_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = transformer.dot_product_attention(*(x.bfloat16() for x in (query, key, value)), scale=scale)
    assert not fused_calls
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), exact, rtol=0, atol=0.05)


def test_where_the_fused_kernel_stays(fused_calls, monkeypatch):
    tokens = torch.randn(1, 2, 5, 16)
    half = tokens.bfloat16()
    transformer.dot_product_attention(tokens, tokens, tokens)
    transformer.dot_product_attention(half, half, half, causal=True)
    transformer.dot_product_attention(half.clone().requires_grad_(), half, half)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_tile": True}, raising=False)
    transformer.dot_product_attention(half, half, half)
    assert len(fused_calls) == 4


def test_compiled_in_turn_and_exported_as_one_node(fused_calls):
    half = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    expected = transformer.dot_product_attention(half, half, half)
    compiled = torch.compile(transformer.dot_product_attention, fullgraph=True, backend="eager")
    assert_close(compiled(half, half, half), expected, rtol=0, atol=0)
    assert not fused_calls
    compiled(*[half.expand(2, -1, -1, -1)] * 3)
    assert len(fused_calls) == 1

    class Attention(nn.Module):
        def forward(self, tokens):
            return transformer.dot_product_attention(tokens, tokens, tokens)

    # Another processor may run the file.
    nodes = torch.export.export(Attention(), (half,)).graph.nodes
    assert any("scaled_dot_product_attention" in str(node.target) for node in nodes)
