"""How much memory a model takes at its peak, told before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PROCESS = Path("/proc/self")
# Where the system does not tell: Python, NumPy, the tokenizers package and LLVM, measured on Linux with Python 3.11.
TYPICAL_PROCESS_BYTES = 100_000_000


class Held(NamedTuple):
    """Bytes of arrays: in memory, and mapped from the model's file."""

    memory: int
    mapped: int


class Load(NamedTuple):
    """The most that an engine will be given: tokens of a batch, tokens of one text, and callers at once."""

    batch_tokens: int
    longest: int
    callers: int

    @property
    def tokens(self) -> int:
        """Of the largest batch: a text that is longer than a batch may be goes alone."""
        return max(self.batch_tokens, self.longest)


class Needs(NamedTuple):
    """Bytes of an engine: its weights, what a load needs besides, and how much of that is there already."""

    weights: Held
    scratch: int
    scratch_now: int


@dataclass(frozen=True)
class Footprint:
    """Bytes that a process with this model takes at its peak.

    weights: packed, and whatever else was made at load. mapped: of the file, tables above all, that become resident row
    by row as texts need them; processes share these pages, and the system takes them back where memory is short.
    scratch: workspaces and results of batches. process: all the rest, as the system tells it now: the interpreter, the
    libraries and their code, the tokenizer, and what the program itself holds.
    """

    weights: int
    mapped: int
    scratch: int
    process: int

    @property
    def peak(self) -> int:
        """The sum."""
        return self.weights + self.mapped + self.scratch + self.process


def held(values: Iterable[Any]) -> Held:
    """Of all arrays in nested tuples, lists and dicts, each buffer counted once, though several arrays share it."""
    sizes: dict[int, tuple[int, bool]] = {}
    for array in _arrays(values):
        base: Any = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        sizes[base.ctypes.data] = base.nbytes, isinstance(base.base, mmap)
    return Held(*(sum(size for size, mapped in sizes.values() if mapped is wanted) for wanted in (False, True)))


def _arrays(value: Any) -> Iterator[NDArray[Any]]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _arrays(each)
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
    elif hasattr(value, "__dataclass_fields__"):
        yield from _arrays(list(vars(value).values()))


def process_bytes(folder: Path, ours: int) -> int:
    """Resident bytes of this process but for `ours`, in memory, and for mappings of weights in the folder."""
    try:
        lines = (PROCESS / "smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return TYPICAL_PROCESS_BYTES
    resident, weights = 0, False
    inside = f"{folder.resolve()}/"
    for line in lines:
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # a mapping's range; its lines follow
            path = line.split(maxsplit=5)[5:]
            weights = bool(path) and path[0].startswith(inside) and path[0].endswith(".safetensors")
        elif name == "Rss:" and not weights:
            resident += 1024 * int(rest.split()[0])
    return max(0, resident - ours)
