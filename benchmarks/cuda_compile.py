"""Registers, shared memory and occupancy of every CUDA kernel, as NVIDIA's compiler reports them for a Tesla T4.

    python -m benchmarks.cuda_compile      # writes results/cuda_compile.json, the numbers in the headers of
                                           # kernels/cuda/*.cu, and prints the table of docs/cuda.md

Needs the extra cuda-rig; no card is used. The host's own launches are recorded, for RoBERTa-base's shape and batches
whose longest text has 32, 128 and 512 tokens: what they ask for decides how many blocks a multiprocessor holds.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilpt.kernels import blocks, cuda, integer
from minilpt.kernels.cuda import float_kernels, integer_kernels
from minilpt.pruning import Step
from tests.cuda_rig import compile_gate

from . import files

RESULT = Path(__file__).parent / "results" / "cuda_compile.json"
ARCHITECTURE, TOKENS = "sm_75", (32, 128, 512)
D, F, H, LABELS, B = 768, 3072, 12, 3, 2  # RoBERTa-base; two texts
RULES = (blocks.KEEP_ALL, blocks.ABSOLUTE, blocks.RELATIVE, blocks.COUNT)
FACTS = "// On a T4, for RoBERTa-base and texts of 32, 128 and 512 tokens"


class Launch(NamedTuple):
    threads: int
    shared_bytes: int


class Recorder:
    """Takes CuPy's place where kernels are launched, and starts none."""

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def RawModule(self, **_: Any) -> Recorder:  # noqa: N802 # CuPy's name
        return self

    def get_function(self, name: str) -> Callable[..., None]:
        def launch(grid: Any, block: Any, arguments: Any, *, shared_mem: int) -> None:
            self.launches[name] = Launch(block[0], shared_mem)

        return launch


def launches(tokens: int) -> dict[str, Launch]:
    """How the host starts every kernel, by the default geometry."""
    recorder, N = Recorder(), B * tokens
    for dtype in ("float32", "float16"):
        _float_launches(float_kernels.FloatKernels(recorder, cuda.Geometry(), dtype), dtype, tokens, N)
    _integer_launches(integer_kernels.IntegerKernels(recorder, cuda.Geometry()), tokens, N)
    return recorder.launches


def _ints(*shape: int) -> Any:
    return np.empty(shape, np.int32)


def _floats(*shape: int) -> Any:
    return np.empty(shape, np.float32)


def _flags(N: int) -> Any:
    return np.empty(N, np.uint8)


