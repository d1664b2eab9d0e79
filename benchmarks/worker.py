"""One engine in one process, told by JSON lines on stdin what to do, answering by JSON lines on stdout.

    python -m benchmarks.worker

Every engine has its own process, so that thread pools cannot disturb each other and memory can be told apart. Between
requests it sleeps on the pipe. The parent's side is `Worker` in `processes`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .engines import ENGINES, Engine, Run, Settings, batches

Request = dict[str, Any]


class Session:
    """The engine that this process has loaded, and the batches that it has prepared."""

    def __init__(self, request: Request):
        self.engine: Engine = ENGINES[request["engine"]]
        self.settings: Settings = request["settings"]
        self.run: Run = self.engine.opened(Path(request["folder"]), self.settings, request["threads"])
        self.pool = ThreadPoolExecutor(self.settings.get("streams", 1))
        self.rows: list[list[int]] = []
        self.work: list[tuple[list[int], Any]] = []

    def give(self, request: Request) -> dict[str, Any]:
        """Read the sequences of a JSON file and prepare their batches, outside of any timed part."""
        self.rows = files.read_json(Path(request["rows"]))
        self.settings |= request.get("settings", {})
        self.work = list(batches(self.engine, self.rows, self.settings))
        return {"batches": len(self.work)}

    def throughput(self, _: Request) -> dict[str, Any]:
        """Seconds for every prepared batch once, at most `streams` at a time."""
        began = time.perf_counter()
        if self.settings.get("streams", 1) == 1:
            for _, batch in self.work:
                self.run(batch)
        else:
            list(self.pool.map(self.run, [batch for _, batch in self.work]))
        return {"seconds": time.perf_counter() - began}

    def logits(self, _: Request) -> dict[str, Any]:
        """The answers for all sequences, in their order."""
        out: dict[int, list[float]] = {}
        for places, batch in self.work:
            out.update(zip(places, np.asarray(self.run(batch)).tolist(), strict=True))
        return {"logits": [out[place] for place in range(len(self.rows))]}

    def latency(self, request: Request) -> dict[str, Any]:
        """Milliseconds of each sequence alone, in turn, until `seconds` have passed; `warm` runs come before."""
        work = [batch for _, batch in batches(self.engine, self.rows, self.settings | {"batch": 1})]
        for index in range(request["warm"]):
            self.run(work[index % len(work)])
        spent, found = time.perf_counter() + request["seconds"], []
        while len(found) < request["least"] or time.perf_counter() < spent:
            began = time.perf_counter()
            self.run(work[len(found) % len(work)])
            found.append(1000 * (time.perf_counter() - began))
        return {"ms": found}


def main() -> None:
    """Serve requests until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "open":
                session, answer = Session(request), {}
            else:
                answer = getattr(session, request["do"])(request)
        except Exception as error:  # the parent reports it and goes on without this engine
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
