# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip doctor``: well, broken, half registered, and beside a broken anomalib."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module, metadata

import anomalib.models
import pytest

from anomalib_fbclip.commands import cli, doctor


def texts(report, status):
    return [finding.text for findings in report.values() for finding in findings if finding.status == status]


def test_a_sound_installation_passes_with_exit_code_zero(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name}\n" in text for name in doctor.CHECKS)
    assert f"anomalib {metadata.version('anomalib')}" in text
    assert "anomalib knows " in text
    assert "score" in text
    assert "Nothing is wrong." in text


def test_skip_leaves_a_check_out(capsys):
    doctor.main(["--skip", "self-test", "registration"])
    text = capsys.readouterr().out
    assert "self-test" not in text
    assert "devices" in text


def test_a_model_that_has_lost_its_mind_is_a_failure(monkeypatch):
    from anomalib_fbclip.fbclip.torch_model import FBCLIPModel

    score = FBCLIPModel.score

    def upside_down(self, images, *args, **kwargs):
        scores = score(self, images, *args, **kwargs)
        return replace(scores, pred_score=1 - scores.pred_score)

    monkeypatch.setattr(FBCLIPModel, "score", upside_down)
    (finding,) = doctor.self_test()
    assert finding.status == doctor.FAIL
    assert "must score higher" in finding.text


@pytest.mark.parametrize(("switch", "status"), [("0", doctor.NOTE), ("1", doctor.FAIL)])
def test_names_that_anomalib_does_not_know(monkeypatch, switch, status):
    monkeypatch.delattr(anomalib.models, "FBCLIP")
    if switch == "1":
        monkeypatch.delitem(sys.modules, "anomalib_fbclip._autoload", raising=False)
    else:  # the .pth file imports it all the same
        import_module("anomalib_fbclip._autoload")
    monkeypatch.setenv("ANOMALIB_FBCLIP_AUTOLOAD", switch)
    *_, finding = doctor.registration()
    assert finding.status == status
    assert "FBCLIP" in finding.text
    assert ("turns it off" if switch == "0" else "reinstall") in finding.text
    assert "--model anomalib_fbclip.FBCLIP" in finding.text


def test_requirements_that_are_not_met_are_named(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: ["numpy>=1000", "no-such-package", "absent; extra == 'x'"])
    failed = [finding.text for finding in doctor.versions() if finding.status == doctor.FAIL]
    assert len(failed) == 2
    assert "numpy>=1000" in failed[0]
    assert "found nothing" in failed[1]


def test_without_open_clip_it_says_what_to_install_and_goes_on(monkeypatch):
    version = metadata.version

    def without_open_clip(name):
        if name == "open_clip_torch":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_open_clip)
    for name in [name for name in sys.modules if name.partition(".")[0] == "open_clip"]:
        monkeypatch.setitem(sys.modules, name, None)
    report = doctor.examine(skip=["registration"])
    failed = {name: found[-1].text for name, found in report.items() if found[-1].status == doctor.FAIL}
    assert list(failed) == ["versions", "weights", "self-test"]
    assert "pip install 'anomalib[clip]" in failed["versions"]
    assert "open_clip" in failed["self-test"]
    assert doctor.render(report).endswith("3 of these must be repaired.\n")


def test_weights_found_or_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    *_, finding = doctor.weights()
    assert finding.status == doctor.NOTE
    assert "--model.pretrained" in finding.text
    (tmp_path / ".cache/clip").mkdir(parents=True)
    (tmp_path / ".cache/clip/ViT-L-14-336px.pt").touch()
    *_, finding = doctor.weights()
    assert finding.status == doctor.OK
    assert "ViT-L-14-336px.pt" in finding.text


def test_beside_a_broken_anomalib_and_torch_it_still_reports(tmp_path):
    for name in ("anomalib", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} lacks a part')")
    start = "from anomalib_fbclip.commands.cli import main; sys.exit(main())"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {start}"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "anomalib cannot be imported" in done.stdout
    assert "anomalib lacks a part (at " in done.stdout
    assert "pip install" in done.stdout
    assert "must be repaired" in done.stdout


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        cli.main(["docter"])
    assert "doctor" in capsys.readouterr().err
