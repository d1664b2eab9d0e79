"""The stand-in for CuPy: the order of work that it knows, cards, shared memory; and that CuPy has the same names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from cuda_rig import fake_cupy, simt
from cuda_rig.fake_cupy import FakeError

needs_compiler = pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
F32 = np.float32
ADD_ONE = """
extern "C" __global__ void add_one(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x] + 1; }
"""


@pytest.fixture
def cp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """With a machine of its own, of two cards."""
    machine = fake_cupy.Cuda()
    machine.count = 2
    monkeypatch.setattr(fake_cupy, "cuda", machine)
    before = fake_cupy.configure(checked=True, schedule="fifo", free_bytes=None)
    yield fake_cupy
    fake_cupy.configure(**before)


def add_one(cp: Any, x: Any, out: Any) -> None:
    cp.RawModule(code=ADD_ONE).get_function("add_one")((1,), (x.size,), (x, out))


def two_streams(cp: Any) -> tuple[Any, Any, Any, Any]:
    """Streams; x, of which the host knows that it is there, and which the first reads; y, which the first writes."""
    first, second = (cp.cuda.Stream(non_blocking=True) for _ in range(2))
    with first:
        x, y = cp.asarray(np.zeros(4, F32)), cp.empty((4,), F32)
        first.synchronize()
        add_one(cp, x, y)
    return first, second, x, y


# What the second stream does next, and what the message says of the first.
UNORDERED: dict[str, tuple[Callable[[Any, Any, Any], Any], str]] = {
    "a kernel reads": (lambda cp, x, y: add_one(cp, y, cp.empty((4,), F32)), "add_one on stream .* stream .* wrote"),
    "a kernel reads a part": (lambda cp, x, y: add_one(cp, y[1:3], cp.empty((2,), F32)), "add_one on stream .* wrote"),
    "the host reads": (lambda cp, x, y: cp.asnumpy(y), "a copy to the host on stream .* wrote"),
    "a kernel writes": (lambda cp, x, y: add_one(cp, cp.asarray(np.zeros(4, F32)), y), "add_one on stream .* wrote"),
    "a kernel writes what is read": (
        lambda cp, x, y: add_one(cp, cp.asarray(np.zeros(4, F32)), x),
        "add_one on stream .* reads",
    ),
}


@needs_compiler
@pytest.mark.parametrize("name", UNORDERED)
def test_streams_are_not_in_order_by_themselves(cp: Any, name: str) -> None:
    work, said = UNORDERED[name]
    _, second, x, y = two_streams(cp)
    with second, pytest.raises(FakeError, match=f"{said}, without a wait"):
        work(cp, x, y)
    with second:
        add_one(cp, x, cp.empty((4,), F32))  # two may read the same


def by_event(cp: Any, first: Any, second: Any) -> None:
    second.wait_event(first.record())


ORDER: dict[str, Callable[..., Any]] = {
    "an event": by_event,
    "a wait for the event": lambda cp, first, second: first.record().synchronize(),
    "a wait for the stream": lambda cp, first, second: first.synchronize(),
    "a wait for the card": lambda cp, first, second: cp.cuda.Device().synchronize(),
}


@needs_compiler
@pytest.mark.parametrize("name", ORDER)
def test_events_and_waits_put_streams_in_order(cp: Any, name: str) -> None:
    first, second, _, y = two_streams(cp)
    ORDER[name](cp, first, second)
    with second:
        z = cp.empty((4,), F32)
        add_one(cp, y, z)
        assert cp.asnumpy(z).tolist() == [2, 2, 2, 2]


@needs_compiler
def test_an_event_covers_what_came_before_it_only(cp: Any) -> None:
    first, second, x, y = two_streams(cp)
    second.wait_event(first.record())
    with first:
        add_one(cp, x, y)
    with second, pytest.raises(FakeError, match=r"add_one on stream .* wrote"):
        add_one(cp, y, cp.empty((4,), F32))


@needs_compiler
def test_a_host_read_on_a_stream_waits_for_that_stream_only(cp: Any) -> None:
    first, second, _, y = two_streams(cp)
    with first:
        assert cp.asnumpy(y).tolist() == [1, 1, 1, 1]
    with second:
        cp.asnumpy(y)  # done, as the host knows


def test_threads_have_a_current_stream_and_a_current_card_of_their_own(cp: Any) -> None:
    entered, left = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def inside(ordinal: int) -> tuple[bool, int]:
        with cp.cuda.Device(ordinal), cp.cuda.Stream() as stream:
            entered.wait()
            found = cp.cuda.get_current_stream() is stream, cp.cuda.runtime.getDevice()
            left.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(inside, (0, 1))) == [(True, 0), (True, 1)]
    assert cp.cuda.runtime.getDevice() == 0


@needs_compiler
def test_memory_and_streams_of_another_card_are_refused(cp: Any) -> None:
    x, stream = cp.asarray(np.zeros(4, F32)), cp.cuda.Stream()
    with cp.cuda.Device(1):
        with pytest.raises(FakeError, match="add_one: memory of card 0, the current one is 1"):
            add_one(cp, x, cp.empty((4,), F32))
        with pytest.raises(RuntimeError, match="stream is created on"), stream:
            pass
    with pytest.raises(fake_cupy.CUDARuntimeError, match="cudaErrorInvalidDevice"), cp.cuda.Device(2):
        pass


SHARED = """
namespace {
__device__ float twice(float x) {
    __shared__ float mine[256];
    mine[threadIdx.x] = x;
    __syncthreads();
    return mine[threadIdx.x] + mine[threadIdx.x ^ 1];
}
}  // namespace
extern "C" __global__ void k(float* out) {
    __shared__ float tile[2][512];
    extern __shared__ float more[];
    tile[threadIdx.x % 2][threadIdx.x] = out[threadIdx.x];
    __syncthreads();
    more[threadIdx.x] = twice(tile[1 - threadIdx.x % 2][threadIdx.x ^ 1]);
    out[threadIdx.x] = more[threadIdx.x];
}
"""


@needs_compiler
def test_shared_memory_counts_what_the_source_declares(cp: Any) -> None:
    """5 KB in the kernel and in what it calls: 43 are left of 48, and of 64 where the host asks for them, 59."""
    kernel, x = cp.RawModule(code=SHARED).get_function("k"), cp.asarray(np.ones(32, F32))
    kernel((1,), (32,), (x,), shared_mem=43 * 1024)
    assert cp.asnumpy(x).tolist() == [2] * 32
    with pytest.raises(FakeError, match=r"k: 5120 \+ 44033 bytes of shared memory, a block has 49152"):
        kernel((1,), (32,), (x,), shared_mem=43 * 1024 + 1)
    kernel.max_dynamic_shared_size_bytes = 60 * 1024
    kernel((1,), (32,), (x,), shared_mem=59 * 1024)
    with pytest.raises(FakeError, match="a block has 65536"):
        kernel((1,), (32,), (x,), shared_mem=60 * 1024)


def test_float16_products_need_a_mode_that_keeps_float32_sums(cp: Any) -> None:
    x = cp.asarray(np.ones((2, 2), np.float16))
    with pytest.raises(FakeError, match="reduce in float16"):
        cp.matmul(x, x, out=cp.empty((2, 2), np.float16))


def test_arrays_of_another_order_are_refused(cp: Any) -> None:
    with pytest.raises(FakeError, match="C-contiguous"):
        cp.asarray(np.zeros((2, 3), F32).T)


@pytest.mark.skipif(
    find_spec("cupy") is None, reason="needs CuPy, which needs no card for this: pip install cupy-cuda12x"
)
def test_cupy_has_what_the_stand_in_has() -> None:
    """Every name that the package and its tests use of CuPy, and the errors' kinds and numbers."""
    import cupy

    for name in ("asarray", "asnumpy", "empty", "matmul", "ndarray", "RawModule", "RawKernel"):
        assert hasattr(cupy, name), name
    cuda = cupy.cuda
    for part, names in {
        cuda: ("Device", "Stream", "Event", "get_current_stream"),
        cuda.Device: ("compute_capability", "synchronize", "__enter__"),
        cuda.Stream: ("synchronize", "record", "wait_event", "__enter__"),
        cuda.runtime: ("getDevice", "getDeviceCount", "getDeviceProperties"),
        cuda.device: ("get_cublas_handle",),
        cupy.RawModule: ("compile", "get_function"),
        cupy.RawKernel: ("max_dynamic_shared_size_bytes",),
    }.items():
        assert not [name for name in names if not hasattr(part, name)], part
    for theirs, ours in (
        (cuda.runtime.CUDARuntimeError, fake_cupy.CUDARuntimeError),
        (cuda.driver.CUDADriverError, fake_cupy.CUDADriverError),
        (cuda.compiler.CompileException, fake_cupy.CompileException),
        (cuda.memory.OutOfMemoryError, fake_cupy.OutOfMemoryError),
    ):
        assert theirs.__mro__[1:] == ours.__mro__[1:], theirs
    for status, text in fake_cupy.CUDARuntimeError.NAMES.items():
        error = cuda.runtime.CUDARuntimeError(status)
        assert (error.status, str(error)) == (status, text)
