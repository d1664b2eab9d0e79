"""Which kernels run, on which device, in which precision: chosen once, with the reason where one is unavailable."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import kernels
from .errors import BackendError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32",)

# Device -> why it cannot be used. A backend that arrives takes its device off this table.
UNAVAILABLE = {"cuda": "this release of minilpt has CPU kernels only"}


@dataclass(frozen=True)
class Backend:
    """name: which kernels; kernels: operation name -> function; threads: those that BLAS uses, None if unknown."""

    name: str
    device: str
    precision: str
    threads: int | None
    kernels: Mapping[str, Callable[..., Any]]


def choose(device: str, precision: str, threads: int | None) -> Backend:
    """The backend for these wishes; BackendError says why there is none.

    NumPy's matrix products run on BLAS, which has one thread count for the whole process: `threads` sets it, None
    leaves it as it is.
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
    return Backend("numpy", "cpu", precision, _blas_threads(threads), kernels.NUMPY)


def _blas_threads(wanted: int | None) -> int | None:
    """Set BLAS's thread count where one is wanted, and read it back."""
    from threadpoolctl import threadpool_info, threadpool_limits

    if wanted is not None:
        threadpool_limits(wanted, user_api="blas")
    counts = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(counts, default=None)


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity mask
        return os.cpu_count() or 1
