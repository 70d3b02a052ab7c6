# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What a Lightning checkpoint of our models holds: what was trained, never the frozen backbone."""

import logging
import zipfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # noqa: S403  # the error alone
from typing import Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.pytorch import LightningModule, Trainer

from anomalib_fbclip.common import safe_load
from anomalib_fbclip.common.arguments import plain
from anomalib_fbclip.common.functional import is_dense

from .regions import Regions
from .tiling import Place

logger = logging.getLogger(__name__)

FROM_CHECKPOINT = "checkpoint"
"""Stands for ``weights`` in a checkpoint of a zero-shot model: the trained tensors come with the checkpoint, and the
adapter file that they once came from need not exist any more."""

_ABSENT = ("model.clip.", "evaluator.")
_COUNTER = ".num_batches_tracked"
"""Of a batch normalisation, an integer."""
_KEY = "anomalib_fbclip"
_RESIZED = ("resize", "tiles")
"""Settings beside the size that what the model sees depends on, where it has them."""
_PRE_PROCESSOR = "anomalib_pre_processor_config"
_FOLDER = 0x10
"""Of a part that is marked as a folder, torch returns whatever the memory holds."""


class NamingCheckpointIO(AnomalibCheckpointIO):
    """anomalib's, which says what is wrong with a damaged file in torch's words and without its name."""

    def load_checkpoint(self, path: str | Path, *args, **kwargs) -> dict[str, Any]:
        """Load a checkpoint, see :func:`named`."""
        with named(path):
            try:
                checkpoint = super().load_checkpoint(path, *args, **kwargs)
            except (RuntimeError, ValueError) as error:
                # torch reads parts of the archive that Python's zipfile does not look at.
                raise _unreadable(path, safe_load.reason(error)) from None
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
            raise _unreadable(path, "it has no state_dict")
        return checkpoint


def name_damaged(trainer: Trainer) -> None:
    """Have a trainer name a checkpoint that cannot be read; one with a plug-in of the user's keeps that."""
    given = trainer.strategy.checkpoint_io
    if type(given) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = NamingCheckpointIO(given.extra_safe_globals)


@contextmanager
def named(path: str | Path) -> Generator[None, None, None]:
    """Name a checkpoint that cannot be read, and say what to do.

    Raises:
        ValueError: If the file is cut off, altered, of another kind, or holds code.
    """
    if Path(path).is_file() and (damage := _damage(Path(path))) is not None:
        raise _unreadable(path, damage)
    try:
        yield
    except UnpicklingError as error:
        # Not chained: torch's message advises to load the file without the check.
        raise _unreadable(path, safe_load.reason(error)) from None


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _FOLDER]
            altered = archive.testzip() or next(iter(folders), None)
    except Exception as error:  # noqa: BLE001  # what is no archive fails in many ways
        return f"it is cut off or of another kind ({error})"
    return None if altered is None else f"{altered} in it is altered"


def _unreadable(path: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"The checkpoint {str(path)!r} cannot be used: {reason}. Take an earlier one, or train anew; an adapter "
        "(.safetensors, .pth) goes into weights (--model.weights).",
    )


def strip(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Take backbone and evaluator out, note the backbone's fingerprint and the image size."""
    checkpoint["state_dict"] = {
        name: tensor for name, tensor in checkpoint["state_dict"].items() if not name.startswith(_ABSENT)
    }
    if module.calibrator.normal_source is not None:
        # The thresholds are in the state dict; the images need not exist any more.
        checkpoint["hyper_parameters"]["normal_source"] = None
    if module.weights is not None:
        checkpoint["hyper_parameters"]["weights"] = FROM_CHECKPOINT
    if "init_weights" in checkpoint["hyper_parameters"]:
        checkpoint["hyper_parameters"]["init_weights"] = None  # training has begun
    region = module.regions
    if region is not None and region.mask is not None:
        checkpoint["hyper_parameters"] |= {"region": None, "crop_to_region": False, "region_fill": "nearest"}
    checkpoint[_KEY] = {
        "region": None if region is None else region.packed(),
        **module.identity(),
        "image_size": module.image_size,
        **{name: module.calibration_settings().get(name) for name in _RESIZED},
        "source": module.source,
        "memory_names": list(getattr(module.model, "memory_names", ())),
        "memory_radius": getattr(module.model, "memory_radius", None),
        "memory_places": [list(place) for place in getattr(getattr(module.model, "memory", None), "places", ())],
    }


def check(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint of another backbone, or with NaN in what was trained.

    The model's image size wins over the checkpoint's: the data set has used it already, and resizing twice would
    change every map without a word.

    Raises:
        ValueError: If the checkpoint was made on another backbone, both sides are named; or if a tensor holds NaN.
    """
    for name, tensor in checkpoint["state_dict"].items():
        if not name.startswith("model.") or name.endswith(_COUNTER):
            continue
        if not is_dense(tensor):
            msg = f"The checkpoint is damaged: {name} is no dense floating-point tensor, take an earlier one."
            raise ValueError(msg)
        if not torch.isfinite(tensor).all():
            msg = f"The checkpoint holds NaN or infinite values in {name}: take an earlier one, or train anew, slower."
            raise ValueError(msg)
    ours = checkpoint.get(_KEY)
    if ours is None:
        return
    if not isinstance(ours, Mapping) or not {"backbone", "fingerprint", "image_size", "source"} <= ours.keys():
        msg = f"The checkpoint is damaged: what it says of its backbone is {ours!r}. Take an earlier one."
        raise ValueError(msg)
    identity = module.identity()
    if ours["fingerprint"] != identity["fingerprint"]:
        msg = (
            f"The checkpoint was made on backbone {ours['backbone']!r} (weights {ours['fingerprint']}), this model has "
            f"{identity['backbone']!r} (weights {identity['fingerprint']}): give the model the same backbone and "
            "pretrained."
        )
        raise ValueError(msg)
    before = {"resize": "squash", "tiles": None}  # files from before it was stored
    settings = module.calibration_settings()
    now = {"image_size": module.image_size, **{name: settings[name] for name in _RESIZED if name in settings}}
    for name, value in now.items():
        theirs = {**before, **ours}[name]
        if plain(theirs) != value:
            logger.warning("The checkpoint was made at %s=%s, this model keeps its %s=%s.", name, theirs, name, value)
            checkpoint.pop(_PRE_PROCESSOR, None)
    module.source = ours["source"]
    if module.regions is None and ours.get("region") is not None:
        module.regions = Regions.unpacked(ours["region"])
    if "model.memory.tokens" in checkpoint["state_dict"]:
        module.model.memory_names = tuple(stored_memory_names(checkpoint))
        module.model.memory.places = tuple(Place(*place) for place in ours.get("memory_places", ()))


def stored_memory_names(checkpoint: Mapping[str, Any]) -> Sequence[str]:
    """Names of what the memory in a checkpoint holds, see :class:`TokenMemory`; empty where they are not known."""
    ours = checkpoint.get(_KEY)
    return ours.get("memory_names", ()) if isinstance(ours, Mapping) else ()


def stored_memory_radius(checkpoint: Mapping[str, Any]) -> int | None:
    """The ``memory_radius`` that the memory in a checkpoint was made with."""
    ours = checkpoint.get(_KEY)
    return ours.get("memory_radius") if isinstance(ours, Mapping) else None


def refill(module: LightningModule, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a stripped state dict with the module's own backbone and evaluator, so that strict loading passes."""
    own = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(_ABSENT)}
    given = {name: tensor for name, tensor in state_dict.items() if not name.startswith("evaluator.")}
    return {**own, **given}
