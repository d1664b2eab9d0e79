"""Engines on one case: settings chosen for each, answers verified, then rounds in which every engine has its turn.

A case is a folder inside a model's folder: `rows.json` (the work), `verify.json`, `answers.npz`, `ltp.json`,
`pruned.json`; see `convert`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import files
from .engines import BATCH_TOKENS, BATCHES, ENGINES, Settings
from .processes import EngineError, Worker

EPS = float(np.finfo(np.float32).eps)
# Bound of a float32 engine's logits: as derived in tests/tolerances.py, 8 times what float32 costs PyTorch against
# float64 over the same sequences, and 4 units in the last place of the largest logit.
FACTOR, FLOOR_ULPS = 8.0, 4.0
# A pruned engine may rightly differ where a score lies within rounding of its threshold.
PRUNED_MISSES = 1
LATENCY_TOKENS = (16, 40, 128, 384)
LATENCY_ROWS = 8

Say = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """What stays the same for a whole run. skipped: engine -> why it is not in the results; grows."""

    engines: tuple[str, ...]
    threads: int
    rounds: int
    quick: bool
    log: Path
    say: Say
    skipped: dict[str, str]

    def usable(self, names: Iterable[str] | None = None) -> list[str]:
        """The engines that nothing has gone wrong with."""
        return [name for name in (self.engines if names is None else names) if name not in self.skipped]

    def skip(self, name: str, error: EngineError) -> None:
        self.skipped[name] = str(error)
        self.say(f"  {name} is left out: {error}")

    def open(self, name: str, case: Path, settings: Settings) -> Worker:
        settings = settings | ({"pruning": str(case / "ltp.json")} if ENGINES[name].pruned else {})
        return Worker(name, case.parent, settings, self.threads, self.log)


def choose(bench: Bench, name: str, case: Path) -> Settings:
    """The fastest settings for this engine on the case: variant and streams first, then the batch.

    Raises EngineError if no variant runs; a variant that fails where another runs is passed over.
    """
    engine = ENGINES[name]
    if engine.ours:
        return _fastest_batch(bench, name, case, {}, BATCH_TOKENS)
    streams = (1,) if bench.threads == 1 else (1, bench.threads)
    tried: list[tuple[float, Settings]] = []
    errors: list[EngineError] = []
    for variant in engine.variants[:1] if bench.quick else engine.variants:
        for count in streams:
            settings = dict(variant) | {"streams": count, "batch": 16}
            try:
                with bench.open(name, case, settings) as worker:
                    tried.append((_seconds(worker, case / "few.json", settings), settings))
            except EngineError as error:
                errors.append(error)
    if not tried:
        raise errors[0]
    return _fastest_batch(bench, name, case, min(tried, key=lambda pair: pair[0])[1], BATCHES)


def _fastest_batch(bench: Bench, name: str, case: Path, settings: Settings, sizes: Sequence[int]) -> Settings:
    with bench.open(name, case, settings) as worker:
        found = {size: _seconds(worker, case / "half.json", {"batch": size}) for size in sizes}
    return settings | {"batch": min(found, key=lambda size: found[size])}


def _seconds(worker: Worker, rows: Path, settings: Settings) -> float:
    worker.ask("give", rows=str(rows), settings=settings)
    return min(worker.ask("throughput")["seconds"] for _ in range(2))


def verify_variants(bench: Bench, name: str, case: Path) -> dict[str, Any]:
    """`verify` for every variant of an engine that runs, by what names it: the fastest one may not be the closest."""
    found = {}
    for variant in ENGINES[name].variants:
        try:
            with bench.open(name, case, dict(variant) | {"batch": 16}) as worker:
                found["/".join(map(str, variant.values()))] = verify(worker, case, {"batch": 16})
        except EngineError as error:
            bench.say(f"  {name} {variant}: {error}")
    return found


def write_parts(case: Path) -> None:
    """`few.json` and `half.json`: every fourth and every second row, for choosing settings."""
    rows = sorted(files.read_json(case / "rows.json"), key=len)
    files.write_json(case / "few.json", rows[::4])
    files.write_json(case / "half.json", rows[::2])


def verify(worker: Worker, case: Path, batch: Settings) -> dict[str, Any]:
    """Compare the engine with the truth of `answers.npz` or `pruned.json`. Raises EngineError beyond a fp32 bound."""
    engine = ENGINES[worker.name]
    if engine.pruned:
        stored = files.read_json(case / "pruned.json")["answers"]
        answers = {key: np.array(stored[key]) for key in ("float32", "float64")}
    else:
        answers = dict(np.load(case / "answers.npz"))
    truth = answers["float64"]
    worker.ask("give", rows=str(case / "verify.json"), settings=batch)
    every = np.array(worker.ask("logits")["logits"])
    found = every[: len(truth)]
    error = np.abs(found - truth)
    bound = FACTOR * np.abs(answers["float32"] - truth).max() + FLOOR_ULPS * EPS * np.abs(truth).max()
    misses = int((error.max(axis=1) > bound).sum())
    record = {
        "sequences": len(truth),
        "max_difference": float(error.max()),
        "mean_difference": float(error.mean()),
        "argmax_agreement": float((found.argmax(axis=1) == truth.argmax(axis=1)).mean()),
        "spread_of_logits": float(truth.std(axis=0).mean()),
    }
    if (case / "labels.json").is_file():
        record["accuracy"] = 100 * float((every.argmax(axis=1) == files.read_json(case / "labels.json")).mean())
    if engine.precision != "fp32":
        return record
    if misses > (PRUNED_MISSES if engine.pruned else 0):
        raise EngineError(f"{worker.name}: {misses} answers differ by up to {error.max():.2e}, more than {bound:.2e}")
    return record | {"bound": float(bound), "beyond_bound": misses}


@contextmanager
def opened(bench: Bench, case: Path, settings: dict[str, Settings]) -> Iterator[dict[str, Worker]]:
    """A worker for every engine that has settings and can be opened."""
    with ExitStack() as stack:
        workers = {}
        for name in bench.usable(settings):
            try:
                workers[name] = stack.enter_context(bench.open(name, case, settings[name]))
            except EngineError as error:
                bench.skip(name, error)
        yield workers


def in_turns(bench: Bench, workers: dict[str, Worker], task: Callable[[Worker], Any]) -> list[dict[str, Any]]:
    """`task` on every worker, round by round, the order turned by one each time. One result per engine and round.

    Each turn ends when the worker has come to rest, so that no thread pool still spins while the next one works.
    """
    rounds = []
    for turn in range(bench.rounds):
        names = bench.usable(workers)
        order = names[turn % len(names) :] + names[: turn % len(names)] if names else []
        results = {}
        for name in order:
            try:
                results[name] = task(workers[name])
                workers[name].settle()
            except EngineError as error:
                bench.skip(name, error)
        rounds.append(results)
    return rounds


def throughput(bench: Bench, case: Path) -> dict[str, Any]:
    """Of every engine on the case: settings, verification, seconds per round; how idle the others were."""
    settings, verified, idle = {}, {}, []
    for name in bench.usable():
        try:
            settings[name] = choose(bench, name, case)
            bench.say(f"  {name}: {settings[name]}")
        except EngineError as error:
            bench.skip(name, error)
    with opened(bench, case, settings) as workers:
        for name in list(workers):
            batch = {"batch": settings[name]["batch"]}
            try:
                verified[name] = verify(workers[name], case, batch)
                workers[name].ask("give", rows=str(case / "rows.json"), settings=batch)
                workers[name].ask("throughput")  # warms up
                workers[name].settle()
            except EngineError as error:
                bench.skip(name, error)

        def turn(worker: Worker) -> float:
            others = [workers[name] for name in bench.usable(workers) if name != worker.name]
            before = sum(other.cpu_seconds() for other in others)
            seconds = float(worker.ask("throughput")["seconds"])
            idle.append((sum(other.cpu_seconds() for other in others) - before) / seconds)
            return seconds

        rounds = in_turns(bench, workers, turn)
    return {
        "settings": settings,
        "verified": verified,
        "seconds": rounds,
        "cores_used_by_waiting_engines": {"mean": statistics.fmean(idle), "max": max(idle)} if idle else None,
    }


def memory(bench: Bench, case: Path, settings: dict[str, Settings]) -> dict[str, float]:
    """Peak MB of every engine, each in a process that opens it and runs the case once."""
    peaks = {}
    for name in bench.usable(settings):
        try:
            with bench.open(name, case, settings[name]) as worker:
                worker.ask("give", rows=str(case / "rows.json"), settings={"batch": settings[name]["batch"]})
                worker.ask("throughput")
                peaks[name] = worker.peak_mb()
        except EngineError as error:
            bench.skip(name, error)
    return peaks


def latency(bench: Bench, case: Path, settings: dict[str, Settings]) -> dict[str, Any]:
    """p50 and p95 in ms of one sequence at a time, per round, at each of LATENCY_TOKENS. Files: `tokens-N.json`.

    settings: where the variants come from; the variant is chosen again here, with all threads on the one sequence.
    """
    alone = {name: _fastest_alone(bench, name, case, settings[name]) for name in bench.usable(settings)}
    seconds = 0.3 if bench.quick else 1.0
    rounds: dict[str, list[dict[str, Any]]] = {}
    with opened(bench, case, alone) as workers:
        for tokens in LATENCY_TOKENS:

            def turn(worker: Worker, rows: str = str(case / f"tokens-{tokens}.json")) -> dict[str, float]:
                worker.ask("give", rows=rows, settings={"batch": 1 if not ENGINES[worker.name].ours else 4096})
                found = worker.ask("latency", warm=LATENCY_ROWS, seconds=seconds, least=20)["ms"]
                p50, p95 = np.percentile(found, [50, 95])
                return {"p50": float(p50), "p95": float(p95), "runs": len(found)}

            rounds[str(tokens)] = in_turns(bench, workers, turn)
    return {"settings": alone, "ms": rounds}


def _fastest_alone(bench: Bench, name: str, case: Path, settings: Settings) -> Settings:
    """Among the engine's variants, the one with the lowest median at 40 tokens."""
    variants = [settings] if bench.quick or ENGINES[name].ours else [dict(v) for v in ENGINES[name].variants]
    found = []
    for variant in variants:
        chosen = variant | {"streams": 1, "batch": 1}
        try:
            with bench.open(name, case, chosen) as worker:
                worker.ask("give", rows=str(case / "tokens-40.json"), settings=chosen)
                ms = worker.ask("latency", warm=LATENCY_ROWS, seconds=0.5, least=20)["ms"]
                found.append((statistics.median(ms), chosen))
        except EngineError:
            continue  # variants that cannot run were reported when the settings were chosen
    return min(found, key=lambda pair: pair[0])[1] if found else settings | {"streams": 1, "batch": 1}


def clock() -> str:
    """Local time, for progress lines."""
    return time.strftime("%H:%M:%S")
