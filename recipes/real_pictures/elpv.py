# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Solar cells of the PyPI package ``elpv-dataset`` as folders, for any labelled data module.

    pip install elpv-dataset
    python -m recipes.real_pictures.elpv datasets/elpv --every 10

``good`` and ``defect`` hold every N-th cell, ``train`` the good ones halfway between them, to learn from. Only cells
with a certain label are taken: a defect probability of 0 is good, one of 1 is a defect.
"""

import argparse
import csv
import shutil
from importlib.resources import as_file, files
from pathlib import Path

FOLDERS = {0.0: "good", 1.0: "defect"}
TRAIN = "train"


def write_folders(target: Path, every: int) -> dict[str, int]:
    """Copy every ``every``-th cell of the package and the good ones halfway between, where their label is certain.

    Returns:
        Number of images by folder.
    """
    count = dict.fromkeys((*FOLDERS.values(), TRAIN), 0)
    with as_file(files("elpv_dataset") / "data") as data:
        lines = (data / "labels.csv").read_text(encoding="ascii").splitlines()
        rows = list(csv.reader(lines, delimiter=" ", skipinitialspace=True))
        cells = [(name, FOLDERS.get(float(chance))) for name, chance, _ in rows[::every]]
        if every > 1:
            cells += [
                (name, TRAIN) for name, chance, _ in rows[every // 2 :: every] if FOLDERS.get(float(chance)) == "good"
            ]
        for name, folder in cells:
            if folder is not None:
                path = target / folder / Path(name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(data / name, path)
                count[folder] += 1
    return count


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write to")
    parser.add_argument("--every", type=int, default=1, help="take every N-th cell")
    arguments = parser.parse_args()
    count = write_folders(arguments.target, arguments.every)
    parser.exit(message=f"{arguments.target}: {count}\n")


if __name__ == "__main__":
    main()
