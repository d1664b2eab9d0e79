"""Register tiles: the innermost loops of every matrix product, as LLVM IR behind Numba intrinsics.

A tile is one to `chosen().rows` rows by some vectors of 16 columns. Each output element is one chain of multiply-adds
over the depth, in order, whatever the tile's other rows are: a row's bits do not depend on its neighbours. All
arguments are addresses and byte or element counts (int64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from ..isa import LANES, chosen
from .vector import F32, I8, I16, I32, I64, INTEGERS, VECTOR, Emitter

Value = Any
VECTOR_BYTES = 4 * LANES
CACHE_LINE = 64
VOID = types.void


def _signature(*arguments: object) -> Any:
    return VOID(*[types.int64 for _ in arguments])


def _by_height(builder: ir.IRBuilder, rows: Value, tile: Callable[[int], None]) -> None:
    """Emit tile(height) for every height that `rows` can have, and a jump to the one it has."""
    tall, after = chosen().rows, builder.append_basic_block("after")
    blocks = [builder.append_basic_block(f"height{height}") for height in range(1, tall + 1)]
    jump = builder.switch(rows, blocks[-1])
    for height, block in enumerate(blocks[:-1], start=1):
        jump.add_case(ir.Constant(I64, height), block)
    for height, block in enumerate(blocks, start=1):
        builder.position_at_end(block)
        tile(height)
        builder.branch(after)
    builder.position_at_end(after)


def _rows(builder: ir.IRBuilder, base: Value, stride: Value, height: int) -> list[Value]:
    """Addresses of `height` rows."""
    return [builder.add(base, builder.mul(ir.Constant(I64, row), stride)) for row in range(height)]


def float_tile(vectors: int) -> Any:
    """The intrinsic for float32 tiles of this many vectors: c[r] = start[r] + a[r] b for `rows` rows.

    start_stride is 0 where all rows start with the same line, as with a bias. Memory at ahead + k * ahead_stride is
    prefetched.
    """

    @intrinsic
    def tile(typingctx, a, a_stride, rows, b, b_stride, start, start_stride, c, c_stride, depth, ahead, ahead_stride):
        def code(context, builder, signature, arguments):
            a, a_stride, rows, b, b_stride, start, start_stride, c, c_stride, depth, ahead, ahead_stride = arguments
            emit = Emitter(builder)

            def of(height: int) -> None:
                a_rows, c_rows = _rows(builder, a, a_stride, height), _rows(builder, c, c_stride, height)
                starts = _rows(builder, start, start_stride, height)
                first = [emit.load(line, VECTOR, VECTOR_BYTES * v) for line in starts for v in range(vectors)]

                def step(k: Value, sums: list[Value]) -> list[Value]:
                    line = builder.add(b, builder.mul(k, b_stride))
                    weights = [emit.load(line, VECTOR, VECTOR_BYTES * v) for v in range(vectors)]
                    soon = builder.add(ahead, builder.mul(k, ahead_stride))
                    for offset in range(0, VECTOR_BYTES * vectors, CACHE_LINE):
                        emit.prefetch(soon, offset)
                    place, out = builder.mul(k, ir.Constant(I64, 4)), []
                    for row in range(height):
                        x = emit.splat(emit.load(a_rows[row], F32, place))
                        out += [emit.fma(x, weights[v], sums[row * vectors + v]) for v in range(vectors)]
                    return out

                for at, value in enumerate(emit.loop(depth, first, step)):
                    emit.store(value, c_rows[at // vectors], VECTOR_BYTES * (at % vectors))

            _by_height(builder, rows, of)
            return context.get_dummy_value()

        return _signature(
            a, a_stride, rows, b, b_stride, start, start_stride, c, c_stride, depth, ahead, ahead_stride
        ), code

    return tile


@intrinsic
def int8_tile(typingctx, a, a_stride, rows, b, start, groups, factors, scale, bias, c, c_stride, ahead, ahead_stride):
    """One panel of an int8 product: c[r] = (start + sum_g a[r, g] . b[g]) * factors[r] * scale + bias.

    The sums are exact int32 (`packing.pack_int8` refuses depths that could overflow); a is uint8 for "dot", int16 for
    "pairs". factors: one float32 per row; scale, bias, c: float32. Memory at ahead + g * ahead_stride is prefetched.
    """

    def code(context, builder, signature, arguments):
        a, a_stride, rows, b, start, groups, factors, scale, bias, c, c_stride, ahead, ahead_stride = arguments
        emit, vectors = Emitter(builder), chosen().vectors

        def of(height: int) -> None:
            a_rows, c_rows = _rows(builder, a, a_stride, height), _rows(builder, c, c_stride, height)
            sums = _int8_sums(emit, a_rows, b, start, groups, vectors, ahead, ahead_stride)
            for v in range(vectors):
                columns, offsets = (emit.load(place, VECTOR, VECTOR_BYTES * v) for place in (scale, bias))
                for row in range(height):
                    factor = emit.splat(emit.load(factors, F32, 4 * row))
                    value = _scaled(emit, sums[row * vectors + v], factor, columns, offsets)
                    emit.store(value, c_rows[row], VECTOR_BYTES * v)

        _by_height(builder, rows, of)
        return context.get_dummy_value()

    return _signature(a, a_stride, rows, b, start, groups, factors, scale, bias, c, c_stride, ahead, ahead_stride), code


@intrinsic
def scale_rows(typingctx, sums, rows, factors, scale, bias, c, c_stride):
    """What `int8_tile` makes of one panel's sums, (rows, columns) int32: c[r] = sums[r] * factors[r] * scale + bias."""

    def code(context, builder, signature, arguments):
        sums, rows, factors, scale, bias, c, c_stride = arguments
        emit, vectors = Emitter(builder), range(chosen().vectors)
        columns, offsets = ([emit.load(place, VECTOR, VECTOR_BYTES * v) for v in vectors] for place in (scale, bias))

        def step(row: Value, state: list[Value]) -> list[Value]:
            line = builder.add(sums, builder.mul(row, ir.Constant(I64, VECTOR_BYTES * len(vectors))))
            here = builder.add(c, builder.mul(row, c_stride))
            factor = emit.splat(emit.load(factors, F32, builder.mul(row, ir.Constant(I64, 4))))
            for v in vectors:
                found = emit.load(line, INTEGERS, VECTOR_BYTES * v)
                emit.store(_scaled(emit, found, factor, columns[v], offsets[v]), here, VECTOR_BYTES * v)
            return state

        emit.loop(rows, [], step)
        return context.get_dummy_value()

    return _signature(sums, rows, factors, scale, bias, c, c_stride), code


