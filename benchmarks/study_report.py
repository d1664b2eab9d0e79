"""Tables and charts of what `pruning_study` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from minilpt.tasks import TASKS

from . import files
from .report import table
from .study_data import SOURCES

METHODS = {
    "learned": "learned LTP",
    "tuned": "calibrated, weights tuned",
    "calibrated": "calibrated, no training",
    "ramp": "manual ramp",
    "topk": "top-k cascade",
    "relative": "relative threshold",
}
SHARE = 0.5  # of the table's operating points


def metric_of(name: str) -> str:
    """The task's first metric."""
    return TASKS[SOURCES[name].task].metrics[0]


def summary(results: Mapping[str, Any], share: float = SHARE) -> str:
    """Each task's metric, dense and under every method at one share of the FLOPs; points lost in brackets."""
    rows = [["task (metric)", "dense", "GFLOPs", *METHODS.values()]]
    for name, found in results["tasks"].items():
        metric = metric_of(name)
        dense = found["dense"]["plain"]
        cells = [_cell(found, method, metric, share) for method in METHODS]
        rows.append([f"{name} ({metric})", f"{dense[metric]:.2f}", f"{dense['gflops']:.2f}", *cells])
    return table(rows)


def _point(found: Mapping[str, Any], method: str, share: float) -> Mapping[str, Any] | None:
    return next((point for point in found["points"].get(method, []) if point["share"] == share), None)


def _cell(found: Mapping[str, Any], method: str, metric: str, share: float) -> str:
    point = _point(found, method, share)
    if point is None:
        return "-"
    lost, low, high = point["difference"]
    return f"{point[metric]:.2f} ({-lost:+.2f}; {-high:+.2f} to {-low:+.2f})"


def reach(results: Mapping[str, Any], points: float = 1.0) -> str:
    """How far each method goes: the least share of the counted FLOPs up to which it never lost more points than that.

    Shares and points are of the dev set, on which nothing was chosen; "-" if the first share measured loses more.
    """
    rows = [["task (metric)", "dense", "tokens", *METHODS.values()]]
    for name, found in results["tasks"].items():
        metric = metric_of(name)
        cells = [_reached(found["points"].get(method, []), points) for method in METHODS]
        rows.append([f"{name} ({metric})", f"{found['dense']['plain'][metric]:.2f}", f"{found['tokens']:.0f}", *cells])
    return table(rows)


def _reached(measured: Sequence[Mapping[str, Any]], points: float) -> str:
    ordered = sorted(measured, key=lambda point: -point["counted"])
    within = list(takewhile(lambda point: point["difference"][0] <= points, ordered))
    return f"{within[-1]['counted']:.2f} ({-within[-1]['difference'][0]:+.2f})" if within else "-"


def details(results: Mapping[str, Any]) -> str:
    """Every task's operating points at one share: counted and executed reduction, and the time that it saves."""
    rows = [["task", "method", "GFLOPs", "counted", "executed", "time, dense / pruned"]]
    for name, found in results["tasks"].items():
        for method, label in METHODS.items():
            point, speed = _point(found, method, SHARE), found["speedup"].get(method)
            if point is not None and speed is not None:
                work = [f"{point['gflops']:.2f}", *(f"{1 / point[kind]:.2f} x" for kind in ("counted", "executed"))]
                rows.append([name, label, *work, f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})"])
    return table(rows)


def frontiers(results: Mapping[str, Any]) -> str:
    """Every measured point: share of the counted FLOPs on the dev set and the metric."""
    parts = []
    for name, found in results["tasks"].items():
        metric = metric_of(name)
        rows = [["method", *(f"{share:g}" for share in _shares(found))]]
        for method, label in METHODS.items():
            points = [_point(found, method, share) for share in _shares(found)]
            cells = ["-" if point is None else f"{point[metric]:.2f} at {point['counted']:.2f}" for point in points]
            rows.append([label, *cells])
        calibration = found["calibration"]["calibrated"]
        parts.append(
            f"**{name}** ({found['texts']} dev texts of {found['tokens']:.0f} tokens on average, dense "
            f"{found['dense']['plain'][metric]:.2f} plain and {found['dense']['learned'][metric]:.2f} with the learned "
            f"model's weights; calibrated on {calibration['texts']} texts in {calibration['seconds']:.0f} s)"
        )
        parts.append(table(rows))
    return "\n\n".join(parts)


def _shares(found: Mapping[str, Any]) -> list[float]:
    return sorted({point["share"] for points in found["points"].values() for point in points}, reverse=True)


def write(results: Mapping[str, Any], path: Path) -> None:
    """Everything as Markdown and as a chart, beside the results file at `path`."""
    machine = results["machine"]
    head = (
        f"# Results of `python -m benchmarks.pruning_study`, {machine['date']}\n\n"
        f"{machine['processor']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + ". 6-layer models; dense is the plain fine-tuned model without padding. Brackets: points against it, and "
        "95 % of a paired bootstrap over the dev texts."
    )
    parts = [head, f"At {SHARE:g} of the counted FLOPs:", summary(results), details(results)]
    parts += ["Within a point of dense:", reach(results), frontiers(results)]
    files.write_text(path.with_suffix(".md"), "\n\n".join(parts) + "\n")
    draw(results, path.with_suffix(".svg"))


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The paper's Fig. 5: metric against counted FLOPs for every method, dense as a line, bars for standard errors."""
    from matplotlib.figure import Figure

    tasks = results["tasks"]
    rows = -(-len(tasks) // 2)
    figure = Figure(figsize=(12, 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, (name, found) in zip(axes.flat, tasks.items(), strict=False):
        metric = metric_of(name)
        dense = found["dense"]["plain"]
        axis.axhline(dense[metric], color="black", linewidth=1, linestyle=":", label="dense")
        for method, label in METHODS.items():
            points = found["points"].get(method, [])
            values, errors = [p[metric] for p in points], [p["standard_error"] for p in points]
            shares = [point["counted"] for point in points]
            axis.errorbar(shares, values, errors, fmt="o-", markersize=3, capsize=2, label=label)
        axis.set_ylim(bottom=dense[metric] - 12)
        axis.set_title(f"{name}, {metric}", fontsize=10)
        axis.set_xlabel("counted FLOPs, share of dense")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path)
