"""Every compiled kernel on one thread, as a share of what this core can do at most, measured in the same run.

    python -m benchmarks.kernels [--out FILE]

The peaks are loops that only multiply and add in registers (24 independent sums; of AMX's, all four), and copies of
arrays that no cache holds. A product's share is of the arithmetic peak, a row operation's of the copy's bytes per
second. Then the whole forward pass of the RoBERTa-base shape: its share of the peak, what pruning gains in time for
what it saves in executed FLOPs, and how the time grows with the tokens where attention per token stays the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.core.extending import intrinsic

from minilpt import load
from minilpt.kernels import blocks, compiled, packing
from minilpt.kernels.isa import AMX_DEPTH, AMX_ROWS, LANES, chosen
from minilpt.kernels.jit import amx
from minilpt.kernels.jit.vector import I64, INTEGERS, VECTOR, Emitter
from minilpt.quantize import quantize_rows

from . import files, peers, workloads

RESULTS = peers.ROOT / "benchmarks" / "results" / "kernels.json"
SUMS = 24  # independent ones: enough to hide the latency of a multiply-add on two ports
ROUNDS = 7
FORWARD_SEQUENCES = 96
TOKENS_BY_16 = (1, 2, 4, 8, 16, 32)  # sequences of 16 tokens
ROW_BYTES = {"layer_norm": 12, "gelu": 8, "quantize": 5, "softmax": 8}  # read and written, for each float32 element


def _peak_loop(int8: bool) -> Any:
    """The intrinsic that runs `count` turns of SUMS multiply-adds of whole vectors and returns something of them."""

    @intrinsic
    def loop(typingctx, count):
        def code(context, builder, signature, arguments):
            emit, kind = Emitter(builder), INTEGERS if int8 else VECTOR
            seed = builder.trunc(arguments[0], ir.IntType(32))
            a = emit.splat(seed if int8 else builder.sitofp(seed, ir.FloatType()), kind)
            zero = emit.splat(0 if int8 else 0.0, kind)

            def step(index: Any, sums: list[Any]) -> list[Any]:
                if int8:
                    return [emit.call("llvm.x86.avx512.vpdpbusd.512", kind, [total, a, a]) for total in sums]
                return [emit.fma(a, a, total) for total in sums]

            sums = emit.loop(arguments[0], [zero] * SUMS, step)
            total = sums[0]
            for value in sums[1:]:
                total = builder.add(total, value) if int8 else builder.fadd(total, value)
            first = builder.extract_element(total, ir.Constant(ir.IntType(32), 0))
            return builder.zext(first, I64) if int8 else builder.fptosi(first, I64)

        return types.int64(types.int64), code

    return loop


@intrinsic
def _peak_tiles(typingctx, count):
    """Run `count` turns of a multiply-add into each of the matrix registers for sums."""

    def code(context, builder, signature, arguments):
        registers = amx.Registers(builder)

        def step(index: Any, state: list[Any]) -> list[Any]:
            for register in amx.SUMS:
                registers.multiply_add(register, amx.ROWS[register // 2], amx.WEIGHTS[register % 2])
            return state

        registers.emit.loop(arguments[0], [], step)
        return context.get_dummy_value()

    return types.void(types.int64), code


def _run_tiles(count: int) -> None:
    amx.configure(AMX_ROWS)
    _peak_tiles(count)
    amx.release()


def peaks() -> dict[str, float]:
    """Of one core: GFLOP/s in float32, GOP/s in int8 where the rung has a dot product, GB/s of a copy."""
    found, turns = {}, 400_000
    kinds = {"fp32": 2 * 16} | ({"int8": 2 * 64} if chosen().int8 == "dot" else {})
    for name, operations in kinds.items():
        intrinsic_ = _peak_loop(name == "int8")
        run = njit(lambda count, loop=intrinsic_: loop(count))
        run(10)
        found[name] = turns * SUMS * operations / _seconds(lambda run=run: run(turns)) / 1e9
    if chosen().amx:
        tiles = njit(_run_tiles)
        tiles(10)
        operations = 2 * AMX_ROWS * LANES * AMX_DEPTH * len(amx.SUMS)
        found["int8"] = turns * operations / _seconds(lambda: tiles(turns)) / 1e9
    source = np.ones(2**26, np.float32)
    target = np.empty_like(source)
    found["copy"] = 2 * source.nbytes / _seconds(lambda: np.copyto(target, source)) / 1e9
    return found


def _seconds(task: Callable[[], Any]) -> float:
    task()
    return min(_once(task) for _ in range(ROUNDS))


def _once(task: Callable[[], Any]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def product(N: int, K: int, M: int, int8: bool) -> float:
    """Giga-operations per second of x W^T + b, weights packed, rows quantised already."""
    draw, rung = np.random.default_rng(0), chosen()
    x = draw.standard_normal((N, K), np.float32)
    weight, bias = draw.standard_normal((M, K), np.float32), np.zeros(M, np.float32)
    packed = packing.pack_int8(*quantize_rows(weight), bias, rung) if int8 else packing.pack(weight, bias, rung)
    out = packing.aligned(4 * N * packed.start.size)
    integers, factors = packing.aligned(N * rung.items(K) * rung.item_bytes), np.empty(N, np.float32)
    rows = np.array(
        [(x.ctypes.data, 4 * K, integers.ctypes.data, rung.items(K) * rung.item_bytes, factors.ctypes.data)],
        blocks.ROWS,
    )
    matrix = np.array([packed.record()], blocks.MATRIX)
    if int8:
        compiled.run(blocks.RUN_QUANTIZE, rows.ctypes.data, N, K)
    places = rows.ctypes.data, matrix.ctypes.data, N, out.ctypes.data, 4 * packed.start.size, blocks.NONE
    repeats = max(1, int(2e9 / (2 * N * K * M)))
    return 2 * N * K * M * repeats / _seconds(lambda: _repeat(repeats, blocks.RUN_PRODUCT, *places)) / 1e9


def _repeat(times: int, *arguments: int) -> None:
    for _ in range(times):
        compiled.run(*arguments)


def row_operation(name: str, count: int = 3072, rows: int = 64) -> float:
    """GB/s of one of ROW_BYTES over rows of `count` float32 that the second-level cache holds."""
    x = np.random.default_rng(0).standard_normal((rows, count), np.float32)
    ones, eps = np.ones(count, np.float32), np.array([1e-5], np.float32)
    if name == "gelu":
        task = lambda: _repeat(1, blocks.RUN_ACTIVATE, x.ctypes.data, x.size, blocks.GELU)  # noqa: E731
    elif name == "quantize":
        integers, factors = packing.aligned(rows * count * chosen().item_bytes), np.empty(rows, np.float32)
        places = (x.ctypes.data, 4 * count, integers.ctypes.data, count * chosen().item_bytes, factors.ctypes.data)
        record = np.array([places], blocks.ROWS)
        task = lambda: _repeat(1, blocks.RUN_QUANTIZE, record.ctypes.data, rows, count)  # noqa: E731
    else:
        lines = [(x[r], ones, x[r], ones, ones) for r in range(rows)]
        addresses = [tuple(line.ctypes.data for line in row) for row in lines]

        def task() -> None:
            for row in addresses:
                compiled.run(blocks.RUN_NORM, *row, count, eps.ctypes.data)

    return ROW_BYTES[name] * x.size / _seconds(task) / 1e9


def attention(n: int, heads: int = 12, d: int = 64) -> dict[str, float]:
    """GFLOP/s of probabilities and context of one sequence, called through `compiled`, with its copies by head."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((n, heads * d), np.float32) for _ in range(3))
    probs = compiled.attention_probs(q, k, heads)
    operations = 2 * heads * n * n * d / 1e9
    return {
        "probs": operations / _seconds(lambda: compiled.attention_probs(q, k, heads)),
        "context": operations / _seconds(lambda: compiled.attention_context(probs, v)),
    }


