# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip doctor``: what is installed, what works, and what to do about the rest.

Its text is made to be pasted into a bug report: plain, without colours, the home folder written as ``~``. Only the
standard library is imported at the top, and each check stands alone, for this must say something useful on a machine
where torch or anomalib is missing or broken.
"""

import argparse
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

import anomalib_fbclip

PACKAGES = (
    *("anomalib", "torch", "torchvision", "lightning", "open_clip_torch", "safetensors", "huggingface-hub", "numpy"),
    *("onnx", "onnxruntime", "openvino"),
)
DEFAULT_BACKBONE = ("ViT-L-14-336", "openai")
OK, NOTE, FAIL = "ok", "note", "FAIL"


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        status: ``ok``, ``note`` (works, but good to know) or ``FAIL``.
        text: What was found and, where something is to be done, what.
    """

    status: str
    text: str


def versions() -> Iterator[Finding]:
    """Python, system and packages; each requirement of this package that is not met is a failure."""
    yield Finding(OK, f"anomalib-fbclip {anomalib_fbclip.__version__} in {Path(anomalib_fbclip.__file__).parent}")
    yield Finding(OK, f"Python {platform.python_version()} at {sys.executable} on {platform.platform()}")
    found = {name: _version(name) for name in PACKAGES}
    yield Finding(OK, ", ".join(f"{name} {version or '-'}" for name, version in found.items()))
    yield from _unmet_requirements()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet_requirements() -> Iterator[Finding]:
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in metadata.requires("anomalib-fbclip") or ()]
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield Finding(NOTE, f"requirements not compared ({error}): this package runs from a folder, not installed.")
        return
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if (
            _version(requirement.name) is not None
            and "clip" in requirement.extras
            and _version("open_clip_torch") is None
        ):
            yield Finding(FAIL, f"open_clip is needed, found nothing: pip install '{requirement}'")
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield Finding(FAIL, f"{requirement} is needed, found {version or 'nothing'}: pip install '{requirement}'")


def registration() -> Iterator[Finding]:
    """Whether anomalib can be imported and knows our models and data modules by name."""
    hooked = "anomalib_fbclip._autoload" in sys.modules
    begin = time.perf_counter()
    try:
        hosts = [import_module(name) for name in ("anomalib.models", "anomalib.data")]
    except Exception as error:  # noqa: BLE001  # whatever a broken install raises is what we are here to tell
        yield Finding(
            FAIL,
            f"anomalib cannot be imported, so nothing else here can work. {_describe(error)}. "
            f"Try: pip install --force-reinstall 'anomalib[clip]>=2.7,<3'",
        )
        return
    yield Finding(OK, f"anomalib imported in {time.perf_counter() - begin:.0f} s")
    from anomalib_fbclip.registration import DATAMODULES, MODELS

    unknown = [
        name for host, table in zip(hosts, (MODELS, DATAMODULES), strict=True) for name in table
        if not hasattr(host, name)
    ]  # fmt: skip
    if not unknown:
        yield Finding(OK, f"anomalib knows {', '.join([*MODELS, *DATAMODULES])} by name")
        return
    from anomalib_fbclip._autoload import SWITCH, turned_off

    status = FAIL
    # The switch first: the line in the .pth file is read all the same, and then does nothing.
    if turned_off():
        status, why = NOTE, f"{SWITCH}={os.environ[SWITCH]} turns it off"
    elif hooked:
        why = "the hook ran and failed, see the warning below"
    else:
        why = "anomalib_fbclip.pth is not beside the package or was not read (python -S): reinstall anomalib-fbclip"
    yield Finding(status, f"anomalib does not know {unknown} by name: {why}. '--model anomalib_fbclip.FBCLIP' works.")


