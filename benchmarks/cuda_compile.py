"""Registers, shared memory and occupancy of every CUDA kernel, as NVIDIA's compiler reports them for a Tesla T4.

    python -m benchmarks.cuda_compile      # writes results/cuda_compile.json and prints the table of docs/cuda.md

Needs the extra cuda-rig; no card is used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilpt.kernels import cuda
from tests.cuda_rig import compile_gate

from . import files

RESULT = Path(__file__).parent / "results" / "cuda_compile.json"
ARCHITECTURE, THREADS = "sm_75", 128  # the default geometry: four warps a block


def result() -> dict[str, Any]:
    kernels = {}
    for path in sorted(Path(cuda.__file__).parent.glob("*.cu")):
        reports = compile_gate.compile_report(cuda.source(path.stem), ARCHITECTURE)
        for name, report in sorted(reports.items()):
            threads = 256 if name == "linear_i8" else THREADS
            kernels[name] = {
                "source": path.name,
                "registers": report.registers,
                "static_shared_bytes": report.shared_bytes,
                "spill_bytes": report.spill_bytes,
                "threads": threads,
                "occupancy": compile_gate.occupancy(report, threads, 0, ARCHITECTURE),
            }
    return {
        "date": date.today().isoformat(),
        "architecture": ARCHITECTURE,
        "nvrtc": version("nvidia-cuda-nvrtc-cu12"),
        "kernels": kernels,
    }


def table(found: Mapping[str, Any]) -> str:
    """By source: kernels, their registers, static shared memory, and the least occupancy."""
    rows = ["| source | kernels | registers | static shared bytes | spills | occupancy |", "| --- " * 6 + "|"]
    sources = dict.fromkeys(kernel["source"] for kernel in found["kernels"].values())
    for source in sources:
        mine = [kernel for kernel in found["kernels"].values() if kernel["source"] == source]
        registers, shared = ([kernel[key] for kernel in mine] for key in ("registers", "static_shared_bytes"))
        least = min(kernel["occupancy"] for kernel in mine)
        spills = sum(kernel["spill_bytes"] for kernel in mine)
        cells = [f"`{source}`", len(mine), f"{min(registers)} to {max(registers)}", max(shared), spills or "none"]
        rows.append(f"| {' | '.join(map(str, cells))} | {100 * least:.0f} % or more |")
    return "\n".join(rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    found = result()
    files.write_text(RESULT, json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