def forward(work: Path) -> dict[str, Any]:
    """The whole forward pass on one thread, by precision; dense beside pruned in turn, each the best of ROUNDS.

    The operations are the executed FLOPs, of which int8 models do attention's in float32.
    """
    folder, rule = work / "roberta-base", work / "roberta-base" / "forward-ltp.json"
    if not (folder / "model.safetensors").is_file():
        workloads.write_checkpoint(folder, "roberta-base")
    rows = sorted(workloads.sequences("roberta-base", "mnli", FORWARD_SEQUENCES), key=len)
    if not rule.is_file():
        workloads.write_thresholds(folder, rows, rule)
    draw = np.random.default_rng(4)
    rows_of_16 = [workloads.sequence("roberta-base", 16, draw) for _ in range(max(TOKENS_BY_16))]
    found = {}
    for precision in ("fp32", "int8"):
        models = {
            name: load(folder, precision=precision, pruning=pruning, threads=1)
            for name, pruning in (("dense", None), ("pruned", rule))
        }
        runs = {name: (model, rows) for name, model in models.items()}
        runs |= {str(16 * count): (models["dense"], rows_of_16[:count]) for count in TOKENS_BY_16}
        seconds = dict.fromkeys(runs, float("inf"))
        for _ in range(ROUNDS):
            for name, (model, work_) in runs.items():
                seconds[name] = min(seconds[name], _once(partial(model.forward, work_)))
        executed = {name: int(model.forward(rows).executed_flops.sum()) for name, model in models.items()}
        gain = {"time": seconds["dense"] / seconds["pruned"], "executed": executed["dense"] / executed["pruned"]}
        found[precision] = {
            "giga": {name: executed[name] / seconds[name] / 1e9 for name in models},
            "pruning_gain": gain,
            "us_per_token": {name: 1e6 * seconds[name] / int(name) for name in runs if name.isdigit()},
        }
    return found


