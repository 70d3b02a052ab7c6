# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

# %% [markdown]
# # A student: the teacher's maps at camera speed
#
# FB-CLIP with a memory of good images scores each image of a product once. A network of 0.7 million parameters then
# learns to give the same maps. It never sees a label. This notebook is small, so that it runs in a minute: 24 drawings,
# a few epochs.

# %%
import logging
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from anomalib.engine import Engine

from anomalib_fbclip import ProceduralSurfaces, Student

folder = Path(tempfile.mkdtemp())
data = ProceduralSurfaces(
    root=folder / "data",
    category="leather",
    num_train=24,
    num_test=8,
    image_size=96,
    train_batch_size=4,
)
teacher_arguments = {"backbone": "tiny", "image_size": 112, "k_shot": 4}

# %% [markdown]
# ## Training
# The teacher scores 24 images and two variants of each with a pasted defect; then the student is trained.

# %%
student = Student(
    teacher="FBCLIP",
    teacher_arguments=teacher_arguments,
    image_size=96,
    pasted=2,
    max_epochs=20,
    target_cache=str(folder / "teacher"),
)
engine = Engine(
    default_root_dir=folder,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    limit_val_batches=0,
)
engine.fit(student, datamodule=data)
student.agreement

# %% [markdown]
# ## Side by side
# Images of the test split, the teacher's maps and the student's.

# %%
teacher = student.load_teacher()
images = torch.stack([data.test_data[number].image for number in range(0, 8, 2)])
rows = {}
with torch.no_grad():
    for name, model in (("teacher", teacher.eval()), ("student", student.eval())):
        begin = time.perf_counter()
        rows[name] = model(images).anomaly_map
        rows[name + " ms"] = 1000 * (time.perf_counter() - begin) / len(images)

figure, axes = plt.subplots(3, len(images), figsize=(2 * len(images), 6))
for column in range(len(images)):
    axes[0, column].imshow(images[column].permute(1, 2, 0))
    for row, name in enumerate(("teacher", "student"), start=1):
        axes[row, column].imshow(rows[name][column].squeeze(), cmap="inferno", vmin=0, vmax=1)
for axis, label in zip(axes[:, 0], ("image", "teacher", "student"), strict=True):
    axis.set_ylabel(label)
for axis in axes.flat:
    axis.set_xticks([])
    axis.set_yticks([])
plt.show()
{name: round(value, 1) for name, value in rows.items() if name.endswith("ms")}
