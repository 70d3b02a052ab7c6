# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""What a table consists of: its models, its data sets, and one cell for each of their categories."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from anomalib_fbclip.common.arguments import argument_names
from anomalib_fbclip.data.catalogue import BENCHMARKS, BY_NAME

DATASETS = "./datasets"
PUBLISHED_NAMES = {"FBCLIP": "FB-CLIP", "WinClip": "WinCLIP", "AnomalyCLIP": "AnomalyCLIP", "AFCLIP": "AF-CLIP"}
_MODEL_KEYS = {"name", "class_path", "init_args", "auxiliary", "per_dataset", "published", "seeds", "normal_images"}
_DATA_KEYS = {"name", "class_path", "init_args", "categories"}
_TABLE_KEYS = {
    *("models", "datasets", "seed", "seeds", "results", "accelerator", "pictures", "loader", "aupimo", "bootstrap"),
}
_DRAWS = 1000
_BATCH_SIZE = 4
"""Of training, FB-CLIP's; AnomalyCLIP and AF-CLIP train with 8."""


@dataclass(frozen=True)
class ModelSpec:
    """A row of the table, as it is for one data set.

    Args:
        name: Name of the row.
        class_path: Any model that anomalib knows.
        init_args: Its arguments.
        auxiliary: Data set on whose labelled test split an adapter is trained first, and the batch size of training;
            ``None``: no training.
        published: Method of the published tables to stand beside; ``None``: none.
        normal_images: How many images of the train split the model gets, drawn by the seed; ``None``: all.
    """

    name: str
    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    auxiliary: dict[str, Any] | None = None
    published: str | None = None
    normal_images: int | None = None


@dataclass(frozen=True)
class DataSpec:
    """A data set of the table.

    Args:
        name: Name in the table; the paper's where it is one of its sixteen.
        class_path: Data module.
        init_args: Its arguments.
        categories: Those to test; empty for a data set that has none.
    """

    name: str
    class_path: str
    init_args: dict[str, Any]
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One model on one category of one data set."""

    model: ModelSpec
    data: DataSpec
    category: str | None
    seed: int
    versions: dict[str, str]

    @cached_property
    def key(self) -> str:
        """Hash of everything that the result depends on, with the content of files that the arguments name."""
        model = asdict(self.model)
        # Names of rows are free to change, and nothing is computed from the published numbers.
        for label in ("name", "published"):
            model.pop(label)
        content = [model, self.data.class_path, self.data.init_args, self.category, self.seed, self.versions]
        return hashlib.sha256(json.dumps(_with_files(content), sort_keys=True, default=str).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Plan:
    """A table to be filled.

    Attributes:
        models: Names of the rows.
        datasets: Data sets.
        cells: One for each row, category and seed.
        seeds: Of rows that are trained; the first one of all others.
        results: Folder to write to.
        accelerator: As Lightning takes it.
        images: Write heat maps.
        aupimo: Compute AUPIMO.
        bootstrap: Draws of the images for the difference of each row to the first; 0: none.
    """

    models: tuple[str, ...]
    datasets: tuple[DataSpec, ...]
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    results: Path
    accelerator: str
    pictures: bool
    aupimo: bool
    bootstrap: int


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {package: _version(package) for package in ("anomalib-fbclip", "anomalib", "torch")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder and not installed
        return "unknown"


def with_seed(model: ModelSpec, seed: int) -> dict[str, Any]:
    """Arguments of a model with the table's seed, where it takes one and the user gave none."""
    module, _, name = model.class_path.rpartition(".")
    with suppress(ImportError):
        model_class = getattr(import_module(module or "anomalib.models"), name, None)
        if model_class is not None and "seed" in argument_names(model_class):
            return {"seed": seed, **model.init_args}
    return dict(model.init_args)


def make_plan(config: Mapping[str, Any], results: str | None = None, root: str | None = None) -> Plan:
    """Read the section ``table`` of a configuration.

    Args:
        config: With ``models`` and ``datasets``; see ``configs/experiment/paper_table.yaml``.
        results: Folder to write to, instead of the configuration's.
        root: Folder that holds the data sets, instead of ``./datasets``.

    Raises:
        ValueError: If a key, a model or a data set is not understood; it is named.
    """
    _check_keys(config, _TABLE_KEYS, "table")
    for key in ("models", "datasets"):
        if not config.get(key):
            msg = f"table: {key} is missing or empty: list at least one."
            raise ValueError(msg)
    seeds = _read_seeds(config)
    bootstrap = config.get("bootstrap", _DRAWS)
    if type(bootstrap) is not int or bootstrap < 0:
        msg = f"table: bootstrap={bootstrap!r}: give the number of draws, 0 for none."
        raise ValueError(msg)
    wanted = list(BY_NAME) if config["datasets"] == "all" else config["datasets"]
    datasets = tuple(_read_data(entry, config.get("loader") or {}, root) for entry in wanted)
    found = versions()
    cells, names = [], []
    for entry in config["models"]:
        base = _read_model(entry)
        if base["name"] in names:
            msg = f"table: two models are called {base['name']!r}; give each a name of its own."
            raise ValueError(msg)
        names.append(base["name"])
        for data in datasets:
            model = _for_dataset(base, data.name, root)
            # What is not trained is the same for each seed.
            own = _read_seeds(entry) if "seeds" in base else seeds if model.auxiliary else seeds[:1]
            cells += [
                Cell(model, data, category, seed, found) for seed in own for category in data.categories or (None,)
            ]
    return Plan(
        tuple(names),
        datasets,
        tuple(cells),
        seeds,
        Path(results or config.get("results", "results/table")),
        str(config.get("accelerator", "auto")),
        bool(config.get("pictures", False)),
        bool(config.get("aupimo", False)),
        bootstrap,
    )


