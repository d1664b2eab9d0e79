"""The tasks of GLUE and IMDB: columns, classes, metrics and files, and the rows of such files with their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import records
from .errors import InputError
from .text import TextOrPair

Values = NDArray[np.floating]


@dataclass(frozen=True)
class Task:
    """Columns, metrics and files of one task, of GLUE or IMDB.

    labels: class names as numbered there, empty for regression. files: of the dev set, in a folder of their own (whose
    name comes first) or where that folder lies. other_names: columns as some files call them -> as here. header: of
    TSV files that have none.
    """

    text: str
    pair: str | None
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    files: tuple[str, ...]
    other_names: Mapping[str, str] = field(default_factory=dict)
    header: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """A text or pair with its label as the file writes it."""

    text: TextOrPair
    label: Any
    place: str


def _dev(folder: str, *more: str) -> tuple[str, ...]:
    """The folder and the file names, GLUE's own first, that its dev set is looked for under."""
    return (folder, "dev.tsv", "dev.jsonl", "dev.csv", *more)


_ENTAILMENT = ("entailment", "not_entailment")
_GRAMMAR = ("unacceptable", "acceptable")
_NLI = ("entailment", "neutral", "contradiction")
_NLI_COLUMNS = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}  # GLUE's own files
_MATCHED = tuple(f"dev_matched.{ending}" for ending in ("tsv", "jsonl", "csv"))
_MISMATCHED = tuple(f"dev_mismatched.{ending}" for ending in ("tsv", "jsonl", "csv"))
TASKS: Mapping[str, Task] = {
    "cola": Task(
        "sentence", None, "label", _GRAMMAR, ("matthews",), _dev("CoLA"), header=("source", "label", "mark", "sentence")
    ),
    "imdb": Task("text", None, "label", ("negative", "positive"), ("accuracy",), _dev("long", "imdb_dev_2000.jsonl")),
    "mnli": Task("premise", "hypothesis", "label", _NLI, ("accuracy",), ("MNLI", *_MATCHED), _NLI_COLUMNS),
    "mnli-mm": Task("premise", "hypothesis", "label", _NLI, ("accuracy",), ("MNLI", *_MISMATCHED), _NLI_COLUMNS),
    "mrpc": Task(
        "#1 String", "#2 String", "Quality", ("not_equivalent", "equivalent"), ("accuracy", "f1"), _dev("MRPC")
    ),
    "qnli": Task("question", "sentence", "label", _ENTAILMENT, ("accuracy",), _dev("QNLI")),
    "qqp": Task(
        "question1",
        "question2",
        "label",
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        _dev("QQP", "dev_20k.jsonl"),
        {"is_duplicate": "label"},
    ),
    "rte": Task("sentence1", "sentence2", "label", _ENTAILMENT, ("accuracy",), _dev("RTE")),
    "sst-2": Task("sentence", None, "label", ("negative", "positive"), ("accuracy",), _dev("SST-2")),
    "sts-b": Task("sentence1", "sentence2", "score", (), ("pearson", "spearman"), _dev("STS-B")),
}


def dev_file(data: Path, task: Task) -> Path:
    """The task's dev set: `data` itself if it is a file, else in this folder or in the task's folder inside it.

    Raises InputError naming all that was looked for.
    """
    if not data.is_dir():
        return data
    folder, *names = task.files
    places = [place / name for place in (data / folder, data) for name in names]
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"{data}: none of {', '.join(str(place.relative_to(data)) for place in places)} is there")


def read_examples(path: Path, task: Task) -> list[Example]:
    """All rows of a TSV, CSV or JSONL file with the task's columns. Raises InputError naming the line at fault."""
    with records.opened(path) as file:
        rows = records.rows(file, records.format_of(path.name), str(path), task.header)
        return [example(place, row, task) for place, row in rows]


def example(place: str, row: records.Row, task: Task) -> Example:
    """What a row of one of the task's files holds. Raises InputError if a column is missing or holds no text."""
    columns = {**{task.other_names.get(name, name): value for name, value in row.items()}, **row}
    text = records.text_of(place, columns, task.text, task.pair)
    return Example(text, records.value_of(place, columns, task.label), place)


def gold(examples: Sequence[Example], task: Task, classes: Sequence[str]) -> Values:
    """Class indices in the model's own order, or scores for regression, (examples,) float64.

    A label is a class name or GLUE's number of one. Where the model's names are GLUE's (in any case and order) names
    decide; otherwise the model is taken to number its classes as GLUE does. Raises InputError for any other label.
    """
    if not task.labels:
        return np.array([_number(example) for example in examples])
    if len(classes) != len(task.labels):
        raise InputError(f"the task has the classes {', '.join(task.labels)}; the model has {', '.join(classes)}")
    own = [name.lower() for name in classes]
    same_names = sorted(own) == sorted(task.labels)
    places = [own.index(name) if same_names else index for index, name in enumerate(task.labels)]
    numbered = {str(index): place for index, place in enumerate(places)}
    named = dict(zip(task.labels, places, strict=True))
    known = numbered | named
    for example in examples:
        if str(example.label).lower() not in known:
            raise InputError(f"{example.place}: label {example.label!r} is not one of {', '.join(known)}")
    return np.array([known[str(example.label).lower()] for example in examples], np.float64)


def _number(example: Example) -> float:
    try:
        return float(example.label)
    except (TypeError, ValueError):
        raise InputError(f"{example.place}: label {example.label!r} is not a number") from None
