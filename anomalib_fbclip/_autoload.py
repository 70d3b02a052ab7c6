# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""Registers this package's models and data modules at the moment anomalib's own tables have been built.

``anomalib_fbclip.pth`` imports this file at interpreter start, so it may use the standard library only and must cost
about a millisecond. It waits for the first import of ``anomalib.models``, ``anomalib.data`` and the pipelines of its
CLI, lets anomalib's loader run, and calls :mod:`anomalib_fbclip.registration` afterwards.
``ANOMALIB_FBCLIP_AUTOLOAD=0`` turns it off.
"""

import os
import sys

SWITCH = "ANOMALIB_FBCLIP_AUTOLOAD"
HOSTS = {
    "anomalib.models": "register_models",
    "anomalib.data": "register_datamodules",
    "anomalib.cli.pipelines": "register_pipelines",
}


class _RegisterAfterImport:
    """A meta-path finder that wraps the loader of a host module, and steps aside for everything else."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        """Find anomalib module with the finders behind this one, and wrap its loader."""
        if fullname not in HOSTS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    _register_after_exec(spec.loader, HOSTS[fullname])
                return spec
        return None


def _register_after_exec(loader: object, register: str) -> None:
    exec_module = loader.exec_module  # type: ignore[attr-defined]

    def exec_and_register(module: object) -> None:
        loader.exec_module = exec_module  # type: ignore[attr-defined]
        exec_module(module)
        try:
            from anomalib_fbclip import registration

            getattr(registration, register)()
        except Exception as error:  # noqa: BLE001  # a broken plug-in must never take anomalib down
            import warnings

            warnings.warn(f"anomalib-fbclip is installed but could not be loaded: {error!r}", stacklevel=2)

    loader.exec_module = exec_and_register  # type: ignore[attr-defined]


def turned_off() -> bool:
    """Whether the environment variable says no."""
    return os.environ.get(SWITCH, "1").lower() in {"0", "false", "no", "off"}


def install() -> None:
    """Put the finder in front of the import path, once, unless it is turned off."""
    if turned_off():
        return
    if not any(type(finder).__name__ == "_RegisterAfterImport" for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())  # type: ignore[arg-type]


install()
