"""CUDA kernels: their sources, their signatures, and launches whose arguments cannot be of the wrong type.

Nothing here imports CuPy; whoever has it passes the module. The `.cu` files compile alone, one module each. Operations
have the names of `minilpt.reference` and `kernels.integer`; they start kernels on the current stream and never wait.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

Array = Any  # of the device, contiguous

WARP = 32
BLOCK_SHARED_BYTES = 48 * 1024  # that a block gets without asking for more (CUDA C++ programming guide, table 27)
# As the sources have them: queries of one block of partial masses, queries of a warp, keys in shared memory at a time.
QUERIES, ROWS, TILE = 64, 4, 32

# The types of kernels' parameters, as NumPy has them. CuPy takes a Python int for 64 bits and a float for a double:
# handed to a 32-bit parameter they would be garbage, so every scalar is converted to what the signature says.
TYPES: Mapping[str, type[np.generic]] = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned char": np.uint8,
    "signed char": np.int8,
    "float": np.float32,
    "__half": np.float16,
}
_SIGNATURE = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([\d, ]+\)\s+)?(\w+)\(([^)]*)\)')


@dataclass(frozen=True)
class Geometry:
    """Warps of a block: of row operations, of attention (fewer where a text is long), of what works by sequence."""

    row_warps: int = 4
    attention_warps: int = 4
    sequence_warps: int = 4
    most_blocks: int = 40 * 16  # of a row operation; the rest is strided over. A T4 holds 16 blocks on each of 40 SMs


def source(name: str) -> str:
    """The text of a `.cu` file."""
    return resources.files(__package__).joinpath(f"{name}.cu").read_text(encoding="utf-8")


def signatures(text: str) -> dict[str, list[tuple[type[np.generic], bool]]]:
    """The kernels of a source: for each parameter its type, and whether it is an array of it."""
    return {name: [_parameter(part) for part in parameters.split(",")] for name, parameters in _SIGNATURE.findall(text)}


def _parameter(text: str) -> tuple[type[np.generic], bool]:
    kind = text.strip().removeprefix("const ").rsplit(maxsplit=1)[0]
    return TYPES[kind.removesuffix("*")], kind.endswith("*")


class Kernels:
    """Some sources on the current device: compiled when first launched, by CuPy, which keeps what it compiled.

    cp: the CuPy module. Float32 sums are not contracted into fused multiply-adds unless the source says so: the bits
    are then those of any other card, and of the tests.
    """

    sources: tuple[str, ...] = ("compact",)

    def __init__(self, cp: Any, geometry: Geometry):
        self._geometry = geometry
        self._signatures, self._modules = {}, {}  # type: dict[str, list[tuple[type[np.generic], bool]]], dict[str, Any]
        for name in self.sources:
            text = source(name)
            module = cp.RawModule(code=text, options=("-std=c++17", "--fmad=false"), backend="nvrtc")
            for kernel, parameters in signatures(text).items():
                self._signatures[kernel], self._modules[kernel] = parameters, module

    def compile(self) -> None:
        """Compile everything now."""
        for module in dict.fromkeys(self._modules.values()):
            module.compile()

    def launch(self, name: str, grid: Sequence[int], warps: int, *arguments: Any, shared_bytes: int = 0) -> None:
        """Start a kernel on the current stream: arrays of the device as they are, numbers in the parameter's type.

        TypeError where an array is of another type than the kernel reads.
        """
        packed = []
        for number, (argument, (kind, is_array)) in enumerate(zip(arguments, self._signatures[name], strict=True)):
            if is_array and argument.dtype != kind:
                raise TypeError(
                    f"{name}: argument {number} must be an array of {kind.__name__}, found {argument.dtype}"
                )
            packed.append(argument if is_array else kind(argument))
        shape = (*grid, 1, 1)[:3]
        self._modules[name].get_function(name)(shape, (warps * WARP,), tuple(packed), shared_mem=shared_bytes)

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

    def attention_warps(self, bytes_of: Any) -> int:
        """Warps of a block, as many as fit: bytes_of(warps) of shared memory."""
        warps = self._geometry.attention_warps
        while warps > 1 and bytes_of(warps) > BLOCK_SHARED_BYTES:
            warps //= 2
        return warps

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
