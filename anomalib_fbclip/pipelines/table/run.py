# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Fills the cells of a table: builds each model once, and gives each category a copy that shares its weights."""

import copy
import gc
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib import LearningType
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_fbclip.data.overlap import check_overlap
from anomalib_fbclip.data.sets import load_datamodule, prepare, shares_source, with_categories

from .auxiliary import auxiliary_adapter, auxiliary_sources
from .measure import AUPIMO, Measure, peak_memory_mb
from .plan import Cell, Plan, with_seed
from .store import CellStore

logger = logging.getLogger(__name__)

Report = Callable[[Cell, dict[str, Any] | None, str | None], None]
_TRAINS_NOTHING = {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}


class _TestEngine(Engine):
    """anomalib's engine without its validation pass before the test of a zero-shot model.

    It would look for thresholds, at the price of a second run over all images; no metric of the table needs one.
    """

    @staticmethod
    def _should_run_validation(model: AnomalibModule, ckpt_path: object) -> bool:
        del model, ckpt_path
        return False


def run_plan(plan: Plan, report: Report) -> dict[str, str]:
    """Fill all cells that are not filled yet.

    Args:
        plan: The table.
        report: Called for each cell when it is done, with its result or with what went wrong.

    Returns:
        What went wrong, by the key of the cell.
    """
    store = CellStore(plan.results / "cells")
    failed = {}
    # Cells of one model follow each other in the plan, those of one data set within them.
    for _, group in groupby(_by_model(plan.cells), key=_builds):
        builder = _Builder(plan, store)
        for cell in group:
            # Looked up as late as can be: another run on the same folder may have filled it meanwhile.
            result = store.read(cell.key)
            error = None
            if result is None or _pictures_missing(plan, cell, result) or _aupimo_missing(plan, result):
                try:
                    with _quiet():
                        result = builder.run(cell)
                    store.write(cell.key, result)
                except Exception as problem:  # one cell must not end the table
                    logger.debug("%s failed", cell, exc_info=True)
                    error = failed[cell.key] = f"{type(problem).__name__}: {str(problem).strip() or 'no message'}"
            # A trained model and its trainer know each other: without this, each would stay to the end of the table.
            gc.collect()
            report(cell, result, error)
    return failed


def _by_model(cells: Sequence[Cell]) -> list[Cell]:
    order: dict[str, list[Cell]] = {}
    for cell in cells:
        order.setdefault(_builds(cell), []).append(cell)
    return [cell for group in order.values() for cell in group]


def _builds(cell: Cell) -> str:
    """What cells of one built model have in common."""
    return str((asdict(cell.model), cell.seed))


