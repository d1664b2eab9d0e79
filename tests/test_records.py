"""Rows from lines, JSONL, CSV and TSV, and errors that name file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilpt
from minilpt import records

CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


def read(folder: Path, content: str | bytes, kind: str) -> list[tuple[str, Any]]:
    """Every (place, row) of a file "data" with this content."""
    path = folder / "data"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with records.opened(path) as lines:
        return list(records.rows(lines, kind, "data"))


def texts(folder: Path, content: str | bytes, kind: str) -> list[Any]:
    return [records.text_of(place, row, "text", None) for place, row in read(folder, content, kind)]


@pytest.mark.parametrize(
    "path, kind",
    [
        ("a.jsonl", "jsonl"),
        ("a.NDJSON", "jsonl"),
        ("dir.csv/a.tsv", "tsv"),
        ("a.csv", "csv"),
        ("a.txt", "lines"),
        ("a", "lines"),
        ("-", "lines"),
        ("a.json", "lines"),
    ],
)
def test_a_file_s_ending_names_its_format(path: str, kind: str) -> None:
    assert records.format_of(path) == kind


@pytest.mark.parametrize(
    "kind, content, wanted",
    [
        ("lines", "one\ntwo\n", ["one", "two"]),
        ("lines", "one\r\ntwo", ["one", "two"]),
        ("lines", "\n  spaces kept \n\n", ["", "  spaces kept ", ""]),
        ("lines", 'a\tb, "c"\x0b\u2028d', ['a\tb, "c"\x0b\u2028d']),
        ("lines", "", []),
        ("jsonl", '{"text": "one"}\n\n  \n{"text": "", "n": 2}', ["one", ""]),
        ("jsonl", '{"text": "\\ud83c\\udfac \\u0000"}\r\n', ["🎬 \0"]),
        ("csv", "text,label\none,1\n", ["one"]),
        ("csv", 'label,text\n1,"two\nlines, ""quoted"""\n0,x\n', ['two\nlines, "quoted"', "x"]),
        ("csv", 'text\n"a\r\nb"\n\n""\n', ["a\r\nb", ""]),
        ("csv", "text\n", []),
        ("csv", "", []),
        ("tsv", 'label\ttext\n1\t"not a quote\n0\tnor "this"\n', ['"not a quote', 'nor "this"']),
        ("tsv", "text\tlabel\r\na, b\t0\r\n", ["a, b"]),
    ],
)
def test_texts_are_read_as_written(tmp_path: Path, kind: str, content: str, wanted: list[str]) -> None:
    assert texts(tmp_path, content, kind) == wanted


@pytest.mark.parametrize(
    "kind, content", [("lines", "é"), ("jsonl", '{"text": "é"}'), ("csv", "text\né"), ("tsv", "text\né")]
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, kind: str, content: str) -> None:
    assert texts(tmp_path, b"\xef\xbb\xbf" + content.encode(), kind) == ["é"]


@given(st.lists(st.tuples(CELL, CELL), min_size=1))
def test_what_the_csv_module_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "text_pair"), *rows])
    with records.opened(path) as lines:
        found = [records.text_of(place, row, "text", "text_pair") for place, row in records.rows(lines, "csv", "x")]
    assert found == rows


@settings(max_examples=40)
@given(st.lists(st.dictionaries(CELL, CELL | st.none() | st.integers() | st.lists(CELL, max_size=2)), max_size=5))
def test_what_the_json_module_writes_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    found = read(tmp_path_factory.getbasetemp(), "".join(json.dumps(row) + "\n" for row in rows), "jsonl")
    assert [row for _, row in found] == rows


@pytest.mark.parametrize(
    "kind, content, places",
    [
        ("lines", "a\nb\n", ["data, line 1", "data, line 2"]),
        ("jsonl", '{}\n\n{"a": 1}\n', ["data, line 1", "data, line 3"]),
        ("csv", 'a\n"x\ny"\nz\n', ["data, line 3", "data, line 4"]),
        ("tsv", "a\nx\n\ny\n", ["data, line 2", "data, line 4"]),
    ],
)
def test_a_row_knows_the_line_on_which_it_ends(tmp_path: Path, kind: str, content: str, places: list[str]) -> None:
    assert [place for place, _ in read(tmp_path, content, kind)] == places


