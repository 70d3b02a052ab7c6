# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # FB-CLIP beside WinCLIP and other baselines
#
# One data module, several models, anomalib's own metrics. All runs without downloads on drawn leather, which the
# embedded backbone has never seen. WinCLIP needs its weights: where they cannot be had, a sentence says so.
#
# Read the numbers as what they are: small models on a few drawn images. The zero-shot model has seen drawings of
# other surfaces; Padim has a backbone with random weights here (`pre_trained=False`) and sees twelve good images.

# %%
import logging
import os
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "5")

# %%
from anomalib.engine import Engine
from anomalib.models import Padim, WinClip

from anomalib_fbclip import FBCLIP, FiSeCLIP, ProceduralSurfaces


def data() -> ProceduralSurfaces:
    return ProceduralSurfaces(root="drawn", category="leather", image_size=112, num_train=12, num_test=16, variation=1)


MODELS = {
    "FB-CLIP, zero-shot": lambda: FBCLIP(backbone="tiny", image_size=112),
    "FB-CLIP, 4 good images": lambda: FBCLIP(backbone="tiny", image_size=112, k_shot=4),
    "FiSeCLIP, zero-shot, in batches": lambda: FiSeCLIP(backbone="tiny", image_size=112),
    "Padim, 12 good images, random backbone": lambda: Padim(pre_trained=False, visualizer=False),
    "WinCLIP, zero-shot": lambda: WinClip(class_name="leather", visualizer=False),
}

# %%
import time

rows, notes = {}, []
for name, build in MODELS.items():
    begin = time.perf_counter()
    try:
        model = build()
    except Exception as error:  # noqa: BLE001  # whatever keeps weights from coming, the other models go on
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        notes.append(f"{name}: left out, for its weights are not on this machine and could not be fetched ({reason}).")
        continue
    model.visualizer = None
    engine = Engine(default_root_dir="results", enable_progress_bar=False, enable_model_summary=False, logger=False)
    found = engine.train(model, datamodule=data())[0]  # zero-shot models train nothing, and are tested at once
    rows[name] = {
        "image AUROC": 100 * found["image_AUROC"],
        "pixel AUROC": 100 * found["pixel_AUROC"],
        "seconds": time.perf_counter() - begin,
    }

# %%
import pandas as pd
from IPython.display import display

display(pd.DataFrame(rows).T.style.format(precision=1))
for note in notes:
    display(note)

# %% [markdown]
# The same in one command, with seeds and as many data sets as you like, is anomalib's benchmark:
#
# ```bash
# anomalib benchmark --config configs/benchmark/side_by_side.yaml
# ```
