# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # FiSeCLIP: batches and their filter
#
# FiSeCLIP trains nothing. The images of a test batch are each other's references: what looks like nothing in the other
# images is abnormal. The references have no labels, so the text filters them: patches that it finds abnormal are no
# reference for others. The result of an image therefore depends on its company, and this notebook shows how.

# %%
import logging
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import matplotlib.pyplot as plt
import numpy as np
import torch

from anomalib_fbclip import FiSeCLIP
from anomalib_fbclip.common.functional import tokens_to_grid
from anomalib_fbclip.data.procedural.generator import generate

# %% [markdown]
# ## A batch
# Eight drawings of leather, three of them with a defect. The model has never seen leather.

# %%
KINDS = ("hole", "good", "good", "crack", "good", "good", "stain", "good")
samples = [generate("leather", kind, 144, seed=(5, number), variation=0.3) for number, kind in enumerate(KINDS)]
lightning_model = FiSeCLIP(backbone="tiny", image_size=144, bank_size=0).eval()
model = lightning_model.model
pictures = torch.stack([torch.from_numpy(sample.image).permute(2, 0, 1) / 255 for sample in samples])
images = lightning_model.pre_processor.transform(pictures)
stages = model.analyse(images)

# %% [markdown]
# ## Every stage
# `text`: what the text says of each patch. `refined`: the same, averaged over similar patches of the image. `kept`:
# patches that may serve as references (white). `distance`: how far a patch is from the nearest kept patches of the
# other images. `result`: both together.

# %%
ROWS = {
    "text": (stages.text_map, "inferno", 0, 1),
    "refined": (stages.refined_map, "inferno", 0, 1),
    "kept": (stages.kept.float(), "gray", 0, 1),
    "distance": (stages.distances, "viridis", 0, float(stages.distances.max())),
    "result": (stages.grid_map, "inferno", 0, 1),
}
figure, axes = plt.subplots(1 + len(ROWS), len(samples), figsize=(1.4 * len(samples), 1.5 * (1 + len(ROWS))))
for column, sample in enumerate(samples):
    axes[0, column].imshow(sample.image)
    axes[0, column].set_title(f"{sample.kind}\n{stages.pred_score[column]:.2f}", fontsize=9)
    if sample.mask.any():
        axes[0, column].contour(sample.mask, levels=[0.5], colors="#00e5ff", linewidths=1)
    for row, (values, colours, low, high) in enumerate(ROWS.values(), start=1):
        axes[row, column].imshow(tokens_to_grid(values[column]), cmap=colours, vmin=low, vmax=high)
for row, name in enumerate(("picture", *ROWS)):
    axes[row, 0].set_ylabel(name)
for axis in axes.flat:
    axis.set_xticks([])
    axis.set_yticks([])

# %% [markdown]
# ## The filter
# When the same defect sits in many images, matching alone takes it for normal: each copy finds the others. The filter
# takes the copies out of the references. Here six of eight images have the same hole.


# %%
def with_hole(sample, holed):
    picture = sample.clean.copy()
    if holed:
        picture[77:98, 51:75] = 12
    return torch.from_numpy(picture).permute(2, 0, 1) / 255


place = np.zeros((144, 144), dtype=bool)
place[77:98, 51:75] = True
repeated = torch.stack([with_hole(sample, number < 6) for number, sample in enumerate(samples)])
repeated = lightning_model.pre_processor.transform(repeated)
found = {}
for name, share in {"no filter": 0.0, "filter, top 20 % of the patches": 0.2}.items():
    other = FiSeCLIP(backbone="tiny", image_size=144, bank_size=0, filter_share=share, text_weight=0.0).eval().model
    distances = tokens_to_grid(other.analyse(repeated).distances)[:6]
    inside = torch.from_numpy(place).view(18, 8, 18, 8).float().mean((1, 3)) > 0.5
    found[name] = float(distances[:, inside].mean() / distances[:, ~inside].mean())
{name: f"the hole is {ratio:.1f} times as far from the references as the rest" for name, ratio in found.items()}

# %% [markdown]
# ## Company
# The score of one image alone, and beside one, three and seven others. Alone there is no reference: the text decides.

# %%
{f"{count} images": round(float(model.analyse(images[:count]).pred_score[0]), 3) for count in (1, 2, 4, 8)}

# %% [markdown]
# A bank of the last images seen (`bank_size`, 16 by default) serves short batches, single images and streams; it
# begins anew with every run. Through anomalib all this is
#
# ```bash
# anomalib test --model FiSeCLIP --model.backbone tiny --data ProceduralSurfaces
# ```
