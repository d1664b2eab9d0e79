"""Tables and a chart of the results that `peers` wrote: every ratio against the best peer of the same precision.

A ratio is taken in every round against the peer that was fastest in that round; its median stands, with its range.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .coldstart import LABELS
from .engines import ENGINES

Rounds = Sequence[Mapping[str, float]]
OURS = [name for name, engine in ENGINES.items() if engine.ours]
WANTED = {  # the aims: (shape, engine) -> throughput as a multiple of the best peer's
    ("roberta-base", "minilpt-fp32"): 1.25,
    ("roberta-base", "minilpt-fp32-pruned"): 2.4,
    ("roberta-base", "minilpt-int8"): 1.5,
    ("roberta-base", "minilpt-int8-pruned"): 3.0,
    ("minilm-l6", "minilpt-fp32"): 1.25,
    ("minilm-l6", "minilpt-fp32-pruned"): 2.2,
    ("minilm-l6", "minilpt-int8"): 1.4,
    ("minilm-l6", "minilpt-int8-pruned"): 2.6,
}


def peers_of(name: str) -> list[str]:
    """The other engines of the same precision."""
    precision = ENGINES[name].precision
    return [peer for peer, engine in ENGINES.items() if not engine.ours and engine.precision == precision]


def ratio(rounds: Rounds, name: str) -> tuple[float, float, float] | None:
    """Median, lowest and highest over the rounds of the fastest peer's time over this engine's."""
    found = []
    for times in rounds:
        peers = [times[peer] for peer in peers_of(name) if peer in times]
        if name in times and peers:
            found.append(min(peers) / times[name])
    return (statistics.median(found), min(found), max(found)) if found else None


def _shown(values: tuple[float, float, float] | None) -> str:
    return "-" if values is None else f"{values[0]:.2f} ({values[1]:.2f} to {values[2]:.2f})"


def kernel_summary(results: Mapping[str, Any], avx2: Mapping[str, Any]) -> str:
    """A sentence on the whole forward pass of `benchmarks.kernels`, here and on the AVX2 rung."""
    shares = [results["forward"][name]["share_of_peak"]["dense"] for name in ("fp32", "int8")]
    gains = [found["forward"][name]["pruning_gain"] for found in (results, avx2) for name in ("fp32", "int8")]
    times = [f"{gain['time']:.2f}" for gain in gains]
    return (
        f"On one thread the RoBERTa-base forward pass reaches {shares[0]:.0%} of the core's measured float32 peak and "
        f"{shares[1]:.0%} of its int8 peak, and pruning gains {times[0]} x and {times[1]} x in time for "
        f"{gains[0]['executed']:.2f} x fewer executed FLOPs; with the AVX2 instructions that Haswell began, {times[2]} "
        f"x and {times[3]} x (`python -m benchmarks.kernels`, with `MINILPT_ISA=avx2`)."
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def throughput_table(case: Mapping[str, Any], wanted: Callable[[str], float | None] = lambda name: None) -> str:
    """Engines of one workload, fastest first: sequences per second, ratio, peak memory, largest logit difference."""
    rounds, count = case["seconds"], case["workload"]["sequences"]
    medians = {
        name: statistics.median(count / times[name] for times in rounds if name in times)
        for name in ENGINES
        if any(name in times for times in rounds)
    }
    rows = [["engine", "sequences/s", "x best peer", "wanted", "peak MB", "logits off by at most"]]
    for name in sorted(medians, key=lambda name: -medians[name]):
        aim = wanted(name)
        rows.append(
            [
                ENGINES[name].label,
                f"{medians[name]:.1f}",
                _shown(ratio(rounds, name)) if name in OURS else "",
                "" if aim is None else f"{aim:g}",
                f"{case['peak_mb'][name]:.0f}" if name in case.get("peak_mb", ()) else "-",
                f"{case['verified'][name]['max_difference']:.1e}" if name in case["verified"] else "-",
            ]
        )
    return table(rows)


def latency_table(latency: Mapping[str, Any]) -> str:
    """p50 in ms of one sequence alone, median of the rounds, at each length; ours as a share of the best peer's."""
    lengths = list(latency["ms"])
    names = [name for name in ENGINES if any(name in turn for turn in latency["ms"][lengths[0]])]
    rows = [["engine", *(f"{length} tokens" for length in lengths)]]
    for name in names:
        cells = []
        for length in lengths:
            turns = [{key: value["p50"] for key, value in turn.items()} for turn in latency["ms"][length]]
            cell = f"{statistics.median(turn[name] for turn in turns if name in turn):.2f}"
            found = ratio(turns, name) if name in OURS else None
            cells.append(cell if found is None else f"{cell} ({1 / found[0]:.2f} x)")
        rows.append([ENGINES[name].label, *cells])
    return table(rows)


def cold_start_table(found: Mapping[str, Any]) -> str:
    """Seconds from process start to the first answer and peak memory, medians."""
    rows = [["program", "cold s", "warm s", "peak MB"]]
    for name, runs in found.items():
        if runs["warm"]:
            seconds = [f"{statistics.median(run['seconds'] for run in runs[kind]):.2f}" for kind in ("cold", "warm")]
            label = LABELS[name] if name in LABELS else ENGINES[name].label
            rows.append([label, *seconds, f"{statistics.median(run['peak_mb'] for run in runs['warm']):.0f}"])
    return table(rows)


