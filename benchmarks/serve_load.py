"""The server under load: throughput and latency, batched and one text at a time, before minilpt and ONNX Runtime.

    python -m benchmarks.serve_load                 # some 15 minutes; the machine must be quiet
    python -m benchmarks.serve_load --quick         # every step on little work, to see that it runs

Each variant is a process of its own behind the same server code, with the same weights and threads; its answers are
checked before it is timed. The client, a process too, shares the cores and sends one text a request over kept-alive
connections on the loopback. Closed loop: so many clients, each sending its next text when it has an answer. Open loop:
texts arrive at random times at a mean rate, whatever the server does, and their latency counts from that time; the rate
rises until the 99th percentile passes a bound, and the highest rate within the bound is the variant's throughput.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import minilpt
from minilpt import records
from minilpt.threads import usable_cores

from . import files, workloads
from .peers import DATA, WORK, machine
from .processes import ROOT, convert

# variant -> (engine of `serve_engines`, tokens in a batch: 1 is one text at a time)
VARIANTS = {
    f"{engine}, {how}": (engine, tokens)
    for engine in ("minilpt", "minilpt-dense", "minilpt-int8", "onnxruntime", "onnxruntime-idle")
    for how, tokens in (("batched", 4096), ("one at a time", 1))
}
TEXTS = ("glue/SST-2/dev.tsv", "sentence")
RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
LATE_MS = 100.0  # the bound on the 99th percentile
STEP = 1.15  # from one arrival rate to the next
CLOSE = 1e-3  # how far a score may be from the model's own
CONNECTIONS = 256  # of the open loop; more texts than that under way wait for one, and their latency counts it
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextmanager
def server(engine: str, folder: Path, threads: int, batch_tokens: int) -> Iterator[int]:
    """The port of a server that runs inside the block, and must end in order."""
    command = [sys.executable, "-m", "benchmarks.serve_engines", engine, str(folder), str(threads), str(batch_tokens)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = next(found for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
        yield int(found[1])
        process.send_signal(signal.SIGTERM)
        if process.wait(30):
            raise SystemExit(f"{engine} ended with status {process.returncode}")
    finally:
        process.kill()
        process.communicate()


async def ask(connection: Connection, text: str) -> Any:
    """One prediction over a kept-alive connection; raises SystemExit for any other answer than 200."""
    reader, writer = connection
    body = json.dumps({"inputs": text}).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: loopback\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    content = await reader.readexactly(int(re.search(rb"content-length: (\d+)", answer)[1]))  # type: ignore[index]
    if b" 200 " not in answer.split(b"\r\n", 1)[0]:
        raise SystemExit(f"the server answered {answer.splitlines()[0]!r}: {content!r}")
    return json.loads(content)


async def connected(port: int, count: int) -> list[Connection]:
    """So many connections."""
    return [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]


async def checked(port: int, texts: Sequence[str], expected: Sequence[float]) -> None:
    """Send every text once, which warms the server up too; raises SystemExit for a score that is not the model's."""
    (connection,) = await connected(port, 1)
    for text, score in zip(texts, expected, strict=True):
        found = (await ask(connection, text))[0]["score"]
        if abs(found - score) > CLOSE:
            raise SystemExit(f"{text!r}: the score is {found}, expected {score}")
    connection[1].close()


async def closed_loop(port: int, texts: Sequence[str], clients: int, seconds: float) -> dict[str, float]:
    """`clients` that each wait for an answer before they send the next text."""
    latencies: list[float] = []
    began = time.perf_counter()

    async def client(connection: Connection, start: int) -> None:
        at = start
        while (sent := time.perf_counter()) < began + seconds:
            await ask(connection, texts[at % len(texts)])
            latencies.append(time.perf_counter() - sent)
            at += 1
        connection[1].close()

    connections = await connected(port, clients)
    await asyncio.gather(*(client(connection, 37 * number) for number, connection in enumerate(connections)))
    return summary(latencies, time.perf_counter() - began)


