"""Operations on one row of float32, as LLVM IR behind Numba intrinsics. Arguments are addresses and counts (int64).

Sums run over 16 lanes and then over the lanes, in one order: the same bits for a row wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from ..isa import LANES, chosen
from ..packing import LIMIT
from .vector import F32, I8, I16, I32, I64, INTEGERS, LOG2_E, VECTOR, Emitter

Value = Any
Body = Callable[..., Any]


def _over_row(
    emit: Emitter, count: Value, state: list[Value], step: Callable[[list[Value], Value, Value | None], list[Value]]
) -> list[Value]:
    """Fold step(state, first element, mask) over a row's vectors: mask is None for whole ones, lanes for the tail."""
    builder, lanes = emit.builder, ir.Constant(I64, LANES)
    whole, rest = builder.sdiv(count, lanes), builder.srem(count, lanes)
    state = emit.loop(whole, state, lambda index, state: step(state, builder.mul(index, lanes), None))
    at = builder.mul(whole, lanes)
    tails = builder.zext(builder.icmp_signed(">", rest, ir.Constant(I64, 0)), I64)  # none or one
    mask = emit.lanes_below(at, count)
    return emit.loop(tails, state, lambda index, state: step(state, at, mask))


def _bytes(emit: Emitter, element: Value, size: int = 4) -> Value:
    return emit.builder.mul(element, ir.Constant(I64, size))


def _load(emit: Emitter, address: Value, at: Value, mask: Value | None) -> Value:
    """Zeros where the mask is off."""
    offset = _bytes(emit, at)
    return emit.load(address, VECTOR, offset) if mask is None else emit.load_some(mask, address, offset)


def _store(emit: Emitter, value: Value, address: Value, at: Value, mask: Value | None) -> None:
    offset = _bytes(emit, at)
    if mask is None:
        emit.store(value, address, offset)
    else:
        emit.store_some(mask, value, address, offset)


def _where(emit: Emitter, mask: Value | None, value: Value, otherwise: Value) -> Value:
    return value if mask is None else emit.builder.select(mask, value, otherwise)


