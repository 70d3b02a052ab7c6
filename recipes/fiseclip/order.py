# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FiSeCLIP on runs that are sorted or mostly bad, before and after ``shuffle`` and ``reference_source``.

    python -m recipes.fiseclip.order magnetic_tile/ --other steel_strips/images
    python -m recipes.fiseclip.order magnetic_tile/ --cases sorted --defects MT_Blowhole MT_Break MT_Fray

anomalib sorts images by path: here ``bad`` comes before ``good``. References are good images that are not tested. Runs:

* ``sorted``: 20 bad images, then 20 good ones;
* ``mostly bad``: 32 and 8;
* ``another type``: 32 and 8, and 13 of the bad ones are no tiles at all, but strips of steel;
* ``one defect``: 32 and 8, and all bad ones have the same drawn defect at about the same place, as of a worn tool.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from anomalib.engine import Engine

from anomalib_fbclip import FiSeCLIP, LabelledFolder
from anomalib_fbclip.data.procedural.paste import draw_patch

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
FORMS = {
    "batch and stream (before)": {"shuffle": False},
    "shuffle": {},
    "batch and stream, references": {"shuffle": False, "reference_source": "references"},
    "shuffle, references": {"reference_source": "references"},
}


class Warned(logging.Handler):
    """Notes whether a run was called its own outlier."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the rank correlation."""
        if "own outliers" in record.getMessage():
            self.seen = f"{record.args[0]:.2f}"


CASES = {"sorted": (20, 20), "mostly bad": (8, 32), "another type": (8, 32), "one defect": (8, 32)}
"""Good and bad images of a run."""
OTHERS = 13
_SEED = 5  # of a missing piece


def write(case: str, root: Path, defect: str, other: Path | None, references: int, folder: Path) -> bool:
    """Write the images of a case; whether all bad ones have masks."""
    good, bad = (sorted((root / kind / "Imgs").glob("*.jpg")) for kind in ("MT_Free", defect))
    for files in (good, bad):
        random.Random(0).shuffle(files)  # noqa: S311  # no secret
    tested, spoiled = CASES[case]
    parts = {"parts/good": good[:tested], "references": good[tested : tested + references], "parts/bad": []}
    if case == "another type":
        if other is None:
            sys.exit("the case 'another type' needs --other, a folder of images")
        bad = [*bad[: spoiled - OTHERS], *sorted(other.iterdir())[:: max(1, len(list(other.iterdir())) // OTHERS)]]
    if case != "one defect":
        parts |= {"parts/bad": bad[:spoiled], "parts/masks": [file.with_suffix(".png") for file in bad[:spoiled]]}
    if case == "another type":
        del parts["parts/masks"]
    for part, files in parts.items():
        (folder / part).mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder / part)
    if case == "one defect":
        (folder / "parts/masks").mkdir()
        for file in good[tested + references :][:spoiled]:
            image = cv2.imread(str(file)).astype(np.float32) / 255
            part, mask = np.zeros(image.shape[:2], dtype=bool), np.zeros(image.shape[:2], dtype=np.uint8)
            part[part.shape[0] // 2, part.shape[1] // 2] = True
            patch = draw_patch(image, part, _SEED, min(part.shape))
            side = len(patch.pixels)
            place = np.s_[patch.top : patch.top + side, patch.left : patch.left + side]
            image[place], mask[place] = patch.pixels, 255 * patch.mask
            cv2.imwrite(str(folder / "parts/bad" / f"{file.stem}.png"), image * 255)
            cv2.imwrite(str(folder / "parts/masks" / f"{file.stem}.png"), mask)
    return case != "another type"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of MT_Blowhole, ..., MT_Free")
    parser.add_argument("--other", type=Path, help="folder of images of another type")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--defects", nargs="*", default=["MT_Break"], help="one run each (default: %(default)s)")
    parser.add_argument("--references", type=int, default=8, help="good images of reference_source")
    parser.add_argument("--image-size", type=int, help="in pixels (default: the backbone's)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    warned = Warned()
    logging.getLogger("anomalib_fbclip.fiseclip").addHandler(warned)
    sys.stdout.write(
        "| case | defect | form | image AUROC | pixel AUROC | AUPRO | warned |\n|---|---|---|---|---|---|---|\n",
    )
    for case in arguments.cases:
        for defect in arguments.defects if case != "one defect" else ["drawn"]:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                kind = arguments.defects[0] if defect == "drawn" else defect
                masks = write(case, arguments.root, kind, arguments.other, arguments.references, folder)
                for form in FORMS:
                    values = " | ".join(run(form, folder, masks, arguments.image_size, warned))
                    sys.stdout.write(f"| {case} | {defect} | {form} | {values} | {warned.seen or 'no'} |\n")
                    sys.stdout.flush()


def run(form: str, folder: Path, masks: bool, image_size: int | None, warned: Warned) -> list[str]:
    """Metrics of one form, in percent."""
    chosen = {key: str(folder / value) if isinstance(value, str) else value for key, value in FORMS[form].items()}
    settings = {"backbone": "tiny", "class_name": "tile", "metrics": "full", "visualizer": False}
    model = FiSeCLIP(**settings, image_size=image_size, **chosen)
    data = LabelledFolder(
        root=folder / "parts",
        normal_dir="good",
        abnormal_dir="bad",
        mask_dir="masks" if masks else None,
        eval_batch_size=16,
        num_workers=0,
    )
    warned.seen = ""
    engine = Engine(default_root_dir=folder / "results", accelerator="cpu", devices=1, logger=False)
    (found,) = engine.test(model, datamodule=data, verbose=False)
    return [f"{100 * found[metric]:.1f}" if metric in found else "-" for metric in METRICS]


if __name__ == "__main__":
    main()
