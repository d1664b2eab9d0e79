"""Tables of docs/integer-arithmetic.md, from results/integer.json.

python -m benchmarks.integer_report
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import files
from .integer import RESULTS

Results = Mapping[str, Any]
TITLES = {"minilm-l6": "MiniLM-L6 (6 x 384 x 1536)", "roberta-base": "RoBERTa-base (12 x 768 x 3072)"}


def accuracy_table(results: Results) -> str:
    """A row for each model and precision: the metric, what is lost with its interval, counted FLOPs."""
    lines = [
        "| task | model | accuracy | lost (95 % of a paired bootstrap) | FLOPs |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, task in results["accuracy"].items():
        for title, row in task["rows"].items():
            if "counted" in row:
                estimate, low, high = row["lost"]
                lost = f"{estimate:.2f} ({low:.2f} to {high:.2f})"
                lines.append(f"| {name} | {title} | {row['accuracy']:.2f} | {lost} | {row['counted']:.3f} |")
    return "\n".join(lines)


def speed_table(results: Results) -> str:
    """Sequences per second, and the gain over float32 with its spread."""
    lines = ["| shape | fp32 | int8 | ibert | ibert over fp32 |", "| --- | --- | --- | --- | --- |"]
    for shape, found in results["speed"].items():
        rates = " | ".join(f"{found['sequences_per_second'][name]:.0f}" for name in ("fp32", "int8", "ibert"))
        median, low, high = found["fp32_over_ibert"]
        lines.append(f"| {TITLES[shape]} | {rates} | {median:.2f} x ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def kernel_table(results: Results) -> str:
    """Nanoseconds of one row."""
    lines = ["| one row of | integers, ns | float32, ns | ratio |", "| --- | --- | --- | --- |"]
    for name, row in results["kernels"].items():
        lines.append(f"| {name} | {row['integer']:.0f} | {row['float']:.0f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def machine_line(results: Results) -> str:
    """What the numbers were measured on."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"Measured on {machine['processor']}, Python {machine['python']}, {versions}, {machine['date']}."


def main() -> None:
    """Print all tables."""
    results = files.read_json(RESULTS)
    print("\n\n".join(table(results) for table in (accuracy_table, speed_table, kernel_table, machine_line)))


if __name__ == "__main__":
    main()
