"""The integer-only kernels, compiled: names, arguments and results of `integer`, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blocks, packing
from .compiled import padded, run
from .integer import GELU_LOW_BITS, Dyadic, Exp, Gelu, Int, Norm, gelu_bound, reciprocal
from .isa import LANES, chosen

Arrays = list[NDArray[Any]]  # kept while their addresses are in use
Items = NDArray[Any]  # uint8 or int16, as the rung has it
Size = Int | NDArray[np.float64] | int


def item_type() -> np.dtype[Any]:
    """What holds an 8-bit value as the rung's products read it."""
    return np.dtype(np.uint8 if chosen().item_bytes == 1 else np.int16)


def to_items(values: Int, columns: int | None = None) -> Items:
    """(N, K) values of 8 bits as items, with zeros up to `columns`, or to whole vectors."""
    N, K = values.shape
    items: Items = np.full((N, columns or chosen().items(K)), chosen().item_zero, item_type())
    items[:, :K] = values + chosen().item_zero
    return items


def from_items(items: Items) -> Int:
    return items.astype(np.int64) - chosen().item_zero


def never_half(factor: Dyadic, largest: Size) -> NDArray[np.bool_]:
    """Whether x * factor is never exactly half of a unit for |x| <= largest: x would need too many factors of two.

    Then |x| < 2^(shift - 1) too, so |x * factor| < 2^30.
    """
    twos = np.bitwise_and(factor.multiplier, -factor.multiplier).astype(np.float64)  # the largest that divide it
    return (factor.multiplier == 0) | (np.float64(largest) * twos < np.exp2(factor.shift - 1.0))


def dyadic_record(
    factor: Dyadic, count: int, arrays: Arrays, columns: int | None = None, largest: Size = 2**31
) -> tuple[int, int, int]:
    """A `blocks.DYADIC` with one factor for each of `count` channels, padded to `columns`, or to whole vectors.

    largest: of what it multiplies.
    """
    usual = bool(never_half(factor, np.int64(largest)).all())
    places = [_line(values, count, columns, np.int32, arrays) for values in factor]
    return usual, places[0], places[1]


def _line(values: Int, count: int, columns: int | None, dtype: type[np.generic], arrays: Arrays) -> int:
    """The address of `count` values, with ones behind them."""
    line: NDArray[Any] = np.ones(columns or padded(count), dtype)
    line[:count] = values
    arrays.append(line)
    return line.ctypes.data


def norm_record(norm: Norm, arrays: Arrays) -> tuple[object, ...]:
    """A `blocks.INTEGER_NORM`."""
    D = len(norm.bias)
    output = dyadic_record(norm.output, D, arrays)
    usual = output[0] and norm.shift == 0 and bool((np.abs(norm.bias) < 2**30).all())
    bias, late = (_line(values, D, None, np.int32, arrays) for values in (norm.bias, norm.late))
    return usual, bias, late, norm.shift, output


def exp_record(exp: Exp) -> tuple[int, ...]:
    """A `blocks.EXP`."""
    ln2, c = -int(exp.ln2), int(exp.c)
    magic, magic_shift = reciprocal(ln2)
    usual = c < 2**31 and bool(never_half(exp.output, np.int64(c)))
    return usual, ln2, magic, magic_shift, int(exp.b), c, int(exp.output.multiplier), int(exp.output.shift)


