"""The command line: `minilpt predict | embed | explain | serve | calibrate | quantize | eval | bundle | doctor | ...`.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an error that minilpt explains, 2 wrong usage
(and 130 when interrupted).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper

from .. import __version__
from ..errors import MinilptError
from . import answers, machine, measures, models


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(argv)
    with _log_on_stderr():
        return _run(options)


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the package tells by its logger, as that kernels are being compiled."""
    logger, handler = logging.getLogger("minilpt"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("minilpt: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(options: argparse.Namespace) -> int:
    if isinstance(sys.stdout, TextIOWrapper):  # JSON is UTF-8, whatever the locale says
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        code = options.run(options)
        sys.stdout.flush()
    except MinilptError as error:
        print(f"minilpt: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minilpt", description="BERT-family text classifiers without torch.")
    parser.add_argument("--version", action="version", version=f"minilpt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (answers, measures, models, machine):
        room.add(commands)
    return parser
