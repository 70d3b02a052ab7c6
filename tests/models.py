# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""All models of the package that stand on a CLIP and one from outside, for tests that hold for every one of them."""

import anomalib.models
import pytest
import toy

import anomalib_fbclip
from anomalib_fbclip.adapted.lightning_model import AdaptedModule
from anomalib_fbclip.host.clip_module import CLIPModule
from anomalib_fbclip.registration import MODELS

anomalib.models.Toy = toy.Toy  # class_path in YAML and tables is looked up there

OURS = {name: getattr(anomalib_fbclip, name) for name in MODELS}
CLASSES = {**{name: model for name, model in OURS.items() if issubclass(model, CLIPModule)}, "Toy": toy.Toy}
ADAPTED = [name for name, model in CLASSES.items() if issubclass(model, AdaptedModule)]
every_model = pytest.mark.parametrize("name", CLASSES)
every_adapted_model = pytest.mark.parametrize("name", ADAPTED)
