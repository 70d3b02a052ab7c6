# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Patches with convolutional features: what is added to CLIP's own, and that files bring them along."""

import pytest
import timm
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_fbclip.clip import FrozenCLIP, load_clip
from anomalib_fbclip.clip.stem import SameConv2d, StemmedPatches


@pytest.fixture
def patches():
    torch.manual_seed(0)
    return StemmedPatches(64).eval()


@pytest.mark.parametrize("side", [8, 40, 56])
@torch.no_grad()
def test_both_strides_are_added_on_the_grid_of_the_patches(patches, side):
    images = torch.randn(2, 3, side, side)
    fine, coarse = patches.features(images)
    assert fine.shape == (2, 40, side // 8, side // 8)
    assert coarse.shape == (2, 112, -(-side // 16), -(-side // 16))
    bare = F.conv2d(images, patches.weight, stride=8)
    for kept, dropped in (("fine", "coarse"), ("coarse", "fine")):
        part = StemmedPatches(64).eval()
        part.load_state_dict(patches.state_dict())
        getattr(part, dropped).weight.zero_()
        bare = bare + part(images) - F.conv2d(images, patches.weight, stride=8)
        assert getattr(part, kept).weight.abs().sum() > 0
    torch.testing.assert_close(bare, patches(images), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_network_is_the_beginning_of_efficientnet_lite0(patches):
    """With unfolded normalisation layers at their start, which change nothing but an eps, timm's gives the same."""
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    convolutions = [module for module in theirs.modules() if isinstance(module, torch.nn.Conv2d)]
    ours = [module for module in patches.modules() if isinstance(module, torch.nn.Conv2d)]
    ours = [module for module in ours if module not in {patches, patches.fine, patches.coarse}]
    for one, other in zip(ours, convolutions[: len(ours)], strict=True):
        one.weight.copy_(other.weight / (1 + 1e-3) ** 0.5)
        one.bias.zero_()
    images = torch.randn(1, 3, 72, 72)
    x = theirs.bn1(theirs.conv_stem(images))
    for block in theirs.blocks[:5]:
        x = block(x)
    torch.testing.assert_close(patches.features(images)[1], x, atol=1e-4, rtol=1e-4)


def test_an_odd_padding_goes_to_the_right_and_the_bottom():
    convolution = SameConv2d(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(convolution.weight)
    image = torch.zeros(1, 1, 4, 4)
    image[..., 0, 0] = 1
    assert convolution(image).squeeze().tolist() == [[1, 0], [0, 0]]


@torch.no_grad()
def test_weights_bring_their_features_along(small_state, patches):
    state = small_state()
    plain = FrozenCLIP.from_state_dict(state)
    width = state["visual.conv1.weight"].shape[0]
    assert width == 64
    stem = {f"visual.conv1.{name}": tensor for name, tensor in patches.state_dict().items() if name != "weight"}
    clip = FrozenCLIP.from_state_dict(state | stem)
    images = torch.randn(1, 3, plain.image_size, plain.image_size)
    assert clip.patch_size == 8
    assert clip.fingerprint() != plain.fingerprint()
    assert not torch.allclose(clip.encode_image(images, (1,))[0], plain.encode_image(images, (1,))[0])
    assert not any(parameter.requires_grad for parameter in clip.parameters())


def test_the_embedded_backbone_has_them():
    assert isinstance(load_clip("tiny").visual.conv1, StemmedPatches)
