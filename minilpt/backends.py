"""Which kernels run, on which device, in which precision: chosen once, with the reason where one is unavailable."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

from .errors import BackendError, MinilptWarning
from .kernels import bundled, compiled, isa
from .threads import usable_cores

DEVICES = ("auto", "cpu", "cuda")
INTEGER_PRECISIONS = ("ibert", "ibert-float-head")  # the second: with I-BERT's own head, for comparison
PRECISIONS = ("fp32", "int8", *INTEGER_PRECISIONS)

# Device -> why it cannot be used. A backend that arrives takes its device off this table.
UNAVAILABLE = {"cuda": "this release of minilpt has CPU kernels only"}


@dataclass(frozen=True)
class Backend:
    """name: "numba" or "numpy"; threads: of this engine, or BLAS's for numpy; rung: the instruction set, if numba.

    reason: why the compiled kernels are not used, if they are not.
    """

    name: str
    device: str
    precision: str
    threads: int
    rung: str | None = None
    reason: str | None = None


def choose(device: str, precision: str, threads: int | None) -> Backend:
    """The backend for these wishes; BackendError says why there is none.

    Compiled kernels run on `threads` threads of their own, by default one for each usable core. Where Numba is missing
    NumPy takes over in fp32, with one warning; its products run on BLAS, which has one thread count for the whole
    process: `threads` sets it, None leaves it as it is.
    """
    if device not in DEVICES:
        raise BackendError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device in UNAVAILABLE:
        raise BackendError(f'device {device!r} is not available: {UNAVAILABLE[device]}; use device="cpu"')
    if precision not in PRECISIONS:
        raise BackendError(
            f"precision {precision!r} is not available in this release; use one of {', '.join(PRECISIONS)}"
        )
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise BackendError(f"threads must be a positive integer or None, found {threads!r}")
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
