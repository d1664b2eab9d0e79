"""The GPU: found, or one sentence that says why there is none and what to install; what CUDA refuses, explained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from .errors import BackendError

OLDEST = 75  # compute capability 7.5, as the Tesla T4 has: what the kernels are compiled and budgeted for at least
INSTALL = 'pip install "cupy-cuda12x[ctk]"'  # with the CUDA libraries that it needs; cuda13x for CUDA 13 drivers
# cudaError_t, as CuPy's CUDARuntimeError has it in `status`. A machine without any driver answers with the first.
INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100
# In the texts of CUDA's own errors, where it is not CuPy's allocator that finds no memory.
NO_ROOM = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
FULL_SUMS = 16  # CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION (cublas_api.h)


@dataclass(frozen=True)
class CudaDevice:
    """A usable card. cp: the CuPy module; capability: 75 for 7.5; multiprocessors: how many it has."""

    cp: Any
    ordinal: int
    name: str
    capability: int
    multiprocessors: int


def installed() -> bool:
    """Whether CuPy is there, without importing it: a process that has no use for a GPU loads nothing."""
    return find_spec("cupy") is not None


def find() -> CudaDevice:
    """The card that is CuPy's current one in this thread, now: what is loaded on it stays with it.

    BackendError says which of CuPy, driver, card or compute capability is missing, and what to do.
    """
    device = _looked_for()
    if isinstance(device, str):
        raise BackendError(f'device "cuda" is not available: {device}')
    return device


def why_not() -> str | None:
    """Why no GPU can be used; None if one can."""
    device = _looked_for()
    return device if isinstance(device, str) else None


def _looked_for() -> CudaDevice | str:
    if not installed():
        return f"CuPy is not installed: {INSTALL}"
    try:
        import cupy as cp

        runtime = cp.cuda.runtime
    except ImportError as error:  # CuPy is there, a library that it links to is not
        return f"CuPy cannot be imported ({_line(error)}): {INSTALL} brings the CUDA libraries that it needs"
    try:
        ordinal = runtime.getDevice()
        properties = runtime.getDeviceProperties(ordinal)
        capability = int(cp.cuda.Device(ordinal).compute_capability)
    except runtime.CUDARuntimeError as error:
        return _unanswered(error)
    name = properties["name"].decode()
    if capability < OLDEST:
        return f"{name} has compute capability {capability / 10}, the kernels need {OLDEST / 10} (Tesla T4) or later"
    return CudaDevice(cp, ordinal, name, capability, properties["multiProcessorCount"])


def _unanswered(error: Any) -> str:
    """Why CUDA names no card. error: a CUDARuntimeError."""
    if error.status == NO_DEVICE:
        return f"no CUDA card is visible ({error}): see nvidia-smi and the variable CUDA_VISIBLE_DEVICES"
    if error.status == INSUFFICIENT_DRIVER:
        return (
            f"NVIDIA's driver is missing or older than this CuPy needs ({error}): install or update it (nvidia-smi "
            f"shows it), or take the CuPy for its CUDA version: {INSTALL}, or cupy-cuda13x[ctk]"
        )
    return f"CUDA does not answer ({error}): see nvidia-smi"


@contextmanager
def loading(device: CudaDevice) -> Iterator[Any]:
    """The card as this thread's current one; BackendError for what CUDA or a library of it refuses meanwhile."""
    cp = device.cp
    try:
        with cp.cuda.Device(device.ordinal) as card:
            yield card
    except (cp.cuda.memory.OutOfMemoryError, RuntimeError) as error:  # CUDA's and cuBLAS's errors are RuntimeErrors
        if out_of_memory(cp, error):
            advice = 'free some (nvidia-smi shows whose it is), load with precision="fp16", or use device="cpu"'
            said = f"{device.name} has no room for the model ({_line(error)}): {advice}"
        else:
            said = f'{device.name} refuses the model ({_line(error)}): see nvidia-smi, or use device="cpu"'
        raise BackendError(f'device "cuda": {said}') from error
    except ImportError as error:  # CuPy loads cuBLAS where it first needs it
        raise BackendError(
            f'device "cuda": a library of CUDA is missing ({_line(error)}): {INSTALL} brings it'
        ) from error


def out_of_memory(cp: Any, error: Exception) -> bool:
    """Whether it says that the card's memory does not suffice: CuPy's own error, or one of CUDA."""
    return isinstance(error, cp.cuda.memory.OutOfMemoryError) or any(name in str(error) for name in NO_ROOM)


def compile_kernels(kernels: Any, device: CudaDevice) -> None:
    """Compile all of them now, which takes seconds; CuPy keeps them on disk. BackendError where it cannot be done.

    kernels: with a method `compile`.
    """
    cp = device.cp
    with loading(device):
        try:
            kernels.compile()
        except (cp.cuda.runtime.CUDARuntimeError, cp.cuda.driver.CUDADriverError):
            raise  # the card's
        except (RuntimeError, OSError, cp.cuda.compiler.CompileException) as error:
            raise BackendError(
                f'device "cuda": the kernels cannot be compiled ({_line(error)}): NVRTC, CUDA\'s run-time compiler, '
                f"and its headers come with {INSTALL}"
            ) from error


@contextmanager
def full_sums(cp: Any) -> Iterator[None]:
    """Products of float16 matrices keep their sums in float32 to the end.

    Else cuBLAS may share a long sum among blocks and add their parts in float16. The handle that says so is CuPy's, one
    for each thread and card, and other code may use it: it gets its mode back.
    """
    cublas, handle = cp.cuda.cublas, cp.cuda.device.get_cublas_handle()
    before = cublas.getMathMode(handle)
    cublas.setMathMode(handle, FULL_SUMS)
    try:
        yield
    finally:
        cublas.setMathMode(handle, before)


def _line(error: Exception) -> str:
    """The first line of its text: missing libraries come with a listing of folders, compilers with the whole log."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
