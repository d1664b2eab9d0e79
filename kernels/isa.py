"""The ladder of instruction sets: which vector instructions the compiled kernels use on this machine.

`MINILPT_ISA` names a rung and forces it (tests run every rung that a machine can execute); else the highest rung that
the CPU has is taken, in a bundle the highest of those it holds. Code is generated for the rung and never for the single
machine, so what one machine has compiled serves every machine of the rung. At int8 all rungs give the same integers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from . import bundled

VARIABLE = "MINILPT_ISA"
LANES = 16  # float32 columns of one vector; LLVM splits it where registers are narrower
AMX_ROWS, AMX_DEPTH = 16, 64  # of one matrix register: rows, and bytes of a row


class Rung(NamedTuple):
    """rows x vectors of 16 columns: the register tile. fma: fused multiply-add is an instruction.

    int8: how int8 products are summed: "dot" (vpdpbusd, four at a time), or "pairs" (widened to int16, pmaddwd or
    whatever LLVM finds). needs: LLVM's names of the CPU features. cpu, features: what LLVM generates code for.
    amx: int8 products of more than a few rows take matrix registers, whose operands look like those of "dot".
    """

    name: str
    rows: int
    vectors: int
    fma: bool
    int8: str
    needs: tuple[str, ...]
    cpu: str
    features: str = ""
    amx: bool = False

    @property
    def columns(self) -> int:
        """Columns of one panel of packed weights."""
        return self.vectors * LANES

    @property
    def group(self) -> int:
        """Consecutive int8 weights of one output that stand together in a panel."""
        return 2 if self.int8 == "pairs" else 4

    @property
    def item_bytes(self) -> int:
        """Of one quantised activation."""
        return 2 if self.int8 == "pairs" else 1

    @property
    def item_zero(self) -> int:
        """What a quantised activation of 0 is stored as: vpdpbusd takes unsigned ones."""
        return 128 if self.int8 == "dot" else 0

    @property
    def depth(self) -> int:
        """The inputs of an int8 product are padded to a multiple of this."""
        return AMX_DEPTH if self.amx else self.group

    @property
    def sums_bytes(self) -> int:
        """Of the int32 sums that are made at once: one register tile's, or those of two rows of matrix registers."""
        return 4 * (2 * AMX_ROWS if self.amx else self.rows) * self.columns

    def items(self, count: int) -> int:
        """Quantised activations of a row of `count`, with those behind the last that are written or read, too."""
        step = max(LANES, self.depth)
        return -(-count // step) * step


_AVX2 = ("avx2", "fma", "bmi", "bmi2", "f16c", "lzcnt", "movbe")  # x86-64-v3, which Haswell began
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")  # x86-64-v4
_AMX = ("amx-tile", "amx-int8")  # Sapphire Rapids and later
# 32 registers of one vector: 6 x 4 accumulators, 4 weights, 1 broadcast. 16 of half a vector: 6 x 1, twice over. 16 of
# a quarter: 2 x 1, four times over.
_VNNI = (*_AVX512, "avx512vnni")
LADDER = (
    Rung("amx", 6, 4, True, "dot", (*_VNNI, *_AMX), "x86-64-v4", "+avx512vnni,+amx-tile,+amx-int8", amx=True),
    Rung("avx512vnni", 6, 4, True, "dot", _VNNI, "x86-64-v4", "+avx512vnni"),
    Rung("avx512", 6, 4, True, "pairs", _AVX512, "x86-64-v4"),
    Rung("avx2", 6, 1, True, "pairs", _AVX2, "x86-64-v3"),
    Rung("portable", 2, 1, False, "pairs", (), "generic"),
)


ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_TILEDATA = 158, 0x1023, 18  # Linux on x86-64: its x86/xstate.rst
CPUINFO = Path("/proc/cpuinfo")
# Linux's names of CPU features, where LLVM has others. Both are there only if the system saves their registers, too.
_LINUX = {"abm": "lzcnt", "bmi1": "bmi", "avx512_vnni": "avx512vnni", "amx_tile": "amx-tile", "amx_int8": "amx-int8"}


@cache
def features() -> frozenset[str]:
    """What this CPU has, by LLVM's names: read from Linux where it tells, which takes a tenth of loading LLVM."""
    if platform.machine() == "x86_64" and CPUINFO.is_file():
        flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
        return frozenset(_LINUX.get(flag, flag) for flag in flags.split(":")[1].split())
    from llvmlite import binding

    return frozenset(name for name, there in binding.get_host_cpu_features().items() if there)


def _granted(rung: Rung) -> bool:
    """Whether the system lets this process use the rung's registers. Linux wants to be asked for the 8 KB of AMX's."""
    if not rung.amx:
        return True
    ask = ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_TILEDATA
    return sys.platform == "linux" and ctypes.CDLL(None).syscall(*ask) == 0


@cache
def usable() -> tuple[Rung, ...]:
    """The rungs that this machine can execute, highest first."""
    return tuple(rung for rung in LADDER if set(rung.needs) <= features() and _granted(rung))


_compiling_for: list[Rung] = []


def compile_for(name: str) -> None:
    """From here on this process compiles for a rung that its machine may lack. It must not run what it makes."""
    _compiling_for[:] = [rung for rung in LADDER if rung.name == name]
    chosen.cache_clear()


@cache
def chosen() -> Rung:
    """The rung in use. ValueError if MINILPT_ISA names one that is unknown or that cannot be used here."""
    if _compiling_for:
        return _compiling_for[0]
    wanted, held = os.environ.get(VARIABLE, ""), bundled.rungs()
    for rung in usable():
        if wanted in ("", rung.name) and (held is None or rung.name in held):
            return rung
    names = ", ".join(rung.name for rung in usable())
    if held is not None:
        asked = f" and {VARIABLE} asks for {wanted}" if wanted else ""
        holds = ", ".join(held) or "no rung of this package's sources"
        raise ValueError(
            f"this bundle holds {holds}; this machine can execute {names}{asked}: bundle with another --isa"
        )
    raise ValueError(f"{VARIABLE}={wanted!r} is not a rung that this machine can execute; it has {names}")
