"""The CUDA rig itself: right kernels give NumPy's results under every schedule, and each planted bug is caught."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cuda_rig import fake_cupy, mutants, simt
from cuda_rig.fake_cupy import FakeError
from cuda_rig.simt import Report, RigError

pytestmark = pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)

THREADS = 96
X = np.random.default_rng(0).standard_normal(200).astype(np.float32)

RIGHT = r"""
#include <cuda_fp16.h>
namespace {
constexpr unsigned ALL = 0xffffffffu;
template <typename T>
__device__ void block_sum(const T* x, int n, T* out) {
    extern __shared__ float partial[];
    float total = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) total += x[i];
    partial[threadIdx.x] = total;
    __syncthreads();
    for (int step = 1; step < blockDim.x; step *= 2) {
        const bool adds = threadIdx.x % (2 * step) == 0 && threadIdx.x + step < blockDim.x;
        if (adds) partial[threadIdx.x] += partial[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = partial[0];
}
}  // namespace

extern "C" __global__ void block_sums(const float* x, int n, float* out) { block_sum(x, n, out); }

extern "C" __global__ void __launch_bounds__(128) softmax_rows(const float* x, int rows, int width, float* out) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    float most = -3e38f, total = 0;
    for (int c = lane; c < width; c += 32) most = fmaxf(most, x[row * width + c]);
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, step));
    for (int c = lane; c < width; c += 32) total += expf(x[row * width + c] - most);
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(ALL, total, step);
    for (int c = lane; c < width; c += 32) out[row * width + c] = expf(x[row * width + c] - most) / total;
}

extern "C" __global__ void compact_positive(const float* x, int n, float* out, int* count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && x[i] > 0) out[atomicAdd(count, 1)] = x[i];
}

extern "C" __global__ void scan(const int* x, int n, int* out) {
    __shared__ int totals[32];
    const int i = threadIdx.x, lane = i % 32, warp = i / 32;
    int sum = i < n ? x[i] : 0;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += totals[w];
    if (i < n) out[i] = sum;
}

extern "C" __global__ void transpose(const float* x, int n, float* out) {
    __shared__ float tile[16][17];
    const int r = blockIdx.y * 16 + threadIdx.y, c = blockIdx.x * 16 + threadIdx.x;
    if (r < n && c < n) tile[threadIdx.y][threadIdx.x] = x[r * n + c];
    __syncthreads();
    const int r2 = blockIdx.x * 16 + threadIdx.y, c2 = blockIdx.y * 16 + threadIdx.x;
    if (r2 < n && c2 < n) out[r2 * n + c2] = tile[threadIdx.x][threadIdx.y];
}

extern "C" __global__ void dots(const signed char* a, const signed char* b, int n, int* out) {
    int total = 0;
    for (int i = 0; i < n; i += 4)
        total = __dp4a(*reinterpret_cast<const int*>(a + i), *reinterpret_cast<const int*>(b + i), total);
    out[threadIdx.x] = total + threadIdx.x;
}

extern "C" __global__ void halves(const __half* x, int n, __half* out) {
    for (int i = 2 * threadIdx.x; i < n; i += 2 * blockDim.x) {
        const float2 two = __half22float2(*reinterpret_cast<const __half2*>(x + i));
        *reinterpret_cast<__half2*>(out + i) = __floats2half2_rn(two.x * 3, two.y * 3);
    }
}

extern "C" __global__ void votes(const int* x, int* out) {
    const unsigned ballot = __ballot_sync(ALL, x[threadIdx.x] > 0);
    const int any = __any_sync(ALL, x[threadIdx.x] > 8), all = __all_sync(ALL, x[threadIdx.x] > -9);
    const int count = __syncthreads_count(x[threadIdx.x] > 0), either = __syncthreads_or(x[threadIdx.x] > 8);
    out[threadIdx.x] = __popc(ballot) + 100 * any + 1000 * all + 10000 * count + 1000000 * either;
}

