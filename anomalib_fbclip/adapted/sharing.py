# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Share an adapter with a model card."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from . import adapter_file, hub
from .model_card import Results, model_card


def share(
    adapter: str | Path,
    repo_id: str,
    results: Results | None = None,
    private: bool = False,
    license_name: str | None = None,
    include_private: bool = False,
) -> str:
    """Put an adapter and a model card into a repository of the hub, which is made if it does not exist.

    Args:
        adapter: Adapter file of this package.
        repo_id: ``owner/name``.
        results: Metrics for the card: a CSV file, or names and values.
        private: Make a new repository private.
        license_name: Licence for the card, such as ``apache-2.0``. That of the data trained on may matter.

        include_private: Also share a line file, which holds features of the line's images.

    Returns:
        str: ``hf://owner/name/file``, as ``weights`` takes it.

    Raises:
        ValueError: If the file is not an adapter of this package, is private, or the results cannot be read.
        HubError: If the hub refuses or cannot be reached.
    """
    adapter = Path(adapter)
    _, metadata = adapter_file.read(adapter)
    if adapter.suffix != ".safetensors":
        msg = f"adapter {str(adapter)!r}: load it and save it with save_adapter first; what is shared is .safetensors."
        raise ValueError(msg)
    if metadata.get("private") and not include_private:
        msg = (
            f"{str(adapter)!r} is a line file: it holds features of {metadata['k_shot']} of the line's images. Share "
            "its adapter instead (load it with weights= and call save_adapter), or give include_private=True "
            "(--include-private)."
        )
        raise ValueError(msg)
    place = f"hf://{repo_id}/{adapter.name}"
    card = model_card(metadata, place, results=results, license_name=license_name)
    with TemporaryDirectory() as folder:
        shutil.copy(adapter, folder)
        Path(folder, "README.md").write_text(card, encoding="utf-8")
        hub.upload(folder, repo_id, f"Add {adapter.name}", private=private)
    return place
