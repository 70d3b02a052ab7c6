# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # Train on one data set, test on another
#
# The paper's protocol: FB-CLIP's small trained part learns on the *labelled test split* of an auxiliary data set what
# "defect" means, once, and is then used on other data. anomalib keeps labelled anomalies out of training;
# `AuxiliaryTransfer` takes them from one data module and tests on another. Both sides may be any data module of
# anomalib, such as `AuxiliaryTransfer("MVTecAD", "Visa", source_category="all")`. Here both are drawn: fabric and mesh
# to train on, wood to test on.
#
# The training is far too short to be worth anything. It shows the way.

# %%
import logging
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

from anomalib.engine import Engine

from anomalib_fbclip import FBCLIP, AuxiliaryTransfer, ProceduralSurfaces

# %%
SIZE = 112
source = ProceduralSurfaces(root="drawn", category=["fabric", "mesh"], image_size=SIZE, num_train=1, num_test=12)
target = ProceduralSurfaces(root="drawn", category="wood", image_size=SIZE, num_train=1, num_test=12)
data = AuxiliaryTransfer(source, target, train_batch_size=4, eval_batch_size=16)

# %% [markdown]
# ## Train
# `weights=None` trains; CLIP stays frozen. The loss is the sum of the focal, dice and semantic-consistency losses.

# %%
import matplotlib.pyplot as plt
from lightning.pytorch import Callback


class Losses(Callback):
    """Keep the loss of every step."""

    def __init__(self) -> None:
        self.values = []

    def on_train_batch_end(self, trainer, *args) -> None:
        self.values.append(float(trainer.callback_metrics["train_loss"]))


losses = Losses()
model = FBCLIP(
    backbone="tiny",
    image_size=SIZE,
    weights=None,
    max_epochs=2,
    learning_rate=3e-4,
    metrics="full",
    visualizer=False,
)
engine = Engine(
    default_root_dir="results",
    accelerator="cpu",
    callbacks=[losses],
    enable_progress_bar=False,
    enable_model_summary=False,
    logger=False,
    limit_val_batches=0,
)
engine.fit(model, datamodule=data)
plt.figure(figsize=(5, 2.2))
plt.plot(losses.values)
plt.xlabel("step")
plt.ylabel("loss")
# %% [markdown]
# ## Test on the target
# The trained part is a file of its own, the adapter: a few MB, with backbone, layers, source data and a checksum.

# %%
from pathlib import Path

adapter = model.save_adapter("adapter.safetensors")
f"{adapter}: {Path(adapter).stat().st_size / 1e6:.1f} MB, trained on {model.source}"

# %%
import pandas as pd

rows = {}
for name, weights in {"adapter trained above": adapter, "embedded adapter, 20 families": "auto"}.items():
    tested = FBCLIP(backbone="tiny", image_size=SIZE, weights=weights, metrics="full", visualizer=False)
    runner = Engine(
        default_root_dir="results",
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        limit_val_batches=0,
    )
    found = runner.test(tested, datamodule=target, verbose=False)[0]
    rows[name] = {metric: 100 * found[metric] for metric in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")}
pd.DataFrame(rows).T.style.format(precision=1)

# %% [markdown]
# ## What is refused
# A model that is tested on what it was trained on tells nothing, so source and target may not share images.

# %%
try:
    AuxiliaryTransfer(source, source).setup()
except ValueError as error:
    message = str(error).split(",", maxsplit=1)[0]
message
