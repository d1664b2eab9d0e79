"""Rows from the files that users have: plain lines, JSONL, CSV, and TSV as GLUE writes it (no quoting)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from .errors import InputError
from .text import TextOrPair

MAX_FIELD_CHARACTERS = 1 << 30  # of a CSV field; the csv module stops at 131,072 by itself
FORMATS = ("lines", "jsonl", "csv", "tsv")
Row = Mapping[str, Any]


def format_of(path: str) -> str:
    """The format that a file's ending names; lines for any other, and for standard input."""
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}.get(Path(path).suffix.lower(), "lines")


def rows(lines: Iterable[str], kind: str, where: str, columns: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """(place, row) for every record; a plain line is the row {"text": line}. `where` names the file in messages.

    lines: as `opened` reads them. columns: of a CSV or TSV file whose first line names none of them. Raises InputError
    with file and line for what cannot be read.
    """
    valid = _valid(lines, where)
    yield from _CELLS[kind](valid, where, columns) if kind in _CELLS else _ROWS[kind](valid, where)


def opened(path: Path) -> TextIO:
    """A file for `rows`: UTF-8 with or without a byte order mark, bytes that are not UTF-8 kept for it to report."""
    try:
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def text_of(place: str, row: Row, text_column: str, pair_column: str | None) -> TextOrPair:
    """The text, or the pair, in these columns of a row; beside `text`, a column `text_pair` makes a pair unasked.

    Raises InputError if a column is missing or is not text.
    """
    if pair_column is None and text_column == "text" and row.get("text_pair") is not None:
        pair_column = "text_pair"
    if pair_column is None:
        return _string(place, row, text_column)
    return _string(place, row, text_column), _string(place, row, pair_column)


def value_of(place: str, row: Row, column: str) -> Any:
    """What a column holds; InputError names the columns that are there if it is missing."""
    if column not in row:
        raise InputError(f"{place}: no column {column!r}; found {', '.join(row)}")
    return row[column]


def _string(place: str, row: Row, column: str) -> str:
    value = value_of(place, row, column)
    if not isinstance(value, str):
        raise InputError(f"{place}: column {column!r} must hold text, found {value!r:.80}")
    return value


def _valid(lines: Iterable[str], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}, line {number}: not valid UTF-8 at character {error.start + 1}") from None
        yield line


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
        except (ValueError, RecursionError) as error:  # not JSON, or a number of 5,000 digits
            raise InputError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: a JSON object was expected, found {row!r:.80}")
        yield place, row


def _csv(lines: Iterable[str], where: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    return _cells(lines, where, columns)


def _tsv(lines: Iterable[str], where: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    return _cells(lines, where, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _cells(lines: Iterable[str], where: str, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[str, Row]]:
    """Rows of as many cells as there are columns; blank lines are left out."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    reader = csv.reader(lines, strict=True, **dialect)
    try:
        first: list[str] = next(reader, [])
        rest: Iterator[list[str]] = reader
        named_by = "line 1 names"
        if columns and not set(columns) & set(first):
            rest, named_by = chain([first], reader), "the task has"
        else:
            columns = first
        for cells in rest:
            place = f"{where}, line {reader.line_num}"
            if cells and len(cells) != len(columns):
                raise InputError(f"{place}: {len(cells)} cells, but {named_by} {len(columns)} columns")
            if cells:
                yield place, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{where}, line {reader.line_num}: {error}") from None


_ROWS = {"lines": _lines, "jsonl": _jsonl}
_CELLS = {"csv": _csv, "tsv": _tsv}
