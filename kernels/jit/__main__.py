"""`python -m minilpt.kernels.jit RUNG PART FILE`: write a part's object file for a rung that this machine may lack."""

import os
import sys
from pathlib import Path

from .. import isa

_, rung, part, file = sys.argv
isa.compile_for(rung)
# Numba generates code while it compiles, which is never run: it needs a CPU that has the rung's instructions.
os.environ |= {"NUMBA_CPU_NAME": isa.chosen().cpu, "NUMBA_CPU_FEATURES": isa.chosen().features}

from .build import build  # noqa: E402 - Numba reads the environment when it is imported

Path(file).write_bytes(build(part))
