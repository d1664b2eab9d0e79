"""A strict stand-in for CuPy: device arrays that are NumPy's and do not mix with them, kernels that run under `simt`.

It has the small surface that host code of kernels needs, and refuses what CuPy would take and a card would get wrong: a
Python int where a kernel reads 32 bits (CuPy packs 64), a float (CuPy packs a double), an array of another type, a host
array among device arrays, a block of more threads or more shared memory than a Tesla T4 has.
"""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import simt, streams

MOST_SHARED_BYTES = 48 * 1024  # of a block; more is to be asked for by an attribute
CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16


class FakeError(Exception):
    """Host code that CuPy or a card would refuse, or misunderstand."""


class CUDARuntimeError(RuntimeError):
    """As `cupy.cuda.runtime.CUDARuntimeError`: status is a number of cudaError_t."""

    NAMES = types.MappingProxyType(
        {
            2: "cudaErrorMemoryAllocation: out of memory",
            35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
            46: "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable",
            100: "cudaErrorNoDevice: no CUDA-capable device is detected",
            101: "cudaErrorInvalidDevice: invalid device ordinal",
        }
    )

    def __init__(self, status: int):
        super().__init__(self.NAMES[status])
        self.status = status


class CUDADriverError(RuntimeError):
    """As `cupy.cuda.driver.CUDADriverError`."""


class CompileException(Exception):  # noqa: N818 # CuPy's name
    """As `cupy.cuda.compiler.CompileException`."""


class OutOfMemoryError(MemoryError):
    """As `cupy.cuda.memory.OutOfMemoryError`."""


class ndarray:  # noqa: N801 # CuPy's name
    """Memory of a card, C-contiguous. written: a byte for each of its bytes, 1 where it was ever written."""

    def __init__(self, memory: NDArray[Any], written: NDArray[np.uint8], device_id: int, uses: streams.Uses):
        self._memory, self._written, self._device_id, self._uses = memory, written, device_id, uses

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
        return ndarray(self._memory[part], self._written[part], self._device_id, self._uses)

    def get(self) -> NDArray[Any]:
        """A copy on the host, made by the current stream, for which the host waits."""
        _access("a copy to the host", reads=[self])
        _wait(get_current_stream()._clock.moment())
        return self._memory.copy()

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError("a device array does not become a host array by itself: use get() or cupy.asnumpy")


class _State:
    """Of the stand-in: how sources are built and run, and how often the host waited."""

    checked, schedule, seed = False, "fifo", 0
    waits = 0
    free_bytes: int | None = None


class _Thread(threading.local):
    """Current card, each card's current streams, innermost last, and the cuBLAS handles."""

    def __init__(self) -> None:
        self.device_id = 0
        self.streams: dict[int, list[Stream]] = {}
        self.handles: dict[int, int] = {}


_thread = _Thread()


def _wait(moment: Mapping[streams.Clock, int]) -> None:
    """The host waits, and it is counted."""
    _State.waits += 1
    streams.host_waits(moment)


def get_current_stream() -> Stream:
    stack = _thread.streams.get(_thread.device_id)
    return stack[-1] if stack else _default_stream(_thread.device_id)


def _access(what: str, reads: Iterable[ndarray] = (), writes: Iterable[ndarray] = ()) -> None:
    """Work of the current stream. FakeError for another card's memory, and for what nothing puts in order."""
    reads, writes = list(reads), list(writes)
    for array in (*reads, *writes):
        if array._device_id != _thread.device_id:
            raise FakeError(f"{what}: memory of card {array._device_id}, the current one is {_thread.device_id}")
    clock = get_current_stream()._clock
    try:
        streams.access(clock, what, reads=[a._uses for a in reads], writes=[a._uses for a in writes])
    except streams.UnorderedError as error:
        raise FakeError(str(error)) from None


def synchronisations() -> int:
    """How often the host has waited for the device so far."""
    return _State.waits


def _new(memory: NDArray[Any], written: bool) -> ndarray:
    if cuda.busy:
        raise CUDARuntimeError(46)
    if _State.free_bytes is not None and memory.nbytes > _State.free_bytes:
        raise OutOfMemoryError(f"Out of memory allocating {memory.nbytes:,} bytes (allocated so far: 0 bytes).")
    marks = np.full((*memory.shape, memory.itemsize), written, np.uint8)
    return ndarray(memory, marks, _thread.device_id, streams.Uses())