@intrinsic
def softmax_line(typingctx, address, count, scale):
    """In place: softmax(scale * x) of `count` elements, scale > 0."""

    def code(context, builder, signature, arguments):
        address, count, scale = arguments
        emit = Emitter(builder)
        lowest, zero = emit.splat(-3.4028234663852886e38), emit.splat(0.0)

        def maximum(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            return [emit.larger(_where(emit, mask, _load(emit, address, at, mask), lowest), state[0])]

        peak = emit.splat(emit.largest(_over_row(emit, count, [lowest], maximum)[0]))
        factor = emit.splat(builder.fmul(scale, ir.Constant(F32, LOG2_E)))

        def exponential(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            power = emit.exp2(builder.fmul(builder.fsub(_load(emit, address, at, mask), peak), factor))
            _store(emit, power, address, at, mask)
            return [builder.fadd(state[0], _where(emit, mask, power, zero))]

        total = emit.sum(_over_row(emit, count, [zero], exponential)[0])
        inverse = emit.splat(builder.fdiv(ir.Constant(F32, 1.0), total))

        def normal(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            _store(emit, builder.fmul(_load(emit, address, at, mask), inverse), address, at, mask)
            return []

        _over_row(emit, count, [], normal)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), code


@intrinsic
def add_line(typingctx, target, source, count):
    """target += source over `count` elements."""

    def code(context, builder, signature, arguments):
        target, source, count = arguments
        emit = Emitter(builder)

        def step(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            total = builder.fadd(_load(emit, target, at, mask), _load(emit, source, at, mask))
            _store(emit, total, target, at, mask)
            return []

        _over_row(emit, count, [], step)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def norm_line(typingctx, address, residual, out, weight, bias, count, eps):
    """out = LayerNorm(x + residual) * weight + bias over `count` elements; x is overwritten. out may be x."""

    def code(context, builder, signature, arguments):
        address, residual, out, weight, bias, count, eps = arguments
        emit = Emitter(builder)
        zero = emit.splat(0.0)
        size = emit.splat(builder.sitofp(count, F32))

        def add(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            x = builder.fadd(_load(emit, address, at, mask), _load(emit, residual, at, mask))
            _store(emit, x, address, at, mask)
            return [builder.fadd(state[0], x)]

        mean = builder.fdiv(emit.splat(emit.sum(_over_row(emit, count, [zero], add)[0])), size)

        def square(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            x = _where(emit, mask, builder.fsub(_load(emit, address, at, mask), mean), zero)
            _store(emit, x, address, at, mask)
            return [emit.fma(x, x, state[0])]

        variance = builder.fdiv(emit.splat(emit.sum(_over_row(emit, count, [zero], square)[0])), size)
        lost = builder.fsub(variance, variance)  # 0; NaN where squares overflow, which would make the row the bias
        deviation = emit.call("llvm.sqrt.v16f32", VECTOR, [builder.fadd(builder.fadd(variance, emit.splat(eps)), lost)])
        inverse = builder.fdiv(emit.splat(1.0), deviation)

        def scale(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            x = builder.fmul(_load(emit, address, at, mask), inverse)
            x = emit.fma(x, _load(emit, weight, at, mask), _load(emit, bias, at, mask))
            _store(emit, x, out, at, mask)
            return []

        _over_row(emit, count, [], scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.float32), code


@intrinsic
def quantize_line(typingctx, address, out, count):
    """Round(x * 127 / max|x|) in the rung's form (uint8 with 128 added, or int16); returns max|x| / 127 (float32).

    A row whose largest is below 127 times float32's smallest normal number becomes zeros. A row that is not finite
    returns what is not, so that the product is not finite either. Writes whole vectors of 16, zeros (of the form)
    behind the last element: `out` needs that room.
    """

    def code(context, builder, signature, arguments):
        address, out, count = arguments
        emit, rung = Emitter(builder), chosen()
        narrow, offset_by = (I8, 128) if rung.int8 == "dot" else (I16, 0)

        def size(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            bits = builder.bitcast(emit.call("llvm.fabs.v16f32", VECTOR, [_load(emit, address, at, mask)]), INTEGERS)
            return [builder.select(builder.icmp_signed("<", state[0], bits), bits, state[0])]

        # Of sizes, the bits as integers have the order of the floats, with infinity and then NaN above all others.
        bits = _over_row(emit, count, [emit.splat(0, INTEGERS)], size)[0]
        largest = builder.bitcast(emit.call("llvm.vector.reduce.smax.v16i32", I32, [bits]), F32)
        tiny = builder.fcmp_ordered("<", largest, ir.Constant(F32, 127 * 1.1754943508222875e-38))
        factor = builder.fdiv(ir.Constant(F32, float(LIMIT)), largest)
        factor = emit.splat(builder.select(tiny, ir.Constant(F32, 0.0), factor))

        def round_(state: list[Value], at: Value, mask: Value | None) -> list[Value]:
            whole = emit.call("llvm.rint.v16f32", VECTOR, [builder.fmul(_load(emit, address, at, mask), factor)])
            integers = builder.add(builder.fptosi(whole, INTEGERS), emit.splat(offset_by, INTEGERS))
            value = builder.trunc(integers, ir.VectorType(narrow, LANES))
            place = _bytes(emit, at, rung.item_bytes)
            builder.store(value, emit.pointer(out, value.type, place), align=rung.item_bytes)
            return []

        _over_row(emit, count, [], round_)
        return builder.fdiv(largest, ir.Constant(F32, float(LIMIT)))

    return types.float32(types.int64, types.int64, types.int64), code


def _activation(name: str) -> Any:
    """The intrinsic that applies one of the Emitter's activations in place to `count` elements, a multiple of 16."""

    @intrinsic
    def activate(typingctx, address, count):
        def code(context, builder, signature, arguments):
            address, count = arguments
            emit = Emitter(builder)
            vectors = builder.sdiv(count, ir.Constant(I64, LANES))

            def step(index: Value, state: list[Value]) -> list[Value]:
                offset = builder.mul(index, ir.Constant(I64, 4 * LANES))
                emit.store(getattr(emit, name)(emit.load(address, VECTOR, offset)), address, offset)
                return []

            emit.loop(vectors, [], step)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), code

    return activate


gelu_line, gelu_tanh_line, relu_line, tanh_line = map(_activation, ("gelu", "gelu_tanh", "relu", "tanh"))
