# Copyright (C) 2026 anomalib-fbclip authors
# SPDX-License-Identifier: Apache-2.0

"""``anomalib-fbclip predict`` and ``test``: anomalib's own with a quiet console, and errors of one or two lines."""

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from anomalib_fbclip.common.arguments import argument_names
from anomalib_fbclip.registration import DATAMODULES, MODELS

_EXPECTED = (OSError, ValueError, TypeError)
_QUIET = (
    *("anomalib", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric", "lightning_utilities"),
    *("pytorch_lightning", "torchmetrics", "httpx", "timm"),
)
_UNION = re.compile(r"\n *Errors:\n(.*?)(?:\n *Given value type:|\Z)", re.DOTALL)
_OPTION = re.compile(r"Option '(\w+)' is not accepted")
_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
_DATA = {"predict": "FOLDER", "test": "LabelledFolder --data.root FOLDER"}
_HELP = """usage: anomalib-fbclip {command} --model FBCLIP --data {data} [--save_maps [png|npy]] [--debug]

'anomalib {command}', with the same arguments, which 'anomalib {command} --help' lists. Log lines come once, warnings of
other libraries are left out, and an error is one or two lines at the end. --debug shows its traceback and everything
else. --save_maps is short for --model.save_maps png.
"""


def predict(words: Sequence[str]) -> int:
    """Score images as ``anomalib predict`` does, with the same arguments."""
    return _front("predict", words)


def test(words: Sequence[str]) -> int:
    """Test a model as ``anomalib test`` does, with the same arguments."""
    return _front("test", words)


def _front(command: str, words: Sequence[str]) -> int:
    words = list(words)
    if not words or words == ["--help"]:
        sys.stdout.write(_HELP.format(command=command, data=_DATA[command]))
        return 0
    debug = "--debug" in words
    words = [command, *_with_maps([word for word in words if word != "--debug"])]
    if debug:
        _run(words)
        return 0
    with _quiet():
        try:
            _run(words)
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted.\n")
            return 130
        except Exception as error:  # noqa: BLE001  # whatever it is, a user reads one line and not a hundred
            sys.stderr.write(f"error: {explain(error)}\n")
            return 1
    return 0


def _with_maps(words: list[str]) -> list[str]:
    """Words with ``--save_maps``, alone or with a format, in anomalib's form."""
    for place, word in enumerate(words):
        name, equals, kind = word.partition("=")
        if name == "--save_maps":
            follows = not equals and words[place + 1 : place + 2] in (["png"], ["npy"])
            kind = words[place + 1] if follows else kind or "png"
            return [*words[:place], *words[place + 1 + follows :], "--model.save_maps", kind]
    return words


def _run(words: Sequence[str]) -> None:
    from anomalib.cli import AnomalibCLI
    from jsonargparse import ArgumentParser

    class Front(AnomalibCLI):
        """anomalib's, with errors that are raised and not printed."""

        @staticmethod
        def init_parser(**kwargs) -> ArgumentParser:
            """As anomalib's."""
            return AnomalibCLI.init_parser(**{**kwargs, "exit_on_error": False})

    Front(list(words))


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Our log lines once and nobody else's, no warnings of other libraries; all as before at the end."""
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in (*_QUIET, "anomalib_fbclip")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Imported here: some libraries warn when they are imported, and set filters and log levels of their own.
        import anomalib.cli  # noqa: F401
        import open_clip  # noqa: F401

        warnings.simplefilter("ignore")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.handlers = [handler]
        root.setLevel(logging.WARNING)
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("anomalib_fbclip").setLevel(logging.INFO)
        try:
            yield
        finally:
            root.handlers = kept
            root.setLevel(level)
            for name, value in levels.items():
                logging.getLogger(name).setLevel(value)


def explain(error: BaseException) -> str:
    """What to read of an error: the message that was meant, without what argument parsers wrap around it."""
    text = str(error)
    inner = _UNION.search(text)
    if inner is not None:
        reasons = re.split(r"\n *- ", "\n" + inner[1])
        reasons = [reason for reason in reasons if reason.strip() and "NoneType" not in reason]
        text = reasons[-1] if reasons else text
        problem = re.match(r"Problem with given class_path '[^']*':\n\s*(.*)", text, re.DOTALL)
        text = problem[1].removeprefix("- ") if problem is not None else text
    elif not isinstance(error, _EXPECTED) and type(error).__name__ != "ArgumentError":
        text = f"{type(error).__name__}: {text}".rstrip(": ") + "\n(--debug shows where it comes from)"
    text = text.replace("'predict.", "'").replace("'test.", "'")  # of the parser's own names
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return "\n".join(lines[:2]) + _suggestion(text)


def _suggestion(text: str) -> str:
    import anomalib_fbclip

    if (option := _OPTION.search(text)) is not None:
        known = {name for model in MODELS for name in argument_names(getattr(anomalib_fbclip, model))}
    elif (option := _CLASS.search(text)) is not None:
        known = {*MODELS, *DATAMODULES}
    else:
        return ""
    near = difflib.get_close_matches(option[1], sorted(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""