def empty(shape: int | Sequence[int], dtype: Any) -> ndarray:
    """Memory of 0xFF bytes, NaN in floats, so that what nobody wrote shows."""
    memory = np.empty(shape, dtype)
    memory.view(np.uint8).fill(0xFF) if memory.size else None
    return _new(memory, False)


def asarray(array: NDArray[Any]) -> ndarray:
    """A host array copied to the device by the current stream. CuPy keeps the order of one that is not C-contiguous."""
    if not isinstance(array, np.ndarray) or not (array.ndim < 2 or array.flags.c_contiguous):
        raise FakeError(f"asarray takes a C-contiguous NumPy array here, found {type(array).__name__}")
    copied = _new(np.array(array, order="C"), True)
    _access("a copy from the host", writes=[copied])
    return copied


def asnumpy(array: ndarray) -> NDArray[Any]:
    """A device array copied to the host, for which the host waits."""
    return _of_device(array, "asnumpy").get()


def matmul(a: ndarray, b: ndarray, out: ndarray) -> None:
    """A product of matrices as cuBLAS computes it: float16 is summed in float32 and rounded once.

    FakeError for float16 where cuBLAS was not told to do so: it may add parts of a sum in float16.
    """
    arrays = [_of_device(array, "matmul") for array in (a, b, out)]
    kinds = {array.dtype for array in arrays}
    if len(kinds) != 1 or a.dtype not in (np.float16, np.float32):
        raise FakeError(f"matmul needs float16 or float32 throughout, found {', '.join(str(x.dtype) for x in arrays)}")
    if out.shape != (a.shape[0], b.shape[1]) or a.shape[1] != b.shape[0]:
        raise FakeError(f"matmul of {a.shape} and {b.shape} does not fit into {out.shape}")
    mode = cuda.cublas.getMathMode(cuda.device.get_cublas_handle())
    if a.dtype == np.float16 and not mode & CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION:
        raise FakeError("matmul of float16 under a math mode that lets cuBLAS reduce in float16")
    _access("matmul", reads=[a, b], writes=[out])
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
    """max_dynamic_shared_size_bytes: as CuPy's attribute, what launches may ask for; a card grants up to 64 KB."""

    def __init__(self, module: Any, name: str):
        self._module, self._name = module, name
        self.max_dynamic_shared_size_bytes = 0  # not asked for

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        """Launch; FakeError for what a T4 does not take, or a kernel would misread."""
        module = self._module()
        static, most = module.static_bytes[self._name], MOST_SHARED_BYTES
        if static + shared_mem > most and shared_mem > self.max_dynamic_shared_size_bytes:
            raise FakeError(f"{self._name}: {static} + {shared_mem} bytes of shared memory, a block has {most}")
        arrays = [argument if isinstance(argument, ndarray) else None for argument in args]
        values = [argument._memory if isinstance(argument, ndarray) else argument for argument in args]
        for argument in args:
            if isinstance(argument, np.ndarray):
                raise FakeError(f"{self._name}: a host array among the arguments")
        used = list(zip(arrays, module.kernels[self._name], strict=False))
        writes = [array for array, parameter in used if array is not None and not parameter.constant]
        _access(self._name, [array for array in arrays if array is not None], writes)
        written = [None if array is None else array._written for array in arrays]
        try:
            report = module.launch(
                self._name,
                tuple(grid),
                tuple(block),
                values,
                shared_bytes=shared_mem,
                schedule=_State.schedule,
                seed=_State.seed,
                initialised=written if _State.checked else None,
            )
        except simt.RigError as error:
            raise FakeError(str(error)) from None
        if report.findings:
            raise FakeError(f"the checker found: {report.findings[0]}")


class Device:
    """A card, the current one if not told which; a context manager that makes it the current one."""

    def __init__(self, device: int | None = None):
        self.id = _thread.device_id if device is None else device
        self._before: list[int] = []

    @property
    def compute_capability(self) -> str:
        return cuda.capability

    def __enter__(self) -> Device:
        if not 0 <= self.id < cuda.count:
            raise CUDARuntimeError(101)
        self._before.append(_thread.device_id)
        _thread.device_id = self.id
        return self

    def __exit__(self, *_: object) -> None:
        _thread.device_id = self._before.pop()

    def synchronize(self) -> None:
        """The host waits for all streams of the card."""
        with _LOCK:
            moments = [stream._clock.moment() for stream in _STREAMS if stream.device_id == self.id]
        _wait({clock: number for moment in moments for clock, number in moment.items()})


