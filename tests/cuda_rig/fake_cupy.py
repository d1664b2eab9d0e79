"""A strict stand-in for CuPy: device arrays that are NumPy's and do not mix with them, kernels that run under `simt`.

It has the small surface that host code of kernels needs, and refuses what CuPy would take and a card would get wrong: a
Python int where a kernel reads 32 bits (CuPy packs 64), a float (CuPy packs a double), an array of another type, a host
array among device arrays, a block of more threads or more shared memory than a Tesla T4 has.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import simt

MOST_THREADS, MOST_SHARED_BYTES = 1024, 48 * 1024  # of a block; more shared memory is to be asked for by an attribute
MOST_GRID = (2**31 - 1, 65535, 65535)


class FakeError(Exception):
    """Host code that CuPy or a card would refuse, or misunderstand."""


class CUDARuntimeError(RuntimeError):
    """As `cupy.cuda.runtime.CUDARuntimeError`."""


class CompileException(Exception):  # noqa: N818 # CuPy's name
    """As `cupy.cuda.compiler.CompileException`."""


class OutOfMemoryError(MemoryError):
    """As `cupy.cuda.memory.OutOfMemoryError`."""


class ndarray:  # noqa: N801 # CuPy's name
    """Memory of the device, C-contiguous. written: a byte for each of its bytes, 1 where it was ever written."""

    def __init__(self, memory: NDArray[Any], written: NDArray[np.uint8]):
        self._memory, self._written = memory, written

    @property
    def shape(self) -> tuple[int, ...]:
        return self._memory.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._memory.dtype

    @property
    def size(self) -> int:
        return self._memory.size

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def __len__(self) -> int:
        return len(self._memory)

    def __getitem__(self, part: int | slice) -> ndarray:
        """Of the first axis, without gaps: what stays contiguous."""
        if not isinstance(part, (int, slice)) or (isinstance(part, slice) and part.step not in (None, 1)):
            raise FakeError(f"this stand-in slices the first axis without steps, found {part!r}")
        return ndarray(self._memory[part], self._written[part])

    def get(self) -> NDArray[Any]:
        """A copy on the host, for which the host waits."""
        _count_wait()
        return self._memory.copy()

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError("a device array does not become a host array by itself: use get() or cupy.asnumpy")


class _State:
    """Of the stand-in: how sources are built and run, and how often the host waited."""

    checked, schedule, seed = False, "fifo", 0
    waits = 0
    free_bytes: int | None = None
    findings: list[simt.Finding] = []  # noqa: RUF012 # there is one state


def _count_wait() -> None:
    _State.waits += 1


def synchronisations() -> int:
    """How often the host has waited for the device so far."""
    return _State.waits


def _new(memory: NDArray[Any], written: bool) -> ndarray:
    if _State.free_bytes is not None and memory.nbytes > _State.free_bytes:
        raise OutOfMemoryError(f"out of memory allocating {memory.nbytes:,} bytes")
    return ndarray(memory, np.full((*memory.shape, memory.itemsize), written, np.uint8))


def empty(shape: int | Sequence[int], dtype: Any) -> ndarray:
    """Memory of 0xFF bytes, NaN in floats, so that what nobody wrote shows."""
    memory = np.empty(shape, dtype)
    memory.view(np.uint8).fill(0xFF) if memory.size else None
    return _new(memory, False)


def asarray(array: NDArray[Any]) -> ndarray:
    """A host array copied to the device."""
    if not isinstance(array, np.ndarray):
        raise FakeError(f"asarray takes a NumPy array here, found {type(array).__name__}")
    return _new(np.array(array, order="C"), True)


def asnumpy(array: ndarray) -> NDArray[Any]:
    """A device array copied to the host, for which the host waits."""
    return _of_device(array, "asnumpy").get()


def matmul(a: ndarray, b: ndarray, out: ndarray) -> None:
    """A product of matrices as cuBLAS computes it: float16 is summed in float32 and rounded once."""
    arrays = [_of_device(array, "matmul") for array in (a, b, out)]
    kinds = {array.dtype for array in arrays}
    if len(kinds) != 1 or a.dtype not in (np.float16, np.float32):
        raise FakeError(f"matmul needs float16 or float32 throughout, found {', '.join(str(x.dtype) for x in arrays)}")
    if out.shape != (a.shape[0], b.shape[1]) or a.shape[1] != b.shape[0]:
        raise FakeError(f"matmul of {a.shape} and {b.shape} does not fit into {out.shape}")
    if _State.checked and not (a._written.all() and b._written.all()):
        raise FakeError("matmul reads memory that was never written")
    out._memory[...] = a._memory.astype(np.float32) @ b._memory.astype(np.float32)
    out._written[...] = 1


def _of_device(array: Any, where: str) -> ndarray:
    if not isinstance(array, ndarray):
        raise FakeError(f"{where}: a device array is needed, found {type(array).__name__}")
    return array


class RawModule:
    """A source, built when it is first needed. The options are NVRTC's and mean nothing here."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc"):
        if not isinstance(code, str) or not isinstance(options, tuple) or backend not in ("nvrtc", "nvcc"):
            raise FakeError("RawModule takes code as text, options as a tuple, and a backend that there is")
        self._code = code

    def compile(self) -> None:
        if cuda.no_compiler:
            raise RuntimeError("CuPy failed to load libnvrtc.so.12: cannot open shared object file")
        self._module()

    def _module(self) -> simt.Module:
        return simt.compile(self._code, checked=_State.checked)

    def get_function(self, name: str) -> Kernel:
        self.compile()
        if name not in simt.parse(self._code):
            raise CUDARuntimeError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        return Kernel(self._module, name)