def ending_record(
    kind: int,
    constants: Gelu | Dyadic,
    count: int,
    arrays: Arrays,
    columns: int | None = None,
    again: Dyadic | None = None,
    largest: Size = 2**31 - 1,
) -> tuple[object, ...]:
    """A `blocks.ENDING` of `count` channels, padded to `columns`. again: 1 where it changes nothing.

    largest: of i-GELU's sums, one number or one for each channel. Only i-GELU has usual constants.
    """
    multiplier, shift = again_numbers(again)
    if isinstance(constants, Dyadic):
        return kind, False, 0, 0, 0, multiplier, max(shift, 1), dyadic_record(constants, count, arrays, columns)
    wide = [np.zeros(columns or padded(count), np.int64) for _ in range(2)]
    for line, values in zip(wide, (constants.c, -constants.one), strict=True):
        line[:count] = values
    even_first = [np.ascontiguousarray(line.reshape(-1, LANES // 2, 2).transpose(0, 2, 1)) for line in wide]
    arrays.extend(even_first)
    places = [_line(constants.b, count, columns, np.int32, arrays), *(line.ctypes.data for line in even_first)]
    bound = gelu_bound(np.broadcast_to(np.int64(largest), (count,)), constants)
    _, c, one, factor = constants
    usual = bool((np.abs(c) < 2**44).all() and (np.abs(one) < 2**30).all())
    usual = usual and (multiplier == 0 or bool(never_half(Dyadic(np.int64(multiplier), np.int64(shift)), 128)))
    usual = usual and bool(never_half(factor, bound).all())
    lines = [_line(values, count, columns, np.int32, arrays) for values in factor]
    arrays[-1][count:] = GELU_LOW_BITS + 1
    return kind, usual, *places, multiplier, max(shift, 1), (usual, *lines)


def again_numbers(again: Dyadic | None) -> tuple[int, int]:
    """Multiplier and shift of a second requantisation, zeros where it changes nothing."""
    if again is None or int(again.multiplier) == 1 << int(again.shift):
        return 0, 0
    return int(again.multiplier), int(again.shift)


def linear(x: Int, weight: NDArray[np.int8], bias: NDArray[np.int32]) -> Int:
    """x W^T + b. x: (N, K) in [-128, 127], weight: (M, K) int8, bias: (M,) int32. Returns (N, M) int64."""
    N, M, rung = len(x), len(weight), chosen()
    packed = packing.pack_integer(weight, bias, rung)
    items, wide = to_items(x), packed.start.size
    out, room = np.empty((N, wide), np.int32), packing.aligned(rung.sums_bytes)
    matrix, ending = np.array([packed.record()], blocks.MATRIX), np.zeros(1, blocks.ENDING)
    places = (items.ctypes.data, items.strides[0], N, matrix.ctypes.data, out.ctypes.data, 4 * wide)
    run(blocks.RUN_INTEGER_SUMS, *places, ending.ctypes.data, room.ctypes.data)
    return out[:, :M].astype(np.int64)


def requantize(x: Int, factor: Dyadic, bits: int) -> Int:
    """x, (N, M) within 32 bits, in another scale, clamped to `bits` of at most 32."""
    arrays: Arrays = []
    record = np.array([dyadic_record(factor, x.shape[1], arrays)], blocks.DYADIC)
    sums, out = np.ascontiguousarray(x, np.int32), np.empty(x.shape, np.int32)
    for row, result in zip(sums, out, strict=True):
        run(blocks.RUN_REQUANTIZE, row.ctypes.data, len(row), record.ctypes.data, bits, result.ctypes.data)
    return out.astype(np.int64)


def _padded_rows(x: Int) -> NDArray[np.int32]:
    """int32 rows with zeros up to whole vectors."""
    rows = np.zeros((len(x), padded(x.shape[1])), np.int32)
    rows[:, : x.shape[1]] = x
    return rows


def add_requantized(x: Int, factor: Dyadic, y: Int, y_factor: Dyadic, bits: int) -> Int:
    """x + y, (N, M), in another scale, each rounded on its own; y of 8 bits, the sum clamped to 22 `bits`."""
    assert bits == 22, "the kernel is for the input of a LayerNorm"
    arrays: Arrays = []
    count, sums, items = x.shape[1], _padded_rows(x), to_items(y)
    first = np.array([dyadic_record(factor, count, arrays, None, np.abs(x).max(initial=0))], blocks.DYADIC)
    second = np.array([dyadic_record(y_factor, count, arrays, None, 128)], blocks.DYADIC)
    out = np.empty_like(sums)
    for row, item, result in zip(sums, items, out, strict=True):
        places = (row.ctypes.data, first.ctypes.data, item.ctypes.data, second.ctypes.data, count, result.ctypes.data)
        run(blocks.RUN_ADD_REQUANTIZED, *places)
    return out[:, :count].astype(np.int64)


def _ended(x: Int, kind: int, constants: Gelu | Dyadic) -> Int:
    arrays: Arrays = []
    count, sums = x.shape[1], _padded_rows(x)
    largest = np.abs(x).max(axis=0, initial=0)
    ending = np.array([ending_record(kind, constants, count, arrays, None, None, largest)], blocks.ENDING)
    out: Items = np.empty(sums.shape, item_type())
    for row, result in zip(sums, out, strict=True):
        run(blocks.RUN_INTEGER_ACTIVATE, row.ctypes.data, len(row), ending.ctypes.data, result.ctypes.data)
    return from_items(out[:, :count])


def i_gelu(x: Int, constants: Gelu) -> Int:
    """GELU of (N, M) sums within 32 bits, in 8 bits."""
    return _ended(x, blocks.TO_8_BITS_GELU, constants)


def i_relu(x: Int, factor: Dyadic) -> Int:
    """max(x, 0) of (N, M) sums within 32 bits, in 8 bits."""
    return _ended(x, blocks.TO_8_BITS_RELU, factor)


def i_tanh(x: Int, constants: Exp) -> Int:
    """127 tanh(x / 2^12) of (N, M) sums within 31 bits. constants: `integer.tanh_constants()`; they are compiled in."""
    one = Dyadic(np.array(1 << 30), np.array(30))
    return _ended(x, blocks.TO_8_BITS_TANH, one)


def i_layer_norm(x: Int, constants: Norm) -> Int:
    """LayerNorm of (n, D) rows of 22 bits, in 8 bits."""
    arrays: Arrays = []
    record = np.array([norm_record(constants, arrays)], blocks.INTEGER_NORM)
    D, rows = x.shape[1], _padded_rows(x)
    out: Items = np.empty(rows.shape, item_type())
    for row, result in zip(rows, out, strict=True):
        run(blocks.RUN_INTEGER_NORM, row.ctypes.data, D, record.ctypes.data, result.ctypes.data)
    return from_items(out[:, :D])


def softmax(x: Int, constants: Exp, mask: int = -1) -> tuple[Int, Int]:
    """8-bit probabilities of (m, n) scores within 32 bits, and what each key receives before their last shift, (n,)."""
    n = x.shape[1]
    record, scores = np.array([exp_record(constants)], blocks.EXP), _padded_rows(x)
    probs: Items = np.empty(scores.shape, item_type())
    received = np.zeros(padded(n), np.int64)
    for row, out in zip(scores, probs, strict=True):
        places = (row.ctypes.data, n, record.ctypes.data, out.ctypes.data, len(out), received.ctypes.data, mask)
        run(blocks.RUN_INTEGER_SOFTMAX, *places)
    return probs[:, :n].astype(np.int64), received[:n]


def keep(mass: Int, rule: tuple[int, int, int, int], counts: NDArray[np.int32], n_initial: int) -> Int:
    """Places of the kept tokens under (kind, denominator, limit, lowest). mass: (n,) int64; counts: by length."""
    *numbers, lowest = rule
    record = np.array([(*numbers, False, lowest, counts.ctypes.data)], blocks.INTEGER_RULE)
    kept, count, mass = np.empty(len(mass), np.int64), np.zeros(1, np.int64), np.ascontiguousarray(mass, np.int64)
    places = (mass.ctypes.data, len(mass), record.ctypes.data, n_initial, kept.ctypes.data, count.ctypes.data)
    run(blocks.RUN_INTEGER_KEEP, *places)
    return kept[: count[0]]