def _float_launches(kernels: float_kernels.FloatKernels, dtype: str, tokens: int, N: int) -> None:
    def stored(*shape: int) -> Any:
        return np.empty(shape, dtype)

    index, bounds, norm, mass, flags = _ints(N), _ints(B + 1), (_floats(D), _floats(D)), _floats(N), _flags(N)
    partial = _floats(-(-tokens // cuda.QUERIES), H, N)
    kernels.embed_norm((index,) * 3, (stored(9, D),) * 3, norm, 1e-5, stored(N, D))
    kernels.add_norm(stored(N, D), _floats(D), stored(N, D), index, norm, 1e-5, stored(N, D))
    for activation in ("none", "gelu", "gelu_tanh", "relu", "tanh"):
        kernels.bias_activation(stored(N, F), _floats(F), activation)
    kernels.gather_rows(stored(N, D), index, stored(N, D))
    kernels.head_out(stored(B, D), stored(LABELS, D), _floats(LABELS), _floats(B, LABELS))
    qkv, bias = stored(N, 3 * D), _floats(3 * D)
    kernels.attention_mass(qkv, bias, bounds, tokens, partial)
    kernels.weighted_probs(qkv, bias, bounds, mass, tokens, partial)
    kernels.merged_context(partial, qkv, bias, bounds, _ints(B), index, tokens, stored(N, D))
    for width in float_kernels.HEAD_WIDTHS:
        wide, all_biases = stored(N, 3 * H * width), _floats(3 * H * width)
        queries, keys = (wide, index, bounds, tokens), (wide, H * width, 2 * H * width)
        kernels.attention_context(queries, keys, bounds, all_biases, H, stored(N, H * width))
    for kind in RULES:
        kernels.keep(Step(kind, 1, tokens, 0.5), partial, bounds, _ints(B), mass, flags, _ints(B))
    kernels.share_removed(mass, flags, bounds, mass, flags, _ints(B), _ints(B))
    kernels.merge_rows(stored(N, D), mass, _ints(B), bounds)


class IntegerStep(NamedTuple):
    """What `IntegerKernels.keep` reads of a layer's rule."""

    kind: int
    denominator: int
    limit: int
    lowest: int
    counts: Any


def _integer_launches(kernels: integer_kernels.IntegerKernels, tokens: int, N: int) -> None:
    def bytes_(*shape: int) -> Any:
        return np.empty(shape, np.int8)

    def wide(*shape: int) -> Any:
        return np.empty(shape, np.int64)

    def factor(count: int) -> integer_kernels.Factor:
        return integer_kernels.Factor(_ints(count), _ints(count))

    index, bounds, flags, exp = _ints(N), _ints(B + 1), _flags(N), integer.tanh_constants()
    norm, partial = integer_kernels.Norm(0, *(_ints(D),) * 4), wide(-(-tokens // cuda.QUERIES), H, N)
    kernels.embed_norm((index,) * 3, ((bytes_(9, D), factor(9)),) * 3, norm, bytes_(N, D))
    kernels.linear(bytes_(N, D), bytes_(F, D), _ints(F), _ints(N, F))
    kernels.requantize(_ints(N, D), factor(D), bytes_(N, D))
    kernels.requantize(_ints(B, LABELS), factor(LABELS), _ints(B, LABELS))
    gelu = integer_kernels.Gelu(_ints(F), wide(F), wide(F), *factor(F))
    kernels.i_gelu(_ints(N, F), gelu, (0, 0), bytes_(N, F))
    kernels.i_relu(_ints(N, F), factor(F), (0, 0), bytes_(N, F))
    kernels.i_tanh(_ints(B, D), factor(D), exp, bytes_(B, D))
    kernels.add_norm((_ints(N, D), factor(D)), (bytes_(N, D), factor(D)), index, norm, (0, 0), bytes_(N, D))
    kernels.gather_rows(bytes_(N, D), index, bytes_(N, D))
    qkv = bytes_(N, 3 * D)
    kernels.attention_mass(qkv, bounds, exp, 0, tokens, partial)
    kernels.weighted_probs(qkv, bounds, wide(N), exp, tokens, partial)
    queries, keys = (qkv, index, bounds, tokens), (qkv, D, 2 * D)
    kernels.attention_context(queries, keys, bounds, H, tokens, exp, (1, 1), bytes_(N, D))
    kernels.merged_context(partial, qkv, bounds, wide(B), _ints(B), index, tokens, (1, 1), bytes_(N, D))
    for kind in RULES:
        rule = IntegerStep(kind, 1, tokens, 1, _ints(tokens + 1))
        kernels.keep(rule, partial, bounds, _ints(B), wide(N), flags, _ints(B))
    kernels.weigh_removed(wide(N), flags, bounds, wide(N), wide(B), flags, _ints(B), _ints(B))
    kernels.merge_rows(bytes_(N, D), wide(N), wide(B), _ints(B), bounds)
    kernels.compact(flags, _ints(B), bounds, index, index, bounds, _ints(2))


def sources() -> list[Path]:
    return sorted(Path(cuda.__file__).parent.glob("*.cu"))


def result() -> dict[str, Any]:
    kernels, launched = {}, {tokens: launches(tokens) for tokens in TOKENS}
    for path in sources():
        for name, report in sorted(compile_gate.compile_report(cuda.source(path.stem), ARCHITECTURE).items()):
            mine = [launched[tokens][name] for tokens in TOKENS]
            kernels[name] = {
                "source": path.name,
                "registers": report.registers,
                "static_shared_bytes": report.shared_bytes,
                "spill_bytes": report.spill_bytes,
                "threads": [launch.threads for launch in mine],
                "dynamic_shared_bytes": [launch.shared_bytes for launch in mine],
                "occupancy": [compile_gate.occupancy(report, *launch, ARCHITECTURE) for launch in mine],
            }
    return {
        "date": date.today().isoformat(),
        "architecture": ARCHITECTURE,
        "nvrtc": version("nvidia-cuda-nvrtc-cu12"),
        "tokens": TOKENS,
        "kernels": kernels,
    }


def _groups(found: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Kernels of a source that differ in nothing: the source, their names, and their numbers as text."""
    facts = {name: (kernel["source"], _numbers(kernel)) for name, kernel in found["kernels"].items()}
    for (source, numbers), names in groupby(facts, facts.__getitem__):
        yield source, ", ".join(names), numbers


def _numbers(kernel: Mapping[str, Any]) -> list[str]:
    """Registers, threads of a block, its shared memory, resident threads; one number where length changes nothing."""
    shared = [(kernel["static_shared_bytes"] + dynamic) / 1000 for dynamic in kernel["dynamic_shared_bytes"]]
    resident = [f"{100 * share:g}" for share in kernel["occupancy"]]
    columns = [[str(threads) for threads in kernel["threads"]], [f"{kilobytes:.1f}" for kilobytes in shared], resident]
    return [str(kernel["registers"]), *(", ".join(dict.fromkeys(c) if len(set(c)) == 1 else c) for c in columns)]


def header(found: Mapping[str, Any], source: str) -> str:
    """The paragraph of a source's header that says what the compiler and the launches make of its kernels."""
    lines = [
        f"{FACTS} (benchmarks/cuda_compile.py): registers, no spill;",
        "// threads of a block; kilobytes of its shared memory; resident threads in percent of 1,024.",
    ]
    for _, names, (registers, threads, kilobytes, resident) in (
        group for group in _groups(found) if group[0] == source
    ):
        text = f"{names}: {registers}; {threads}; {kilobytes}; {resident}"
        lines += textwrap.wrap(text, 118, initial_indent="//   ", subsequent_indent="//     ")
    return "\n".join(lines)


def table(found: Mapping[str, Any]) -> str:
    """Kernels of a source that are launched and resident alike; the range of their registers."""
    alike: dict[tuple[str, ...], dict[str, int]] = {}
    for name, kernel in found["kernels"].items():
        registers, *rest = _numbers(kernel)
        alike.setdefault((kernel["source"], *rest), {})[name] = int(registers)
    rows = ["| source | kernels | registers | threads | shared KB | resident % |", "| --- " * 6 + "|"]
    for (source, *rest), registers in alike.items():
        least, most = min(registers.values()), max(registers.values())
        used = str(least) if least == most else f"{least} to {most}"
        rows.append(f"| `{source}` | {', '.join(registers)} | {' | '.join([used, *rest])} |")
    return "\n".join(rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    found = result()
    files.write_text(RESULT, json.dumps(found, indent=2) + "\n")
    for path in sources():
        text = path.read_text(encoding="utf-8")
        files.write_text(path, re.sub(rf"{FACTS}.*?(?=\n\n)", header(found, path.name), text, flags=re.DOTALL))
    print(table(found))


if __name__ == "__main__":
    main()
