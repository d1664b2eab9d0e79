"""Operations on one row of float32, as LLVM IR behind Numba intrinsics. Arguments are addresses and counts (int64).

Sums run over 16 lanes and then over the lanes in order: the same bits for a row wherever it stands.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .isa import LANES, chosen
from .vector import F32, I8, I16, I64, INTEGERS, VECTOR, Emitter

Value = Any
LIMIT = 127  # int8 activations and weights lie in [-127, 127]


def _vectors(emit: Emitter, count: Value) -> Value:
    """Vectors of 16 that cover `count` elements."""
    builder = emit.builder
    return builder.sdiv(builder.add(count, ir.Constant(I64, LANES - 1)), ir.Constant(I64, LANES))


def _fold(emit: Emitter, address: Value, count: Value, first: Value, body: Any, *, write: bool = False) -> Value:
    """Fold `state, x = body(state, x, offset, mask)` over a row's vectors, its tail masked; with write, x goes back."""
    builder = emit.builder

    def step(index: Value, state: list[Value]) -> list[Value]:
        at = builder.mul(index, ir.Constant(I64, LANES))
        mask, offset = emit.lanes_below(at, count), builder.mul(at, ir.Constant(I64, 4))
        found, changed = body(state[0], emit.load_some(mask, address, offset), offset, mask)
        if write:
            emit.store_some(mask, changed, address, offset)
        return [found]

    return emit.loop(_vectors(emit, count), [first], step)[0]


@intrinsic
def softmax_line(typingctx, address, count, scale):
    """In place: softmax(scale * x) of `count` elements, scale > 0; returns nothing."""

    def code(context, builder, signature, arguments):
        address, count, scale = arguments
        emit = Emitter(builder)
        lowest = emit.splat(-3.4028234663852886e38)

        def maximum(best: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            return builder.select(mask, emit.larger(x, best), best), x

        peak = emit.splat(emit.largest(_fold(emit, address, count, lowest, maximum)))
        factor = emit.splat(scale)

        def exponential(total: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            power = emit.exp(builder.fmul(builder.fsub(x, peak), factor))
            return builder.fadd(total, builder.select(mask, power, emit.splat(0.0))), power

        total = emit.sum(_fold(emit, address, count, emit.splat(0.0), exponential, write=True))
        inverse = emit.splat(builder.fdiv(ir.Constant(F32, 1.0), total))

        def normal(state: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            return state, builder.fmul(x, inverse)

        _fold(emit, address, count, emit.splat(0.0), normal, write=True)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), code


@intrinsic
def norm_line(typingctx, address, residual, out, weight, bias, count, eps):
    """out = LayerNorm(x + residual) * weight + bias over `count` elements; x is overwritten. residual 0: none."""

    def code(context, builder, signature, arguments):
        address, residual, out, weight, bias, count, eps = arguments
        emit = Emitter(builder)
        zero = emit.splat(0.0)
        size = emit.splat(builder.sitofp(count, F32))
        has_residual = builder.icmp_signed("!=", residual, ir.Constant(I64, 0))
        nowhere = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES)

        def add(total: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            wanted = builder.select(has_residual, mask, nowhere)
            x = builder.fadd(x, emit.load_some(wanted, residual, offset))
            return builder.fadd(total, x), x

        mean = builder.fdiv(emit.splat(emit.sum(_fold(emit, address, count, zero, add, write=True))), size)

        def square(total: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            x = builder.select(mask, builder.fsub(x, mean), zero)
            return emit.fma(x, x, total), x

        variance = builder.fdiv(emit.splat(emit.sum(_fold(emit, address, count, zero, square, write=True))), size)
        deviation = emit.call("llvm.sqrt.v16f32", VECTOR, [builder.fadd(variance, emit.splat(eps))])
        inverse = builder.fdiv(emit.splat(1.0), deviation)

        def scale(state: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            factor = emit.load_some(mask, weight, offset)
            x = emit.fma(builder.fmul(x, inverse), factor, emit.load_some(mask, bias, offset))
            emit.store_some(mask, x, out, offset)
            return state, x

        _fold(emit, address, count, zero, scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.float32), code


@intrinsic
def quantize_line(typingctx, address, out, count):
    """Round(x * 127 / max|x|) in the rung's form (int8, uint8 + 128, int16); returns max|x| / 127 (float32).

    A row whose largest is below 127 times float32's smallest normal number becomes zeros. Writes whole vectors of 16:
    `out` needs that room.
    """

    def code(context, builder, signature, arguments):
        address, out, count = arguments
        emit, rung = Emitter(builder), chosen()

        def size(best: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            return emit.larger(best, emit.call("llvm.fabs.v16f32", VECTOR, [x])), x

        largest = emit.largest(_fold(emit, address, count, emit.splat(0.0), size))
        tiny = builder.fcmp_ordered("<", largest, ir.Constant(F32, 127 * 1.1754943508222875e-38))
        factor = builder.fdiv(ir.Constant(F32, float(LIMIT)), largest)
        factor = emit.splat(builder.select(tiny, ir.Constant(F32, 0.0), factor))
        narrow, bytes_each = (I16, 2) if rung.int8 == "pairs" else (I8, 1)
        offset_by = emit.splat(128 if rung.int8 == "dot" else 0, INTEGERS)

        def round_(state: Value, x: Value, offset: Value, mask: Value) -> tuple[Value, Value]:
            whole = emit.call("llvm.rint.v16f32", VECTOR, [builder.fmul(x, factor)])
            integers = builder.add(builder.fptosi(whole, INTEGERS), offset_by)
            place = builder.sdiv(builder.mul(offset, ir.Constant(I64, bytes_each)), ir.Constant(I64, 4))
            value = builder.trunc(integers, ir.VectorType(narrow, LANES))
            builder.store(value, emit.pointer(out, value.type, place), align=bytes_each)
            return state, x

        _fold(emit, address, count, emit.splat(0.0), round_)
        return builder.fdiv(largest, ir.Constant(F32, float(LIMIT)))

    return types.float32(types.int64, types.int64, types.int64), code


@intrinsic
def dequantize_line(typingctx, address, out, factor, scale, bias, count):
    """out = int32 sums * (factor * scale) + bias over `count` elements, a multiple of 16."""

    def code(context, builder, signature, arguments):
        address, out, factor, scale, bias, count = arguments
        emit = Emitter(builder)
        row = emit.splat(factor)

        def step(index: Value, state: list[Value]) -> list[Value]:
            offset = builder.mul(index, ir.Constant(I64, 4 * LANES))
            sums = builder.sitofp(emit.load(address, INTEGERS, offset), VECTOR)
            both = builder.fmul(row, emit.load(scale, VECTOR, offset))
            emit.store(emit.fma(sums, both, emit.load(bias, VECTOR, offset)), out, offset)
            return []

        emit.loop(_vectors(emit, count), [], step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64, types.int64), code


def _activation(name: str) -> Any:
    """The intrinsic that applies one of the Emitter's activations in place to `count` elements, a multiple of 16."""

    @intrinsic
    def activate(typingctx, address, count):
        def code(context, builder, signature, arguments):
            address, count = arguments
            emit = Emitter(builder)

            def step(index: Value, state: list[Value]) -> list[Value]:
                offset = builder.mul(index, ir.Constant(I64, 4 * LANES))
                emit.store(getattr(emit, name)(emit.load(address, VECTOR, offset)), address, offset)
                return []

            emit.loop(_vectors(emit, count), [], step)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), code

    return activate


gelu_line, gelu_tanh_line, relu_line = (_activation(name) for name in ("gelu", "gelu_tanh", "relu"))