def measure() -> dict[str, Any]:
    """Peaks, kernels and the forward pass, each the best of ROUNDS, peaks before and after."""
    compiled.warm_up()
    before = peaks()
    shapes = [(6, 768, 768), (96, 768, 768), (96, 768, 3072), (96, 3072, 768), (480, 768, 3072), (480, 384, 1536)]
    found: dict[str, Any] = {"products": [], "rows": {}, "attention": {}}
    for shape in shapes:
        for name in ("fp32", "int8"):
            found["products"].append({"shape": shape, "precision": name, "giga": product(*shape, name == "int8")})
    for name in ("layer_norm", "gelu", "quantize"):
        found["rows"][name] = row_operation(name)
    for n in (40, 128, 512):
        found["attention"][str(n)] = attention(n)
    found["forward"] = forward(peers.WORK)
    after = peaks()
    top = {name: statistics.mean([before[name], after[name]]) for name in before}
    for record in found["products"]:
        record["share_of_peak"] = record["giga"] / top[record["precision"]] if record["precision"] in top else None
    for precision, record in found["forward"].items():
        shares = {name: giga / top[precision] for name, giga in record["giga"].items() if precision in top}
        record["share_of_peak"] = shares
    return {"machine": peers.machine(), "rung": chosen().name, "peaks": {"before": before, "after": after}} | found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = measure()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(options.out, results)
    print("peaks of one core:", {name: round(value, 1) for name, value in results["peaks"]["before"].items()})
    for record in results["products"]:
        share = f"{record['share_of_peak']:.0%}" if record["share_of_peak"] else "-"
        print(f"{record['precision']} {record['shape']}: {record['giga']:.0f} G/s, {share} of the peak")
    print("rows, GB/s:", {name: round(value, 1) for name, value in results["rows"].items()})
    print("attention, GFLOP/s:", results["attention"])
    for precision, record in results["forward"].items():
        print(f"forward, {precision}:", {name: value for name, value in record.items() if name != "giga"})


if __name__ == "__main__":
    main()
