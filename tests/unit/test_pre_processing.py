# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The resize of exported graphs is the resize of the model."""

import pytest
import torch
from anomalib.pre_processing import PreProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

from anomalib_fbclip.host.pre_processing import ExactPreProcessor, _matrix, resize_matrix


def _transform(size):
    resize = Resize((size, size), antialias=True, interpolation=InterpolationMode.BICUBIC)
    return Compose([resize, Normalize(mean=(0.4, 0.5, 0.3), std=(0.2, 0.3, 0.25))])


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(1, 120))
def test_matrices_are_torchvisions_resize(height, width, size):
    image = torch.rand(1, 3, height, width)
    resized = resize_matrix(height, size) @ image @ resize_matrix(width, size).T
    torch.testing.assert_close(resized, _transform(size).transforms[0](image), atol=2e-5, rtol=0)
    assert torch.allclose(resize_matrix(height, size).sum(dim=1), torch.ones(size))


@pytest.mark.parametrize(("size_in", "size_out"), [(30, 56), (373, 144), (1920, 518)])
def test_matrices_bear_bfloat16(size_in, size_out):
    """In a graph for images of any size, a runtime may compute them in its own precision."""
    rounded = _matrix(torch.arange(1, size_in + 1), size_out, torch.bfloat16).float()
    assert (rounded - resize_matrix(size_in, size_out)).abs().sum(dim=1).max() < 0.1


def test_an_exported_graph_keeps_antialiasing_for_fixed_and_for_any_size():
    image = torch.rand(2, 3, 90, 130)
    processor = ExactPreProcessor(_transform(32)).eval()
    expected = processor(image)
    assert torch.equal(expected, processor.transform(image))
    host = PreProcessor(_transform(32))(image)
    assert float((host - expected).abs().max()) > 0.5
    for _ in range(2):  # nothing of the first graph may be left for the second
        fixed = torch.export.export(processor, (image,), strict=False).module()
        torch.testing.assert_close(fixed(image), expected, atol=1e-4, rtol=0)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    dynamic = torch.export.export(processor, (image,), dynamic_shapes=(sizes,)).module()
    for shape in ((90, 130), (41, 33), (17, 300)):
        image = torch.rand(3, 3, *shape)
        torch.testing.assert_close(dynamic(image), processor(image), atol=1e-4, rtol=0)


def test_other_transforms_pass_through():
    image = torch.rand(1, 3, 40, 40)
    for transform in (Normalize(mean=[0.5] * 3, std=[0.2] * 3), Resize((20, 20), antialias=False)):
        exported = torch.export.export(ExactPreProcessor(transform), (image,)).module()
        torch.testing.assert_close(exported(image), transform(image))
    assert torch.equal(ExactPreProcessor(None)(image), image)