class Event:
    """A place in a stream's work."""

    def __init__(self) -> None:
        self._moment: Mapping[streams.Clock, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self._moment = (stream or get_current_stream())._clock.moment()

    def synchronize(self) -> None:
        _wait(self._moment)


class Stream:
    """Work in order, of the card that is current when it is made; a context manager that makes it the current one."""

    def __init__(self, *, non_blocking: bool = False):
        self.non_blocking, self.device_id = non_blocking, _thread.device_id
        with _LOCK:
            self._clock = streams.Clock(f"stream {next(_NUMBERS)} of card {self.device_id}")
            _STREAMS.append(self)

    def __enter__(self) -> Stream:
        if self.device_id != _thread.device_id:
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id}) does not match with the current device "
                f"({_thread.device_id})"
            )
        _thread.streams.setdefault(self.device_id, []).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _thread.streams[self.device_id].pop()

    def record(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self._clock.wait_for(event._moment)

    def synchronize(self) -> None:
        _wait(self._clock.moment())


_LOCK, _NUMBERS = threading.RLock(), itertools.count()
_STREAMS: list[Stream] = []
_DEFAULT: dict[int, Stream] = {}


def _default_stream(device_id: int) -> Stream:
    """One for each card, of all threads."""
    with _LOCK:
        if device_id not in _DEFAULT:
            with Device(device_id):
                _DEFAULT[device_id] = Stream()
        return _DEFAULT[device_id]


class Cublas:
    """`cupy.cuda.cublas`. Handles belong to a thread and a card."""

    CUBLAS_DEFAULT_MATH = 0

    def __init__(self) -> None:
        self._modes: dict[int, int] = {}

    def getMathMode(self, handle: int) -> int:  # noqa: N802 # CuPy's name
        return self._modes.get(handle, self.CUBLAS_DEFAULT_MATH)

    def setMathMode(self, handle: int, mode: int) -> None:  # noqa: N802 # CuPy's name
        self._modes[handle] = mode


class Cuda:
    """`cupy.cuda`: what a machine has is set by these fields. trouble: what the driver answers with, or None."""

    Device, Stream, Event = Device, Stream, Event
    compiler = types.SimpleNamespace(CompileException=CompileException)
    driver = types.SimpleNamespace(CUDADriverError=CUDADriverError)
    memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    name, capability, count = "Tesla T4 (stand-in)", "75", 1
    trouble: int | None = None
    no_compiler = no_cublas = busy = False  # busy: no process gets a context on the card

    def __init__(self) -> None:
        self._cublas, self._handles = Cublas(), itertools.count(1)
        self.get_current_stream = get_current_stream

    @property
    def cublas(self) -> Cublas:
        """Loaded where it is first needed."""
        if self.no_cublas:
            raise ImportError('Failure finding "libcublas.so.12": No such file: libcublas.so.12\n  listdir(...):')
        return self._cublas

    @property
    def device(self) -> types.SimpleNamespace:
        def handle() -> int:
            self.cublas  # noqa: B018 # the import
            return _thread.handles.setdefault(_thread.device_id, next(self._handles))

        return types.SimpleNamespace(get_cublas_handle=handle)

    @property
    def runtime(self) -> types.SimpleNamespace:
        """A count of 0 is an answer that no call gives: without a card every one of them raises."""

        def answer(value: Any) -> Any:
            status = self.trouble if self.trouble else 0 if self.count else 100
            if status:
                raise CUDARuntimeError(status)
            return value

        return types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: answer(self.count),
            getDevice=lambda: answer(_thread.device_id),
            getDeviceProperties=lambda ordinal: answer({"name": self.name.encode(), "multiProcessorCount": 40}),
        )


cuda = Cuda()
__version__ = "14.2.0"


def configure(**settings: Any) -> Mapping[str, Any]:
    """Set checked, schedule, seed or free_bytes; returns what they were."""
    before = {name: getattr(_State, name) for name in settings}
    for name, value in settings.items():
        setattr(_State, name, value)
    return before