__constant__ int backwards[4] = {3, 2, 1, 0};
extern "C" __global__ void __launch_bounds__(64) reversed(const int* x, int* out) {
    __shared__ int of[2][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    of[warp][lane] = x[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = of[warp][backwards[lane % 4] + 28 - lane / 4 * 4];
}

extern "C" __global__ void quads(const float* x, float* out) {
    reinterpret_cast<float4*>(out)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
}

namespace {
template <typename T>
__device__ void turn_quads(const T* x, T* out) {
    extern __shared__ float4 turning[];
    turning[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = turning[blockDim.x - 1 - threadIdx.x];
}
}  // namespace
extern "C" __global__ void turned_quads(const float* x, float* out) {
    turn_quads(reinterpret_cast<const float4*>(x), reinterpret_cast<float4*>(out));
}

extern "C" __global__ void neighbours(const int* x, int n, int* out) {
    const unsigned there = (1u << n) - 1;
    if (threadIdx.x < n) out[threadIdx.x] = __shfl_down_sync(there, x[threadIdx.x], 1);
}

extern "C" __global__ void products(const unsigned* x, unsigned long long* out) {
    out[0] = __dp4a(x[0], x[0], 1u);
    out[1] = __umulhi(x[0], x[0]);
    out[2] = __umul64hi(~0ull, x[0]);
    out[3] = __mul64hi(-1, x[0]);
}
"""


class Case(NamedTuple):
    """A launch: kernel, grid, block, arguments, dynamic shared memory."""

    kernel: str
    grid: Any
    block: Any
    arguments: list[Any]
    shared_bytes: int = 0


def run(source: str, case: Case, *, checked: bool = True, schedule: str = "fifo", seed: int = 0) -> Report:
    module = simt.compile(source, checked=checked)
    written = [np.ones((*a.shape, a.itemsize), np.uint8) if isinstance(a, np.ndarray) else None for a in case.arguments]
    return module.launch(*case[:4], shared_bytes=case.shared_bytes, schedule=schedule, seed=seed, initialised=written)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("schedule", simt.SCHEDULES)
def test_right_kernels_give_numpy_s_results(checked: bool, schedule: str) -> None:
    draw = np.random.default_rng(1)
    rows, whole = draw.standard_normal((5, 40)).astype(np.float32), draw.integers(-9, 9, 90).astype(np.int32)
    square, bytes_ = (
        draw.standard_normal((20, 20)).astype(np.float32),
        draw.integers(-128, 128, (2, 64)).astype(np.int8),
    )
    half = draw.standard_normal(70).astype(np.float16)

    def result(kernel: str, grid: Any, block: Any, *arguments: Any, shared_bytes: int = 0) -> Any:
        case = Case(kernel, grid, block, list(arguments), shared_bytes)
        for seed in range(3):
            assert run(RIGHT, case, checked=checked, schedule=schedule, seed=seed).findings == ()
        return arguments[-1]

    sums = result("block_sums", 2, THREADS, X, np.int32(len(X)), np.zeros(2, np.float32), shared_bytes=4 * THREADS)
    assert abs(sums.sum() - X.sum(dtype=np.float64)) < 1e-4
    soft = result("softmax_rows", 2, 128, rows, np.int32(5), np.int32(40), np.zeros_like(rows))
    assert np.abs(soft - np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)).max() < 1e-6
    count, kept = np.zeros(1, np.int32), np.zeros_like(X)
    for seed in range(3):
        count[0] = 0
        case = Case("compact_positive", 3, 70, [X, np.int32(len(X)), kept, count])
        assert run(RIGHT, case, checked=checked, schedule=schedule, seed=seed).findings == ()
        assert np.array_equal(np.sort(kept[: count[0]]), np.sort(X[X > 0]))
    assert np.array_equal(result("scan", 1, THREADS, whole, np.int32(90), np.zeros(90, np.int32)), np.cumsum(whole))
    assert np.array_equal(result("transpose", (2, 2), (16, 16), square, np.int32(20), np.zeros_like(square)), square.T)
    dots = result("dots", 1, 3, *bytes_, np.int32(64), np.zeros(3, np.int32))
    assert dots.tolist() == [int(bytes_[0].astype(int) @ bytes_[1]) + i for i in range(3)]
    tripled = result("halves", 1, 8, half, np.int32(70), np.zeros_like(half))
    assert np.array_equal(tripled, (half.astype(np.float32) * 3).astype(np.float16))
    votes = result("votes", 1, 64, whole[:64].copy(), np.zeros(64, np.int32))
    first = int((whole[:32] > 0).sum()) + 100 * bool((whole[:32] > 8).any()) + 1000 * bool((whole[:32] > -9).all())
    assert np.array_equal(result("reversed", 1, 64, whole[:64].copy(), np.zeros(64, np.int32)), turned(whole[:64]))
    assert np.array_equal(result("quads", 1, 50, X, np.zeros_like(X)), X)
    backwards = result("turned_quads", 1, 50, X, np.zeros_like(X), shared_bytes=16 * 50)
    assert np.array_equal(backwards, X.reshape(50, 4)[::-1].ravel())
    assert votes[0] == first + 10000 * int((whole[:64] > 0).sum()) + 1000000 * bool((whole[:64] > 8).any())


def turned(x: Any) -> Any:
    return x.reshape(2, 32)[:, ::-1].ravel()


def test_integer_intrinsics() -> None:
    out = np.zeros(4, np.uint64)
    run(RIGHT, Case("products", 1, 1, [np.array([0xFF80FF01], np.uint32), out]))
    square = 0xFF80FF01**2
    assert out.tolist() == [2 * 255**2 + 128**2 + 1 + 1, square >> 32, 0xFF80FF00, 2**64 - 1]


def test_a_lane_that_takes_no_part_gives_a_value_that_shows() -> None:
    out = np.zeros(20, I32)
    assert run(RIGHT, Case("neighbours", 1, 20, [np.arange(20, dtype=I32), I32(20), out])).findings == ()
    assert out.tolist() == [*range(1, 20), -1]


N, F32, I32 = np.int32(len(X)), np.float32, np.int32
CASES = {
    "block_sums": lambda: Case("block_sums", 2, THREADS, [X, N, np.zeros(2, F32)], 4 * THREADS),
    "softmax_rows": lambda: Case("softmax_rows", 2, 128, [X, I32(5), I32(40), np.zeros(200, F32)]),
    "compact_positive": lambda: Case("compact_positive", 3, 70, [X, N, np.zeros(200, F32), np.zeros(1, I32)]),
    "scan": lambda: Case("scan", 1, THREADS, [np.ones(90, I32), I32(90), np.zeros(90, I32)]),
    "transpose": lambda: Case("transpose", (2, 2), (16, 16), [X[:100].copy(), I32(10), np.zeros(100, F32)]),
    "halves": lambda: Case("halves", 1, 8, [np.ones(70, np.float16), I32(70), np.zeros(70, np.float16)]),
    "votes": lambda: Case("votes", 1, 64, [np.ones(64, I32), np.zeros(64, I32)]),
    "reversed": lambda: Case("reversed", 1, 64, [np.ones(64, I32), np.zeros(64, I32)]),
}
# What is changed in which kernel, and what the checker has to say.
PLANTED = {
    "no barrier before others' sums are read": (
        "block_sums",
        "partial[threadIdx.x] = total;\n    __syncthreads();",
        "partial[threadIdx.x] = total;",
        "race",
    ),
    "no barrier between two steps": (
        "block_sums",
        "threadIdx.x + step];\n        __syncthreads();",
        "threadIdx.x + step];",
        "race",
    ),
    "a barrier that some threads pass by": (
        "block_sums",
        "        __syncthreads();\n    }\n    if",
        "        if (adds) __syncthreads();\n    }\n    if",
        "diverged",
    ),
    "every thread writes the block's result": ("block_sums", "if (threadIdx.x == 0) out", "out", "race"),
    "all blocks write one result": ("block_sums", "out[blockIdx.x] = partial", "out[0] = partial", "race"),
    "a shared element too many": ("block_sums", "partial[threadIdx.x] = t", "partial[threadIdx.x + 1] = t", "bounds"),
    "a shared element that nobody wrote": ("scan", "totals[warp] = sum", "totals[warp + 1] = sum", "uninitialised"),
    "no guard of the last row": ("softmax_rows", "if (row >= rows) return;", "", "out of bounds"),
    "one column too many": ("softmax_rows", "c < width; c += 32) out", "c <= width; c += 32) out", "race"),
    "a lane leaves before the others ask for it": (
        "softmax_rows",
        "float most = -3e38f",
        "if (lane == 7) return; float most = -3e38f",
        "wrong mask",
    ),
    "a mask without its own lane": ("softmax_rows", "_xor_sync(ALL, most", "_xor_sync(0xffffu, most", "wrong mask"),
    "lanes in different calls": (
        "votes",
        "__any_sync(ALL, x[threadIdx.x] > 8)",
        "threadIdx.x % 2 ? __any_sync(ALL, 1)\n : __any_sync(ALL, 0)",
        "diverged",
    ),
    "a plain addition instead of an atomic one": ("compact_positive", "atomicAdd(count, 1)", "(*count)++", "race"),
    "no guard of the end": ("compact_positive", "i < n && x[i] > 0", "x[i] > 0", "out of bounds"),
    "no barrier before other warps' totals": (
        "scan",
        "totals[warp] = sum;\n    __syncthreads();",
        "totals[warp] = sum;",
        "race",
    ),
    "no barrier before the tile is read": (
        "transpose",
        "    __syncthreads();\n    const int r2",
        "    const int r2",
        "race",
    ),
    "a vector load at an odd place": ("halves", "__half2*>(x + i)", "__half2*>(x + i + (i < 60))", "misaligned"),
    "a shuffle in the place of a warp's barrier": ("reversed", "__syncwarp()", "__shfl_sync(ALL, lane, 0)", "race"),
    "a vote in the place of a warp's barrier": ("reversed", "__syncwarp()", "__any_sync(ALL, lane)", "race"),
    "a column in the next row": (
        "transpose",
        "tile[threadIdx.y][threadIdx.x] =",
        "tile[threadIdx.y][threadIdx.x + 8] =",
        "bounds",
    ),
    "past a constant table": ("reversed", "backwards[lane % 4]", "backwards[lane % 5]", "bounds"),
    "a write to the input": ("scan", "if (i < n) out[i] =", "if (i < n) const_cast<int*>(x)[i] =", "constant"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str) -> None:
    kernel, right, wrong, said = PLANTED[name]
    assert RIGHT.count(right) == 1, "the bug must be planted in one place"
    found: set[str] = set()
    for schedule in simt.SCHEDULES:
        for seed in range(3):
            report = run(RIGHT.replace(right, wrong), CASES[kernel](), schedule=schedule, seed=seed)
            found |= {finding.kind for finding in report.findings}
    assert any(said in kind for kind in found), found


def test_a_finding_names_the_line_the_array_and_the_threads() -> None:
    kernel, right, wrong, _ = PLANTED["a plain addition instead of an atomic one"]
    finding = run(RIGHT.replace(right, wrong), CASES[kernel]()).findings[0]
    assert (finding.kind, finding.kernel, finding.argument, finding.offset) == ("race", kernel, "count", 0)
    assert finding.other is not None and finding.other != (finding.block, finding.thread)
    assert "(*count)++" in finding.line


def test_a_finding_inside_the_shim_names_the_source_s_line() -> None:
    finding = run(RIGHT, Case("quads", 1, 1, [X[1:], np.zeros(4, F32)])).findings[0]
    assert (finding.kind, finding.argument) == ("misaligned", "x")
    assert "reinterpret_cast<const float4*>(x)" in finding.line


def test_arrays_that_overlap_overlap_in_the_kernel() -> None:
    whole = np.zeros(64 + 32, I32)
    for schedule in simt.SCHEDULES:
        report = run(RIGHT, Case("reversed", 1, 64, [whole[32:], whole[:64]]), schedule=schedule)
        assert {(finding.kind, finding.argument) for finding in report.findings} == {("race", "out")}, schedule
    same = np.arange(64, dtype=I32)  # whoever reads and writes one array with a barrier between is right
    assert run(RIGHT, Case("reversed", 1, 32, [same, same])).findings == ()
    assert np.array_equal(same[:32], np.arange(32)[::-1])
    halves = np.arange(128, dtype=I32)  # neighbours do not overlap, and each keeps its own end
    assert run(RIGHT, Case("reversed", 1, 64, [halves[:64], halves[64:]])).findings == ()
    assert run(RIGHT, Case("reversed", 1, 64, [halves[:60], halves[60:]])).findings[0].kind == "out of bounds"


@pytest.mark.parametrize(
    ("grid", "block", "more", "said"),
    [
        (0, 32, {}, "a grid of (0,)"),
        ((1, 65536), 32, {}, "a grid of (1, 65536)"),
        (1, (1, 1, 65), {}, "a block of (1, 1, 65)"),
        (1, (2, 2, 2, 2), {}, "a block of (2, 2, 2, 2)"),
        (1, (32, 33), {}, "1 to 1024 threads, found 1056"),
        (1, 32, {"shared_bytes": 65537}, "a block has 65536"),
        (1, 32, {"schedule": "best"}, "no schedule 'best'"),
    ],
)
def test_a_launch_that_no_card_takes_is_refused(grid: Any, block: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(RigError, match=re.escape(said)):
        simt.compile(RIGHT).launch("quads", grid, block, [X, np.zeros_like(X)], **more)


def test_launch_bounds_are_a_promise() -> None:
    with pytest.raises(RigError, match="1 to 64 threads, found 96"):
        simt.compile(RIGHT).launch("reversed", 1, 96, [np.ones(96, I32), np.zeros(96, I32)])


def test_memory_that_was_never_written_is_seen_in_arguments_too() -> None:
    case = CASES["scan"]()
    module, written = simt.compile(RIGHT, checked=True), np.zeros((90, 4), np.uint8)
    report = module.launch(*case[:4], initialised=[written, None, np.zeros((90, 4), np.uint8)])
    assert {finding.kind for finding in report.findings} == {"uninitialised"}
    assert report.findings[0].argument == "x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([X, 200, np.zeros(2, F32)], "n: a number of type int32 is needed, found int 200"),
        ([X, np.int64(200), np.zeros(2, F32)], "n: a number of type int32"),
        ([X.astype(np.float64), N, np.zeros(2, F32)], "x: a contiguous array of float32"),
        ([X[::2], N, np.zeros(2, F32)], "x: a contiguous array of float32 is needed"),
        ([X, N], "takes 3 arguments, 2 were given"),
    ],
)
def test_arguments_that_cuda_would_misread_are_refused(arguments: list[Any], said: str) -> None:
    with pytest.raises(RigError, match=said):
        run(RIGHT, Case("block_sums", 1, 32, arguments, 128))


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(RigError, match=r"source.cu:1:.*nonsense"):
        simt.compile('extern "C" __global__ void k(int n) { nonsense; }')
    with pytest.raises(RigError, match="a parameter of type 'double'"):
        simt.compile('extern "C" __global__ void k(double n) {}')
    with pytest.raises(RigError, match="there is no kernel 'k'"):
        simt.compile(RIGHT).launch("k", 1, 1, [])


# The stand-in for CuPy.


@pytest.fixture
def cupy() -> Iterator[Any]:
    before = fake_cupy.configure(checked=True, schedule="fifo", free_bytes=None)
    yield fake_cupy
    fake_cupy.configure(**before)


def test_the_stand_in_runs_kernels_and_counts_waits(cupy: Any) -> None:
    module = cupy.RawModule(code=RIGHT, options=("-std=c++17",), backend="nvrtc")
    x, out = cupy.asarray(np.arange(90, dtype=np.int32)), cupy.empty((90,), np.int32)
    before = cupy.synchronisations()
    module.get_function("scan")((1,), (96,), (x, np.int32(90), out), shared_mem=0)
    assert cupy.synchronisations() == before
    assert np.array_equal(cupy.asnumpy(out), np.cumsum(np.arange(90)))
    assert cupy.synchronisations() == before + 1


WRONG_HOST = {
    "a Python int": (lambda cp, x, out: ((1,), (96,), (x, 90, out)), "found int 90"),
    "an int of 64 bits": (lambda cp, x, out: ((1,), (96,), (x, np.int64(90), out)), "int32 is needed"),
    "a host array": (lambda cp, x, out: ((1,), (96,), (x, np.int32(90), np.zeros(90, np.int32))), "host array"),
    "another type": (lambda cp, x, out: ((1,), (96,), (cp.asarray(np.zeros(90, F32)), np.int32(90), out)), "of int32"),
    "too short": (lambda cp, x, out: ((1,), (96,), (x, np.int32(90), out[:80])), "out of bounds"),
    "too many threads": (lambda cp, x, out: ((1,), (32, 33), (x, np.int32(90), out)), "1 to 1024 threads"),
    "no block": (lambda cp, x, out: ((0,), (96,), (x, np.int32(90), out)), "a grid of"),
    "never written": (lambda cp, x, out: ((1,), (96,), (cp.empty((90,), I32), np.int32(90), out)), "uninitialised"),
}


@pytest.mark.parametrize("name", WRONG_HOST)
def test_the_stand_in_refuses_what_a_card_would_get_wrong(cupy: Any, name: str) -> None:
    make, said = WRONG_HOST[name]
    x, out = cupy.asarray(np.arange(90, dtype=np.int32)), cupy.empty((90,), np.int32)
    with pytest.raises(FakeError, match=said):
        cupy.RawModule(code=RIGHT).get_function("scan")(*make(cupy, x, out))


def test_too_little_shared_memory_is_seen(cupy: Any) -> None:
    kernel, out = cupy.RawModule(code=RIGHT).get_function("block_sums"), cupy.empty((1,), F32)
    with pytest.raises(FakeError, match=r"out of bounds.*shared memory"):
        kernel((1,), (96,), (cupy.asarray(X), N, out), shared_mem=4 * 95)
    with pytest.raises(FakeError, match="a block has 49152"):
        kernel((1,), (96,), (cupy.asarray(X), N, out), shared_mem=50_000)


def test_device_and_host_arrays_do_not_mix(cupy: Any) -> None:
    x = cupy.asarray(X)
    with pytest.raises(TypeError, match="does not become a host array"):
        np.asarray(x)
    with pytest.raises(FakeError, match="a device array is needed"):
        cupy.matmul(x, X, out=x)
    a = cupy.asarray(np.ones((2, 3), F32))
    with pytest.raises(FakeError, match="does not fit"):
        cupy.matmul(a, a, out=a)
    with pytest.raises(FakeError, match="float16 or float32 throughout"):
        cupy.matmul(a, cupy.asarray(np.ones((3, 2), np.float16)), out=cupy.empty((2, 2), F32))
    with pytest.raises(FakeError, match="never written"):
        cupy.matmul(a, cupy.empty((3, 2), F32), out=cupy.empty((2, 2), F32))


# Mutants.


def judged(folder: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    source = folder / "a.cu"
    source.write_text('extern "C" __global__ void k(int* out) {\n    __syncthreads();\n    if (*out > 0) return;\n}\n')
    asked = [sys.executable, "-m", "cuda_rig.mutants", str(source), "--out", str(folder / "out.json")]
    asked += ["--command", command, *options]
    return subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent)


def test_a_mutant_is_killed_or_survives_by_the_command_s_word(tmp_path: Path) -> None:
    done = judged(tmp_path, "bash -c 'grep -q __syncthreads $CUDA_RIG_MUTANT || { echo AssertionError; exit 1; }'")
    assert done.stdout == "1 of 2 mutants were killed\n", done.stderr
    assert "a failed assertion: a.cu:2, no block barrier" in done.stderr
    assert "survived: a.cu:3, no early return" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["mutants"], found["outcomes"]) == (2, {"a failed assertion": 1, "survived": 1})
    assert [mutant["before"] for mutant in found["survivors"]] == ["if (*out > 0) return;"]


DEATHS = {
    "the checker's report": "echo FakeError: the checker found: Finding; echo AssertionError; exit 1",
    "a failed assertion": "echo AssertionError; exit 1",
    "a crash": "kill -SEGV $$",
    "too long": "sleep 60",
    "another error": "echo KeyError; exit 1",
}


@pytest.mark.parametrize("outcome", DEATHS)
def test_what_killed_a_mutant_is_told(tmp_path: Path, outcome: str) -> None:
    """Errors that are no verdict of the tests are listed with what was said."""
    whole = f"bash -c 'grep -q __syncthreads $CUDA_RIG_MUTANT && exit 0; {DEATHS[outcome]}'"
    done = judged(tmp_path, whole, "--only", "no block barrier", "--limit-s", "2")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["outcomes"] == {outcome: 1}, done.stderr
    assert [mutant["said"] for mutant in found["other errors"]] == (
        ["KeyError\n"] if outcome == "another error" else []
    )


def test_mutants_of_tests_that_fail_anyway_are_not_counted_as_killed(tmp_path: Path) -> None:
    done = judged(tmp_path, "false")
    assert done.returncode == 1
    assert "before anything is changed: false" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_an_import_that_fails_is_no_verdict(tmp_path: Path) -> None:
    """Pytest's exit code is 2 then, and 5 where it has selected nothing."""
    done = judged(tmp_path, "bash -c 'grep -q __syncthreads $CUDA_RIG_MUTANT || exit 2'")
    assert done.returncode == 1
    assert "gave 2, which is no verdict" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_mutant_that_does_not_compile_is_not_counted() -> None:
    """Nor is the command run."""
    mutant = mutants.Mutant("a.cu", 1, "no guard", "", "", 'extern "C" __global__ void k() { nonsense; }')
    assert mutants.judge(mutant, ["false"], 1).outcome == mutants.INVALID


def test_every_mutation_is_found_in_its_place(tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    code = [
        "template <int N>",
        "if (i < n) x = 1;  // if (a < b)",
        "atomicAdd(at, 1);",
        "if (lane == 0) x = 2;",
        "__syncwarp();",
    ]
    source.write_text("\n".join(code))
    assert [(mutant.line, mutant.mutation, mutant.after) for mutant in mutants.mutants(source)] == [
        (2, "no guard", "if (true) x = 1;"),
        (2, "a bound one too high", "if (i <= n) x = 1;"),
        (3, "a plain addition, not an atomic one", "(*(at) += 1);"),
        (4, "every thread, not the first", "if (true) x = 2;"),
        (5, "no warp barrier", ";"),
    ]
