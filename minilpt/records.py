"""Rows from the files that users have: plain lines, JSONL, CSV, and TSV as GLUE writes it (no quoting)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .text import TextOrPair

FORMATS = ("lines", "jsonl", "csv", "tsv")
Row = Mapping[str, Any]


def format_of(path: str) -> str:
    """The format that a file's ending names; lines for any other, and for standard input."""
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}.get(Path(path).suffix.lower(), "lines")


def rows(lines: Iterable[str], kind: str, where: str) -> Iterator[tuple[str, Row]]:
    """(place, row) for every record; a plain line is the row {"text": line}. `where` names the file in messages.

    Raises InputError with file and line for what cannot be read.
    """
    try:
        yield from _ROWS[kind](lines, where)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not valid UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise InputError(f"{where}: not valid {kind.upper()}: {error}") from None


def text_of(place: str, row: Row, text_column: str, pair_column: str | None) -> TextOrPair:
    """The text, or the pair, in these columns of a row. Raises InputError if one is missing or is not text."""
    if pair_column is None:
        return _string(place, row, text_column)
    return _string(place, row, text_column), _string(place, row, pair_column)


def value_of(place: str, row: Row, column: str) -> Any:
    """What a column holds; InputError names the columns that are there if it is missing."""
    if row.get(column) is None:
        raise InputError(
            f"{place}: no column {column!r}; found {', '.join(str(key) for key in row if key is not None)}"
        )
    return row[column]


def _string(place: str, row: Row, column: str) -> str:
    value = value_of(place, row, column)
    if not isinstance(value, str):
        raise InputError(f"{place}: column {column!r} must hold text, found {value!r:.80}")
    return value


def _lines(lines: Iterable[str], where: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, 1):
        yield f"{where}, line {number}", {"text": line.rstrip("\r\n")}


def _jsonl(lines: Iterable[str], where: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, 1):
        place = f"{where}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: a JSON object was expected, found {row!r:.80}")
        yield place, row


def _csv(lines: Iterable[str], where: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(lines, strict=True)
    for row in reader:
        yield f"{where}, line {reader.line_num}", row


def _tsv(lines: Iterable[str], where: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    for row in reader:
        yield f"{where}, line {reader.line_num}", row


_ROWS = {"lines": _lines, "jsonl": _jsonl, "csv": _csv, "tsv": _tsv}
