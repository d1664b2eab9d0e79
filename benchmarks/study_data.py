"""The pruning study's tasks: which rows train, which are left for calibration, which measure.

    python -m benchmarks.study_data --data DATA --work WORK     # writes WORK/TASK/{train,calibrate,dev}.jsonl

Where only a dev set is at hand (QNLI, QQP) a fixed part of it trains and the rest measures; a question or sentence may
then occur on both sides in different pairs. IMDB's dev rows are every 12th of its train file, and are taken out of it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilpt import records
from minilpt.tasks import TASKS, Task, example

from . import files

Row = Mapping[str, Any]
CALIBRATION_ROWS = 512  # or a tenth of the training rows


@dataclass(frozen=True)
class Source:
    """A task's rows. files: relative to the data folder, for training and for measuring; dev None: a part of train.

    epochs: of the dense, soft and hard stages. limit: most training rows, for lack of time. For the same reason the
    study measures, searches, bisects and times no more texts than the last four say; of dev rows, evenly spaced ones.
    """

    task: str
    train: tuple[str, ...]
    dev: str | None
    epochs: tuple[float, float, float]
    max_tokens: int = 128
    dev_rows: int = 0
    limit: int | None = None
    measured_texts: int = 2000
    searched_texts: int = CALIBRATION_ROWS
    bisected_texts: int = 128
    timed_texts: int = 400


SOURCES: Mapping[str, Source] = {
    "sst-2": Source("sst-2", ("glue/SST-2/train.tsv",), "glue/SST-2/dev.tsv", (2, 0.36, 0.8)),
    "mrpc": Source("mrpc", ("glue/MRPC/train.tsv",), "glue/MRPC/dev.tsv", (5, 2, 3)),
    "rte": Source("rte", ("glue/RTE/train.tsv",), "glue/RTE/dev.tsv", (6, 3, 3)),
    "sts-b": Source("sts-b", ("glue/STS-B/train.tsv",), "glue/STS-B/dev.tsv", (5, 2, 3)),
    "qnli": Source("qnli", ("glue/QNLI/dev.tsv",), None, (5, 2, 3), dev_rows=1463),
    "qqp": Source("qqp", ("glue/QQP/dev_20k.jsonl",), None, (3, 0.7, 1.2), dev_rows=4212),
    "nli": Source(
        "mnli",
        ("nli/snli_train_18k.jsonl", "glue/MNLI/train_10k.jsonl", "nli/cad_snli_train.tsv"),
        "glue/MNLI/dev_matched.jsonl",
        (2, 0.4, 0.8),
    ),
    "imdb": Source(
        "imdb",
        ("long/imdb_train.jsonl.gz",),
        "long/imdb_dev_2000.jsonl",
        (1.5, 0.4, 0.6),
        max_tokens=512,
        limit=6000,
        measured_texts=667,  # about every third: labels alternate, so of every fourth they would all be the same
        searched_texts=96,
        bisected_texts=32,
        timed_texts=50,
    ),
}


def write(data: Path, work: Path, name: str) -> None:
    """The files of one task, with the columns of `minilpt eval`."""
    source = SOURCES[name]
    rows = [row for path in source.train for row in _rows(data / path)]
    if source.dev is None:
        rows = sorted(rows, key=_key)
        dev, train = rows[: source.dev_rows], rows[source.dev_rows :]
    else:
        dev = list(_rows(data / source.dev))
        measured = {row.get("text") for row in dev} - {None}
        train = [row for row in rows if row.get("text") not in measured]
    train = sorted(train, key=_key)[: source.limit]
    left = min(CALIBRATION_ROWS, len(train) // 10)
    task = TASKS[source.task]
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", train[left:]), ("calibrate", train[:left]), ("dev", dev)):
        lines = [json.dumps(_columns(row, task), ensure_ascii=False) for row in chosen]
        files.write_text(folder / f"{part}.jsonl", "\n".join(lines) + "\n")


def _rows(path: Path) -> Iterator[Row]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as lines:
        kind = records.format_of(path.name.removesuffix(".gz"))
        for _, row in records.rows(lines, kind, path.name):
            yield row


def _columns(row: Row, task: Task) -> Row:
    """The row's text, or its pair, and its label, under the task's own names."""
    found = example("a row", row, task)
    texts = [found.text] if isinstance(found.text, str) else found.text
    columns = [column for column in (task.text, task.pair) if column]
    return dict(zip(columns, texts, strict=True)) | {task.label: found.label}


def _key(row: Row) -> bytes:
    """A place in an order that depends on nothing but the row."""
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode()).digest()


def main() -> None:
    """Write the files of all tasks, or of those named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_data", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/, nli/ and long/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=[*SOURCES], metavar="TASK")
    options = parser.parse_args()
    for name in options.tasks:
        write(options.data, options.work, name)


if __name__ == "__main__":
    main()
