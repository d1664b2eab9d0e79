"""Real texts for the bundled model: SST-2 dev sentences and IMDB reviews, where the data is there.

DATA/glue/SST-2/dev.tsv, DATA/glue/SST-2/train.tsv (to calibrate OpenVINO), DATA/long/imdb_dev_2000.jsonl
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import minilpt
from minilpt import records

from . import files

CALIBRATION_ROWS = 128
SETS = {"sst-2-dev": ("glue/SST-2/dev.tsv", "sentence"), "imdb-reviews": ("long/imdb_dev_2000.jsonl", "text")}


def missing(data: Path) -> list[str]:
    """Files that are needed and not there."""
    wanted = [path for path, _ in SETS.values()] + ["glue/SST-2/train.tsv"]
    return [path for path in wanted if not (data / path).is_file()]


def write_cases(data: Path, folder: Path, most: dict[str, int]) -> list[Path]:
    """One case per set inside the bundled model's folder, with `labels.json`; `most` bounds the texts of each."""
    model = minilpt.load()
    train = [text for text, _ in _read(data / "glue/SST-2/train.tsv", "sentence", CALIBRATION_ROWS)]
    files.write_json(folder / "calibration.json", model.encode(train)[0])
    rule = (folder / "ltp.json").read_text(encoding="utf-8")
    cases = []
    for name, (path, column) in SETS.items():
        case = folder / name
        case.mkdir(exist_ok=True)
        pairs = _read(data / path, column, most[name])
        rows = model.encode([text for text, _ in pairs])[0]
        files.write_text(case / "ltp.json", rule)
        files.write_json(case / "labels.json", [label for _, label in pairs])
        for file in ("rows.json", "verify.json"):  # every answer is checked
            files.write_json(case / file, rows)
        cases.append(case)
    return cases


def _read(path: Path, column: str, most: int) -> list[tuple[str, int]]:
    """(text, 0 or 1) of evenly spaced rows of a file, which may be sorted by label."""
    with records.opened(path) as file:
        rows: list[Any] = list(records.rows(file, records.format_of(path.name), str(path)))
    step = max(1, len(rows) // most)
    pairs = [(str(row[column]), int(row["label"])) for _, row in rows[::step]]
    return pairs[:most]
