# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""The frozen CLIP backbone that the models of this package share."""

from .build import load_clip
from .frozen import FrozenCLIP
from .token_cache import TokenCache

__all__ = ["FrozenCLIP", "TokenCache", "load_clip"]
