# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Results of single cells on disk: written whole or not at all, so that a run may stop, go on, or have company."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomalib_fbclip.common.files import replacing


class CellStore:
    """One JSON file for each cell that is done.

    Args:
        folder: Folder of the files; runs of any tables may share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> dict[str, Any] | None:
        """The result of a cell, or ``None`` if it is not done or its file cannot be read."""
        try:
            result = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return result if isinstance(result, dict) and "metrics" in result else None

    def counts_file(self, key: str) -> Path:
        """Where the counts of a cell's single images are kept."""
        return self.folder / f"{key}.npz"

    def write(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a cell."""
        with replacing(self.folder / f"{key}.json") as file:
            file.write_text(json.dumps(result, indent=1), encoding="utf-8")
