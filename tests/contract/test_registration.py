# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""anomalib finds our models and data modules with no import by the user."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from anomalib.data import get_datamodule
from anomalib.models import get_model

from anomalib_fbclip import FBCLIP, ProceduralSurfaces, Student

ROOT = Path(__file__).parents[2]

FRESH = """
import sys, time
start = time.perf_counter()
from anomalib.models import get_model, list_models
import anomalib.data
assert "f_b_c_l_i_p" in list_models(), sorted(list_models())
assert hasattr(anomalib.data, "ProceduralSurfaces")
print(type(get_model("fbclip", backbone="tiny", weights=None)).__module__)
"""


def _python(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_fresh_process_knows_the_models() -> None:
    run = _python(FRESH)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("anomalib_fbclip.fbclip.lightning_model")


def test_auto_load_is_free_harmless_and_can_be_switched_off() -> None:
    code = "import sys; print([type(f).__name__ for f in sys.meta_path]); print('torch' in sys.modules)"
    assert "_RegisterAfterImport" in _python(code).stdout
    off = _python(code, ANOMALIB_FBCLIP_AUTOLOAD="0")
    assert "_RegisterAfterImport" not in off.stdout
    assert off.stdout.strip().endswith("False")
    slow = _python(
        "import time; t = time.perf_counter(); import anomalib_fbclip._autoload; print(time.perf_counter() - t)",
    )
    assert float(slow.stdout) < 0.05


def test_a_broken_plugin_gives_one_warning_and_the_host_goes_on(tmp_path: Path) -> None:
    # A stand-in for anomalib keeps this fast: what is tested is the loader around it.
    host = tmp_path / "anomalib" / "models"
    host.mkdir(parents=True)
    (tmp_path / "anomalib" / "__init__.py").touch()
    (host / "__init__.py").write_text("here = True\n")
    code = "import warnings; warnings.simplefilter('always'); import anomalib.models; print(anomalib.models.here)"
    run = _python(code, PYTHONPATH=str(tmp_path))
    assert run.stdout.strip() == "True"
    assert run.stderr.count("anomalib-fbclip is installed but could not be loaded") == 1


@pytest.mark.parametrize("path", ["FBCLIP", "anomalib.models.FBCLIP", "anomalib_fbclip.FBCLIP"])
def test_get_model_by_class_path(path: str) -> None:
    model = get_model({
        "class_path": path,
        "init_args": {"backbone": "tiny", "feature_layers": [2, 8], "weights": None},
    })
    assert isinstance(model, FBCLIP)
    assert model.model.feature_layers == (2, 8)


def test_get_datamodule_by_bare_name() -> None:
    config = {"data": {"class_path": "ProceduralSurfaces", "init_args": {"category": "wood"}}}
    assert isinstance(get_datamodule(config), ProceduralSurfaces)


@pytest.mark.parametrize("name", ["anomalib_fbclip.FBCLIP", "anomalib.models.FBCLIP"])
def test_the_cli_takes_the_model_by_other_paths(name: str, tmp_path: Path) -> None:
    words = ["test", "--model", name, "--model.backbone", "tiny", "--default_root_dir", str(tmp_path)]
    cli = AnomalibCLI([*words, "--data", "ProceduralSurfaces", "--data.category", "wood"], run=False)
    assert isinstance(cli.model, FBCLIP)


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_configs_parse(config: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / config
    cli = AnomalibCLI(["train", "--config", str(path), "--default_root_dir", str(tmp_path)], run=False)
    assert isinstance(cli.model, Student if config == "student.yaml" else FBCLIP)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--model", "FBCLIP", "--model.backbone", "tiny", "--print_config"], "smoothing_sigma: 4.0"),
        (["train", "--model.help", "FBCLIP"], "--model.feature_layers"),
    ],
)
def test_print_config_and_help(arguments: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        AnomalibCLI(arguments)
    assert stop.value.code == 0
    assert expected in capsys.readouterr().out


def test_the_wheel_carries_package_and_auto_load_line(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    names = zipfile.ZipFile(wheel).namelist()
    assert "anomalib_fbclip.pth" in names
    assert "anomalib_fbclip/py.typed" in names
    assert "anomalib_fbclip/clip/tiny/clip.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "recipes"))]
