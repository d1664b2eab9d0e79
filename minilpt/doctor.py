"""What this machine and this installation offer to minilpt, and what to do where it is less than it could be.

Looks only: nothing is compiled, written or downloaded.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import numpy as np

from . import __version__, backends
from .errors import BackendError
from .kernels import bundled, compiled, isa
from .threads import cgroup_quota, usable_cores
from .weights.resolve import MODELS, bundled_names, damaged

NEEDED = ("numpy", "safetensors", "tokenizers")
CUDA_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


@dataclass(frozen=True)
class Finding:
    """level: "ok", "note" (it could be better) or "problem". advice: empty where nothing is to be done."""

    about: str
    level: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """One finding for each of CHECKS, in their order."""
    return [check() for check in CHECKS]


def _versions() -> Finding:
    names = [name for name in (*NEEDED, "numba", "llvmlite") if find_spec(name)]
    found = f"minilpt {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}; "
    found += ", ".join(f"{name} {_version(name)}" for name in names)
    missing = [name for name in NEEDED if name not in names]
    if missing:
        return Finding(
            "versions", "problem", f"{found}; missing: {', '.join(missing)}", f"pip install {' '.join(missing)}"
        )
    if "numba" not in names and bundled.rungs() is None:
        advice = "pip install numba, or run a folder that minilpt bundle has made; NumPy alone has fp32 and is slower"
        return Finding("versions", "problem", f"{found}; missing: numba", advice)
    return Finding("versions", "ok", found)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _instructions() -> Finding:
    try:
        rung, best = isa.chosen().name, isa.usable()[0].name
    except (ValueError, ImportError) as error:
        return Finding("instruction set", "problem", str(error), f"unset {isa.VARIABLE}, or install llvmlite")
    found = f"{rung}; this machine can execute {', '.join(rung.name for rung in isa.usable())}"
    if rung != best and os.environ.get(isa.VARIABLE):
        return Finding("instruction set", "note", found, f"{isa.VARIABLE} asks for {rung}: unset it to have {best}")
    if rung != best:
        return Finding("instruction set", "note", found, f"this bundle lacks {best}: bundle with --isa {best},{rung}")
    return Finding("instruction set", "ok", found)


def _threads() -> Finding:
    cores, quota = usable_cores(), cgroup_quota()
    found = f"{cores} by default; the machine has {os.cpu_count()} cores"
    if hasattr(os, "sched_getaffinity"):
        found += f", the affinity mask {len(os.sched_getaffinity(0))}"
    found += ", no cgroup quota" if quota is None else f", the cgroup's quota is {quota:g}"
    if quota is not None and quota < cores:
        advice = (
            f"{cores} threads can use up a quota of {quota:g} and then wait: load with threads={max(1, int(quota))}"
        )
        return Finding("threads", "note", found, f"{advice} where even response times matter")
    return Finding("threads", "ok", found)


def _kernels() -> Finding:
    held = bundled.rungs()
    if held is not None:
        return _bundled_kernels(held)
    folder = compiled.cache_folder()
    try:
        states = {part: _state(part) for part in compiled.PARTS}
    except (ValueError, ImportError) as error:
        return Finding("kernels", "problem", f"cannot be compiled: {error}", "see the findings above")
    found = f"{folder}: " + ", ".join(f"{part} {state}" for part, state in states.items())
    there = next(place for place in (folder, *folder.parents) if place.exists())
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    if set(states.values()) == {"compiled"}:
        return Finding("kernels", "ok", found)
    if not writable:
        advice = (
            f"every process compiles for some 20 seconds: set {compiled.CACHE_VARIABLE} to a folder that can be written"
        )
        return Finding("kernels", "problem", f"{found}; cannot be written", advice)
    return Finding("kernels", "note", found, "the first load compiles for some 20 seconds: run minilpt warmup before")


def _state(part: str) -> str:
    """Of a part's object file for the chosen rung."""
    file = compiled.cache_file(isa.chosen(), part)
    if compiled.stored(isa.chosen(), part) is not None:
        return "compiled"
    return "damaged, to be compiled anew" if file.is_file() else "to be compiled"


def _bundled_kernels(held: tuple[str, ...]) -> Finding:
    found = f"{bundled.FOLDER}: for {', '.join(held) or 'no rung of these sources'}"
    try:
        for part in compiled.PARTS:
            compiled.entry(part)
    except ValueError as error:
        return Finding("kernels", "problem", f"{found}; {error}", "make the bundle anew, with minilpt bundle")
    return Finding("kernels", "ok", found)


def _models() -> Finding:
    names = bundled_names()
    try:
        bad = [f"{name}/{file}" for name in names for file in damaged(MODELS / name)]
    except OSError as error:
        return Finding("bundled models", "problem", str(error), "install minilpt anew")
    if bad:
        return Finding("bundled models", "problem", f"{MODELS}: damaged: {', '.join(bad)}", "install minilpt anew")
    found = f"{', '.join(names)}: every file has the SHA-256 that its card lists" if names else "none"
    return Finding("bundled models", "ok", found)


def _blas() -> Finding:
    built = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    found = f"NumPy {np.__version__} with {built.get('name', 'no BLAS')} {built.get('version', '')}".rstrip()
    return Finding("BLAS", "ok", f"{found}; runs the model only where the compiled kernels cannot")


def _gpu() -> Finding:
    driver = _cuda_driver()
    found = f"{driver or 'no NVIDIA driver'}; CuPy is {'installed' if find_spec('cupy') else 'not installed'}"
    try:
        return Finding("GPU", "ok", f"{found}; used: {backends.choose('cuda', 'fp32', None).rung}")
    except BackendError as error:
        return (
            Finding("GPU", "note", found, str(error)) if driver else Finding("GPU", "ok", f"{found}: the CPU is used")
        )


def _cuda_driver() -> str | None:
    """What the NVIDIA driver says, asked without CuPy; None where there is none, or it finds no card."""
    try:
        library = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    return f"{count.value} NVIDIA card(s), driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


CHECKS: tuple[Callable[[], Finding], ...] = (_versions, _instructions, _threads, _kernels, _models, _blas, _gpu)
