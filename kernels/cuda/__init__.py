"""CUDA kernels: their sources, their signatures, and launches whose arguments cannot be of the wrong type.

Nothing here imports CuPy; whoever has it passes the module. The `.cu` files compile alone, one module each. Operations
have the names of `minilpt.reference` and `kernels.integer`; they start kernels on the current stream and never wait.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

Array = Any  # of the device, contiguous

WARP = 32
BLOCK_SHARED_BYTES = 48 * 1024  # that a block gets without asking for more (CUDA C++ programming guide, table 27)
MOST_THREADS = 1024  # of a block, on every card
MOST_GRID = 2**31 - 1  # blocks of a grid's first dimension
MOST_WIDTH = BLOCK_SHARED_BYTES // 4  # of rows whose norm one warp computes in shared memory
# As the sources have them: queries of one block of partial masses, queries of a warp, keys in shared memory at a time.
QUERIES, ROWS, TILE = 64, 4, 32

# The types of kernels' parameters, as NumPy has them. CuPy takes a Python int for 64 bits and a float for a double:
# handed to a 32-bit parameter they would be garbage, so every scalar is converted to what the signature says.
TYPES: Mapping[str, np.dtype[Any]] = {
    "int": np.dtype(np.int32),
    "unsigned": np.dtype(np.uint32),
    "long long": np.dtype(np.int64),
    "unsigned char": np.dtype(np.uint8),
    "signed char": np.dtype(np.int8),
    "float": np.dtype(np.float32),
    "__half": np.dtype(np.float16),
}
_SIGNATURE = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\((\d+)[\d, ]*\)\s+)?(\w+)\(([^)]*)\)')


@dataclass(frozen=True)
class Geometry:
    """Warps of a block: of row operations, of attention (fewer where a text is long), of what works by sequence.

    ValueError for what no card can launch.
    """

    row_warps: int = 4
    attention_warps: int = 4
    sequence_warps: int = 4
    most_blocks: int = 40 * 16  # of a row operation, which strides over the rest

    @classmethod
    def of(cls, multiprocessors: int) -> Geometry:
        """For a card with so many, each of which holds up to 16 blocks; a T4 has 40."""
        return cls(most_blocks=16 * multiprocessors)

    def __post_init__(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), MOST_GRID if field.name == "most_blocks" else MOST_THREADS // WARP
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"a geometry's {field.name} is an integer from 1 to {most}, found {value!r}")


class Signature(NamedTuple):
    """A kernel's parameters, each with its type and whether it is an array of it, and the most threads of a block."""

    parameters: list[tuple[np.dtype[Any], bool]]
    most_threads: int


def source(name: str) -> str:
    """The text of a `.cu` file."""
    return resources.files(__package__).joinpath(f"{name}.cu").read_text(encoding="utf-8")


def signatures(text: str) -> dict[str, Signature]:
    """The kernels of a source."""
    return {
        name: Signature([_parameter(part) for part in parameters.split(",")], int(bound or MOST_THREADS))
        for bound, name, parameters in _SIGNATURE.findall(text)
    }


def _parameter(text: str) -> tuple[np.dtype[Any], bool]:
    kind = text.strip().removeprefix("const ").rsplit(maxsplit=1)[0]
    return TYPES[kind.removesuffix("*")], kind.endswith("*")


def pitch(words: int) -> int:
    """From a row in shared memory to the next: an odd number of fours, which are read at a time."""
    return 4 * (math.ceil(words / 4) | 1)


def row_bytes(words: int) -> int:
    """Of one row in shared memory from which NVIDIA's compiler reads fours, the last one past its end."""
    return 16 * math.ceil(words / 4)


def rows_words(warps: int, words: int) -> int:
    """Of a block's queries and one tile of keys, in rows of so many words."""
    return (warps * ROWS + TILE) * pitch(words)