HEADS = {"lines": b"", "jsonl": b"", "csv": b"text\n", "tsv": b"text\n"}


@pytest.mark.parametrize("kind", records.FORMATS)
def test_bytes_that_are_not_utf_8_are_an_error_of_their_line(tmp_path: Path, kind: str) -> None:
    """Far into a file, beyond what a reader decodes at once."""
    good = b'{"text": "a"}\n' * 5000
    at = good.count(b"\n") + HEADS[kind].count(b"\n") + 1
    with pytest.raises(minilpt.InputError, match=f"data, line {at}: not valid UTF-8 at character 3$"):
        read(tmp_path, HEADS[kind] + good + b"ab\xffcd\n" + good, kind)


@pytest.mark.parametrize(
    "kind, content, said",
    [
        ("jsonl", '{"text": "a"}\n{"text": \n', "data, line 2: not valid JSON"),
        ("jsonl", '{}\n["a"]\n', "data, line 2: a JSON object was expected, found ['a']"),
        ("jsonl", '"a"\n', "data, line 1: a JSON object was expected"),
        ("jsonl", "[" * 100_000, "data, line 1: not valid JSON"),
        ("jsonl", '{"text": ' + "9" * 5000 + "}", "data, line 1: not valid JSON"),
        ("csv", 'text\na\n"b\nc', "data, line 4: "),
        ("csv", 'text\n"a"b\n', "data, line 2: "),
        ("csv", "text,label\na,1\nb, c,1\n", "data, line 3: 3 cells, but line 1 names 2 columns"),
        ("tsv", "text\tlabel\na\n", "data, line 2: 1 cells, but line 1 names 2 columns"),
    ],
    ids=["cut", "list", "string", "nested", "digits", "open quote", "after quote", "more cells", "fewer cells"],
)
def test_a_broken_row_is_an_error_naming_file_and_line(tmp_path: Path, kind: str, content: str, said: str) -> None:
    with pytest.raises(minilpt.InputError) as caught:
        read(tmp_path, content, kind)
    assert said in str(caught.value)


def test_rows_before_a_broken_one_are_given(tmp_path: Path) -> None:
    (tmp_path / "data").write_text('{"text": "a"}\nbroken\n')
    with records.opened(tmp_path / "data") as lines:
        rows = records.rows(lines, "jsonl", "data")
        assert next(rows) == ("data, line 1", {"text": "a"})
        with pytest.raises(minilpt.InputError, match="line 2"):
            next(rows)


def test_one_column_is_a_text_and_two_are_a_pair() -> None:
    row = {"a": "first", "b": "second"}
    assert records.text_of("here", row, "b", None) == "second"
    assert records.text_of("here", row, "a", "b") == ("first", "second")
    assert records.value_of("here", {"label": None}, "label") is None


@pytest.mark.parametrize(
    "row, said",
    [
        ({"other": "a", "another": "b"}, "data, line 7: no column 'text'; found other, another"),
        ({"text": "a"}, "data, line 7: no column 'pair'; found text"),
        ({"text": 3, "pair": ""}, "data, line 7: column 'text' must hold text, found 3"),
        ({"text": None, "pair": ""}, "data, line 7: column 'text' must hold text, found None"),
        ({"text": "", "pair": ["a"]}, "data, line 7: column 'pair' must hold text, found ['a']"),
        ({"text": "", "pair": "x" * 9}, None),
    ],
)
def test_a_missing_column_or_a_cell_that_is_no_text_is_an_error(row: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert records.text_of("data, line 7", row, "text", "pair") == ("", "x" * 9)
        return
    with pytest.raises(minilpt.InputError) as caught:
        records.text_of("data, line 7", row, "text", "pair")
    assert str(caught.value) == said


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_a_file_that_cannot_be_opened_is_an_error_naming_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(minilpt.InputError, match="cannot be read") as caught:
        records.opened(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
