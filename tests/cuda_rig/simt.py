"""Unmodified CUDA sources as functions of NumPy arrays: built by g++ behind simt.h, launched fiber by fiber.

A kernel is an `extern "C" __global__ void name(...)` whose parameters are pointers and numbers. With `checked` every
access of memory passes the checker of runtime.cpp; what it found is in the Report.
"""

from __future__ import annotations

import bisect
import ctypes
import hashlib
import math
import operator
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
# -fno-extern-tls-init, gnu2 and no unique symbols: shared memory is thread-local storage that lies in one piece.
# Without contraction a float sum has one value, as with nvcc's --fmad=false; -mfma makes the fused operations that are
# asked for by name one instruction.
FLAGS = (
    "-std=c++17 -O2 -g1 -fPIC -shared -ffp-contract=off -mfma -mf16c -fno-extern-tls-init -mtls-dialect=gnu2"
    " -fno-gnu-unique -fno-strict-aliasing -w"
).split()
SCHEDULES = ("fifo", "lifo", "random", "preempt")
KINDS = (
    "race",
    "out of bounds",
    "misaligned",
    "uninitialised",
    "write to a constant argument",
    "diverged",
    "wrong mask",
)
GUARD_BYTES = 4096  # on both sides of an array
ALIGNMENT = 16  # of NumPy's allocations, and all that the widest vector needs: addresses keep their rest modulo this
# A Tesla T4's limits, and those of every card since.
MOST_GRID, MOST_BLOCK, MOST_THREADS, MOST_SHARED_BYTES = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024, 65536
INSTRUMENTED = ("-fsanitize=thread", "-fsanitize=bounds")
TYPES: dict[str, Any] = {
    "int": np.int32,
    "unsigned": np.uint32,
    "unsigned int": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "short": np.int16,
    "char": np.int8,
    "signed char": np.int8,
    "int8_t": np.int8,
    "unsigned char": np.uint8,
    "bool": np.bool_,
    "float": np.float32,
    "__half": np.float16,
    "half": np.float16,
}
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(([^)]*)\)', re.DOTALL
)
_BOUNDS = re.compile(r"__launch_bounds__\(\s*(\d+)[^)]*\)\s+(\w+)\s*\(")
_DYNAMIC = re.compile(r"extern\s+__shared__\s+([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)

WHY_NOT = "the CUDA rig needs g++ on x86-64 Linux"


def available() -> bool:
    """Whether sources can be built and run here."""
    return shutil.which("g++") is not None and platform.machine() == "x86_64" and platform.system() == "Linux"


class RigError(Exception):
    """A source that does not compile, or a launch that CUDA would refuse or misunderstand."""


@dataclass(frozen=True)
class Parameter:
    """dtype: of the number, or of the array's elements; constant: the kernel must not write to the array."""

    name: str
    dtype: np.dtype[Any]
    is_array: bool
    constant: bool


@dataclass(frozen=True)
class Finding:
    """What the checker saw. argument: the array's name, "shared memory", or "a fixed size"; line: of the source.

    offset: in bytes; where a declared size is exceeded, the index.
    """

    kind: str
    kernel: str
    argument: str
    offset: int
    block: int
    thread: int
    other: tuple[int, int] | None
    line: str


@dataclass(frozen=True)
class Report:
    """Of one launch; without the checker there are no findings but of threads that diverged."""

    findings: tuple[Finding, ...]


class _Region(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_void_p),
        ("size", ctypes.c_longlong),
        ("read_only", ctypes.c_int),
        ("initialised", ctypes.c_void_p),
    ]


class _Finding(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("argument", ctypes.c_int),
        ("offset", ctypes.c_longlong),
        ("block", ctypes.c_uint),
        ("thread", ctypes.c_uint),
        ("other_block", ctypes.c_uint),
        ("other_thread", ctypes.c_uint),
        ("place", ctypes.c_void_p),
    ]


def parse(text: str) -> dict[str, tuple[Parameter, ...]]:
    """The kernels of a source, with their parameters. RigError for a type that is not in TYPES."""
    text = _COMMENT.sub(" ", text)
    return {
        name: tuple(_parameter(name, part) for part in parameters.split(",") if part.strip())
        for name, parameters in _KERNEL.findall(text)
    }


def _parameter(kernel: str, text: str) -> Parameter:
    words = text.replace("*", " * ").replace("__restrict__", " ").split()
    constant, is_array = "const" in words, "*" in words
    kind = " ".join(word for word in words[:-1] if word not in ("const", "*"))
    if kind not in TYPES:
        raise RigError(f"{kernel}: a parameter of type {kind!r} is not one of {', '.join(TYPES)}")
    return Parameter(words[-1], np.dtype(TYPES[kind]), is_array, constant and is_array)


