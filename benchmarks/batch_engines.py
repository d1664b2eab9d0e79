"""The same texts by a plain process, Ray Data, Spark and Dask: what an engine adds to the time of the model.

    python -m benchmarks.batch_engines --data DATA [--texts 2000] [--rounds 3]
    python -m benchmarks.batch_engines --report   # the table of docs/deployment.md, from the stored result

DATA/long/imdb_dev_2000.jsonl holds the texts. Each run is a process of its own, the engines take turns, and all have
the machine's cores: the plain process as threads, the others as workers of one thread each. The clock starts when the
engine is up and runs until every answer is here: loading the model in each worker counts, starting the engine does not.
Answers must be those of the plain process, bit for bit, each row once. Needs Java and the extra `test-engines`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import minilpt
from minilpt.evaluate import machine
from minilpt.integrations import BatchPredictor
from minilpt.threads import usable_cores

from . import files
from .processes import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "batch_engines.json"
REVIEWS = "long/imdb_dev_2000.jsonl"
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
TITLES = {"plain": "plain `predict`", "ray": "Ray Data", "spark": "Spark, `mapInPandas`", "dask": "Dask, processes"}
Answers = list[tuple[int, str, float]]
Job = Callable[[list[str]], Answers]


@contextmanager
def plain() -> Iterator[Job]:
    """One process, a thread for each core."""

    def job(texts: list[str]) -> Answers:
        return [(row, each.label, each.score) for row, each in enumerate(minilpt.load().predict(texts))]

    yield job


@contextmanager
def ray() -> Iterator[Job]:
    """An actor of one thread for each core."""
    import ray

    ray.init(num_cpus=usable_cores(), include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")

    def job(texts: list[str]) -> Answers:
        rows = [{"row": row, "text": text} for row, text in enumerate(texts)]
        answers = ray.data.from_items(rows, override_num_blocks=4 * usable_cores()).map_batches(
            BatchPredictor,
            fn_constructor_kwargs={"outputs": ["label", "score"]},
            batch_size=256,
            num_cpus=1,
            concurrency=usable_cores(),
        )
        return [(row["row"], row["label"], row["score"]) for row in answers.drop_columns(["text"]).take_all()]

    yield job
    ray.shutdown()


@contextmanager
def spark() -> Iterator[Job]:
    """A worker for each core, on this machine."""
    from pyspark.sql import SparkSession

    local = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    session = SparkSession.builder.master(f"local[{usable_cores()}]").config(map=local).getOrCreate()
    predict = BatchPredictor()

    def job(texts: list[str]) -> Answers:
        table = session.createDataFrame(list(enumerate(texts)), "row long, text string").repartition(2 * usable_cores())
        kinds = "row long, text string, label string, score float"
        answers = table.mapInPandas(lambda batches: map(predict, batches), kinds).select("row", "label", "score")
        return [(each.row, each.label, each.score) for each in answers.collect()]

    yield job
    session.stop()


@contextmanager
def dask() -> Iterator[Job]:
    """A process for each core."""
    import dask.dataframe
    import pandas

    predict = BatchPredictor(threads=1)

    def job(texts: list[str]) -> Answers:
        table = pandas.DataFrame({"row": range(len(texts)), "text": texts})
        frame = dask.dataframe.from_pandas(table, npartitions=2 * usable_cores())
        kinds = {"row": "int64", "text": "object", "label": "object", "score": "float32"}
        # chunksize: Dask hands out six partitions at a time if not told otherwise, here all of them to one process.
        lazy, cores = frame.map_partitions(predict, meta=kinds), usable_cores()
        answers = lazy.compute(scheduler="processes", num_workers=cores, chunksize=1)
        return [(row, label, score) for row, label, score in answers[["row", "label", "score"]].itertuples(index=False)]

    yield job


ENGINES = {"plain": plain, "ray": ray, "spark": spark, "dask": dask}


def one_run(engine: str, texts: Path, out: Path) -> None:
    """The job of a child process: seconds and answers to a file."""
    with ENGINES[engine]() as job:
        content = json.loads(texts.read_text())
        began = time.perf_counter()
        answers = job(content)
        seconds = time.perf_counter() - began
    out.write_text(json.dumps({"seconds": seconds, "answers": sorted(answers)}))


def measure(texts: list[str], rounds: int) -> dict[str, Any]:
    """Texts per second of every engine, and its share of the plain run's of the same round: median, least, most."""
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as room:
        content, out, wanted = Path(room, "texts.json"), Path(room, "out.json"), None
        content.write_text(json.dumps(texts))
        for turn in range(rounds):
            for engine in ENGINES:
                command = [sys.executable, "-m", "benchmarks.batch_engines", "--run", engine, str(content), str(out)]
                environment = os.environ | QUIET | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
                subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
                found = json.loads(out.read_text())
                wanted = wanted or found["answers"]
                assert found["answers"] == wanted, f"{engine} gives other answers"
                seconds[engine].append(found["seconds"])
                print(f"round {turn}: {engine}: {found['seconds']:.2f} s", flush=True)
    rows = {}
    for engine, times in seconds.items():
        shares = [base / spent for base, spent in zip(seconds["plain"], times, strict=True)]
        rows[engine] = {
            "texts_per_second": len(texts) / statistics.median(times),
            "of_plain": [statistics.median(shares), min(shares), max(shares)],
        }
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | texts per second | of the plain run's |", "| --- | --- | --- |"]
    for engine, row in result["engines"].items():
        middle, least, most = row["of_plain"]
        share = "" if engine == "plain" else f"{middle:.2f} ({least:.2f} to {most:.2f})"
        lines.append(f"| {TITLES[engine]} | {row['texts_per_second']:.0f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("ENGINE", "TEXTS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        one_run(options.run[0], Path(options.run[1]), Path(options.run[2]))
    elif options.report:
        print(table(files.read_json(RESULTS)))
    elif options.data is None:
        parser.error("--data is needed")
    else:
        with open(options.data / REVIEWS, encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in islice(lines, options.texts)]
        versions = {name: metadata.version(name) for name in ("ray", "pyspark", "dask")}
        where = machine()
        where["versions"] |= versions
        files.write_json(RESULTS, {"machine": where, "texts": len(texts), "engines": measure(texts, options.rounds)})
        print(table(files.read_json(RESULTS)))


if __name__ == "__main__":
    main()
