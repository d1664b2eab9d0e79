"""The GPU: found once, or one sentence that says why there is none and what to install."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from .errors import BackendError

OLDEST = 75  # compute capability 7.5, as the Tesla T4 has: what the kernels are compiled and budgeted for at least
INSTALL = 'pip install "cupy-cuda12x[ctk]"'  # with the CUDA libraries that it needs; cuda13x for CUDA 13 drivers


@dataclass(frozen=True)
class CudaDevice:
    """A usable card. cp: the CuPy module; capability: 75 for 7.5."""

    cp: Any
    ordinal: int
    name: str
    capability: int


def installed() -> bool:
    """Whether CuPy is there, without importing it: a process that has no use for a GPU loads nothing."""
    return find_spec("cupy") is not None


def find() -> CudaDevice:
    """CuPy's current device. BackendError says which of CuPy, driver, card or compiler is missing, and what to do."""
    device = _found()
    if isinstance(device, str):
        raise BackendError(f'device "cuda" is not available: {device}')
    return device


def why_not() -> str | None:
    """Why no GPU can be used; None if one can."""
    device = _found()
    return device if isinstance(device, str) else None


@cache  # a driver does not appear while a process runs
def _found() -> CudaDevice | str:
    if not installed():
        return f"CuPy is not installed: {INSTALL}"
    try:
        import cupy as cp

        runtime = cp.cuda.runtime
    except ImportError as error:  # CuPy is there, a library that it links to is not
        return f"CuPy cannot be imported ({error}): {INSTALL} brings the CUDA libraries that it needs"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return (
            f"CUDA does not answer ({error}): install NVIDIA's driver (nvidia-smi shows it), or, where the driver is "
            f"for another CUDA version, that version's CuPy: {INSTALL} or cupy-cuda13x[ctk]"
        )
    if not count:
        return "no CUDA card is visible: see nvidia-smi and the variable CUDA_VISIBLE_DEVICES"
    ordinal = runtime.getDevice()
    name = runtime.getDeviceProperties(ordinal)["name"].decode()
    capability = int(cp.cuda.Device(ordinal).compute_capability)
    if capability < OLDEST:
        return f"{name} has compute capability {capability / 10}, the kernels need {OLDEST / 10} (Tesla T4) or later"
    return CudaDevice(cp, ordinal, name, capability)


def compile_kernels(kernels: Any, device: CudaDevice) -> None:
    """Compile all of them now, which takes seconds; CuPy keeps them on disk. BackendError where it cannot be done.

    kernels: with a method `compile`.
    """
    try:
        with device.cp.cuda.Device(device.ordinal):
            kernels.compile()
    except (RuntimeError, OSError, device.cp.cuda.compiler.CompileException) as error:
        raise BackendError(
            f'device "cuda": the kernels cannot be compiled ({error}): NVRTC, CUDA\'s run-time compiler, and its '
            f"headers come with {INSTALL}"
        ) from error