def compile(source: Path | str, *, checked: bool = False) -> Module:
    """Build a source, a path or its text. Built files are kept in the system's folder for temporary files.

    RigError with the compiler's message where it does not compile.
    """
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    return _module(text, checked)


@cache
def _module(text: str, checked: bool) -> Module:
    return Module(text, _built(text, checked), checked)


def _built(text: str, checked: bool) -> Path:
    whole = f'#line 1 "source.cu"\n{text}\n#line 1 "added by the rig"\n{_added(text)}'
    instrumentation = INSTRUMENTED if checked else ()
    runtime = _runtime()
    parts = [whole, *FLAGS, *instrumentation, (HERE / "simt.h").read_text("utf-8"), runtime.name]
    target = _folder() / f"{_digest(*parts)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as name:
            unit, linked = Path(name, "unit.o"), Path(name, "linked.so")
            header = ["-include", str(HERE / "simt.h"), "-I", str(HERE), "-x", "c++", "-"]
            _gxx([*FLAGS, *instrumentation, "-c", "-o", str(unit), *header], whole)
            # Linked without -fsanitize=thread, or the sanitizer's own library would come in.
            _gxx([*FLAGS, "-o", str(linked), str(unit), str(runtime)])
            os.replace(linked, target)
    return target


@cache
def _runtime() -> Path:
    """runtime.cpp as an object file."""
    text = (HERE / "runtime.cpp").read_text("utf-8")
    target = _folder() / f"runtime-{_digest(text, (HERE / 'simt.h').read_text('utf-8'), *FLAGS)}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as name:
            unit = Path(name, "runtime.o")
            _gxx([*FLAGS, "-c", "-o", str(unit), str(HERE / "runtime.cpp")])
            os.replace(unit, target)
    return target


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@cache
def _folder() -> Path:
    """Where built files are kept: this user's own, since they are loaded as code."""
    folder = Path(tempfile.gettempdir()) / f"cuda-rig-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RigError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
    return folder


