"""minilpt beside ONNX Runtime, OpenVINO, CTranslate2 and PyTorch: throughput, latency, memory, cold start.

    python -m benchmarks.peers                      # everything, some two hours on two cores
    python -m benchmarks.peers --quick              # every step on little work, to see that it runs
    python -m benchmarks.peers --report results.json

Every engine runs in a process of its own, with the same number of threads and the same weights, and has its answers
checked before it is timed. Peers get sequences sorted by length and padded per batch; their variants, parallel streams
and batch sizes are tried and the fastest kept. Ratios are taken round by round against the best peer of that round.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from minilpt.threads import usable_cores

from . import coldstart, compare, files, texts, workloads
from .convert import CONVERSIONS
from .engines import ENGINES
from .processes import ROOT, EngineError, convert

WORK = ROOT / "benchmarks" / "prepared"  # prepared models, about 5 GB; what is there is used again
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
DATA = ROOT.parent / "shared" / "data"
PARTS = ("shapes", "bundled", "memory", "cold-start")
PACKAGES = ("minilpt", "numpy", "numba", "llvmlite", "onnx", "onnxruntime", "openvino", "nncf", "ctranslate2", "torch")
PACKAGES += ("transformers", "tokenizers")
CPU_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp")
QUICK_SEQUENCES = {"mnli": 64, "sst-2": 64, "imdb": 8}
VERIFIED = {"mnli": 64, "sst-2": 64, "imdb": 16}
BUNDLED_TEXTS = {"sst-2-dev": 872, "imdb-reviews": 400}
QUICK_TEXTS = {"sst-2-dev": 96, "imdb-reviews": 24}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and write the results after every part."""
    options = _options(arguments)
    if options.report:
        from . import report

        results = files.read_json(options.report)
        report.write(results, options.report)
        print(*filter(None, (report.summary(results), report.latency_summary(results))), sep="\n\n")
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = compare.Bench(
        tuple(options.engines), options.threads, options.rounds, options.quick, options.work / "log.txt", _say, {}
    )
    for name in bench.engines:
        if importlib.util.find_spec(ENGINES[name].package) is None:
            bench.skip(name, EngineError(f"{ENGINES[name].package} is not installed"))
    results = {"machine": machine(), "options": _recorded(options), "left_out": bench.skipped, "shapes": {}}
    if options.add and options.out.is_file():
        results = _continued(results, options.out)
    before, began = results.get("minutes", 0.0), time.monotonic()

    def save() -> None:
        results["minutes"] = before + (time.monotonic() - began) / 60
        files.write_json(options.out, results)

    if "shapes" in options.parts:
        for shape in options.shapes:
            found = results["shapes"].setdefault(shape, {"title": workloads.SHAPES[shape].title, "throughput": {}})
            _run_shape(bench, options, shape, found, save)
    if "bundled" in options.parts or "cold-start" in options.parts:
        _run_bundled(bench, options, results, save)
    if "memory" in options.parts:
        for case, found in _cases(options.work, results):
            _say(f"memory of {case.parent.name}, {case.name}")
            found["peak_mb"] = compare.memory(_afresh(bench), case, found["settings"])
            save()
    save()
    _say(f"wrote {options.out}; draw it with: python -m benchmarks.peers --report {options.out}")


