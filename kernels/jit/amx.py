"""Matrix registers (Intel's AMX): exact int32 sums of uint8 rows with packed int8 weights, two tiles of rows at a time.

A tile is up to AMX_ROWS rows of AMX_DEPTH bytes. Rows go evenly into the fewest tiles, all of one height, so that the
last tile may begin among the rows of the one before it: they are computed twice, to the same integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from ..isa import AMX_DEPTH, AMX_ROWS
from .memory import compiled
from .tiles import CACHE_LINE, VECTOR_BYTES
from .vector import I8, I64, Emitter

Value = Any
FEW = 4  # rows: fewer are cheaper in vector registers
VECTORS, GROUP = 4, 4  # of a panel, of every rung with AMX
LINE = VECTOR_BYTES * VECTORS  # bytes of one group of a panel, and of one row of its sums
SUMS, ROWS, WEIGHTS = (0, 1, 2, 3), (4, 5), (6, 7)  # the eight registers
PALETTE, PLACE_OF_BYTES, PLACE_OF_ROWS, CONFIGURATION = 1, 16, 48, 64  # as LDTILECFG reads them


@compiled
def tall(rows):
    """The height of the tiles that `rows` rows go into."""
    tiles = (rows + AMX_ROWS - 1) // AMX_ROWS
    return (rows + tiles - 1) // tiles


def _stack(builder: ir.IRBuilder, size: int) -> Value:
    """The address of `size` bytes of the function's own memory, on a cache line; not initialised, unlike Numba's."""
    with builder.goto_entry_block():
        place = builder.alloca(ir.ArrayType(I8, size))
    place.align = CACHE_LINE
    return builder.ptrtoint(place, I64)


@intrinsic
def room(typingctx):
    """The address of the calling function's own memory for the sums of two tiles with one panel."""

    def code(context, builder, signature, arguments):
        return _stack(builder, 2 * AMX_ROWS * LINE)

    return types.int64(), code


@intrinsic
def configure(typingctx, height):
    """Give this thread's registers their shapes: tiles of `height` rows. All are empty then; `release` frees them."""

    def code(context, builder, signature, arguments):
        height = builder.trunc(arguments[0], I8)
        block = _stack(builder, CONFIGURATION)
        emit = Emitter(builder)
        for place in range(0, CONFIGURATION, 8):
            emit.store(ir.Constant(I64, 0), block, place)
        emit.store(ir.Constant(I8, PALETTE), block)
        for register in (*SUMS, *ROWS, *WEIGHTS):
            rows = ir.Constant(I8, AMX_DEPTH // GROUP) if register in WEIGHTS else height
            emit.store(ir.Constant(I8, AMX_DEPTH), block, PLACE_OF_BYTES + 2 * register)
            emit.store(rows, block, PLACE_OF_ROWS + register)
        emit.call("llvm.x86.ldtilecfg", ir.VoidType(), [emit.pointer(block, I8)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def release(typingctx):
    """Leave no state in this thread's registers, which the system would save at every switch."""

    def code(context, builder, signature, arguments):
        Emitter(builder).call("llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), code


class Registers:
    """Emits instructions whose operands are registers by number."""

    def __init__(self, builder: ir.IRBuilder):
        self.emit = Emitter(builder)

    def _do(self, name: str, registers: Sequence[int], *arguments: Value) -> None:
        numbers = [ir.Constant(I8, register) for register in registers]
        self.emit.call(f"llvm.x86.{name}", ir.VoidType(), [*numbers, *arguments])

    def load(self, register: int, address: Value, offset: Value | int, stride: Value) -> None:
        self._do("tileloadd64", [register], self.emit.pointer(address, I8, offset), stride)

    def store(self, register: int, address: Value, offset: int, stride: Value) -> None:
        self._do("tilestored64", [register], self.emit.pointer(address, I8, offset), stride)

    def multiply_add(self, sums: int, rows: int, weights: int) -> None:
        self._do("tdpbusd", [sums, rows, weights])


def _block(tiles: int) -> Any:
    """The intrinsic for one tile of rows, or for two, of which the second begins `more` rows behind the first.

    c[r] = start + sum_g a[r, g] . b[g], one panel, int32; depth: of the rows, in AMX_DEPTH inputs. One tile takes all
    vectors of columns at once, two take half of them and then the others. Half a panel's memory from `ahead` on is
    prefetched.
    """
    vectors = VECTORS // tiles
    lines = AMX_DEPTH // GROUP * LINE // CACHE_LINE // 2 // tiles  # fetched in every step

    @intrinsic
    def block(typingctx, a, a_stride, more, b, start, depth, c, c_stride, ahead):
        def code(context, builder, signature, arguments):
            a, a_stride, more, b, start, depth, c, c_stride, ahead = arguments
            registers = Registers(builder)
            a_rows, c_rows = (
                [base, builder.add(base, builder.mul(more, stride))] for base, stride in ((a, a_stride), (c, c_stride))
            )
            for turn in range(tiles):
                columns = [VECTOR_BYTES * (turn * vectors + v) for v in range(vectors)]
                for at, register in enumerate(SUMS):
                    registers.load(register, start, columns[at % vectors], ir.Constant(I64, 0))

                def step(k: Value, state: list[Value], turn: int = turn, columns: list[int] = columns) -> list[Value]:
                    number = builder.add(k, builder.mul(depth, ir.Constant(I64, turn)))
                    soon = builder.add(ahead, builder.mul(number, ir.Constant(I64, lines * CACHE_LINE)))
                    for line in range(lines):
                        registers.emit.prefetch(soon, line * CACHE_LINE)
                    inputs = builder.mul(k, ir.Constant(I64, AMX_DEPTH))
                    weights = builder.add(b, builder.mul(k, ir.Constant(I64, AMX_DEPTH // GROUP * LINE)))
                    for tile in range(tiles):
                        registers.load(ROWS[tile], a_rows[tile], inputs, a_stride)
                        for v, column in enumerate(columns):
                            register = WEIGHTS[v % len(WEIGHTS)]
                            if tile == 0:
                                registers.load(register, weights, column, ir.Constant(I64, LINE))
                            registers.multiply_add(SUMS[tile * vectors + v], ROWS[tile], register)
                    return state

                registers.emit.loop(depth, [], step)
                for at, register in enumerate(SUMS):
                    registers.store(register, c_rows[at // vectors], columns[at % vectors], c_stride)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), code

    return block


ONE, TWO = _block(1), _block(2)


@compiled
def turns(rows):
    """How often two tiles are taken, or the one that is left, until all rows are done."""
    return (rows + 2 * AMX_ROWS - 1) // (2 * AMX_ROWS)


@compiled
def tiles_of(turn, rows, height):
    """The first row of this turn's tiles, and how many rows behind it the second begins: 0 where one is left."""
    row = 2 * turn * height
    first = min(row, rows - height)
    return first, min(row + height, rows - height) - first


@compiled
def panel_sums(a, a_stride, more, panel, start, groups, c, c_stride, turn):
    """int32 sums of a turn's tiles with one panel. a, c: addresses of their first row, more: see `tiles_of`.

    The first two turns fetch the panel behind this one; those after them find it in the cache.
    """
    depth, size = groups // (AMX_DEPTH // GROUP), groups * LINE
    ahead = panel + size + turn % 2 * (size // 2)
    if more == 0:
        ONE(a, a_stride, more, panel, start, depth, c, c_stride, ahead)
    else:
        TWO(a, a_stride, more, panel, start, depth, c, c_stride, ahead)
