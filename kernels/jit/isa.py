"""The ladder of instruction sets: which vector instructions the generated kernels use on this machine.

`MINILPT_ISA` names a rung and forces it (tests run every rung that a machine can execute); else the highest rung that
the CPU has is taken. All rungs share one interface and, at int8, give the same integers.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

VARIABLE = "MINILPT_ISA"
LANES = 16  # float32 columns of one vector; LLVM splits it where registers are narrower


class Rung(NamedTuple):
    """rows x vectors of 16 columns: the register tile. fma: fused multiply-add is an instruction.

    int8: how int8 products are summed: "dot" (vpdpbusd, four at a time), or "pairs" (widened to int16, pmaddwd or
    whatever LLVM finds). needs: LLVM's names of the CPU features.
    """

    name: str
    rows: int
    vectors: int
    fma: bool
    int8: str
    needs: tuple[str, ...]

    @property
    def columns(self) -> int:
        """Columns of one panel of packed weights."""
        return self.vectors * LANES

    @property
    def group(self) -> int:
        """Consecutive int8 weights of one output that stand together in a panel."""
        return 2 if self.int8 == "pairs" else 4


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
# 32 registers of one vector: 6 x 4 accumulators, 4 weights, 1 broadcast. 16 of half a vector: 6 x 1, twice over. 16 of
# a quarter: 2 x 1, four times over.
LADDER = (
    Rung("avx512vnni", 6, 4, True, "dot", (*_AVX512, "avx512vnni")),
    Rung("avx512", 6, 4, True, "pairs", _AVX512),
    Rung("avx2", 6, 1, True, "pairs", ("avx2", "fma")),
    Rung("portable", 2, 1, False, "pairs", ()),
)


@cache
def usable() -> tuple[Rung, ...]:
    """The rungs that this machine can execute, highest first."""
    from numba.core import config
    from numba.core.codegen import get_host_cpu_features

    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else get_host_cpu_features()
    if config.CPU_NAME and config.CPU_FEATURES is None:
        features = _features_of(config.CPU_NAME, features)
    has = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    return tuple(rung for rung in LADDER if set(rung.needs) <= has)


def _features_of(cpu: str, host: str) -> str:
    """With NUMBA_CPU_NAME Numba compiles for that CPU only: of the host's features, those that we know it to have."""
    if cpu == "haswell":
        return "+avx2,+fma"
    return "" if cpu == "generic" else host


@cache
def chosen() -> Rung:
    """The rung in use. ValueError if MINILPT_ISA names one that is unknown or that this machine lacks."""
    wanted = os.environ.get(VARIABLE, "")
    if not wanted:
        return usable()[0]
    for rung in usable():
        if rung.name == wanted:
            return rung
    names = ", ".join(rung.name for rung in usable())
    raise ValueError(f"{VARIABLE}={wanted!r} is not a rung that this machine can execute; it has {names}")
