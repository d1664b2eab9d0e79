"""Integer-only operations on one row, as loops that LLVM vectorises: `kernels.integer`, bit for bit, which says why
nothing overflows. Arguments are addresses and counts; an item is an 8-bit value as the rung's products read it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

from .. import integer
from ..blocks import SUMS, TO_8_BITS, TO_8_BITS_GELU, TO_8_BITS_RELU
from ..integer import ERF_SHIFT, EXP_BITS, EXP_LOW_BITS, GELU_LOW_BITS, PROB_BITS, SOFTMAX_BITS, TANH_BITS, TANH_LIMIT
from ..isa import LANES, chosen
from . import integer_vector
from .memory import compiled, view
from .vector import I64, Emitter

ITEM_BYTES = chosen().item_bytes
ITEM = np.uint8 if ITEM_BYTES == 1 else np.int16
ITEM_ZERO = chosen().item_zero
NORM_MOST = 2 ** (22 - 1)
EXP_MOST = 2 ** (integer.EXP_OUTPUT_BITS - 1) - 1
MOST_PROB = (1 << SOFTMAX_BITS) - 1
EXP_LOW_MASK, GELU_LOW_MASK = (1 << EXP_LOW_BITS) - 1, (1 << GELU_LOW_BITS) - 1
_TANH = integer.tanh_constants()
TANH_LN2, TANH_B, TANH_C = -int(_TANH.ln2), int(_TANH.b), int(_TANH.c)
TANH_MAGIC, TANH_MAGIC_SHIFT = integer.reciprocal(TANH_LN2)
TANH_MULTIPLIER, TANH_SHIFT = int(_TANH.output.multiplier), int(_TANH.output.shift)


@compiled
def rounded(x, shift):
    """x / 2^shift, halves to even."""
    return (x + ((1 << (shift - 1)) - 1) + ((x >> shift) & 1)) >> shift


@compiled
def rounded_more(x, rest, shift):
    """The same, where x had smaller bits: rest is 1 if any of them was set."""
    return (x + ((1 << (shift - 1)) - 1) + (((x >> shift) & 1) | rest)) >> shift


@compiled
def to_8_bits(x):
    return min(max(x, -128), 127)


@compiled
def value_line(items, count, out):
    """Items to int32."""
    x, values = view(items, count, ITEM), view(out, count, np.int32)
    for i in range(count):
        values[i] = np.int64(x[i]) - ITEM_ZERO


@compiled
def requantize_line(sums, count, factor, bits, out):
    """int32 to int32 of `bits` bits; a factor for each."""
    x, result = view(sums, count, np.int32), view(out, count, np.int32)
    multiplier, shift = view(factor.multiplier, count, np.int32), view(factor.shift, count, np.int32)
    most = np.int64(1) << (bits - 1)
    for i in range(count):
        value = rounded(np.int64(x[i]) * np.int64(multiplier[i]), np.int64(shift[i]))
        result[i] = min(max(value, -most), most - 1)


@compiled
def requantize_evenly(sums, count, multiplier, shift, out):
    """int32 to items of 8 bits, one factor for all."""
    x, items = view(sums, count, np.int32), view(out, count, ITEM)
    for i in range(count):
        items[i] = to_8_bits(rounded(np.int64(x[i]) * multiplier, shift)) + ITEM_ZERO


@compiled
def end_line(sums, count, column, ending, out):
    """What `ending`, a `blocks.ENDING`, makes of int32 sums from column `column` on: items at `out`."""
    again, again_shift = ending.again_multiplier, max(ending.again_shift, 1)
    if ending.kind == TO_8_BITS_GELU and ending.usual:
        b, c, minus_one = ending.b + 4 * column, ending.c + 8 * column, ending.minus_one + 8 * column
        multiplier, shift = ending.output.multiplier + 4 * column, ending.output.shift + 4 * column
        integer_vector.gelu_row(sums, count, b, c, minus_one, multiplier, shift, again, again_shift, out)
    elif ending.kind == TO_8_BITS_GELU:
        gelu_line(sums, count, column, ending, out)
    elif ending.kind == TO_8_BITS:
        _end_plain(sums, count, column, ending, -(1 << 31), out)
    elif ending.kind == TO_8_BITS_RELU:
        _end_plain(sums, count, column, ending, 0, out)
    elif ending.kind != SUMS:
        _end_tanh(sums, count, column, ending, out)


@compiled
def _again(value, multiplier, shift):
    """8 bits once more, unless the multiplier is 0."""
    return to_8_bits(rounded(value * multiplier, shift)) if multiplier else value


@compiled
def _end_plain(sums, count, column, ending, smallest, out):
    x, items = view(sums, count, np.int32), view(out, count, ITEM)
    multiplier = view(ending.output.multiplier + 4 * column, count, np.int32)
    shift = view(ending.output.shift + 4 * column, count, np.int32)
    again, again_shift = ending.again_multiplier, max(ending.again_shift, 1)  # read here: a loop cannot keep them
    for i in range(count):
        value = np.int64(max(x[i], smallest))
        value = to_8_bits(rounded(value * np.int64(multiplier[i]), np.int64(shift[i])))
        items[i] = _again(value, again, again_shift) + ITEM_ZERO


@compiled
def gelu_line(sums, count, column, ending, out):
    """i-GELU, 8 bits. c and minus_one: of every 16 the even ones first, as `integer_vector` reads them."""
    x, items = view(sums, count, np.int32), view(out, count, ITEM)
    multiplier = view(ending.output.multiplier + 4 * column, count, np.int32)
    shift = view(ending.output.shift + 4 * column, count, np.int32)
    b, c = view(ending.b + 4 * column, count, np.int32), view(ending.c + 8 * column, count, np.int64)
    minus_one = view(ending.minus_one + 8 * column, count, np.int64)
    again, again_shift = ending.again_multiplier, max(ending.again_shift, 1)
    for i in range(count):
        value = np.int64(x[i])
        from_end = min(abs(value), -np.int64(b[i])) + np.int64(b[i])
        place = i // LANES * LANES + i % LANES // 2 + i % 2 * (LANES // 2)
        polynomial = from_end * from_end + c[place]
        erf = (-polynomial if value < 0 else polynomial) >> ERF_SHIFT
        value = value * (minus_one[place] - erf)
        factor = np.int64(multiplier[i])
        below = (value & GELU_LOW_MASK) * factor
        total = (value >> GELU_LOW_BITS) * factor + (below >> GELU_LOW_BITS)
        rest = np.int64((below & GELU_LOW_MASK) != 0)
        value = to_8_bits(rounded_more(total, rest, np.int64(shift[i]) - GELU_LOW_BITS))
        items[i] = _again(value, again, again_shift) + ITEM_ZERO


@compiled
def _exp(q, ln2, magic, magic_shift, b, c, multiplier, shift):
    """i-exp of -q, q >= 0; ln2 > 0."""
    q = min(q, EXP_BITS * ln2)
    z = (q * magic) >> magic_shift
    r = q - ln2 * z
    polynomial = max(c - r * (b - r), 0)
    below = (polynomial & EXP_LOW_MASK) * multiplier
    total = (polynomial >> EXP_LOW_BITS) * multiplier + (below >> EXP_LOW_BITS)
    rest = np.int64((below & EXP_LOW_MASK) != 0)
    return rounded_more(total, rest, min(shift + z - EXP_LOW_BITS, 63))


@compiled
def _tanh_exp(q):
    return _exp(q, TANH_LN2, TANH_MAGIC, TANH_MAGIC_SHIFT, TANH_B, TANH_C, TANH_MULTIPLIER, TANH_SHIFT)


@compiled
def _end_tanh(sums, count, column, ending, out):
    """i-tanh, 8 bits."""
    x, items = view(sums, count, np.int32), view(out, count, ITEM)
    multiplier = view(ending.output.multiplier + 4 * column, count, np.int32)
    shift = view(ending.output.shift + 4 * column, count, np.int32)
    one = np.int64(1) << TANH_BITS
    for i in range(count):
        value = rounded(np.int64(x[i]) * np.int64(multiplier[i]), np.int64(shift[i]))
        value = min(max(value, -(1 << 31)), (1 << 31) - 1)
        e = min(_tanh_exp(abs(value)), one)
        size = (2 * TANH_LIMIT * (one - e) + one + e) // (2 * (one + e))
        items[i] = (-size if value < 0 else size) + ITEM_ZERO


@compiled
def softmax_line(scores, n, exp, probs, padded, received, mask):
    """Items of unsigned 8-bit probabilities, zeros from n to `padded`, of int32 scores, which are overwritten.

    received: 0, or the address of (n,) int64 to which the probabilities before their last shift are added, of which
    the bits of `mask` count. Unsigned items have no zero point. All have room for whole vectors.
    """
    if exp.usual:
        constants = (exp.ln2, exp.magic, exp.magic_shift, exp.b, exp.c, exp.multiplier, exp.shift)
        integer_vector.softmax_row(scores, n, *constants, probs, received, mask)
        return
    x, items = view(scores, n, np.int32), view(probs, padded, ITEM)
    peak = x[0]
    for k in range(1, n):
        peak = max(peak, x[k])
    total = np.int64(0)
    ln2, magic, magic_shift, b, c = exp.ln2, exp.magic, exp.magic_shift, exp.b, exp.c
    multiplier, shift = exp.multiplier, exp.shift
    for k in range(n):
        q = np.int64(peak) - np.int64(x[k])
        power = min(_exp(q, ln2, magic, magic_shift, b, c, multiplier, shift), EXP_MOST)
        x[k] = power
        total += power
    factor = (np.int64(1) << SOFTMAX_BITS) // total
    for k in range(n):
        items[k] = min(np.int64(x[k]) * factor, MOST_PROB) >> (SOFTMAX_BITS - PROB_BITS)
    for k in range(n, padded):
        items[k] = 0
    if received:
        mass = view(received, n, np.int64)
        for k in range(n):
            mass[k] += min(np.int64(x[k]) * factor, MOST_PROB) & mask


@compiled
def add_line(sums, factor, residual, residual_factor, count, out):
    """Both in 22 bits, added, int32: int32 sums and items. Returns their sum."""
    if factor.usual and residual_factor.usual:
        first, second = (factor.multiplier, factor.shift), (residual_factor.multiplier, residual_factor.shift)
        return integer_vector.add_row(sums, *first, residual, *second, count, NORM_MOST, out)
    x, y, result = view(sums, count, np.int32), view(residual, count, ITEM), view(out, count, np.int32)
    multiplier, shift = view(factor.multiplier, count, np.int32), view(factor.shift, count, np.int32)
    second, second_shift = (
        view(residual_factor.multiplier, count, np.int32),
        view(residual_factor.shift, count, np.int32),
    )
    total = np.int64(0)
    for i in range(count):
        value = rounded(np.int64(x[i]) * np.int64(multiplier[i]), np.int64(shift[i]))
        item = np.int64(y[i]) - ITEM_ZERO
        value += rounded(item * np.int64(second[i]), np.int64(second_shift[i]))
        value = min(max(value, -NORM_MOST), NORM_MOST - 1)
        result[i] = value
        total += value
    return total


@compiled
def sum_line(values, count):
    """Of int32."""
    x, total = view(values, count, np.int32), np.int64(0)
    for i in range(count):
        total += x[i]
    return total


@compiled
def norm_line(address, total, count, norm, again_multiplier, again_shift, out):
    """i-LayerNorm of int32 values of 22 bits, which are overwritten, and their sum: items. again_multiplier: 0 for once."""
    mean = total // count
    rest = total - mean * count
    if 2 * rest > count or (2 * rest == count and mean & 1):
        mean += 1
    square = integer_vector.square_row(address, count, mean, norm.drop)
    deviation = max(square_root(square), 1) << norm.drop
    factor = (np.int64(1) << 31) // deviation
    if norm.usual and factor < 1 << 31:
        constants = (norm.bias, norm.late, norm.output.multiplier, norm.output.shift)
        integer_vector.norm_row(address, count, factor, *constants, again_multiplier, again_shift, out)
        return
    x, items = view(address, count, np.int32), view(out, count, ITEM)
    bias, multiplier = view(norm.bias, count, np.int32), view(norm.output.multiplier, count, np.int32)
    shift, late = view(norm.output.shift, count, np.int32), view(norm.late, count, np.int32)
    for i in range(count):
        value = ((np.int64(x[i]) * factor) >> 1) + np.int64(bias[i])
        value = to_8_bits(rounded(value * np.int64(multiplier[i]), np.int64(shift[i])) + np.int64(late[i]))
        items[i] = _again(value, again_multiplier, again_shift) + ITEM_ZERO


@intrinsic
def _leading_zeros(typingctx, x):
    """Of an int64, 64 for 0."""

    def code(context, builder, signature, arguments):
        return Emitter(builder).call("llvm.ctlz.i64", I64, [arguments[0], ir.Constant(ir.IntType(1), 0)])

    return types.int64(types.int64), code


@compiled
def square_root(x):
    """Floor of the square root of 0 <= x < 2^62, by Newton's iteration from above."""
    if x == 0:
        return np.int64(0)
    square, guess = np.uint64(x), np.uint64(1) << np.uint64((65 - _leading_zeros(x)) >> 1)
    better = (guess + square // guess) >> np.uint64(1)
    while better < guess:
        guess = better
        better = (guess + square // guess) >> np.uint64(1)
    return np.int64(guess)