def _gxx(arguments: Sequence[str], text: str | None = None) -> None:
    done = subprocess.run(["g++", *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RigError(f"g++ does not compile it:\n{done.stderr[:4000]}")


def _added(text: str) -> str:
    """What follows a source: its dynamic shared arrays, in the scopes that declare them, and a trampoline a kernel."""
    plain = 'extern "C" __attribute__((no_sanitize("thread"))) void'
    arrays: list[str] = []
    told: list[str] = []
    for kind, name, inside in _dynamic_arrays(text):
        array = f"alignas(256) __shared__ {kind} {name}[SIMT_DYNAMIC_BYTES / sizeof({kind})];"
        arrays.append(f"namespace {{ {array} }}" if inside else array)
        scope = "" if inside else "::"
        tell = f"simt_tell_{len(told)}"
        told.append(tell)
        arrays.append(f"namespace {{ void {tell}() {{ simt_dynamic_array({scope}{name}, SIMT_DYNAMIC_BYTES); }} }}")
    # A thread gets its thread-local memory when it first touches some, in a piece that dl_iterate_phdr knows if it is
    # too large for the loader's reserve (some 2 KB): hence `simt_touched`.
    lines = ['extern "C" void simt_dynamic_array(void* at, unsigned long bytes);', *arrays]
    lines.append("namespace { thread_local volatile char simt_touched[8192]; }")
    lines.append(f"{plain} simt_dynamic() {{ simt_touched[0] = 0; {' '.join(f'{tell}();' for tell in told)} }}")
    for name in parse(text):
        values = ", ".join(_unpacked(number, text) for number, text in enumerate(_types(text, name)))
        lines.append(f"{plain} simt_kernel_{name}(void** a) {{ {name}({values}); }}")
    return "\n".join(lines)


def _static_bytes(text: str, path: Path) -> dict[str, int]:
    """By the built source's symbols: a kernel's own arrays, and those of all other functions, as if it called them."""
    own, others = dict.fromkeys(parse(text), 0), 0
    dynamic = {"simt_touched", *(name for _, name, _ in _dynamic_arrays(text))}
    symbols = subprocess.run(["readelf", "-sWC", str(path)], capture_output=True, text=True, check=True).stdout
    for size, name in set(re.findall(r"\w+: \w+ +(\w+) TLS +\w+ +\w+ +\d+ (.+)$", symbols, re.MULTILINE)):
        function, _, array = name.rpartition("::")
        if function in own:
            own[function] += int(size, 0)
        elif array not in dynamic:
            others += int(size, 0)
    return {kernel: mine + others for kernel, mine in own.items()}


def _types(text: str, kernel: str) -> list[str]:
    """The parameters' types as the source has them."""
    parameters = dict(_KERNEL.findall(_COMMENT.sub(" ", text)))[kernel]
    return [part.strip().rsplit(maxsplit=1)[0] for part in parameters.split(",") if part.strip()]


def _unpacked(number: int, kind: str) -> str:
    return f"({kind})a[{number}]" if "*" in kind else f"*({kind}*)a[{number}]"


def _dynamic_arrays(text: str) -> list[tuple[str, str, bool]]:
    """Element type and name of each, and whether it is declared inside an anonymous namespace."""
    plain, spans = _COMMENT.sub(lambda found: " " * len(found[0]), text), []
    for opened in re.finditer(r"namespace\s*\{", plain):
        depth, at = 1, opened.end()
        while depth and at < len(plain):
            depth += {"{": 1, "}": -1}.get(plain[at], 0)
            at += 1
        spans.append((opened.start(), at))
    found = {
        (kind, name, any(begin < place.start() < end for begin, end in spans))
        for place in _DYNAMIC.finditer(plain)
        for kind, name in [place.groups()]
    }
    return sorted(found)


class Module:
    """A built source. kernels: name -> parameters; checked: whether the checker sees its accesses.

    static_bytes: kernel -> of the shared arrays whose size the source declares.
    """

    def __init__(self, text: str, path: Path, checked: bool):
        self.kernels, self.checked, self._path, self._lines = parse(text), checked, path, text.splitlines()
        self._library = ctypes.CDLL(str(path))
        self.static_bytes = _static_bytes(text, path)
        self._most_threads = {name: int(most) for most, name in _BOUNDS.findall(_COMMENT.sub(" ", text))}

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any],
        *,
        shared_bytes: int = 0,
        schedule: str = "fifo",
        seed: int = 0,
        initialised: Sequence[NDArray[np.uint8] | None] | None = None,
    ) -> Report:
        """Run a kernel. arguments: C-contiguous arrays, written in place, and numbers of exactly the parameters' types.

        initialised: for each argument None, or a byte for each of its bytes that says whether it was ever written, kept
        up to date. RigError for arguments that CUDA would misunderstand.
        """
        if name not in self.kernels:
            raise RigError(f"there is no kernel {name!r}; there are {', '.join(self.kernels)}")
        parameters = self.kernels[name]
        if len(arguments) != len(parameters):
            raise RigError(f"{name} takes {len(parameters)} arguments, {len(arguments)} were given")
        for parameter, argument in zip(parameters, arguments, strict=True):
            _check(name, parameter, argument)
        shape = _dimensions(name, "grid", grid, MOST_GRID), _dimensions(name, "block", block, MOST_BLOCK)
        threads, most = math.prod(shape[1]), self._most_threads.get(name, MOST_THREADS)
        if threads > most:
            raise RigError(f"{name}: a block has 1 to {most} threads, found {threads}")
        static = self.static_bytes[name]
        if shared_bytes < 0 or static + shared_bytes > MOST_SHARED_BYTES:
            raise RigError(f"{name}: {static} + {shared_bytes} bytes of shared memory, a block has {MOST_SHARED_BYTES}")
        if schedule not in SCHEDULES:
            raise RigError(f"there is no schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
        with _ONE_AT_A_TIME:
            return self._launch(name, *shape, arguments, shared_bytes, schedule, seed, initialised)

    def _launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        shared_bytes: int,
        schedule: str,
        seed: int,
        initialised: Sequence[NDArray[np.uint8] | None] | None,
    ) -> Report:
        parameters = self.kernels[name]
        # Where arrays overlap, an access counts as one of the first region that has it: of one that may be written.
        places = [number for number, parameter in enumerate(parameters) if parameter.is_array]
        places.sort(key=lambda number: parameters[number].constant)
        values = {number: np.array([argument]) for number, argument in enumerate(arguments) if number not in places}
        guarded = dict(zip(places, _guarded([arguments[number] for number in places]), strict=True))
        values |= guarded
        regions = (_Region * max(1, len(places)))()
        for region, number in enumerate(places):
            copy, written = guarded[number], None if initialised is None else initialised[number]
            regions[region] = _Region(
                *(copy.ctypes.data, copy.nbytes, parameters[number].constant),
                None if written is None else written.ctypes.data,
            )
        pointers = (ctypes.c_void_p * len(arguments))(*(values[number].ctypes.data for number in range(len(values))))
        findings = (_Finding * 16)()
        count = self._library.simt_launch(
            getattr(self._library, f"simt_kernel_{name}"),
            pointers,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_longlong(shared_bytes),
            regions,
            len(guarded),
            int(self.checked),
            SCHEDULES.index(schedule),
            ctypes.c_ulonglong(seed),
            self._library.simt_dynamic,
            findings,
        )
        for number, copy in guarded.items():
            if not parameters[number].constant:
                arguments[number][...] = copy.reshape(arguments[number].shape)
        return Report(tuple(self._finding(name, findings[i], places) for i in range(count)))

    def _finding(self, name: str, raw: _Finding, places: Sequence[int]) -> Finding:
        arrays = {-1: "shared memory", -2: "", -3: "a fixed size"}
        argument = arrays[raw.argument] if raw.argument < 0 else self.kernels[name][places[raw.argument]].name
        kind = KINDS[raw.kind]
        other = (raw.other_block, raw.other_thread) if kind == "race" else None
        return Finding(kind, name, argument, raw.offset, raw.block, raw.thread, other, self._line(raw.place))

    def _line(self, place: int | None) -> str:
        """The source's line, by its number, where addr2line finds it."""
        if not place or not shutil.which("addr2line"):
            return ""
        base = _base_address(self._library.simt_dynamic)
        asked = ["addr2line", "-i", "-e", str(self._path), hex(place - 1 - base)]
        found = subprocess.run(asked, capture_output=True, text=True).stdout
        # What is inlined comes first, simt.h's vectors and atomics among it: the source's own line is wanted.
        number = re.search(r"source\.cu:(\d+)", found)
        return f"{number[1]}: {self._lines[int(number[1]) - 1].strip()}" if number else ""


