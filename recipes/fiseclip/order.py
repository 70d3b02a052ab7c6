# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""FiSeCLIP on runs that are sorted by class or mostly bad, before and after ``shuffle`` and ``reference_source``.

    python -m recipes.fiseclip.order magnetic_tile/
    python -m recipes.fiseclip.order magnetic_tile/ --defects MT_Fray --good 8 --bad 32

anomalib sorts images by path: here ``bad`` comes before ``good``. References are good images that are not tested.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path

from anomalib.engine import Engine

from anomalib_fbclip import FiSeCLIP, LabelledFolder

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of MT_Blowhole, ..., MT_Free")
    parser.add_argument("--defects", nargs="*", default=["MT_Blowhole", "MT_Break", "MT_Fray"], help="one run each")
    parser.add_argument("--good", type=int, default=20, help="good images of a run")
    parser.add_argument("--bad", type=int, default=20, help="bad images of a run")
    parser.add_argument("--references", type=int, default=8, help="good images of reference_source")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, force=True)
    warned = Warned()
    logging.getLogger("anomalib_fbclip.fiseclip").addHandler(warned)
    sys.stdout.write("| defect | form | image AUROC | pixel AUROC | AUPRO | warned |\n|---|---|---|---|---|---|\n")
    for defect in arguments.defects:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            good, bad = (sorted((arguments.root / kind / "Imgs").glob("*.jpg")) for kind in ("MT_Free", defect))
            for files in (good, bad):
                random.Random(0).shuffle(files)  # noqa: S311  # no secret
            bad = bad[: arguments.bad]
            parts = {"parts/good": good[: arguments.good], "parts/bad": bad}
            parts["references"] = good[arguments.good : arguments.good + arguments.references]
            parts["parts/masks"] = [file.with_suffix(".png") for file in bad]
            for part, files in parts.items():
                (folder / part).mkdir(parents=True)
                for file in files:
                    shutil.copy(file, folder / part)
            for form, settings in FORMS.items():
                chosen = {
                    key: str(folder / value) if isinstance(value, str) else value for key, value in settings.items()
                }
                model = FiSeCLIP(backbone="tiny", class_name="tile", metrics="full", visualizer=False, **chosen)
                data = LabelledFolder(
                    root=folder / "parts",
                    normal_dir="good",
                    abnormal_dir="bad",
                    mask_dir="masks",
                    eval_batch_size=16,
                    num_workers=0,
                )
                warned.seen = ""
                engine = Engine(default_root_dir=folder / "results", accelerator="cpu", devices=1, logger=False)
                (found,) = engine.test(model, datamodule=data, verbose=False)
                values = " | ".join(f"{100 * found[metric]:.1f}" for metric in METRICS)
                sys.stdout.write(f"| {defect} | {form} | {values} | {warned.seen or 'no'} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
