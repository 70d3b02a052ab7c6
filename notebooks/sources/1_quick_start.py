# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Quick start: your own images
#
# Scores, labels and heat maps for a folder of images, without labels and without training. Set `PICTURES` to your
# folder. While it is `None`, eight images of drawn wood stand in, half of them with a defect.
#
# The small backbone inside the package keeps this notebook fast and free of downloads. It is for trying: for real work
# use the paper's backbone and an adapter, `FBCLIP(weights="<adapter>")`.

# %%
import logging
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

PICTURES = None
NORMAL = None  # a folder of a few images that are known to be good, if you have some

# %%
from anomalib.engine import Engine

from anomalib_fbclip import FBCLIP, ProceduralSurfaces

if PICTURES is None:
    drawn = ProceduralSurfaces(root="drawn", category="wood", num_train=4, num_test=8)
    drawn.prepare_data()
    drawn.setup()
    PICTURES = next(Path("drawn").rglob("test"))
    NORMAL = next(Path("drawn").rglob("train"))
PICTURES = Path(PICTURES).resolve()
PICTURES.name, sorted(path.name for path in PICTURES.iterdir())

# %% [markdown]
# ## Predict
# `engine.predict` gives a score in [0, 1], a label, a map and a mask for each image.

# %%
engine = Engine(default_root_dir="results", enable_progress_bar=False, logger=False)
model = FBCLIP(backbone="tiny")
predictions = engine.predict(model, data_path=PICTURES)

# %%
import pandas as pd

names = [Path(path).relative_to(PICTURES).as_posix() for batch in predictions for path in batch.image_path]
table = pd.DataFrame(
    {
        "picture": names,
        "score": [float(score) for batch in predictions for score in batch.pred_score],
        "label": [bool(label) for batch in predictions for label in batch.pred_label],
    },
)
worst = table.nlargest(12, "score")  # of hundreds of images, the twelve highest scores
worst.style.hide().format({"score": "{:.3f}"}).background_gradient(
    "Oranges",
    subset="score",
    vmin=0,
    vmax=1,
)

# %% [markdown]
# ## Look
# The scale of the maps is fixed, so a good image stays dark.

# %%
import matplotlib.pyplot as plt
from anomalib.data.utils import read_image

maps = [each.squeeze() for batch in predictions for each in batch.anomaly_map]
figure, axes = plt.subplots(2, len(worst), figsize=(1.6 * len(worst), 3.6), squeeze=False)
for column, row in enumerate(worst.itertuples()):
    axes[0, column].imshow(read_image(PICTURES / row.picture))
    axes[1, column].imshow(maps[row.Index], cmap="inferno", vmin=0, vmax=1)
    axes[0, column].set_title(f"{Path(row.picture).parent.name}\n{row.score:.2f}", fontsize=8)
for axis in axes.flat:
    axis.axis("off")

# %% [markdown]
# ## A few good images help
# `k_shot` images that are known to be good join the text score: their patches are remembered, and what lies far
# from all of them becomes more abnormal. `few_shot_source` is their folder.

# %%
few = FBCLIP(backbone="tiny", k_shot=4, few_shot_source=NORMAL)
again = engine.predict(few, data_path=PICTURES)
table["score, 4 good images known"] = [float(score) for batch in again for score in batch.pred_score]
table.loc[worst.index].drop(columns="label").style.hide().format(precision=3)

# %% [markdown]
# The same on the command line:
#
# ```bash
# anomalib predict --model FBCLIP --model.backbone tiny --data <folder>
# anomalib predict --model FBCLIP --model.backbone tiny --model.k_shot 4 --model.few_shot_source <good> --data <folder>
# ```