_ONE_AT_A_TIME = threading.Lock()  # the runtime's fibers are those of one launch


class _Info(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _base_address(function: Any) -> int:
    info = _Info()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return info.base or 0


def _dimensions(kernel: str, what: str, size: int | Sequence[int], most: Sequence[int]) -> tuple[int, int, int]:
    given = tuple(map(operator.index, size if isinstance(size, Sequence) else (size,)))
    if len(given) > 3 or any(not 0 < n <= limit for n, limit in zip(given, most, strict=False)):
        raise RigError(f"{kernel}: a {what} of {given} is not within 1 and {most}")
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


def _check(kernel: str, parameter: Parameter, argument: Any) -> None:
    where, wanted = f"{kernel}, {parameter.name}", parameter.dtype
    if parameter.is_array:
        if not isinstance(argument, np.ndarray) or argument.dtype != wanted or not argument.flags.c_contiguous:
            raise RigError(f"{where}: a contiguous array of {wanted} is needed, found {_described(argument)}")
        if not parameter.constant and not argument.flags.writeable:
            raise RigError(f"{where}: the kernel writes to it, and the array is read-only")
    elif not isinstance(argument, np.generic) or argument.dtype != wanted:
        raise RigError(f"{where}: a number of type {wanted} is needed, found {_described(argument)}")


def _described(argument: Any) -> str:
    if isinstance(argument, np.ndarray):
        return f"an array of {argument.dtype}, contiguous: {argument.flags.c_contiguous}"
    return f"{type(argument).__name__} {argument!r:.40}"


def _guarded(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Flat copies with room on both sides, which small mistakes may overwrite without harm.

    Arrays that overlap do so in their copies, and what is misaligned stays so.
    """
    spans: list[tuple[int, int]] = []  # addresses, in order, of what has to stay in one piece
    for begin, end in sorted((array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays):
        if spans and begin < spans[-1][1]:
            begin, end = spans[-1][0], max(spans.pop()[1], end)
        spans.append((begin, end))
    rooms = [np.empty(end - begin + 2 * GUARD_BYTES + ALIGNMENT, np.uint8) for begin, end in spans]
    copies = []
    for array in arrays:
        address = array.ctypes.data
        piece = bisect.bisect(spans, (address, math.inf)) - 1
        start = GUARD_BYTES + (spans[piece][0] - rooms[piece].ctypes.data - GUARD_BYTES) % ALIGNMENT
        at = start + address - spans[piece][0]
        copies.append(rooms[piece][at : at + array.nbytes].view(array.dtype))
        copies[-1][...] = array.ravel()
    return copies
