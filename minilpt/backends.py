"""Which kernels run, on which device, in which precision: chosen once, with the reason where one is unavailable."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

from . import cuda_device
from .errors import BackendError, MinilptWarning
from .kernels import bundled, compiled, isa
from .threads import usable_cores

DEVICES = ("auto", "cpu", "cuda")
INTEGER_PRECISIONS = ("ibert", "ibert-float-head")  # the second: with I-BERT's own head, for comparison
PRECISIONS = ("fp32", "fp16", "int8", *INTEGER_PRECISIONS)
CUDA_PRECISIONS = ("fp32", "fp16", "ibert")
CPU_PRECISIONS = ("fp32", "int8", *INTEGER_PRECISIONS)


@dataclass(frozen=True)
class Backend:
    """name: "numba", "numpy" or "cuda"; threads: of this engine, or BLAS's for numpy, or the host's one for cuda.

    rung: the instruction set, "sm_75" and the like for cuda; reason: why the compiled kernels are not used, if they are
    not.
    """

    name: str
    device: str
    precision: str
    threads: int
    rung: str | None = None
    reason: str | None = None


def choose(device: str, precision: str, threads: int | None) -> Backend:
    """The backend for these wishes; BackendError says why there is none.

    "auto" takes a GPU where CuPy is installed, a card answers and the precision is one of CUDA_PRECISIONS; where CuPy
    is installed but finds nothing that it can use, the CPU runs if it has the precision, and one warning says why.
    Compiled kernels run on `threads` threads of their own, by default one for each usable core. Where Numba is missing
    NumPy takes over in fp32, with one warning; its products run on BLAS, which has one thread count for the whole
    process: `threads` sets it, None leaves it as it is.
    """
    if device not in DEVICES:
        raise BackendError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if precision not in PRECISIONS:
        raise BackendError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise BackendError(f"threads must be a positive integer or None, found {threads!r}")
    if device == "cuda":
        return _cuda(precision)
    if device == "auto" and precision in CUDA_PRECISIONS and cuda_device.installed():
        try:
            return _cuda(precision)
        except BackendError as error:
            if precision in CPU_PRECISIONS:
                return fall_back(error, precision=precision, threads=threads)
    if precision not in CPU_PRECISIONS:
        reason = 'device is "cpu"' if device == "cpu" else cuda_device.why_not()
        raise BackendError(f"precision {precision!r} needs a GPU: {reason}")
    reason = _why_not_compiled()
    if reason is None:
        try:
            rung = isa.chosen().name
            if bundled.rungs() is not None:
                compiled.entry("integer" if precision in INTEGER_PRECISIONS else "float")
        except ValueError as error:
            raise BackendError(str(error)) from None
        return Backend("numba", "cpu", precision, threads or usable_cores(), rung)
    if precision != "fp32":
        raise BackendError(f"precision {precision!r} needs the compiled kernels: {reason}")
    warnings.warn(f"{reason}; running on NumPy, which is slower", MinilptWarning, stacklevel=3)
    return Backend("numpy", "cpu", precision, _blas_threads(threads), reason=reason)


def fall_back(error: BackendError, *, precision: str, threads: int | None) -> Backend:
    """The CPU in the place of a GPU that "auto" would take but for this error, which one warning tells."""
    warnings.warn(f"{error}; running on the CPU", MinilptWarning, stacklevel=4)
    return choose("cpu", precision, threads)


def _cuda(precision: str) -> Backend:
    if precision not in CUDA_PRECISIONS:
        raise BackendError(f'device "cuda" has precision {", ".join(CUDA_PRECISIONS)}, not {precision!r}')
    return Backend("cuda", "cuda", precision, 1, f"sm_{cuda_device.find().capability}")


def unavailable() -> dict[str, str]:
    """Backend -> why it cannot be used, of those that cannot. Imports CuPy where it is installed."""
    reasons = {"cuda": cuda_device.why_not(), "numba": _why_not_compiled()}
    return {name: reason for name, reason in reasons.items() if reason}


def _why_not_compiled() -> str | None:
    if sys.byteorder != "little":
        return "the compiled kernels are for little-endian machines"
    if bundled.rungs() is None and find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    return None


def _blas_threads(wanted: int | None) -> int:
    """Set BLAS's thread count where one is wanted, and read it back."""
    from threadpoolctl import threadpool_info, threadpool_limits

    if wanted is not None:
        threadpool_limits(wanted, user_api="blas")
    counts = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(counts, default=1)