def _fastest_peer(rounds: Rounds, precision: str) -> str:
    """The label of the peer with the lowest median time."""
    medians = {
        name: statistics.median(times[name] for times in rounds if name in times)
        for name, engine in ENGINES.items()
        if not engine.ours and engine.precision == precision and any(name in times for times in rounds)
    }
    return ENGINES[min(medians, key=lambda name: medians[name])].label if medians else "-"


def _workloads(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(title, case) of everything whose throughput was measured."""
    shapes = [
        (f"{found['title']}, {lengths}", case)
        for found in results.get("shapes", {}).values()
        for lengths, case in found["throughput"].items()
    ]
    texts = [case for case in results.get("bundled", {}).items() if case[0] != "left_out"]
    return shapes + [(f"bundled model, {name}", case) for name, case in texts]


def summary(results: Mapping[str, Any]) -> str:
    """One line for each workload: throughput as a multiple of the fastest peer's of the same precision."""
    rows = [["throughput as a multiple of the fastest peer's", *(ENGINES[name].label for name in OURS), "that peer"]]
    for title, case in _workloads(results):
        rounds = case["seconds"]
        peer = "; ".join(f"{_fastest_peer(rounds, precision)}" for precision in ("fp32", "int8"))
        rows.append([title, *(_shown(ratio(rounds, name)) for name in OURS), peer])
    return table(rows)


def latency_summary(results: Mapping[str, Any]) -> str:
    """p50 of one sequence alone in int8, as a share of the fastest int8 peer's; empty where none was measured."""
    rows: list[list[str]] = []
    for found in results.get("shapes", {}).values():
        if "latency" not in found:
            continue
        ms = found["latency"]["ms"]
        if not rows:
            rows = [["p50 of one sequence alone, int8, as a share", *(f"{length} tokens" for length in ms)]]
        for name in (name for name in OURS if ENGINES[name].precision == "int8"):
            shares = [
                ratio([{key: value["p50"] for key, value in turn.items()} for turn in turns], name)
                for turns in ms.values()
            ]
            cells = ["-" if share is None else f"{1 / share[0]:.2f}" for share in shares]
            rows.append([f"{found['title']}, {ENGINES[name].label}", *cells])
    return table(rows) if rows else ""


def write(results: Mapping[str, Any], path: Path) -> None:
    """Everything as Markdown and as a chart, beside the results file at `path`."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    head = [
        f"# Results of `python -m benchmarks.peers`, {machine['date']}",
        f"{machine['processor']} (family {machine['family_model'][0]}, model {machine['family_model'][1]}), "
        f"{results['options']['threads']} threads, {', '.join(machine['flags'])}; Python {machine['python']}; "
        f"{versions}. {results['options']['rounds']} rounds, interleaved; medians, and ratios with their range over "
        f"the rounds. Everything, settings included, is in `{path.name}`.",
        *([f"Left out: {results['left_out']}"] if results["left_out"] else []),
    ]
    files.write_text(path.with_suffix(".md"), "\n\n".join([*head, tables(results)]) + "\n")
    draw(results, path.with_suffix(".svg"))


def tables(results: Mapping[str, Any]) -> str:
    """Everything of a results file, as Markdown."""
    parts = []
    for shape, found in results.get("shapes", {}).items():
        for lengths, case in found["throughput"].items():
            workload, pruning = case["workload"], case["pruning"]
            parts += [
                f"**{found['title']}, {lengths} lengths** ({workload['sequences']} sequences, mean "
                f"{workload['mean']:.0f} tokens; pruned to {pruning['counted_ratio']:.2f} of the counted FLOPs)",
                throughput_table(case, lambda name, shape=shape: WANTED.get((shape, name))),
            ]
        if "latency" in found:
            parts += [f"**{found['title']}, one sequence at a time, p50 in ms**", latency_table(found["latency"])]
    for name, case in results.get("bundled", {}).items():
        if name != "left_out":
            workload = case["workload"]
            parts += [
                f"**Bundled model, {name}** ({workload['sequences']} texts, mean {workload['mean']:.0f} tokens)",
                throughput_table(case),
            ]
    if "cold_start" in results:
        parts += ["**Process start to the first answer**", cold_start_table(results["cold_start"])]
    return "\n\n".join(parts)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A bar chart of every workload's sequences per second, as an SVG or whatever the path's ending says."""
    cases = _workloads(results)
    if not cases:
        return
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = -(-len(cases) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 3.6 * rows), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, (title, case) in zip(axes.flat, cases, strict=False):
        rounds, count = case["seconds"], case["workload"]["sequences"]
        found = {n: [count / times[n] for times in rounds if n in times] for n in ENGINES}
        names = sorted((n for n in found if found[n]), key=lambda n: statistics.median(found[n]))
        values = [statistics.median(found[n]) for n in names]
        colours = ["#1f6feb" if n in OURS else "#8b949e" for n in names]
        axis.barh([ENGINES[n].label for n in names], values, color=colours)
        for place, value in enumerate(values):
            axis.text(value, place, f" {value:.0f}", va="center", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("sequences per second")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
