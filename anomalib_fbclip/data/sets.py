# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Data modules by name, for one, several or all of their categories, and taken together."""

import copy
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any
from urllib.error import URLError

import pandas as pd
from anomalib.data import get_datamodule
from anomalib.data.datamodules.base.image import AnomalibDataModule
from anomalib.data.datasets.base.image import AnomalibDataset

from .catalogue import BY_CLASS, BY_NAME
from .procedural.families import GROUPS

ALL = "all"


def load_datamodule(data: AnomalibDataModule | Mapping[str, Any] | str) -> AnomalibDataModule:
    """A data module from an instance, a name, or class_path and init_args.

    Args:
        data: A name is a data set of the paper as its tables write it (``"VisA"``) or a class (``"Visa"``).

    Raises:
        ValueError: If there is no such data module.
    """
    if isinstance(data, AnomalibDataModule):
        return data
    if isinstance(data, str):
        known = BY_NAME.get(data)
        data = {"class_path": known.class_path, "init_args": known.init_args} if known else {"class_path": data}
    if "class_path" not in data:
        msg = f"data={dict(data)}: give the name of a data module, or class_path and init_args."
        raise ValueError(msg)
    name = str(data["class_path"]).rsplit(".", maxsplit=1)[-1]
    if not hasattr(sys.modules["anomalib.data"], name):
        msg = f"class_path={data['class_path']!r}: anomalib.data has no {name}; of the paper's: {sorted(BY_NAME)}."
        raise ValueError(msg)
    return get_datamodule({"class_path": name, "init_args": dict(data.get("init_args") or {})})


def prepare(datamodule: AnomalibDataModule) -> None:
    """Have a data module look for its files; anomalib downloads MVTec AD and VisA where they are missing.

    Raises:
        ConnectionError: If they are neither there nor to be downloaded; the folder is named.
    """
    try:
        datamodule.prepare_data()
    except URLError as error:
        msg = (
            f"{datamodule.name} is not in {str(getattr(datamodule, 'root', '?'))!r} and could not be downloaded "
            f"({error.reason}): put it there, or say where it is (root). docs/datasets has the layout."
        )
        raise ConnectionError(msg) from error


def categories_of(datamodule: AnomalibDataModule) -> tuple[str, ...]:
    """All categories of the data set that a data module reads; empty where it knows of none."""
    if type(datamodule).__name__ in BY_CLASS:
        return BY_CLASS[type(datamodule).__name__].category_names
    # anomalib lists them beside each data set, in a module of the same name.
    path = type(datamodule).__module__.replace(".datamodules.", ".datasets.")
    try:
        return tuple(getattr(import_module(path), "CATEGORIES", ()))
    except ModuleNotFoundError:
        return ()


def with_categories(
    datamodule: AnomalibDataModule,
    category: str | Sequence[str] | None,
) -> list[AnomalibDataModule]:
    """One data module for each category.

    Args:
        datamodule: A data module that was not set up yet.
        category: One, several, ``"all"``, or ``None`` for the data module as it is.

    Raises:
        ValueError: If the data set has no such category.
    """
    if category is None:
        return [datamodule]
    known = categories_of(datamodule)
    wanted = known if category == ALL else (category,) if isinstance(category, str) else tuple(category)
    if category == ALL and not known:
        return [datamodule]
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        what = f"choose 'all' or some of {list(known)}" if known else "it has none, or takes them in its own init_args"
        msg = f"category={category!r} of {type(datamodule).__name__}: {what}."
        raise ValueError(msg)
    modules = []
    for name in wanted:
        module = copy.copy(datamodule)
        module.category = name
        modules.append(module)
    return modules


def describe(datamodules: Sequence[AnomalibDataModule]) -> str:
    """Name and categories in one word, such as ``MVTecAD-all``: the source that an adapter records."""
    first = datamodules[0]
    names = [str(datamodule.category) for datamodule in datamodules if datamodule.category]
    if len(names) > 1 and set(names) == set(categories_of(first)):
        names = [ALL]
    return "-".join((first.name, *names))


def single_categories(name: str, category: str) -> set[str]:
    """What a category, several in one word, or a group of drawn families stands for."""
    words = set(re.split(r"[-+/]", category)) - {""}
    groups = GROUPS if name == "ProceduralSurfaces" else {}
    return {single for word in words for single in groups.get(word, (word,))}


def shares_source(source: str | None, datamodules: Sequence[AnomalibDataModule]) -> bool:
    """Whether an adapter's recorded source and some data sets are, in part, the same: by their names alone.

    Args:
        source: As :func:`describe` wrote it, or a data set of the paper in any usual spelling (``mvtec``, ``VisA``).
        datamodules: What the adapter is tested on.
    """
    if not source:
        return False
    source = _PAPER_NAMES.get(_bare(source), source)
    for datamodule in datamodules:
        name, category = datamodule.name, str(datamodule.category or "")
        if source == name:
            return True
        if source.startswith((f"{name}-", f"{name}/")):
            trained, tested = single_categories(name, source[len(name) :]), single_categories(name, category)
            if trained & tested or ALL in trained or not tested or ALL in tested:
                return True
    return False


def _bare(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


_PAPER_NAMES = {_bare(each.name): each.init_args.get("name", each.class_path) for each in BY_NAME.values()}
_PAPER_NAMES["mvtecad"] = BY_NAME["MVTec"].class_path


def combine(datamodules: Sequence[AnomalibDataModule]) -> AnomalibDataset:
    """The test splits of several data modules as one, with a column that names each image's category.

    Masks are used where all of them have some.
    """
    datasets = [datamodule.test_data for datamodule in datamodules]
    if len(datasets) == 1:
        return datasets[0]
    combined = copy.copy(datasets[0])
    tasks = {dataset.samples.attrs["task"] for dataset in datasets}
    # pandas compares attributes when it concatenates; what anomalib needs of them is set below.
    tables = [pd.DataFrame(module.test_data.samples).assign(category=module.category) for module in datamodules]
    samples = pd.concat(tables, ignore_index=True)
    samples.attrs["task"] = tasks.pop() if len(tasks) == 1 else "classification"
    combined.samples = samples
    return combined
