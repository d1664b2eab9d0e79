"""What NVIDIA's compiler makes of a source, for cards that are not there: registers, spills, opcodes, occupancy.

NVRTC of CUDA 12 and 13 and nvdisasm come from pip packages (PACKAGES); neither needs a driver.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
# CUDA version -> library and headers, below the folder `nvidia` that all of NVIDIA's packages share.
COMPILERS = {
    12: ("cuda_nvrtc/lib/libnvrtc.so.12", "cuda_runtime/include"),
    13: ("cu13/lib/libnvrtc.so.13", "cu13/include"),
}
PACKAGES = {
    12: "nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-nvdisasm",
    13: "nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-nvdisasm",
}
OPTIONS = ("-std=c++17", "--fmad=false", "--ptxas-options=-v", "-default-device")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SECTION = re.compile(r"\.text\.(\w+)")
_MOVE = re.compile(r"HFMA2\S* R\d+, -?RZ, -?RZ,")  # zero times zero and a constant: how the compiler writes constants
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)")


class CompileError(Exception):
    """A source that NVRTC refuses or warns about; the message holds its log."""


@dataclass
class KernelReport:
    """Of one kernel on one architecture. shared_bytes: static; opcodes: how often each one, with its modifiers."""

    name: str
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)


def missing(cuda: int) -> str | None:
    """Why this CUDA version's compiler cannot be used, or None."""
    library, headers = COMPILERS[cuda]
    for part in (library, f"{headers}/cuda_fp16.h", "cu13/bin/nvdisasm"):
        if _find(part) is None:
            return f"needs {part}: pip install {PACKAGES[cuda]}"
    return None


@cache
def _find(part: str) -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations or ()]
    return next((root / part for root in roots if (root / part).exists()), None)


def compile_report(text: str, architecture: str, cuda: int = 12) -> dict[str, KernelReport]:
    """Compile to machine code and read it. CompileError for errors and for warnings."""
    cubin, log = _nvrtc(text, architecture, cuda)
    reports: dict[str, KernelReport] = {}
    report = KernelReport("")
    for line in log.splitlines():
        if entry := _ENTRY.search(line):
            report = reports.setdefault(entry[1], KernelReport(entry[1]))
        if stack := _STACK.search(line):
            report.stack_bytes, report.spill_bytes = int(stack[1]), int(stack[2]) + int(stack[3])
        if used := _USED.search(line):
            report.registers = int(used[1])
            report.shared_bytes = int(shared[1]) if (shared := _SHARED.search(line)) else 0
    for name, opcodes in _opcodes(cubin).items():
        reports[name].opcodes = opcodes
    return reports


def _nvrtc(text: str, architecture: str, cuda: int) -> tuple[bytes, str]:
    reason = missing(cuda)
    if reason:
        raise CompileError(reason)
    library, headers = (_find(part) for part in COMPILERS[cuda])
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"source.cu", 0, None, None)
    options = [*OPTIONS, f"-arch={architecture}", f"-I{headers}"]
    packed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), packed)
    log = _read(nvrtc, program, "ProgramLog").decode()
    if failed or "warning" in log:
        raise CompileError(f"{architecture}, CUDA {cuda}: {log}")
    cubin = _read(nvrtc, program, "CUBIN")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, log


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, content)
    return content.raw[:-1] if what == "ProgramLog" else content.raw


def _opcodes(cubin: bytes) -> dict[str, Counter[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([str(_find("cu13/bin/nvdisasm")), "-c", file.name], capture_output=True, text=True)
    if listed.returncode:
        raise CompileError(f"nvdisasm: {listed.stderr}")
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listed.stdout.splitlines():
        if ".section" in line and (section := _SECTION.search(line)):
            current = found.setdefault(section[1], Counter())
        elif opcode := _OPCODE.search(line):
            current["MOV.HFMA2" if _MOVE.search(line) else opcode[1]] += 1
    return found


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share, from the tables of compute capabilities in the CUDA C++ programming guide."""

    threads: int
    blocks: int
    registers: int
    shared_bytes: int
    reserved_shared_bytes: int  # of every block


MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 65536, 64 * 1024, 0),
    "sm_80": Multiprocessor(2048, 32, 65536, 164 * 1024, 1024),
    "sm_90": Multiprocessor(2048, 32, 65536, 228 * 1024, 1024),
}


def occupancy(report: KernelReport, threads: int, dynamic_bytes: int, architecture: str) -> float:
    """Resident threads of a multiprocessor as a share of the most, for blocks of this size."""
    of, warps = MULTIPROCESSORS[architecture], -(-threads // 32)
    registers = -(-report.registers * 32 // 256) * 256 * warps  # a warp gets them 256 at a time
    shared = report.shared_bytes + dynamic_bytes + of.reserved_shared_bytes
    shared = -(-shared // 256) * 256
    blocks = min(of.blocks, of.threads // (32 * warps), of.registers // registers)
    if shared:
        blocks = min(blocks, of.shared_bytes // shared)
    return blocks * 32 * warps / of.threads