def _scaled(emit: Emitter, sums: Value, factor: Value, columns: Value, offsets: Value) -> Value:
    """sums * (columns * factor) + offsets, float32."""
    return emit.fma(emit.builder.sitofp(sums, VECTOR), emit.builder.fmul(columns, factor), offsets)


def sum_tile(vectors: int) -> Any:
    """The intrinsic for the first `vectors` vectors of an int8 panel: c[r] = start + sum_g a[r, g] . b[g], int32."""

    @intrinsic
    def tile(typingctx, a, a_stride, rows, b, start, groups, c, c_stride, ahead, ahead_stride):
        def code(context, builder, signature, arguments):
            a, a_stride, rows, b, start, groups, c, c_stride, ahead, ahead_stride = arguments
            emit = Emitter(builder)

            def of(height: int) -> None:
                a_rows, c_rows = _rows(builder, a, a_stride, height), _rows(builder, c, c_stride, height)
                sums = _int8_sums(emit, a_rows, b, start, groups, vectors, ahead, ahead_stride)
                for at, value in enumerate(sums):
                    emit.store(value, c_rows[at // vectors], VECTOR_BYTES * (at % vectors))

            _by_height(builder, rows, of)
            return context.get_dummy_value()

        return _signature(a, a_stride, rows, b, start, groups, c, c_stride, ahead, ahead_stride), code

    return tile


def _int8_sums(
    emit: Emitter,
    a_rows: list[Value],
    b: Value,
    start: Value,
    groups: Value,
    vectors: int,
    ahead: Value,
    ahead_stride: Value,
) -> list[Value]:
    """start + sum_g a[r, g] . b[g] for every row r and vector of columns, row by row: exact int32."""
    builder, rung = emit.builder, chosen()
    width = LANES * rung.group  # bytes of one vector of weights
    first = [emit.load(start, INTEGERS, VECTOR_BYTES * v) for v in range(vectors)] * len(a_rows)

    def step(g: Value, sums: list[Value]) -> list[Value]:
        line = builder.add(b, builder.mul(g, ir.Constant(I64, width * rung.vectors)))
        soon = builder.add(ahead, builder.mul(g, ahead_stride))
        for offset in range(0, width * vectors, CACHE_LINE):
            emit.prefetch(soon, offset)
        weights = [_weights(emit, line, width * v) for v in range(vectors)]
        place, out = builder.mul(g, ir.Constant(I64, 4)), []
        for row, a_row in enumerate(a_rows):
            x = emit.splat(emit.load(a_row, I32, place), INTEGERS)
            out += [_multiply_add(emit, sums[row * vectors + v], x, weights[v]) for v in range(vectors)]
        return out

    return emit.loop(groups, first, step)


def _weights(emit: Emitter, line: Value, offset: int) -> Value:
    """One vector of 16 columns: as they are for vpdpbusd, widened to int16 pairs otherwise."""
    if chosen().int8 == "dot":
        return emit.load(line, INTEGERS, offset)
    narrow = emit.load(line, ir.VectorType(I8, 2 * LANES), offset, align=1)
    return emit.builder.sext(narrow, ir.VectorType(I16, 2 * LANES))


def _multiply_add(emit: Emitter, sums: Value, x: Value, weights: Value) -> Value:
    """sums + x . weights in each of 16 columns, exact in int32."""
    if chosen().int8 == "dot":
        return emit.call("llvm.x86.avx512.vpdpbusd.512", INTEGERS, [sums, x, weights])
    builder, wide = emit.builder, ir.VectorType(I32, 2 * LANES)
    pairs = builder.bitcast(x, ir.VectorType(I16, 2 * LANES))
    products = builder.mul(builder.sext(pairs, wide), builder.sext(weights, wide), flags=["nsw"])
    halves = []
    for parity in (0, 1):
        places = ir.Constant(INTEGERS, list(range(parity, 2 * LANES, 2)))
        halves.append(builder.shuffle_vector(products, ir.Constant(wide, ir.Undefined), places))
    return builder.add(sums, builder.add(*halves))


@intrinsic
def transpose(typingctx, source, source_stride, rows, target, target_stride):
    """Write the transpose of a 16 x 16 block of float32. Of its rows only `rows` (1 to 16) exist; the last is repeated."""

    def code(context, builder, signature, arguments):
        source, source_stride, rows, target, target_stride = arguments
        emit, last = Emitter(builder), builder.sub(rows, ir.Constant(I64, 1))
        block = []
        for row in range(LANES):
            number = ir.Constant(I64, row)
            number = builder.select(builder.icmp_signed("<", number, last), number, last)
            block.append(emit.load(builder.add(source, builder.mul(number, source_stride)), VECTOR))
        half = LANES // 2
        while half:  # swap the off-diagonal quarters of every square of 2 * half rows
            low = [lane if not lane & half else lane - half + LANES for lane in range(LANES)]
            high = [lane + half if not lane & half else lane + LANES for lane in range(LANES)]
            for row in (row for row in range(LANES) if not row & half):
                pair = block[row], block[row + half]
                for at, lanes in ((row, low), (row + half, high)):
                    block[at] = builder.shuffle_vector(*pair, ir.Constant(INTEGERS, lanes))
            half //= 2
        for row, value in enumerate(block):
            emit.store(value, builder.add(target, builder.mul(ir.Constant(I64, row), target_stride)))
        return context.get_dummy_value()

    return _signature(source, source_stride, rows, target, target_stride), code
