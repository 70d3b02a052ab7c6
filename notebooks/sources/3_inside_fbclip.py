# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Inside FB-CLIP: every stage drawn
#
# One image goes through the model; `return_stages=True` hands out the tensors of every stage on its way. The callback
# `StageMaps` draws the same record for the images of a test or prediction run.

# %%
import logging
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import matplotlib.pyplot as plt
import numpy as np
import torch

from anomalib_fbclip import FBCLIP
from anomalib_fbclip.callbacks.stage_maps import draw_stages
from anomalib_fbclip.common.functional import tokens_to_grid
from anomalib_fbclip.data.procedural.generator import generate
from anomalib_fbclip.fbclip.foreground import CUE_WEIGHTS, foreground_cues

# %% [markdown]
# ## The image
# Drawn wood with a hole, and the same wood without it. The model has never seen wood.

# %%
sample = generate("wood", "hole", 144, seed=3, variation=0.5)
lightning_model = FBCLIP(backbone="tiny").eval()
model = lightning_model.model
pictures = torch.stack([torch.from_numpy(p).permute(2, 0, 1) / 255 for p in (sample.image, sample.clean)])
with torch.no_grad():
    batch, stages = model(lightning_model.pre_processor.transform(pictures), return_stages=True)
figure, axes = plt.subplots(1, 3, figsize=(7, 2.6))
for axis, picture, title in zip(
    axes,
    (sample.image, sample.mask, sample.clean),
    (f"score {batch.pred_score[0]:.3f}", "true defect", f"score {batch.pred_score[1]:.3f}"),
    strict=True,
):
    axis.imshow(picture, cmap="gray")
    axis.set_title(title)
    axis.axis("off")

# %% [markdown]
# ## All stages of the defective image
# One row for each block that is read. From left to right: the foreground mask (grey is background), the three views,
# the gates of the attention, how much each attended token resembles the background prototype, and what the text says of
# it. Above: the map without and with background suppression, and the result.

# %%
draw_stages(stages, model.feature_layers, 0, sample.image / 255, sample.mask, "wood with a hole")

# %% [markdown]
# ## The same of the good image
# All scales are fixed, so both figures can be compared panel by panel.

# %%
draw_stages(stages, model.feature_layers, 1, sample.clean / 255, None, "the same wood without the hole")

# %% [markdown]
# ## The four cues of the foreground mask
# Local saliency, distance to the mean patch, dissimilarity to the class token, change since the block before: each
# scaled to [0, 1], weighted, summed, smoothed along the rows, and cut at 0.5.

# %%
names = ("local saliency", "centre distance", "class-token inconsistency", "change since the block before")
layer = 3
cues = foreground_cues(stages.image_tokens[layer], stages.image_tokens[layer - 1])[:, 0]
figure, axes = plt.subplots(1, 5, figsize=(11, 2.5))
for axis, cue, name, weight in zip(axes, cues, names, CUE_WEIGHTS, strict=False):
    axis.imshow(tokens_to_grid(cue), cmap="viridis")
    axis.set_title(f"{name}\nweight {weight}", fontsize=8)
axes[4].imshow(tokens_to_grid(stages.foreground_mask[layer][0]), cmap="gray", vmin=0, vmax=1)
axes[4].set_title(f"mask of block {model.feature_layers[layer]}", fontsize=8)
for axis in axes:
    axis.axis("off")

# %% [markdown]
# ## The text side
# Three poolings of the same text tokens, and their sum. The cosine between "normal" and "abnormal" tells how far each
# of them holds the two apart: the lower, the farther.

# %%
poolings = {
    "end of text": stages.text_eot,
    "mean of all places": stages.text_global,
    "attention": stages.text_attention,
    "fused": stages.text_features,
}
{name: round(float(torch.cosine_similarity(*pair, dim=0)), 3) for name, pair in poolings.items()}

# %% [markdown]
# ## Switching parts off
# Every ablation of the paper is an argument. Same adapter, other model: these are looks, not measurements.

# %%
maps = {"full model": batch.anomaly_map[0]}
trained = model.trained_state_dict()
for title, arguments in {
    "tokens only (no MVFBE views)": {"views": ["id"]},
    "no suppression": {"suppression": False},
    "end-of-text only (no MSTFF)": {"text_poolings": ["eot"]},
}.items():
    other = FBCLIP(backbone="tiny", weights=None, **arguments).eval().model
    other.load_state_dict({name: tensor for name, tensor in trained.items() if name in other.state_dict()})
    with torch.no_grad():
        maps[title] = other(lightning_model.pre_processor.transform(pictures[:1])).anomaly_map[0]
figure, axes = plt.subplots(1, len(maps), figsize=(2.6 * len(maps), 2.8))
for axis, (title, heat) in zip(axes, maps.items(), strict=True):
    axis.imshow(np.asarray(heat), cmap="inferno", vmin=0, vmax=1)
    axis.set_title(title, fontsize=9)
    axis.axis("off")