async def open_loop(port: int, texts: Sequence[str], rate: float, seconds: float, seed: int) -> dict[str, float]:
    """Poisson arrivals at `rate` a second."""
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in await connected(port, CONNECTIONS):
        free.put_nowait(connection)
    draw, latencies, under_way = random.Random(seed), [], set()

    async def request(due: float, text: str) -> None:
        connection = await free.get()
        await ask(connection, text)
        latencies.append(time.perf_counter() - due)
        free.put_nowait(connection)

    began = due = time.perf_counter()
    while (due := due + draw.expovariate(rate)) < began + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(request(due, draw.choice(texts)))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    took = time.perf_counter() - began
    while not free.empty():
        free.get_nowait()[1].close()
    return summary(latencies, took) | {"rate": rate}


def summary(latencies: Sequence[float], seconds: float) -> dict[str, float]:
    """Answers a second, and percentiles in milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    return {"per_second": len(latencies) / seconds, "p50_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}


async def measure(port: int, texts: Sequence[str], options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The closed loop for each number of clients, then the open loop's climb."""
    found: dict[str, Any] = {"closed": {}, "open": []}
    for clients in options.clients:
        found["closed"][clients] = await closed_loop(port, texts, clients, options.seconds)
    rate = 0.3 * max(row["per_second"] for row in found["closed"].values())
    while True:
        row = await open_loop(port, texts, rate, options.seconds, seed)
        found["open"].append(row)
        if row["p99_ms"] > LATE_MS or row["per_second"] < 0.9 * rate:
            return found
        rate *= STEP


def best(found: dict[str, Any]) -> float:
    """The highest arrival rate of a round whose 99th percentile was within the bound; 0 if none was."""
    return max((row["rate"] for row in found["open"] if row["p99_ms"] <= LATE_MS), default=0.0)


def table(results: dict[str, Any]) -> str:
    """One row a variant: medians over the rounds, and the lowest and highest of the last column."""
    lines = [f"| served | clients | answers/s | p50 ms | p99 ms | most arrivals/s with p99 within {LATE_MS:g} ms |"]
    lines.append("| --- " * 6 + "|")
    for name, rounds in results["variants"].items():
        clients = list(rounds[0]["closed"])[-1]
        middle = [
            statistics.median(found["closed"][clients][key] for found in rounds)
            for key in ("per_second", "p50_ms", "p99_ms")
        ]
        rates = sorted(map(best, rounds))
        spread = f"{statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"
        lines.append(f"| {name} | {clients} | {middle[0]:.0f} | {middle[1]:.1f} | {middle[2]:.1f} | {spread} |")
    return "\n".join(lines)


def _texts(path: Path, column: str, most: int) -> list[str]:
    with records.opened(path) as file:
        return [str(row[column]) for _, row in records.rows(file, records.format_of(path.name), str(path))][:most]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every variant in interleaved rounds, and write the results after each."""
    options = _options(arguments)
    texts = _texts(options.data / TEXTS[0], TEXTS[1], 64 if options.quick else 872)
    folder = options.work / "bundled"
    if not (folder / "model.safetensors").is_file():
        workloads.write_bundled(folder)
    if (
        any(VARIANTS[name][0].startswith("onnxruntime") for name in options.variants)
        and not (folder / "fused.json").is_file()
    ):
        convert(folder, "onnx", options.work / "log.txt")
    expected = {}
    for engine, load in (
        ("minilpt", {}),
        ("minilpt-dense", {"pruning": None}),
        ("minilpt-int8", {"precision": "int8"}),
    ):
        expected[engine] = [found.score for found in minilpt.load(folder, **load).predict(texts)]
    expected["onnxruntime"] = expected["onnxruntime-idle"] = expected["minilpt-dense"]
    recorded = {"seconds": options.seconds, "rounds": options.rounds, "threads": options.threads, "texts": len(texts)}
    results: dict[str, Any] = {"machine": machine(), "options": recorded, "late_ms": LATE_MS, "variants": {}}
    for turn in range(options.rounds):
        for name in options.variants:
            engine, batch_tokens = VARIANTS[name]
            with server(engine, folder, options.threads, batch_tokens) as port:
                asyncio.run(checked(port, texts, expected[engine]))
                found = asyncio.run(measure(port, texts, options, seed=turn))
            results["variants"].setdefault(name, []).append(found)
            print(f"round {turn + 1}, {name}: {best(found):.0f} arrivals/s", file=sys.stderr)
            files.write_json(options.out, results)
    print(table(results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with glue/SST-2/dev.tsv")
    parser.add_argument("--work", type=Path, default=WORK, help="for prepared models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of the engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="of the closed loop")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    return options


if __name__ == "__main__":
    main()