def _read_seeds(config: Any) -> tuple[int, ...]:  # noqa: ANN401  # a mapping of YAML
    """``seeds``, or the one ``seed``.

    Raises:
        ValueError: If both are given, or one is no whole number.
    """
    if "seed" in config and "seeds" in config:
        msg = f"table: seed={config['seed']!r} and seeds={config['seeds']!r}: give one of the two."
        raise ValueError(msg)
    seeds = config["seeds"] if "seeds" in config else [config.get("seed", 0)]
    if not isinstance(seeds, (list, tuple)) or not seeds or any(type(seed) is not int for seed in seeds):
        msg = f"table: seeds={seeds!r}: give a list of whole numbers, such as [0, 1, 2]."
        raise ValueError(msg)
    return tuple(dict.fromkeys(seeds))


def _read_model(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    entry = {"class_path": entry} if isinstance(entry, str) else dict(entry)
    _check_keys(entry, _MODEL_KEYS, "table.models")
    if "class_path" not in entry:
        msg = f"table.models: {entry} has no class_path."
        raise ValueError(msg)
    number = entry.get("normal_images")
    if number is not None and (type(number) is not int or number < 1):
        msg = f"table.models: normal_images={number!r}: give how many images of the train split to use, at least 1."
        raise ValueError(msg)
    short = entry["class_path"].rsplit(".", maxsplit=1)[-1]
    return {"name": short, "published": PUBLISHED_NAMES.get(short), "init_args": {}, "per_dataset": {}, **entry}


def _for_dataset(base: Mapping[str, Any], name: str, root: str | None) -> ModelSpec:
    changed = base["per_dataset"].get(name, {})
    _check_keys(changed, {"init_args", "auxiliary"}, f"table.models.per_dataset.{name}")
    auxiliary = changed.get("auxiliary", base.get("auxiliary"))
    if auxiliary is not None:
        auxiliary = {"name": auxiliary} if isinstance(auxiliary, str) else dict(auxiliary)
        batch_size = auxiliary.pop("train_batch_size", _BATCH_SIZE)
        source = _read_data(auxiliary, {}, root)
        auxiliary = {**asdict(source), "categories": list(source.categories), "train_batch_size": batch_size}
    return ModelSpec(
        base["name"],
        base["class_path"],
        {**(base["init_args"] or {}), **(changed.get("init_args") or {})},
        auxiliary,
        base["published"],
        base.get("normal_images"),
    )


def _read_data(entry: str | Mapping[str, Any], loader: Mapping[str, Any], root: str | None) -> DataSpec:
    entry = {"name": entry} if isinstance(entry, str) else dict(entry)
    _check_keys(entry, _DATA_KEYS, "table.datasets")
    name = entry.get("name") or entry.get("class_path")
    known = BY_NAME.get(str(name))
    class_path = entry.get("class_path") or (known.class_path if known else None)
    if class_path is None:
        msg = f"table.datasets: {name!r} is none of {list(BY_NAME)}; give class_path and init_args for your own."
        raise ValueError(msg)
    init_args = {**(known.init_args if known else {}), **loader, **(entry.get("init_args") or {})}
    if root is not None and str(init_args.get("root", "")).startswith(f"{DATASETS}/"):
        init_args["root"] = str(Path(root) / str(init_args["root"]).removeprefix(f"{DATASETS}/"))
    categories = entry.get("categories", "all")
    if categories == "all":
        listed = known or next((b for b in BENCHMARKS if b.categories and b.class_path == class_path), None)
        categories = listed.category_names if listed else ()
    return DataSpec(str(name), class_path, init_args, tuple(map(str, _as_list(categories))))


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _check_keys(entry: Mapping[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(entry) - allowed)
    if unknown:
        msg = f"{where}: {unknown} not understood; choose from {sorted(allowed)}."
        raise ValueError(msg)


def _with_files(value: Any) -> Any:  # noqa: ANN401  # any JSON value
    if isinstance(value, Mapping):
        return {key: _with_files(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_files(item) for item in value]
    # A path's content counts, so that another adapter under the same name is another cell.
    if isinstance(value, str) and Path(value).is_file():
        return [value, _digest(value, Path(value).stat().st_mtime_ns)]
    return value


@lru_cache(maxsize=64)
def _digest(path: str, changed: int) -> str:
    del changed  # part of the cache's key: backbone weights are read once and not for each cell
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()
