# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Writes the scores of a prediction into one table beside the images."""

import csv
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .batches import on_host
from .components import components_of
from .map_files import MapFiles
from .processes import gather
from .unreadable import (
    predicted_files,
    predicted_folders,
    reads_all,
    reason,
    restore,
    skip_unreadable,
    skipped_files,
)
from .verdicts import is_calibrated, is_command_line, judge

if TYPE_CHECKING:
    from anomalib.data import ImageBatch

logger = logging.getLogger(__name__)

COLUMNS = ("path", "score", "label", "threshold", "map_max", "picture", "error", "note", "components", "map", "part")
MOST_COMPONENTS = 1000
"""Of an image, the highest peaks: readers of CSV stop at cells of 131072 characters."""

_NAMED = 20
_TERMINATED = 143  # 128 + SIGTERM, the exit status that shells and service managers know
_DISAGREE = "where score and map disagree"
_LEFT_OUT = "reading or transforming it, or its mask, failed when its turn came, though the image can be read now"


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table that :class:`PredictionIndex` wrote; lists are JSON in CSV."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))


class PredictionIndex(Callback):
    """Write one row for each predicted file, and go on past files that cannot be read.

    Columns: ``path``; ``score`` in [0, 1]; ``label``, 1 where the score is above ``threshold``, or ``uncalibrated``
    where the thresholds rest on nothing; ``map_max``, the largest value of the map; ``picture``, the strip, relative to
    the table; ``error``, for files that could not be read; ``note``, where score and map disagree; ``components``, what
    is marked, the highest peak first, as a JSON list of objects with ``box`` (left, top, right, bottom), ``area``,
    ``peak`` and ``centre`` in pixels of the image, see :class:`~anomalib_fbclip.host.components.Component`; ``map``,
    the file of the map where they are saved, relative to the table; ``part``, where images are grouped. Files that
    could not be read come last (with several processes: last of each one's rows), without a score, and are named in one
    warning.
    No file that was asked for is left out without a row.

    Rows are written while they come, into ``<name>.partial-<process><suffix>``, which gets its final name when all are
    there: a table under that name is complete. Our models add this callback by themselves, unless the trainer has one
    already.

    Args:
        dirpath: Folder to write to. ``None``: that of the images, ``images`` in the run's folder.
        filename: Name of the table: ``.csv``, or ``.jsonl`` for one JSON object a line.

    Raises:
        ValueError: If the file name has another suffix.

    Example:
        >>> from anomalib.engine import Engine
        >>> engine = Engine(callbacks=[PredictionIndex(filename="scores.jsonl")])
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = "predictions.csv") -> None:
        if Path(filename).suffix not in {".csv", ".jsonl"}:
            msg = f"filename={filename!r}: use the suffix .csv or .jsonl."
            raise ValueError(msg)
        self.dirpath = Path(dirpath) if dirpath is not None else None
        self.filename = filename
        self.last_path: Path | None = None
        self.unreadable: dict[str, str] = {}
        self._changed: list[Any] = []
        self._file: IO[str] | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the table, list what is asked for."""
        if is_command_line(trainer):
            # The command line throws predictions away at its end; thousands of them fill the memory until then.
            trainer.predict_loop.return_predictions = False
        self._asked, self._asked_all = predicted_files(trainer), reads_all(trainer)
        self._seen: set[str] = set()
        self._words: Counter[str] = Counter()
        self._changed = skip_unreadable(trainer, one_size=getattr(pl_module, "fits_images", False))
        self._visualizer = getattr(pl_module, "visualizer", None)
        self._maps = next((item for item in trainer.callbacks if isinstance(item, MapFiles)), None)
        self._map_folder = Path() if self._maps is None else self._maps.folder(trainer)
        pictures = getattr(self._visualizer, "output_dir", None) or Path(trainer.default_root_dir) / "images"
        folder = self.dirpath or Path(pictures)
        folder.mkdir(parents=True, exist_ok=True)
        self._pictures, self._path = Path(pictures), folder / self.filename
        if trainer.world_size > 1:
            self._path = self._of_process(self._path, trainer.global_rank)
        # File names need not be valid text: what Python could not decode, it writes back as it was.
        self._file = self._partial.open("w", encoding="utf-8", errors="surrogateescape", newline="")
        self._write = self._writer(self._file)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: "ImageBatch",
        batch: "ImageBatch",
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch, as the post-processor left it."""
        del outputs, batch_idx, dataloader_idx
        threshold = getattr(pl_module.post_processor, "normalized_image_threshold", None)
        threshold = None if threshold is None else round(float(threshold), 6)
        calibrated = is_calibrated(pl_module.post_processor)
        for item in on_host(batch):
            verdict = judge(item, calibrated, pl_module.post_processor)
            remark = pl_module.remark(item.image_path) if hasattr(pl_module, "remark") else ""
            self._words.update([verdict.word, *([_DISAGREE] if verdict.note else []), remark])
            row: dict[str, Any] = dict.fromkeys(COLUMNS)
            row["path"] = item.image_path
            row["score"] = round(float(item.pred_score), 6)
            row["label"] = verdict.label
            row["note"] = "; ".join(filter(None, (verdict.note, remark))) or None
            row["threshold"] = threshold
            row["map_max"] = None if item.anomaly_map is None else round(float(item.anomaly_map.max()), 6)
            row["picture"] = self._picture(item.image_path)
            if calibrated and item.pred_mask is not None:
                found = components_of(item)[:MOST_COMPONENTS]
                row["components"] = [component._asdict() for component in found]
            if self._maps is not None and item.image_path is not None:
                row["map"] = self._beside(self._map_folder / self._maps.path_of(item.image_path))
            if getattr(pl_module, "parts", None) is not None:
                row["part"] = pl_module.parts.name_of(item.image_path)
            self._write(row)
            self._seen.add(str(item.image_path))
        if self._file is not None:
            # What a killed run leaves is all that was done.
            self._file.flush()
        if trainer.received_sigterm:
            # Lightning notes the signal and goes on predicting, until the system kills the process.
            raise SIGTERMException(_TERMINATED)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """List what could not be read, give the table its name."""
        del pl_module
        asked = self._asked[trainer.global_rank :: trainer.world_size]
        missing = [path for path in asked if str(path) not in self._seen]
        limit = trainer.limit_predict_batches
        if not (isinstance(limit, float) and limit >= 1):  # as a float a share of the batches, as an int their number
            reached = [index for index, path in enumerate(asked) if str(path) in self._seen]
            missing = [path for path in asked[: max(reached, default=0)] if str(path) not in self._seen]
        left_out = _LEFT_OUT if self._asked_all else None
        self.unreadable = {str(path): why for path in missing if (why := reason(path) or left_out) is not None}
        for path, why in self.unreadable.items():
            self._write({**dict.fromkeys(COLUMNS), "path": path, "error": why})
        skipped = self._write_skipped(trainer)
        self._close()
        self._rename_strips()
        self._partial.replace(self._path)
        if trainer.world_size > 1:
            self._join(trainer)
        self.last_path = self._path
        words = sum((Counter(part) for part in gather(trainer, [dict(self._words)])), Counter())
        counts = ", ".join(f"{number} {word}" for word, number in words.items() if word)
        logger.info("Scores: %s (%d images: %s)", self._path, len(self._seen), counts or "none")
        if skipped:
            kinds = Counter(path.suffix.lower() for path in skipped).most_common()
            logger.warning(
                "%d images or videos have extensions that anomalib does not read (%s) and no score: convert them to "
                "PNG or JPEG:\n%s",
                len(skipped),
                ", ".join(f"{number} {kind}" for kind, number in kinds),
                self._named([str(path) for path in skipped]),
            )
        if self.unreadable:
            logger.warning(
                "%d of %d files could not be read and have no score:\n%s",
                len(self.unreadable),
                len(asked),
                self._named([f"{path}: {why}" for path, why in self.unreadable.items()]),
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the rows so far, under the name that says so, and leave the data sets as they were."""
        del trainer, pl_module, exception
        if self._file is not None and self._seen:
            logger.warning("The prediction ended early. The rows of %d images: %s", len(self._seen), self._partial)
        self._close()
        restore(self._changed)
        self._changed = []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the data sets as they were."""
        del trainer, pl_module, stage
        restore(self._changed)
        self._changed = []

    def _named(self, lines: list[str]) -> str:
        """The first lines, and where the others are."""
        more = [f"... all of them: column 'error' of {self._path}"] if len(lines) > _NAMED else []
        return "\n".join(lines[:_NAMED] + more)

    def _write_skipped(self, trainer: Trainer) -> list[Path]:
        """Write rows of files that anomalib passed over; return them."""
        if not trainer.is_global_zero:
            return []
        skipped = [path for folder in predicted_folders(trainer) for path in skipped_files(folder)]
        for path in skipped:
            why = f"anomalib does not read {path.suffix}: convert it to PNG or JPEG"
            self._write({**dict.fromkeys(COLUMNS), "path": str(path), "error": why})
        return skipped

    @staticmethod
    def _of_process(path: Path, rank: int) -> Path:
        return path.with_stem(f"{path.stem}.rank{rank}")

    def _join(self, trainer: Trainer) -> None:
        """Make one table of all processes' tables."""
        self._path = self._path.with_name(self.filename)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._of_process(self._path, rank) for rank in range(trainer.world_size)]
            with self._partial.open("wb") as joined:
                for number, part in enumerate(parts):
                    rows = part.read_bytes().splitlines(keepends=True)
                    joined.writelines(rows[1 if number and self._path.suffix == ".csv" else 0 :])
            self._partial.replace(self._path)
            for part in parts:
                part.unlink()
        trainer.strategy.barrier()

    def _rename_strips(self) -> None:
        """Let the table follow a visualizer that named its strips by rank in the end."""
        renamed = getattr(self._visualizer, "renamed", None)
        if not renamed:
            return
        rows = read_table(self._partial)
        with self._partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            write = self._writer(file)
            for row in rows:
                if row.get("picture"):
                    # Joined to an absolute path, the folder falls away.
                    path = self._path.parent / row["picture"]
                    row["picture"] = self._relative(renamed.get(path, path))
                write(row)

    @property
    def _partial(self) -> Path:
        # Two runs on one folder must not write into one file.
        return self._path.with_stem(f"{self._path.stem}.partial-{os.getpid()}")

    def _writer(self, file: IO[str]) -> Callable[[dict[str, Any]], object]:
        if self._path.suffix == ".jsonl":
            return lambda row: file.write(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        return lambda row: table.writerow({name: _cell(value) for name, value in row.items()})

    def _picture(self, image_path: str | None) -> str | None:
        place = getattr(self._visualizer, "picture_path", None)
        if place is None or image_path is None:
            return None
        return self._relative(self._pictures / place(image_path))

    def _relative(self, target: Path) -> str:
        return str(target.relative_to(self._path.parent) if target.is_relative_to(self._path.parent) else target)

    def _beside(self, target: Path) -> str:
        try:
            return Path(os.path.relpath(target, self._path.parent)).as_posix()
        except ValueError:  # on another drive
            return str(target)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _cell(value: Any) -> Any:  # noqa: ANN401  # of a row
    return json.dumps(value) if isinstance(value, list) else value