class Kernels:
    """Some sources on the current device: compiled when first launched, by CuPy, which keeps what it compiled.

    cp: the CuPy module. Float32 sums are not contracted into fused multiply-adds unless the source says so: the bits
    are then those of any other card, and of the tests.
    """

    sources: tuple[str, ...] = ("compact",)

    def __init__(self, cp: Any, geometry: Geometry):
        self._geometry = geometry
        self._signatures: dict[str, Signature] = {}
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}  # of those, what was launched before
        for name in self.sources:
            text = source(name)
            module = cp.RawModule(code=text, options=("-std=c++17", "--fmad=false"), backend="nvrtc")
            found = signatures(text)
            self._signatures |= found
            self._modules |= dict.fromkeys(found, module)

    def compile(self) -> None:
        """Compile everything now."""
        for name in self._modules:
            self._kernel(name)

    def _kernel(self, name: str) -> Any:
        """Looked up in its module once: CuPy makes a new object of every look-up, which asks the driver again."""
        if name not in self._kernels:
            self._kernels[name] = self._modules[name].get_function(name)
        return self._kernels[name]

    def launch(self, name: str, grid: Sequence[int], warps: int, *arguments: Any, shared_bytes: int = 0) -> None:
        """Start a kernel on the current stream: arrays of the device as they are, numbers in the parameter's type.

        TypeError where an array is of another type than the kernel reads, ValueError where a block has more warps than
        the kernel is compiled for.
        """
        parameters, most_threads = self._signatures[name]
        if not 1 <= warps <= most_threads // WARP:
            raise ValueError(f"{name}: a block has 1 to {most_threads // WARP} warps, found {warps}")
        packed = []
        for number, (argument, (kind, is_array)) in enumerate(zip(arguments, parameters, strict=True)):
            if is_array and argument.dtype != kind:
                raise TypeError(f"{name}: argument {number} must be an array of {kind}, found {argument.dtype}")
            packed.append(argument if is_array else kind.type(argument))
        shape = (*grid, 1, 1)[:3]
        self._kernel(name)(shape, (warps * WARP,), tuple(packed), shared_mem=shared_bytes)

    def on_rows(self, name: str, out: Array, *arguments: Any, row_bytes: int = 0) -> None:
        """A kernel whose warps each compute rows of out, (N, K). row_bytes: of shared memory for each warp."""
        warps = self._geometry.row_warps
        while warps > 1 and warps * row_bytes > BLOCK_SHARED_BYTES:
            warps //= 2
        grid = (min(math.ceil(len(out) / warps), self._geometry.most_blocks),)
        self.launch(name, grid, warps, *arguments, shared_bytes=warps * row_bytes)

    def on_sequences(self, name: str, B: int, *arguments: Any) -> None:
        """A kernel with one block for each of B sequences."""
        self.launch(name, (B,), self._geometry.sequence_warps, *arguments)

    def on_heads(
        self,
        name: str,
        shape: tuple[int, int, int],
        bytes_of: Callable[[int], int],
        *arguments: Any,
        queries_of_block: int | None = None,
    ) -> None:
        """A kernel of attention, of as many warps a block as have room: bytes_of(warps) of shared memory.

        shape: the most queries of a sequence, heads, B. queries_of_block: ROWS for each warp if not given.
        """
        warps, (queries, heads, B) = self._geometry.attention_warps, shape
        while warps > 1 and bytes_of(warps) > BLOCK_SHARED_BYTES:
            warps //= 2
        grid = (math.ceil(queries / (queries_of_block or warps * ROWS)), heads, B)
        self.launch(name, grid, warps, *arguments, shared_bytes=bytes_of(warps))

    def compact(
        self,
        goes_on: Array,
        counts: Array,
        cu_seqlens: Array,
        places: Array,
        rank: Array,
        new_cu_seqlens: Array,
        totals: Array,
    ) -> None:
        """The rows that go on, the inverse, the new bounds, and (2,) int32: their number and the longest sequence's."""
        B = len(counts)
        self.on_sequences("compact", B, goes_on, counts, cu_seqlens, B, places, rank, new_cu_seqlens, totals)
