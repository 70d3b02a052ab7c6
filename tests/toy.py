# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""A model outside the package: cosine of each block's tokens with two learned prompts, and cross-entropy.

This is all that a new model needs; training, prediction, adapter file, few normal images, thresholds, exports and the
table come from the base.
"""

import torch
from anomalib.models.components import AnomalibModule
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fbclip.adapted.lightning_model import AdaptedModule
from anomalib_fbclip.adapted.torch_model import AdaptedCLIP, Detection
from anomalib_fbclip.clip.prompts import PromptLearner


class ToyModel(AdaptedCLIP):
    model_name = "Toy"

    def __init__(self, clip, n_ctx=2, **shared):
        super().__init__(clip, **shared)
        self.prompts = PromptLearner(clip, n_ctx, ("object.", "damaged object."))

    def architecture(self):
        return {**super().architecture(), "n_ctx": self.prompts.n_ctx}

    def encode_text(self):
        tokens = self.clip.encode_text(self.prompts())
        return F.normalize(self.clip.project_text(tokens[torch.arange(2), self.prompts.end_of_text]), dim=-1)

    def detect(self, tokens, text_features, grid=None):
        del grid
        logit = 0
        for layer in tokens:
            joint = F.normalize(self.clip.project(self.clip.visual.ln_post(layer)), dim=-1)  # [B, 1 + L, d]
            normal, abnormal = (joint @ text_features.T / self.temperature).unbind(dim=-1)
            logit = logit + abnormal - normal
        return Detection(logit)


class ToyLoss(nn.Module):
    def forward(self, pred_score, anomaly_map, labels, masks):
        parts = {"image": F.binary_cross_entropy(pred_score, labels.float())}
        if masks is not None:
            parts["pixel"] = F.binary_cross_entropy(anomaly_map, masks.float())
        return {**parts, "total": sum(parts.values())}


class Toy(AdaptedModule, AnomalibModule):
    paper_epochs = 1

    def __init__(self, n_ctx: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.build(ToyModel, ToyLoss(), n_ctx=n_ctx)