def _continued(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """The results at `path`, to be added to: of this machine, its versions and the same rounds and threads."""
    found = files.read_json(path)
    same = [("machine", "processor"), ("machine", "family_model"), ("machine", "versions")]
    for part, name in [*same, ("options", "rounds"), ("options", "threads"), ("options", "sequences")]:
        if found[part][name] != results[part][name]:
            sys.exit(f"{path}: {name} was {found[part][name]}, now it is {results[part][name]}; leave out --add")
    return dict(found) | {"left_out": results["left_out"]}


def _cases(work: Path, results: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and results of everything whose throughput is known."""
    for shape, found in results["shapes"].items():
        for lengths, case in found["throughput"].items():
            yield work / shape / f"{lengths}-{case['workload']['sequences']}", case
    for name, case in results.get("bundled", {}).items():
        if name != "left_out":
            yield work / "bundled" / name, case


def _run_shape(bench: compare.Bench, options: argparse.Namespace, shape: str, results: Any, save: Any) -> None:
    folder = options.work / shape
    bench = _afresh(bench)
    if not (folder / "model.safetensors").is_file():
        workloads.write_checkpoint(folder, shape)
        files.write_json(folder / "calibration.json", workloads.sequences(shape, "mnli", 128, seed=9))
    _prepare_peers(bench, folder)
    for lengths in options.lengths:
        rows = workloads.sequences(shape, lengths, _count(options, lengths))
        case = folder / f"{lengths}-{len(rows)}"
        case.mkdir(exist_ok=True)
        _say(f"{shape}, {lengths}: {workloads.describe(rows)}")
        files.write_json(case / "rows.json", rows)
        files.write_json(case / "verify.json", rows[: VERIFIED[lengths]])
        _prepare_case(bench, case)
        fresh = _afresh(bench)
        found = {"workload": workloads.describe(rows), "pruning": _counted(case)} | compare.throughput(fresh, case)
        results["throughput"][lengths] = found | {"left_out": fresh.skipped}
        save()
    if options.latency and results["throughput"]:
        first = next(iter(results["throughput"]))
        case = folder / f"{first}-{_count(options, first)}"
        draw = np.random.default_rng(3)
        for tokens in compare.LATENCY_TOKENS:
            rows = [workloads.sequence(shape, tokens, draw) for _ in range(compare.LATENCY_ROWS)]
            files.write_json(case / f"tokens-{tokens}.json", rows)
        _say(f"{shape}: latency at {compare.LATENCY_TOKENS} tokens")
        results["latency"] = compare.latency(bench, case, results["throughput"][first]["settings"])
    results["left_out"] = bench.skipped
    save()


def _run_bundled(bench: compare.Bench, options: argparse.Namespace, results: Any, save: Any) -> None:
    folder = options.work / "bundled"
    if not (folder / "model.safetensors").is_file():
        workloads.write_bundled(folder)
    if "bundled" in options.parts:
        absent = texts.missing(options.data)
        if absent:
            _say(f"bundled model: left out, {options.data} lacks {', '.join(absent)}")
        else:
            cases = texts.write_cases(options.data, folder, QUICK_TEXTS if options.quick else BUNDLED_TEXTS)
            fresh = _afresh(bench)
            _prepare_peers(fresh, folder)
            results["bundled"] = {"left_out": fresh.skipped}
            for case in cases:
                _prepare_case(fresh, case)
                rows = files.read_json(case / "rows.json")
                _say(f"bundled model, {case.name}: {workloads.describe(rows)}")
                found = {"workload": workloads.describe(rows), "pruning": _counted(case)}
                once = _afresh(fresh)
                found |= compare.throughput(once, case)
                found["left_out"] = once.skipped
                if "onnxruntime-int8" in fresh.usable():
                    found["onnxruntime_variants"] = compare.verify_variants(fresh, "onnxruntime-int8", case)
                results["bundled"][case.name] = found
                save()
    if "cold-start" in options.parts:
        fresh = _afresh(bench)
        _say("cold start of the bundled model")
        for kind in ("onnx", "onnx-int8"):
            _once(fresh, folder, kind)
        results["cold_start"] = coldstart.measure(fresh, folder)


def _afresh(bench: compare.Bench) -> compare.Bench:
    """The same bench with its own list of what is left out, so that a failure stays with its model or workload."""
    return compare.Bench(**vars(bench) | {"skipped": dict(bench.skipped)})


def _prepare_peers(bench: compare.Bench, folder: Path) -> None:
    for name in bench.usable():
        try:
            for kind in ENGINES[name].needs:
                _once(bench, folder, kind)
        except EngineError as error:
            bench.skip(name, error)


def _prepare_case(bench: compare.Bench, case: Path) -> None:
    compare.write_parts(case)
    for kind in ("answers", "pruning"):
        _once(bench, case, kind)


def _once(bench: compare.Bench, folder: Path, kind: str) -> None:
    """Convert unless the last file of that conversion is there, newer than the rows that a case was made from."""
    if not (folder / CONVERSIONS[kind][1]).is_file():
        _say(f"  preparing {folder.name}: {kind}")
        convert(folder, kind, bench.log)


def _counted(case: Path) -> Any:
    record = files.read_json(case / "pruned.json")
    del record["answers"]
    return record | {"rule": files.read_json(case / "ltp.json")}


def _count(options: argparse.Namespace, lengths: str) -> int:
    if options.sequences and lengths != "imdb":
        return int(options.sequences)
    if options.sequences:
        return max(8, options.sequences // 8)
    return QUICK_SEQUENCES[lengths] if options.quick else workloads.LENGTHS[lengths].sequences


def machine() -> dict[str, Any]:
    """Where, when and with what versions this was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(values.get("flags", values.get("Features", "")).split())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.date.today().isoformat(),
        "processor": values.get("model name", platform.processor() or platform.machine()),
        "family_model": [values.get("cpu family"), values.get("model")],
        "cores": usable_cores(),
        "cores_of_machine": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "load_at_start": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    names = ("shapes", "lengths", "engines", "rounds", "threads", "sequences", "quick")
    return {name: getattr(options, name) for name in names}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--parts", choices=PARTS, default=PARTS, **several, help=" ".join(PARTS))
    parser.add_argument("--shapes", choices=workloads.SHAPES, default=[*workloads.SHAPES], **several)
    parser.add_argument("--lengths", choices=workloads.LENGTHS, default=[*workloads.LENGTHS], **several)
    parser.add_argument("--engines", choices=ENGINES, default=[*ENGINES], **several, help=" ".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=None, help="5, with --quick 2")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="of every engine; all usable cores")
    parser.add_argument("--sequences", type=int, help="of MNLI- and SST-2-like lengths, an eighth of it for IMDB-like")
    parser.add_argument("--no-latency", dest="latency", action="store_false")
    parser.add_argument("--quick", action="store_true", help="little work, first variants only: to see that it runs")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with glue/SST-2 and long (see texts.py)")
    parser.add_argument("--work", type=Path, default=WORK, help="prepared models are kept here")
    parser.add_argument("--fresh", action="store_true", help="prepare everything again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="keep what --out holds of this machine, run the rest")
    parser.add_argument("--report", type=Path, help="of a results file: tables and chart beside it, summary on stdout")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.work = options.work.resolve()
    if options.fresh and not options.report:
        shutil.rmtree(options.work, ignore_errors=True)
    return options


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
