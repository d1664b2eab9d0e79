"""Register tiles: the innermost loops of every matrix product, as LLVM IR behind Numba intrinsics.

A tile is up to `chosen().rows` rows by `vectors` vectors of 16 columns. Each output element is one chain of multiply-adds
over the depth, in order, whatever the tile's other rows are: a row's bits do not depend on its neighbours. Rows beyond the
last are computed as copies of it and stored over it. All arguments are addresses and byte or element counts (int64).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .isa import LANES, chosen
from .vector import F32, I8, I16, I32, I64, INTEGERS, VECTOR, Emitter

Value = Any
VECTOR_BYTES = 4 * LANES
VOID = types.void


def _signature(*arguments: object) -> Any:
    return VOID(*[types.int64 for _ in arguments])


def _row_addresses(emit: Emitter, base: Value, stride: Value, rows: Value, count: int) -> list[Value]:
    """Addresses of rows 0 to count - 1, those beyond the last valid one being its own."""
    builder, last = emit.builder, emit.builder.sub(rows, ir.Constant(I64, 1))
    addresses = []
    for row in range(count):
        number = ir.Constant(I64, row)
        number = builder.select(builder.icmp_signed("<", number, last), number, last)
        addresses.append(builder.add(base, builder.mul(number, stride)))
    return addresses


def _float_tile(vectors: int) -> Any:
    """The intrinsic for float32 tiles of this many vectors."""

    @intrinsic
    def tile(typingctx, a, a_stride, rows, b, b_stride, start, c, c_stride, depth):
        def code(context, builder, signature, arguments):
            a, a_stride, rows, b, b_stride, start, c, c_stride, depth = arguments
            emit, tall = Emitter(builder), chosen().rows
            a_rows = _row_addresses(emit, a, a_stride, rows, tall)
            c_rows = _row_addresses(emit, c, c_stride, rows, tall)
            first = [emit.load(start, VECTOR, VECTOR_BYTES * v) for v in range(vectors)] * tall

            def step(k: Value, sums: list[Value]) -> list[Value]:
                line = builder.add(b, builder.mul(k, b_stride))
                weights = [emit.load(line, VECTOR, VECTOR_BYTES * v) for v in range(vectors)]
                place, out = builder.mul(k, ir.Constant(I64, 4)), []
                for row in range(tall):
                    x = emit.splat(emit.load(a_rows[row], F32, place))
                    out += [emit.fma(x, weights[v], sums[row * vectors + v]) for v in range(vectors)]
                return out

            for at, value in enumerate(emit.loop(depth, first, step)):
                emit.store(value, c_rows[at // vectors], VECTOR_BYTES * (at % vectors))
            return context.get_dummy_value()

        return _signature(a, a_stride, rows, b, b_stride, start, c, c_stride, depth), code

    return tile


FLOAT_TILES = tuple(_float_tile(vectors) for vectors in range(1, 5))


@intrinsic
def int8_tile(typingctx, a, a_stride, rows, b, start, c, c_stride, groups):
    """int32 sums of one panel: c[r] = start + sum_g a[r, g] . b[g], for methods "dot" (a: uint8) and "pairs" (int16)."""

    def code(context, builder, signature, arguments):
        a, a_stride, rows, b, start, c, c_stride, groups = arguments
        emit, rung = Emitter(builder), chosen()
        tall, vectors = rung.rows, rung.vectors
        a_rows = _row_addresses(emit, a, a_stride, rows, tall)
        c_rows = _row_addresses(emit, c, c_stride, rows, tall)
        first = [emit.load(start, INTEGERS, VECTOR_BYTES * v) for v in range(vectors)] * tall
        width = LANES * rung.group  # bytes of one vector of weights

        def step(g: Value, sums: list[Value]) -> list[Value]:
            line = builder.add(b, builder.mul(g, ir.Constant(I64, width * vectors)))
            weights = [_weights(emit, line, width * v) for v in range(vectors)]
            place, out = builder.mul(g, ir.Constant(I64, 4)), []
            for row in range(tall):
                x = emit.splat(emit.load(a_rows[row], I32, place), INTEGERS)
                out += [_multiply_add(emit, sums[row * vectors + v], x, weights[v]) for v in range(vectors)]
            return out

        for at, value in enumerate(emit.loop(groups, first, step)):
            emit.store(value, c_rows[at // vectors], VECTOR_BYTES * (at % vectors))
        return context.get_dummy_value()

    return _signature(a, a_stride, rows, b, start, c, c_stride, groups), code


def _weights(emit: Emitter, line: Value, offset: int) -> Value:
    """One vector of 16 columns: as they are for vpdpbusd, widened to int16 pairs otherwise."""
    if chosen().group == 4:
        return emit.load(line, INTEGERS, offset, align=1)
    narrow = emit.load(line, ir.VectorType(I8, 2 * LANES), offset, align=1)
    return emit.builder.sext(narrow, ir.VectorType(I16, 2 * LANES))


def _multiply_add(emit: Emitter, sums: Value, x: Value, weights: Value) -> Value:
    """sums + x . weights in each of 16 columns, exact in int32."""
    if chosen().group == 4:
        return emit.call("llvm.x86.avx512.vpdpbusd.512", INTEGERS, [sums, x, weights])
    builder, wide = emit.builder, ir.VectorType(I32, 2 * LANES)
    pairs = builder.bitcast(x, ir.VectorType(I16, 2 * LANES))
    products = builder.mul(builder.sext(pairs, wide), builder.sext(weights, wide), flags=["nsw"])
    halves = []
    for parity in (0, 1):
        places = ir.Constant(INTEGERS, list(range(parity, 2 * LANES, 2)))
        halves.append(builder.shuffle_vector(products, ir.Constant(wide, ir.Undefined), places))
    return builder.add(sums, builder.add(*halves))