class Kernel:
    def __init__(self, module: Any, name: str):
        self._module, self._name = module, name

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        """Launch; FakeError for what a T4 does not take, or a kernel would misread."""
        shape, threads = (*grid, 1, 1)[:3], int(np.prod(block))
        if not 0 < threads <= MOST_THREADS:
            raise FakeError(f"{self._name}: a block has 1 to {MOST_THREADS} threads, found {threads}")
        if any(not 0 < size <= most for size, most in zip(shape, MOST_GRID, strict=True)):
            raise FakeError(f"{self._name}: a grid of {tuple(grid)} is not within 1 and {MOST_GRID}")
        if shared_mem > MOST_SHARED_BYTES:
            raise FakeError(f"{self._name}: {shared_mem} bytes of shared memory, a block has {MOST_SHARED_BYTES}")
        arrays = [argument if isinstance(argument, ndarray) else None for argument in args]
        values = [argument._memory if isinstance(argument, ndarray) else argument for argument in args]
        for argument in args:
            if isinstance(argument, np.ndarray):
                raise FakeError(f"{self._name}: a host array among the arguments")
        written = [None if array is None else array._written for array in arrays]
        try:
            report = self._module().launch(
                self._name,
                shape,
                tuple(block),
                values,
                shared_bytes=shared_mem,
                schedule=_State.schedule,
                seed=_State.seed,
                initialised=written if _State.checked else None,
            )
        except simt.RigError as error:
            raise FakeError(str(error)) from None
        _State.findings.extend(report.findings)
        if report.findings:
            raise FakeError(f"the checker found: {report.findings[0]}")


class Device:
    """One card; a context manager."""

    def __init__(self, ordinal: int = 0):
        self.id = ordinal

    @property
    def compute_capability(self) -> str:
        return cuda.capability

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        _count_wait()


class Stream:
    """Work in order; a context manager. Everything here is done when it is started."""

    def __init__(self, *, non_blocking: bool = False):
        self.non_blocking = non_blocking

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        _count_wait()


class Cuda:
    """`cupy.cuda`: what a machine has is set by these fields. driver: None, or the message of what is wrong with it."""

    Device, Stream = Device, Stream
    compiler = types.SimpleNamespace(CompileException=CompileException)
    memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    name, capability, count = "Tesla T4 (stand-in)", "75", 1
    driver: str | None = None
    no_compiler = False

    @property
    def runtime(self) -> types.SimpleNamespace:
        def count() -> int:
            if self.driver:
                raise CUDARuntimeError(self.driver)
            return self.count

        return types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=count,
            getDevice=lambda: 0,
            getDeviceProperties=lambda ordinal: {"name": self.name.encode()},
        )


cuda = Cuda()
__version__ = "14.2.0"


def configure(**settings: Any) -> Mapping[str, Any]:
    """Set checked, schedule, seed or free_bytes; returns what they were."""
    before = {name: getattr(_State, name) for name in settings}
    for name, value in settings.items():
        setattr(_State, name, value)
    return before
