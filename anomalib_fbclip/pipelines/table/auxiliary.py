# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Trains the adapter of a row on its auxiliary data set, once, and keeps it."""

import hashlib
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import get_model
from lightning import seed_everything

from anomalib_fbclip.data.auxiliary_transfer import AuxiliaryTransfer
from anomalib_fbclip.data.sets import load_datamodule, prepare, with_categories

from .plan import ModelSpec, Plan, versions, with_seed

logger = logging.getLogger(__name__)


def auxiliary_sources(model: ModelSpec) -> list[AnomalibDataModule]:
    """The auxiliary data set of a row, one data module for each category, set up."""
    sources = with_categories(_load(model), (model.auxiliary or {})["categories"] or None)
    for source in sources:
        prepare(source)
        source.setup()
    return sources


def auxiliary_adapter(model: ModelSpec, plan: Plan, seed: int) -> Path:
    """The adapter of a row, trained now unless the results folder has it.

    Args:
        model: Row with an auxiliary data set.
        plan: The table; adapters lie in its results folder.
        seed: Seed of the run.

    Raises:
        ValueError: If the model has no adapter to train.
    """
    content = json.dumps([model.class_path, model.init_args, model.auxiliary, seed, versions()], sort_keys=True)
    path = plan.results / "adapters" / f"{hashlib.sha256(content.encode()).hexdigest()[:24]}.safetensors"
    if path.is_file():
        return path
    init_args = {**with_seed(model, seed), "weights": None}
    trained = get_model({"class_path": model.class_path, "init_args": init_args})
    if not hasattr(trained, "save_adapter"):
        msg = f"table.models: {model.class_path} has no adapter to train; leave auxiliary out."
        raise ValueError(msg)
    trained.evaluator = trained.visualizer = None
    auxiliary = model.auxiliary or {}
    logger.warning("Training the adapter of %s on %s; it is kept as %s.", model.name, auxiliary["name"], path)
    seed_everything(seed, verbose=False)
    with TemporaryDirectory() as folder:
        engine = Engine(
            accelerator=plan.accelerator,
            devices=1,
            logger=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        source_category, batch_size = auxiliary["categories"] or None, auxiliary["train_batch_size"]
        data = AuxiliaryTransfer(_load(model), source_category=source_category, train_batch_size=batch_size)
        engine.fit(trained, datamodule=data)
        return trained.save_adapter(path)


def _load(model: ModelSpec) -> AnomalibDataModule:
    auxiliary = model.auxiliary or {}
    return load_datamodule({"class_path": auxiliary["class_path"], "init_args": auxiliary["init_args"]})
