"""Rows of an input file, and tables for a terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .. import records


@contextmanager
def rows_of(options: argparse.Namespace) -> Iterator[Iterator[tuple[str, records.Row]]]:
    """The rows of the file, or of standard input, with their places."""
    kind = options.input_format or records.format_of(options.input)
    name = "standard input" if options.input == "-" else options.input
    with _opened(options.input) as lines:
        yield records.rows(lines, kind, name)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    if path == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[union-attr]
        yield sys.stdin
        return
    with records.opened(Path(path)) as file:
        yield file


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cells."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