class _Builder:
    """One model of the table: built when its first cell needs it, and kept if it trains nothing.

    Args:
        plan: The table.
        store: Where results are kept.
    """

    def __init__(self, plan: Plan, store: CellStore) -> None:
        self.plan = plan
        self.store = store
        self.model: AnomalibModule | None = None
        self.sources: list[AnomalibDataModule] = []
        self.broken: Exception | None = None
        self.missing: dict[str, Exception] = {}

    def run(self, cell: Cell) -> dict[str, Any]:
        """Fill one cell."""
        datamodule = load_datamodule({"class_path": cell.data.class_path, "init_args": cell.data.init_args})
        if cell.category is not None and str(datamodule.category) != cell.category:
            (datamodule,) = with_categories(datamodule, cell.category)
        self._prepare(datamodule, cell)
        # Named as the trainer names it, so that the engine does not set up the splits anew.
        datamodule.setup(TrainerFn.FITTING)
        self._check_source(cell, datamodule)
        _keep_normal_images(datamodule, cell)
        model = self._model(cell)
        measure = Measure(self.plan.aupimo)
        with TemporaryDirectory() as folder:
            engine = self._engine(measure, folder)
            if model.learning_type not in _TRAINS_NOTHING:
                engine.fit(model, datamodule=datamodule)
                engine = self._engine(measure, folder)
            seed_everything(cell.seed, verbose=False)
            self._pictures(model, cell)
            engine.test(model, datamodule=datamodule, verbose=False)
        measure.counts.save(self.store.counts_file(cell.key))
        source = getattr(model, "source", None)
        return {
            "metrics": measure.results(),
            "images": measure.images,
            "seconds_per_image": measure.seconds_per_image,
            "metric_seconds": measure.metric_seconds,
            "peak_memory_mb": peak_memory_mb(),
            "pictures": _number_of_pictures(self.plan, cell) if self.plan.pictures else None,
            "note": f"adapter trained on {source}" if shares_source(source, [datamodule]) else "",
            "cell": asdict(cell),
        }

    def _prepare(self, datamodule: AnomalibDataModule, cell: Cell) -> None:
        """Look for the data set; one that is missing is not downloaded again for each of its categories."""
        if cell.data.name in self.missing:
            raise self.missing[cell.data.name]
        try:
            prepare(datamodule)
        except ConnectionError as problem:
            self.missing[cell.data.name] = problem
            raise

    def _check_source(self, cell: Cell, datamodule: AnomalibDataModule) -> None:
        """Refuse a target that the row's adapter is trained on."""
        if cell.model.auxiliary is None:
            return
        if not self.sources and self.broken is None:
            try:
                self.sources = auxiliary_sources(cell.model)
            except Exception as problem:  # noqa: BLE001  # raised below, and again for each further target
                self.broken = problem
        if self.broken is not None:
            raise self.broken
        check_overlap(self.sources, [datamodule])

    def _engine(self, measure: Measure, folder: str) -> Engine:
        kind = Engine if self.plan.pictures else _TestEngine
        return kind(
            callbacks=[measure],
            accelerator=self.plan.accelerator,
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )

    def _model(self, cell: Cell) -> AnomalibModule:
        """The model in its first state."""
        if self.broken is not None:
            # Downloads that fail take their time: they are not tried for each category again.
            raise self.broken
        if self.model is None:
            seed_everything(cell.seed, verbose=False)
            init_args = with_seed(cell.model, cell.seed)
            try:
                if cell.model.auxiliary is not None:
                    init_args["weights"] = str(auxiliary_adapter(cell.model, self.plan, cell.seed))
                model = get_model({"class_path": cell.model.class_path, "init_args": init_args})
            except Exception as problem:
                self.broken = problem
                raise
            # Measured by a callback of ours, see Measure; anomalib's own metrics cost more than most models.
            model.evaluator = None
            if not self.plan.pictures:
                model.visualizer = None
                if hasattr(model.post_processor, "enable_thresholding"):
                    model.post_processor.enable_thresholding = False
            if model.learning_type not in _TRAINS_NOTHING:
                return model
            self.model = model
        return _sharing_weights(self.model)

    def _pictures(self, model: AnomalibModule, cell: Cell) -> None:
        """Give each category a folder: anomalib's visualizer would stay in that of the first."""
        if self.plan.pictures and getattr(model, "visualizer", None) is not None:
            model.visualizer.output_dir = _picture_folder(self.plan, cell)


def _keep_normal_images(datamodule: AnomalibDataModule, cell: Cell) -> None:
    """Leave a model as many images of the train split as its row says.

    Raises:
        ValueError: If the split has fewer.
    """
    number = cell.model.normal_images
    if number is None:
        return
    images = datamodule.train_data
    if number > len(images):
        msg = f"normal_images={number}: the train split of {cell.data.name} has {len(images)}."
        raise ValueError(msg)
    drawn = np.random.default_rng(cell.seed).permutation(len(images))[:number]
    datamodule.train_data = images.subsample(sorted(drawn.tolist()))


def _picture_folder(plan: Plan, cell: Cell) -> Path:
    parts = (cell.model.name, cell.data.name, cell.category or "")
    return plan.results.joinpath("pictures", *(_safe(part) for part in parts if part))


def _number_of_pictures(plan: Plan, cell: Cell) -> int:
    """Those that are whole; the name of one that is being written begins with a dot."""
    return sum(1 for path in _picture_folder(plan, cell).rglob("[!.]*.*") if path.is_file())


def _pictures_missing(plan: Plan, cell: Cell, result: Mapping[str, Any]) -> bool:
    """Whether images are wanted of a cell that was filled without them, or some are gone since."""
    drawn = result.get("pictures")
    return plan.pictures and (drawn is None or _number_of_pictures(plan, cell) < drawn)


def _aupimo_missing(plan: Plan, result: Mapping[str, Any]) -> bool:
    """Whether AUPIMO is wanted of a cell that was filled without it."""
    return plan.aupimo and AUPIMO not in result["metrics"]


def _sharing_weights(model: AnomalibModule) -> AnomalibModule:
    """A copy of a model in its first state, of which only the parameters are the same in memory.

    What a model keeps of a category (thresholds, reference images, the class name in WinCLIP's prompts, the folder of
    images) is then forgotten with the copy, whatever it is.
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Leave out what Lightning and anomalib tell at the start of each of many short runs; warnings stay."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _safe(part: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_. " else "_" for letter in part)
