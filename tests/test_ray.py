"""A Ray Data job over real reviews on a local cluster: every row once, although a worker dies in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minilpt

pytest.importorskip("ray.data", reason="needs Ray Data: pip install 'minilpt[ray]'", exc_type=ImportError)

TEXTS = 120
# The worker that has answered row 7 dies before it can say so, once.
PROGRAM = """
import json, os, signal, sys
import ray
from minilpt.integrations import BatchPredictor, allotted_threads

TEXTS, KILLED, ANSWERS = map(os.path.abspath, sys.argv[1:])

class Mortal(BatchPredictor):
    def __call__(self, batch):
        answer = super().__call__(batch)
        if 7 in batch["row"] and not os.path.exists(KILLED):
            open(KILLED, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
        rows = len(batch["row"])
        return answer | {"process": [os.getpid()] * rows, "threads": [allotted_threads()] * rows}

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
rows = [{"row": row, "text": text} for row, text in enumerate(json.load(open(TEXTS)))]
answers = ray.data.from_items(rows, override_num_blocks=8).map_batches(
    Mortal, fn_constructor_kwargs={"outputs": ["label", "score"]}, batch_size=5, num_cpus=1, concurrency=2
)
found = answers.drop_columns(["text"]).take_all()
with open(ANSWERS, "w") as file:  # Ray writes to stdout as it likes
    json.dump(found, file)
"""


def test_a_job_of_two_actors_answers_every_row_once_although_one_is_killed(shared: Path, tmp_path: Path) -> None:
    lines = (shared / "data" / "long" / "imdb_dev_2000.jsonl").read_text(encoding="utf-8").split("\n")
    texts = [json.loads(line)["text"] for line in lines[:TEXTS]]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-c", PROGRAM, "texts.json", "killed", "answers.json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | quiet, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "answers.json").read_text())
    assert (tmp_path / "killed").exists()
    assert sorted(row["row"] for row in found) == list(range(TEXTS))
    want = minilpt.load(threads=1).predict(texts)
    assert all((row["label"], row["score"]) == (want[row["row"]].label, want[row["row"]].score) for row in found)
    assert len({row["process"] for row in found}) >= 2
    assert {row["threads"] for row in found} == {1}
