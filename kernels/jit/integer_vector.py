"""The integer-only operations in whole vectors, as LLVM IR behind Numba intrinsics: `integer_lines`, bit for bit, faster.

They serve the usual constants, which the records of `kernels.compiled_integer` mark: numbers that fit into 32 bits where
64 would be slow, and products that are never exactly half of a unit, so that halves need no care. Sixteen int32 lanes are
two halves of int64 lanes where products are wide. Rows have room for whole vectors of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from ..integer import ERF_SHIFT, EXP_BITS, EXP_OUTPUT_BITS, GELU_LOW_BITS, PROB_BITS, SOFTMAX_BITS
from ..isa import LANES, chosen
from .vector import I8, I16, I32, I64, INTEGERS, Emitter

Value = Any
HALF = ir.VectorType(I64, LANES // 2)
NARROW_HALF = ir.VectorType(I32, LANES // 2)
ITEM, ITEM_BYTES = (I8, 1) if chosen().item_bytes == 1 else (I16, 2)
ITEMS = ir.VectorType(ITEM, LANES)
ITEM_ZERO = chosen().item_zero
VOID = types.void
Finish = Callable[[Value], Value]
Step = Callable[[list[Value], Value, Value | None], list[Value]]


class Integers(Emitter):
    """Appends instructions on vectors of integers."""

    def whole(self, number: int) -> Value:
        """The same int32 in 16 lanes."""
        return self.splat(number, INTEGERS)

    def wide(self, value: Value | int) -> Value:
        """The same int64 in 8 lanes."""
        return self.splat(value, HALF)

    def halves(self, value: Value, signed: bool = True) -> list[Value]:
        """16 lanes of int32 as two times 8 of int64: the even ones, and the odd ones.

        Where they are multiplied, the instruction reads the lower half of a lane, and the even ones cost nothing.
        """
        both, bits = self.builder.bitcast(value, HALF), self.wide(32)
        if signed:
            return [self.builder.ashr(self.builder.shl(both, bits), bits), self.builder.ashr(both, bits)]
        return [self.builder.and_(both, self.wide(2**32 - 1)), self.builder.lshr(both, bits)]

    def joined(self, halves: list[Value]) -> Value:
        """Even and odd lanes of int64, their lower 32 bits, as 16 of int32."""
        even = self.builder.and_(halves[0], self.wide(2**32 - 1))
        return self.builder.bitcast(self.builder.or_(even, self.builder.shl(halves[1], self.wide(32))), INTEGERS)

    def in_order(self, halves: list[Value]) -> list[Value]:
        """Even and odd lanes as the first eight and the last eight."""
        return [
            self.builder.shuffle_vector(
                *halves, ir.Constant(NARROW_HALF, [first + lane // 2 + lane % 2 * 8 for lane in range(8)])
            )
            for first in (0, 4)
        ]

    def least(self, a: Value, b: Value, signed: bool = True) -> Value:
        compare = self.builder.icmp_signed if signed else self.builder.icmp_unsigned
        return self.builder.select(compare("<", a, b), a, b)

    def most(self, a: Value, b: Value) -> Value:
        return self.builder.select(self.builder.icmp_signed(">", a, b), a, b)

    def clamp(self, value: Value, most: int) -> Value:
        """Into [-most, most - 1], int32."""
        return self.least(self.most(value, self.whole(-most)), self.whole(most - 1))

    def shifted(self, product: Value, less: Value) -> Value:
        """product / 2^(less + 1), rounded, in 8 lanes; never exactly half of a unit."""
        one = self.wide(1)
        return self.builder.ashr(self.builder.add(self.builder.ashr(product, less), one), one)

    def scaled(self, value: Value, multiplier: Value, shift: Value) -> Value:
        """Round(value * multiplier / 2^shift), 16 lanes of int32 each."""
        less = self.halves(self.builder.sub(shift, self.whole(1)), signed=False)
        parts = zip(self.halves(value), self.halves(multiplier), less, strict=True)
        return self.joined([self.shifted(self.builder.mul(x, m), s) for x, m, s in parts])

    def row(self, address: Value, at: Value, kind: Value, size: int) -> Value:
        """A vector from element `at` on, of elements of `size` bytes."""
        return self.load(address, kind, self.builder.mul(at, ir.Constant(I64, size)), align=size)

    def numbers(self, address: Value, at: Value) -> Value:
        """16 int32."""
        return self.row(address, at, INTEGERS, 4)

    def values(self, items: Value, at: Value) -> Value:
        """16 items as int32 values."""
        narrow = self.row(items, at, ITEMS, ITEM_BYTES)
        wide = self.builder.zext if ITEM_BYTES == 1 else self.builder.sext
        return self.builder.sub(wide(narrow, INTEGERS), self.whole(ITEM_ZERO))

    def put(self, value: Value, address: Value, at: Value, size: int) -> None:
        """Store from element `at` on."""
        place = self.pointer(address, value.type, self.builder.mul(at, ir.Constant(I64, size)))
        self.builder.store(value, place, align=size)

    def put_items(self, values: Value, address: Value, at: Value) -> None:
        """16 int32 values of 8 bits as items."""
        self.put(self.builder.trunc(self.builder.add(values, self.whole(ITEM_ZERO)), ITEMS), address, at, ITEM_BYTES)

    def rows(self, count: Value, state: list[Value], step: Step) -> list[Value]:
        """Fold step(state, first element, lanes that are there) over the vectors of `count` elements.

        The lanes are None in whole vectors, and what is left of the last one behind them.
        """
        builder, lanes = self.builder, ir.Constant(I64, LANES)
        whole = builder.sdiv(count, lanes)
        state = self.loop(whole, state, lambda index, state: step(state, builder.mul(index, lanes), None))
        at = builder.mul(whole, lanes)
        tails = builder.zext(builder.icmp_signed("<", at, count), I64)  # none or one
        there = self.lanes_below(at, count)
        return self.loop(tails, state, lambda index, state: step(state, at, there))

    def once_or_again(
        self, count: Value, again: Value, again_shift: Value, step: Callable[[Finish, Value], None]
    ) -> None:
        """step(finish, first element) over `count` elements: finish requantises 8 bits again unless `again` is 0."""
        factor = [self.splat(self.builder.trunc(number, I32), INTEGERS) for number in (again, again_shift)]

        def over_rows(finish: Finish) -> None:
            def body(state: list[Value], at: Value, there: Value | None) -> list[Value]:
                step(finish, at)
                return []

            self.rows(count, [], body)

        with self.builder.if_else(self.builder.icmp_signed("==", again, ir.Constant(I64, 0))) as (once, twice):
            with once:
                over_rows(lambda value: value)
            with twice:
                over_rows(lambda value: self.clamp(self.scaled(value, *factor), 128))

    def total(self, halves: list[Value]) -> Value:
        """Of all int64 lanes."""
        return self.call("llvm.vector.reduce.add.v8i64", I64, [self.builder.add(*halves)])

    def only(self, there: Value | None, value: Value) -> Value:
        """Zero where there is no lane."""
        return value if there is None else self.builder.select(there, value, self.whole(0))


@intrinsic
def gelu_row(typingctx, sums, count, b, c, minus_one, multiplier, shift, again, again_shift, out):
    """i-GELU of int32 sums as items; see `integer_lines.gelu_line`. again: 0 for once only.

    b: int32; c and minus_one: int64, of every 16 the even ones first.
    """

    def code(context, builder, signature, arguments):
        sums, count, b, c, minus_one, multiplier, shift, again, again_shift, out = arguments
        emit = Integers(builder)
        low = ir.Constant(I64, GELU_LOW_BITS)

        def step(finish: Finish, at: Value) -> None:
            x, ends = emit.numbers(sums, at), emit.numbers(b, at)
            sign = builder.ashr(x, emit.whole(31))
            size = builder.sub(builder.xor(x, sign), sign)
            from_end = builder.add(emit.least(size, builder.neg(ends)), ends)
            parts = []
            lines = zip(
                *(emit.halves(value) for value in (x, sign, from_end)),
                emit.halves(emit.numbers(multiplier, at), signed=False),
                emit.halves(builder.sub(emit.numbers(shift, at), emit.whole(GELU_LOW_BITS + 1)), signed=False),
                (0, LANES // 2),
                strict=True,
            )
            for value, negative, distance, factor, less, lane in lines:
                here = builder.add(at, ir.Constant(I64, lane))
                polynomial = builder.add(builder.mul(distance, distance), emit.row(c, here, HALF, 8))
                erf = builder.sub(builder.xor(polynomial, negative), negative)
                erf = builder.ashr(erf, emit.wide(ERF_SHIFT))
                grown = builder.sub(emit.row(minus_one, here, HALF, 8), erf)  # fits into 32 bits
                grown = builder.ashr(builder.shl(grown, emit.wide(32)), emit.wide(32))
                product = builder.mul(value, grown)
                below = builder.mul(builder.and_(product, emit.wide(2**GELU_LOW_BITS - 1)), factor)
                total = builder.mul(builder.ashr(product, emit.splat(low, HALF)), factor)
                total = builder.add(total, builder.lshr(below, emit.splat(low, HALF)))
                parts.append(emit.shifted(total, less))
            emit.put_items(finish(emit.clamp(emit.joined(parts), 128)), out, at)

        emit.once_or_again(count, again, again_shift, step)
        return context.get_dummy_value()

    return VOID(*[types.int64] * 10), code


@intrinsic
def softmax_row(typingctx, scores, n, ln2, magic, magic_shift, b, c, multiplier, shift, probs, received, mask):
    """Items of unsigned probabilities of n int32 scores, which are overwritten; see `integer_lines.softmax_line`.

    Zeros behind the n-th, up to a whole vector. received has as much room.
    """

    def code(context, builder, signature, arguments):
        scores, n, ln2, magic, magic_shift, b, c, multiplier, shift, probs, received, mask = arguments
        emit = Integers(builder)
        lowest = emit.whole(-(2**31))

        def highest(state: list[Value], at: Value, there: Value | None) -> list[Value]:
            x = emit.numbers(scores, at)
            return [emit.most(state[0], x if there is None else builder.select(there, x, lowest))]

        peak = emit.call("llvm.vector.reduce.smax.v16i32", I32, emit.rows(n, [lowest], highest))
        narrow = [emit.splat(builder.trunc(number, I32), INTEGERS) for number in (ln2, b, c)]
        wide = [emit.splat(builder.zext(builder.trunc(number, I32), I64), HALF) for number in (magic, multiplier)]
        wide += [emit.splat(number, HALF) for number in (builder.sub(shift, ir.Constant(I64, 1)), magic_shift)]
        far = builder.trunc(builder.mul(ln2, ir.Constant(I64, EXP_BITS)), I32)
        peak, far = emit.splat(peak, INTEGERS), emit.splat(far, INTEGERS)

        def exponential(state: list[Value], at: Value, there: Value | None) -> list[Value]:
            q = emit.least(builder.sub(peak, emit.numbers(scores, at)), far, signed=False)
            turns = [builder.lshr(builder.mul(half, wide[0]), wide[3]) for half in emit.halves(q, False)]
            r = builder.sub(q, builder.mul(narrow[0], emit.joined(turns)))
            polynomial = builder.sub(narrow[2], builder.mul(r, builder.sub(narrow[1], r)))
            polynomial = emit.most(polynomial, emit.whole(0))
            parts = []
            for half, z in zip(emit.halves(polynomial, signed=False), turns, strict=True):
                less = emit.least(builder.add(wide[2], z), emit.wide(62))
                parts.append(emit.shifted(builder.mul(half, wide[1]), less))
            power = emit.least(emit.joined(parts), emit.whole(2 ** (EXP_OUTPUT_BITS - 1) - 1))
            power = emit.only(there, power)
            emit.put(power, scores, at, 4)
            return [builder.add(state[0], power)]

        sums = emit.rows(n, [emit.whole(0)], exponential)[0]
        total = emit.total(emit.halves(sums, signed=False))
        factor = emit.splat(builder.sdiv(ir.Constant(I64, 1 << SOFTMAX_BITS), total), HALF)
        drop, masks = emit.wide(SOFTMAX_BITS - PROB_BITS), emit.splat(mask, HALF)
        counts = builder.icmp_signed("!=", received, ir.Constant(I64, 0))

        def normal(state: list[Value], at: Value, there: Value | None) -> list[Value]:
            powers = emit.halves(emit.numbers(scores, at), signed=False)
            products = [emit.least(builder.mul(half, factor), emit.wide(2**SOFTMAX_BITS - 1)) for half in powers]
            narrow = emit.joined([builder.lshr(half, drop) for half in products])
            emit.put(builder.trunc(narrow, ITEMS), probs, at, ITEM_BYTES)
            with builder.if_then(counts):
                for lane, half in zip((0, LANES // 2), emit.in_order(products), strict=True):
                    here = builder.add(at, ir.Constant(I64, lane))
                    mass = builder.add(emit.row(received, here, HALF, 8), builder.and_(half, masks))
                    emit.put(mass, received, here, 8)
            return []

        emit.rows(n, [], normal)
        return context.get_dummy_value()

    return VOID(*[types.int64] * 12), code


@intrinsic
def add_row(typingctx, sums, multiplier, shift, residual, second, second_shift, count, most, out):
    """Both in 22 bits, added, int32; see `integer_lines.add_line`. Returns their sum. out may be sums."""

    def code(context, builder, signature, arguments):
        sums, multiplier, shift, residual, second, second_shift, count, most, out = arguments
        emit = Integers(builder)
        bound = emit.splat(builder.trunc(most, I32), INTEGERS)

        def step(state: list[Value], at: Value, there: Value | None) -> list[Value]:
            value = emit.scaled(emit.numbers(sums, at), emit.numbers(multiplier, at), emit.numbers(shift, at))
            item = emit.scaled(emit.values(residual, at), emit.numbers(second, at), emit.numbers(second_shift, at))
            value = emit.most(builder.add(value, item), builder.neg(bound))
            value = emit.only(there, emit.least(value, builder.sub(bound, emit.whole(1))))
            emit.put(value, out, at, 4)
            return [builder.add(total, half) for total, half in zip(state, emit.halves(value), strict=True)]

        return emit.total(emit.rows(count, [emit.wide(0), emit.wide(0)], step))

    return types.int64(*[types.int64] * 9), code


@intrinsic
def square_row(typingctx, values, count, mean, drop):
    """Subtract the mean from int32 values in place; returns the sum of the squares of what is left, less `drop` bits."""

    def code(context, builder, signature, arguments):
        values, count, mean, drop = arguments
        emit = Integers(builder)
        mean = emit.splat(builder.trunc(mean, I32), INTEGERS)
        drop = emit.splat(builder.trunc(drop, I32), INTEGERS)

        def step(state: list[Value], at: Value, there: Value | None) -> list[Value]:
            value = emit.only(there, builder.sub(emit.numbers(values, at), mean))
            emit.put(value, values, at, 4)
            halves = emit.halves(builder.ashr(value, drop))
            return [builder.add(total, builder.mul(half, half)) for total, half in zip(state, halves, strict=True)]

        return emit.total(emit.rows(count, [emit.wide(0), emit.wide(0)], step))

    return types.int64(*[types.int64] * 4), code


@intrinsic
def norm_row(typingctx, values, count, factor, bias, late, multiplier, shift, again, again_shift, out):
    """Items of int32 deviations times `factor` / 2, below 2^31, with biases, requantised; again: 0 for once only."""

    def code(context, builder, signature, arguments):
        values, count, factor, bias, late, multiplier, shift, again, again_shift, out = arguments
        emit = Integers(builder)
        factor = emit.splat(builder.sext(builder.trunc(factor, I32), I64), HALF)

        def step(finish: Finish, at: Value) -> None:
            halves = emit.halves(emit.numbers(values, at))
            quotient = emit.joined([builder.ashr(builder.mul(half, factor), emit.wide(1)) for half in halves])
            value = builder.add(quotient, emit.numbers(bias, at))
            value = emit.scaled(value, emit.numbers(multiplier, at), emit.numbers(shift, at))
            value = emit.clamp(builder.add(value, emit.numbers(late, at)), 128)
            emit.put_items(finish(value), out, at)

        emit.once_or_again(count, again, again_shift, step)
        return context.get_dummy_value()

    return VOID(*[types.int64] * 10), code
