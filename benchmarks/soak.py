"""One model shared by many threads for long: every answer bit-equal to the serial one, and no memory that grows.

    python -m benchmarks.soak --minutes 30 --predictions 100000

Callers take jobs of very different kinds until both the minutes and the predictions have been reached: one text, a few,
a batch that is split over threads, long texts in windows; pruned and dense; in every precision. Each text's logits are
compared, bit for bit, with those that it had alone, on one thread. Resident memory is read every few seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import minilpt
from minilpt import Classifier
from minilpt.threads import usable_cores

from . import files

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "soak.json"
CORPUS = ROOT / "weights" / "cards" / "texts"
PRECISIONS = ("fp32", "int8", "ibert")
COUNTS = (1, 1, 1, 3, 8, 40)  # texts of one job
WORDS = (1, 3, 6, 10, 16, 25, 40, 60, 90, 500)  # of the texts: the longest become windows


@dataclass
class Load:
    """Models by name, the texts, and for each model every text's logits, (texts, labels) float32."""

    models: dict[str, Classifier]
    texts: list[str]
    alone: dict[str, NDArray[np.float32]]


@dataclass
class Tally:
    """What the callers have seen so far. wrong: (model, texts) of answers that differ."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, list[int]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def predictions(self) -> int:
        """Texts that were answered."""
        return sum(self.done.values())


def corpus(count: int) -> list[str]:
    """Texts of WORDS words each in turn, from the sentences of the repository."""
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(CORPUS.iterdir())).split()
    draw = random.Random(8)
    starts = (draw.randrange(len(words) - max(WORDS)) for _ in range(count))
    return [" ".join(words[start : start + WORDS[number % len(WORDS)]]) for number, start in enumerate(starts)]


def prepared(texts: int, threads: int, precisions: tuple[str, ...] = PRECISIONS) -> Load:
    """The bundled model in every precision, pruned and dense, and its answers to each text alone on one thread."""
    models, alone, inputs = {}, {}, corpus(texts)
    for precision in precisions:
        for name, pruning in {"pruned": "auto", "dense": None}.items():
            key = f"{precision} {name}"
            serial = minilpt.load(precision=precision, pruning=pruning, threads=1)
            alone[key] = np.concatenate([serial.logits([text], truncation="windows") for text in inputs])
            serial.close()
        models[f"{precision} pruned"] = shared = minilpt.load(precision=precision, threads=threads)
        models[f"{precision} dense"] = shared.with_pruning(None)
    return Load(models, inputs, alone)


def caller(load: Load, tally: Tally, stop: threading.Event, seed: int) -> None:
    """Take jobs until told to stop."""
    draw = random.Random(seed)
    while not stop.is_set():
        name = draw.choice(list(load.models))
        chosen = [draw.randrange(len(load.texts)) for _ in range(draw.choice(COUNTS))]
        found = load.models[name].logits([load.texts[place] for place in chosen], truncation="windows")
        wrong = (found.view(np.uint32) != load.alone[name][chosen].view(np.uint32)).any(axis=1)
        with tally.lock:
            tally.done[name] += len(chosen)
            if wrong.any():
                tally.wrong.append((name, [place for place, differs in zip(chosen, wrong, strict=True) if differs]))


def soak(load: Load, callers: int, seconds: float, predictions: int, every_s: float) -> tuple[Tally, list[float]]:
    """Run the callers until both are reached. Returns the tally, and resident MB every `every_s` seconds."""
    tally, stop, resident_mb = Tally(), threading.Event(), []
    workers = [threading.Thread(target=caller, args=(load, tally, stop, seed)) for seed in range(callers)]
    for worker in workers:
        worker.start()
    try:
        end = time.monotonic() + seconds
        while any(worker.is_alive() for worker in workers):
            if time.monotonic() >= end and tally.predictions >= predictions:
                break
            time.sleep(every_s)
            resident_mb.append(now_mb())
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    return tally, resident_mb


def now_mb() -> float:
    """This process's resident memory in MB (10^6 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) * 1024 / 1e6


def growth(resident_mb: list[float]) -> float:
    """How much the last quarter's median is above the second's, as a share. The first quarter fills the workspaces."""
    quarter = len(resident_mb) // 4
    early, late = np.median(resident_mb[quarter : 2 * quarter]), np.median(resident_mb[-quarter:])
    return float(late / early - 1)


def record(options: argparse.Namespace, tally: Tally, resident_mb: list[float], left: list[str]) -> dict[str, Any]:
    """What the run showed."""
    return {
        "machine": {"system": platform.platform(), "cores": usable_cores(), "python": platform.python_version()},
        "minilpt": minilpt.__version__,
        "callers": options.callers,
        "engine_threads": options.threads,
        "minutes": round(options.seconds_run / 60, 1),
        "predictions": tally.predictions,
        "predictions_by_model": dict(sorted(tally.done.items())),
        "wrong": tally.wrong,
        "resident_mb": [round(value, 1) for value in resident_mb],
        "growth": round(growth(resident_mb), 4),
        "threads_after_close": left,
    }


def main() -> None:
    """Soak, write the result, and end with status 1 if an answer was wrong or a thread stayed."""
    parser = argparse.ArgumentParser(description="load one model from many threads for long")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--predictions", type=int, default=100_000)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the engine")
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--every", type=float, default=15, help="seconds between two looks at the memory")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    load = prepared(options.texts, options.threads)
    began = time.monotonic()
    tally, resident_mb = soak(load, options.callers, 60 * options.minutes, options.predictions, options.every)
    options.seconds_run = time.monotonic() - began
    for model in load.models.values():
        model.close()
    left = sorted(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
    found = record(options, tally, resident_mb, left)
    files.write_json(options.out, found)
    print(json.dumps({key: value for key, value in found.items() if key != "resident_mb"}, indent=1))
    raise SystemExit(bool(tally.wrong or left))


if __name__ == "__main__":
    main()