def devices() -> Iterator[Finding]:
    """What torch can compute on."""
    import torch

    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    yield Finding(OK, f"CPU {platform.machine()}, {threads}; torch built for CUDA {torch.version.cuda or '-'}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(OK, f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    for name in ("mps", "xpu"):
        module = getattr(torch.backends if name == "mps" else torch, name, None)
        if module is not None and module.is_available():
            yield Finding(OK, f"{name} is available")
    if torch.version.cuda and not torch.cuda.is_available():
        yield Finding(NOTE, "torch is built for CUDA and finds no device: is there a driver (nvidia-smi)?")


def weights() -> Iterator[Finding]:
    """Embedded weights, and whether the default backbone's weights are on this machine or how to get them."""
    from anomalib_fbclip.clip.build import EMBEDDED
    from anomalib_fbclip.registration import PUBLISHED_FORMATS

    for name, folder in EMBEDDED.items():
        # The rooms of the models with an adapter.
        adapters = (module.split(".")[1] for module in PUBLISHED_FORMATS)
        for file in (f"{part}.safetensors" for part in ("clip", *adapters)):
            path = folder / file
            if path.is_file():
                yield Finding(OK, f"embedded backbone {name!r}: {file}, {path.stat().st_size / 1e6:.1f} MB")
            else:
                yield Finding(FAIL, f"embedded backbone {name!r}: {path} is missing: reinstall anomalib-fbclip")
    backbone, tag = DEFAULT_BACKBONE
    cached, source = _cached_weights(backbone, tag)
    if cached.is_file():
        yield Finding(OK, f"default backbone {backbone}/{tag}: {cached}")
    else:
        yield Finding(
            NOTE,
            f"default backbone {backbone}/{tag} (0.9 GB) is not on this machine. With a network the first use fetches "
            f"it. Without: fetch {source} elsewhere, copy it here, and pass --model.pretrained <file>.",
        )


def _cached_weights(backbone: str, tag: str) -> tuple[Path, str]:
    """Where open_clip keeps the weights (the file need not exist), and where it fetches them from."""
    from open_clip.pretrained import get_pretrained_url

    url = get_pretrained_url(backbone, tag)
    return Path("~/.cache/clip").expanduser() / url.rsplit("/", 1)[-1], url


def self_test() -> Iterator[Finding]:
    """The embedded model on one drawn image, with and without a planted defect: score and map must tell."""
    import torch

    from anomalib_fbclip.common.functional import pair
    from anomalib_fbclip.data.procedural.generator import generate
    from anomalib_fbclip.fbclip.lightning_model import FBCLIP

    begin = time.perf_counter()
    model = FBCLIP(backbone="tiny").eval()
    sample = generate("wood", "hole", pair(model.image_size)[0], seed=3, variation=0.5)
    pictures = torch.stack([torch.from_numpy(p).permute(2, 0, 1) / 255 for p in (sample.clean, sample.image)])
    with torch.no_grad():
        found = model(pictures)
    clean, defective = found.pred_score.tolist()
    mask = torch.from_numpy(sample.mask)
    inside, outside = (float(found.anomaly_map[1].squeeze()[where].mean()) for where in (mask, ~mask))
    seconds = time.perf_counter() - begin
    text = (
        f"embedded model, one drawn image, {seconds:.1f} s: score {clean:.3f} without and {defective:.3f} with the "
        f"planted defect; map {inside:.3f} inside and {outside:.3f} outside of it"
    )
    if defective > clean and inside > outside:
        yield Finding(OK, text)
    else:
        yield Finding(FAIL, f"{text}: the defect must score higher. Please report this.")


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": versions,
    "registration": registration,
    "devices": devices,
    "weights": weights,
    "self-test": self_test,
}


def examine(skip: Sequence[str] = ()) -> dict[str, list[Finding]]:
    """Run the checks, in their order; what a check raises becomes its last finding.

    Args:
        skip: Names of checks to leave out.
    """
    report: dict[str, list[Finding]] = {}
    for name, check in CHECKS.items():
        if name in skip:
            continue
        findings = report.setdefault(name, [])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                findings.extend(check())
            except Exception as error:  # noqa: BLE001  # one broken part must not hide the findings on the others
                findings.append(Finding(FAIL, f"could not be checked. {_describe(error)}"))
        ours = dict.fromkeys(str(item.message) for item in caught if "fbclip" in str(item.message).lower())
        findings += [Finding(NOTE, f"warning: {message}") for message in ours]
    return report


def _describe(error: BaseException) -> str:
    """Kind and first line of an error; with the file that raised it, for import errors seldom name the culprit."""
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]} (at {place})"


def render(report: dict[str, list[Finding]]) -> str:
    """The report as plain text."""
    lines = ["anomalib-fbclip doctor (paste all of this into a bug report)"]
    for name, findings in report.items():
        lines += ["", name, *(f"  {finding.status:<5}{finding.text}" for finding in findings)]
    failures = sum(finding.status == FAIL for findings in report.values() for finding in findings)
    lines += ["", f"{failures} of these must be repaired." if failures else "Nothing is wrong.", ""]
    return "\n".join(lines).replace(str(Path.home()), "~")


def main(words: Sequence[str] = ()) -> int:
    """Write the report to standard output.

    Args:
        words: Arguments of the command.

    Returns:
        int: 0 if nothing has to be repaired, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="anomalib-fbclip doctor",
        description="Versions, registration with anomalib, devices, weights and a short self-test. Exit code 0: "
        "nothing is wrong; 1: something must be repaired.",
    )
    parser.add_argument("--skip", nargs="+", choices=list(CHECKS), default=[], help="checks to leave out")
    report = examine(parser.parse_args(list(words)).skip)
    sys.stdout.write(render(report))
    return int(any(finding.status == FAIL for findings in report.values() for finding in findings))
