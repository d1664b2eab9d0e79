"""Integer-only arithmetic (I-BERT, arXiv 2101.01321, sections 3.3 to 3.6): integers in, integers out.

A real number is an integer times a scale that is known when a model is loaded. The scales never appear here: they are
folded into the integer constants of `Exp`, `Gelu`, `Norm` and `Dyadic` by the functions that make those records, in the
dtype of the scale that they are given: float32 gives the constants of the I-BERT code bit for bit. Integers of any
width come as int64, or narrower arrays; legend: n live tokens, H heads, D width, K inputs, M outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Scale = Any  # np.float32 or np.float64, one or an array

# exp(p) = 0.35815147 p^2 + 0.96963238 p + 1 on (-ln 2, 0], at most 1.9e-3 off (section 3.5; the I-BERT code's digits).
EXP_POLYNOMIAL = (0.35815147, 0.96963238, 1.0)
MINUS_LN_2 = -0.6931
EXP_BITS = 30  # powers of two below 2^-30 are taken as 2^-30
# erf(x) = sign(x) (a (min(|x|, -b) + b)^2 + 1) (section 3.4; the I-BERT code's digits)
ERF_A, ERF_B = -0.2888, -1.769
SQRT_2 = 1.4142  # as the I-BERT code has it
ERF_SHIFT = 14  # bits that i-erf drops
SOFTMAX_BITS, PROB_BITS = 32, 8  # a row of probabilities sums to 2^32 before the last shift, to 2^8 after it
EXP_OUTPUT_BITS, ACTIVATION_BITS = 16, 8
MASS_DROP = 14  # bits that masses lose before they are multiplied
EXP_LOW_BITS, GELU_LOW_BITS = 16, 32  # split off before a product that needs more than 63 bits, see `scaled_wide`
NORM_BITS = 30  # x / (std sqrt D) of LayerNorm is an integer over 2^30
TANH_INPUT_BITS, TANH_BITS = 12, 30  # fractional bits of i-tanh's input, and of the exponential inside
TANH_LIMIT = 127  # i-tanh gives this for 1
MANTISSA_BITS = 31  # of a dyadic multiplier
MOST_SHIFT = 62


class Dyadic(NamedTuple):
    """multiplier / 2^shift, |multiplier| < 2^31: both int64, one number or one for each channel.

    1 <= shift <= 62, or as much more on both sides as `dyadic` is told.
    """

    multiplier: Int
    shift: Int


class Exp(NamedTuple):
    """i-exp of q times a scale: (q + b) q + c on (ln2, 0], both negative or 0; see `exp_constants`. All int64.

    output: what turns (q + b) q + c times 2^30 into the answer's scale.
    """

    ln2: Int
    b: Int
    c: Int
    output: Dyadic


class Gelu(NamedTuple):
    """i-GELU of x times a scale, int64, one number or one for each channel. output: of x times the integer 1 + erf."""

    b: Int
    c: Int
    one: Int
    output: Dyadic


class Norm(NamedTuple):
    """i-LayerNorm: bias in units of sqrt(D) / 2^30 times the weight, (D,) int64; output: with the weight, by channel.

    shift: bits that deviations drop before they are squared. late: (D,), added to the answer; 0 in I-BERT.
    """

    bias: Int
    shift: int
    output: Dyadic
    late: Int


def dyadic(ratio: Scale, low_bits: int = 0) -> Dyadic:
    """The nearest number with a mantissa of 31 bits, halves away from zero, to each ratio (float64).

    It multiplies integers below 2^(31 + low_bits), see `scaled_wide`; a ratio too small to make one of any of them
    becomes 0. ValueError where a ratio is not finite, or is 2^(30 - low_bits) or more: no shift would be left.
    """
    if not np.isfinite(ratio).all():
        raise ValueError(f"a ratio of scales must be finite, found {ratio}")
    mantissa, exponent = np.frexp(np.asarray(ratio, np.float64))
    whole = (np.copysign(np.floor(np.abs(mantissa) * 2.0**MANTISSA_BITS + 0.5), mantissa)).astype(np.int64)
    full = np.abs(whole) == 2**MANTISSA_BITS
    whole, exponent = np.where(full, whole // 2, whole), np.where(full, exponent + 1, exponent).astype(np.int64)
    shift = MANTISSA_BITS - exponent
    if (shift <= low_bits).any():
        raise ValueError(f"a ratio of scales must be below 2^{30 - low_bits}, found {np.max(np.abs(ratio))}")
    tiny = shift > MOST_SHIFT + low_bits
    return Dyadic(np.where(tiny, 0, whole), np.where(tiny, MOST_SHIFT + low_bits, shift))


def scaled(x: Int, factor: Dyadic) -> Int:
    """Round(x * factor), halves to even, int64. |x| <= 2^31: products are below 2^62, half of 2^shift at most 2^61."""
    product = x * factor.multiplier
    return rounded_shift(product, factor.shift)


def rounded_shift(x: Int, shift: Int, rest: Any = 0) -> Int:
    """x / 2^shift, halves to even; |x| < 2^62 and 1 <= shift <= 63, or |x| < 3 * 2^61 and shift <= 62.

    rest: 1 where x had more, smaller bits.
    """
    odd = (x >> shift) & 1
    return (x + ((np.int64(1) << (shift - 1)) - 1) + (odd | rest)) >> shift


def scaled_wide(x: Int, factor: Dyadic, low_bits: int) -> Int:
    """Round(x * factor), halves to even, where the product needs more than 63 bits: |x| < 2^(31 + low_bits).

    The shift must be more than low_bits <= 32. x = high 2^low_bits + low: |high| < 2^31 and 0 <= low < 2^low_bits, so
    both products, and their sum in units of 2^low_bits, stay below 2^63.
    """
    mask = (1 << low_bits) - 1
    below = (x & mask) * factor.multiplier
    total, rest = (x >> low_bits) * factor.multiplier + (below >> low_bits), below & mask
    return rounded_shift(total, factor.shift - low_bits, rest != 0)


def clamped(x: Int, bits: int) -> Int:
    """Into [-2^(bits-1), 2^(bits-1) - 1]."""
    most = 2 ** (bits - 1)
    return np.clip(x, -most, most - 1)


def requantize(x: Int, factor: Dyadic, bits: int) -> Int:
    """x in another scale (section 3.1), as `scaled`, clamped to `bits`."""
    return clamped(scaled(x, factor), bits)


def add_requantized(x: Int, factor: Dyadic, y: Int, y_factor: Dyadic, bits: int) -> Int:
    """x + y in another scale, each rounded on its own as the I-BERT code does, the sum clamped to `bits`."""
    return clamped(scaled(x, factor) + scaled(y, y_factor), bits)


def linear(x: Int, weight: NDArray[np.int8], bias: NDArray[np.int32]) -> Int:
    """x W^T + b. x: (N, K) in [-128, 127], weight: (M, K) int8, bias: (M,) int32. Returns (N, M) int64.

    Exact in int32 where `128 * sum|W_m| + |b_m|` is below 2^31, which `minilpt.integer_model` checks for every m.
    """
    return x.astype(np.int32) @ weight.T.astype(np.int32) + bias.astype(np.int64)


def exp_constants(scale: Scale, output_scale: Scale) -> Exp:
    """For q in units of `scale`, answers in units of `output_scale`.

    ValueError where the scale is not between 1.5e-7 and 0.69: c, about 2.79 / scale^2, must lie below 2^47, and ln 2
    must be an integer.
    """
    a, b, c = EXP_POLYNOMIAL
    inverse, square = 1 / scale, scale * scale  # the I-BERT code divides so
    if not (np.all(square * 2.0**47 > 2.8) and np.all(scale < -MINUS_LN_2)):
        raise ValueError(f"i-exp needs a scale between 1.5e-7 and 0.69, found {np.min(scale)} to {np.max(scale)}")
    ratio = np.float64(exp_unit(scale)) / np.float64(output_scale)
    output = dyadic(ratio * 2.0**EXP_BITS, EXP_LOW_BITS)
    return Exp(_floor(inverse * MINUS_LN_2), _floor(inverse * (b / a)), _floor((1 / square) * (c / a)), output)


def exp_unit(scale: Scale) -> Scale:
    """What one unit of ((q + b) q + c) * 2^30 stands for."""
    return EXP_POLYNOMIAL[0] * (scale * scale) / 2**EXP_BITS


def _floor(x: Scale) -> Int:
    return np.floor(x).astype(np.int64)


def reciprocal(ln2: int) -> tuple[int, int]:
    """(m, s) with q * m >> s == q // ln2 for 0 <= q <= 30 ln2, for kernels without division; ln2 > 0.

    m is 2^s / ln2, rounded up by less than 1: the product is too large by less than q / 2^s, which must not exceed
    1 / ln2. m has 6 bits more than ln2.
    """
    shift = (EXP_BITS * ln2 * ln2).bit_length()
    return -(-(1 << shift) // ln2), shift


def i_exp(q: Int, constants: Exp) -> Int:
    """exp of q <= 0, rounded to the output's scale (Algorithm 2 and the QuantAct behind it). Returns int64 >= 0.

    With z = q // ln2, at most 30, and r the rest, exp = ((r + b) r + c) / 2^z. |r| < |ln2| < 2^23, so the polynomial
    lies between 0 and c < 2^47. Its 2^(30 - z) and the output's shift are one shift; from 63 on nothing is left.
    """
    q = np.maximum(q, EXP_BITS * constants.ln2)
    z = q // constants.ln2
    r = q - constants.ln2 * z
    polynomial = np.maximum((r + constants.b) * r + constants.c, 0)
    shift = np.minimum(constants.output.shift + z, 63 + EXP_LOW_BITS)
    return scaled_wide(polynomial, constants.output._replace(shift=shift), EXP_LOW_BITS)


def i_softmax(x: Int, constants: Exp) -> Int:
    """Rows of probabilities that sum to 2^32 at most (section 3.5), before `probs_of` shifts them. (..., n) int64.

    A certain key gets 2^32 - 1 where the I-BERT code can give it 2^32, whose 8-bit probability would have 9 bits.
    x: (..., n) int32. Differences from the maximum have 33 bits; exponentials at most 15 bits, their sums 15 + log2(n);
    exponential times 2^32 // sum is 2^32 at most.
    """
    exp = clamped(i_exp(x - x.max(axis=-1, keepdims=True).astype(np.int64), constants), EXP_OUTPUT_BITS)
    total = exp.sum(axis=-1, keepdims=True)
    return np.minimum(exp * ((1 << SOFTMAX_BITS) // total), (1 << SOFTMAX_BITS) - 1)


def probs_of(wide: Int) -> Int:
    """The 8-bit probabilities, [0, 255], of `i_softmax`'s."""
    return wide >> (SOFTMAX_BITS - PROB_BITS)


def attention_mass(wide: Int) -> Int:
    """What each key receives: summed over heads and queries. wide: (H, m, n), `i_softmax`'s. Returns (n,) int64.

    Rows sum to 2^32 at most: 2^62 holds 2^30 of them.
    """
    return wide.sum(axis=(0, 1))


def merge_weights(mass: Int, keep: NDArray[np.bool_]) -> Int:
    """What each removed token counts in the one that stands for them, 0 for the kept: its mass less its low bits. (n,).

    mass, keep: (n,). Where nothing is left of the masses, all removed tokens count 1.
    """
    weight = np.where(keep, 0, mass >> MASS_DROP)
    return weight if weight.any() else (~keep).astype(np.int64)


def merged_row(rows: Int, weight: Int) -> Int:
    """The weighted mean of rows, halves up. rows: (..., n, K) of 9 bits, weight: (n,). Returns (..., K) int64.

    Masses sum to H n 2^32 and weights to H n 2^18 at most; 2^63 holds twice that times 2^8 for H n below 2^36.
    """
    total = weight.sum()
    return (2 * (weight @ rows) + total) // (2 * total)


def gelu_constants(scale: Scale, output_scale: Scale) -> Gelu:
    """For x in units of `scale`, one number or (M,), answers in units of `output_scale`.

    ValueError where the scale is below 1.2e-9: b, about -2.5 / scale, must lie above -2^31.
    """
    if np.any(np.float64(scale) * 2.0**31 < 2.51):
        raise ValueError(f"i-GELU needs a scale of at least 1.2e-9, found {np.min(scale)}")
    unit = scale / SQRT_2
    b, c = _floor((1 / unit) * ERF_B), _floor((1 / (unit * unit)) * (1 / ERF_A))
    erf_scale = unit * unit * ERF_A * 2**ERF_SHIFT
    one = np.floor_divide(1.0, erf_scale).astype(np.int64)
    gelu_scale = scale * erf_scale / 2
    # The scale is negative, as erf's `a`: both factors change their sign.
    return Gelu(b, c, one, dyadic(-np.float64(gelu_scale) / np.float64(output_scale), GELU_LOW_BITS))


def i_gelu(x: Int, constants: Gelu) -> Int:
    """GELU (Algorithm 1 and the QuantAct behind it) in the output's scale and 8 bits. Returns int64.

    x: (..., M), |x| < 2^31. `minilpt.integer_model` checks that x (1 + erf) stays below 2^62 for the x that its channel
    can have; |b| is about 2.5 / scale, c about -6.9 / scale^2.
    """
    size = np.minimum(np.abs(x), -constants.b)
    erf = (np.sign(x) * ((size + constants.b) ** 2 + constants.c)) >> ERF_SHIFT
    return clamped(scaled_wide(x * -(erf + constants.one), constants.output, GELU_LOW_BITS), ACTIVATION_BITS)


def gelu_bound(largest: Int, constants: Gelu) -> NDArray[np.float64]:
    """What |x (1 + erf)| of `i_gelu` cannot exceed where |x| <= largest, in float64, and a little more."""
    b, c, one = (np.abs(values).astype(np.float64) for values in constants[:3])
    return np.float64(largest) * ((b * b + c) / 2**ERF_SHIFT + one + 2) * (1 + 1e-12)


def norm_constants(weight: Scale, bias: Scale, output_scale: Scale, shift: int = 0, allow_late: bool = False) -> Norm:
    """For a LayerNorm's weight and bias, (D,), answers in units of `output_scale`, one number or (D,).

    I-BERT adds the bias, divided by the weight, before it changes the scale. An integer of 30 bits can hold that up to
    a bias of sqrt(D) times its weight; where it cannot the bias is added late, rounded to the output's scale, if that
    is allowed. ValueError if not, as for a weight of 0, or for numbers that are not finite.
    """
    unit = np.sqrt(weight.dtype.type(len(weight))) / 2**NORM_BITS
    whole = np.floor(np.divide(bias, weight, out=np.full_like(bias, np.inf), where=weight != 0) / unit)
    wide = ~(np.abs(whole) <= 2.0**NORM_BITS)  # NaN too
    late = np.where(wide, np.rint(np.float64(bias) / np.float64(output_scale)), 0)
    wrong = ~np.isfinite(weight) | ~(np.abs(late) < 2.0**NORM_BITS) | (wide if not allow_late else False)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"channel {at}: bias {bias[at]} must not be more than sqrt(D) times weight {weight[at]}, by which I-BERT "
            f"divides it: an integer of {NORM_BITS} bits is to hold the ratio"
        )
    early = np.where(wide, 0, whole).astype(np.int64)
    output = dyadic(np.float64(unit * weight) / np.float64(output_scale))
    return Norm(early, shift, output, late.astype(np.int64))


def i_layer_norm(x: Int, constants: Norm) -> Int:
    """LayerNorm of rows (section 3.6 and the QuantAct behind it) in the output's scale and 8 bits. Returns int64.

    x: (n, D) of at most 22 bits, D <= 2^16: deviations have 23 bits, the sum of their squares 62. A deviation is at
    most the standard deviation times sqrt(D), so the quotient is below 2^31 and, with the bias, below 2^32; times a
    multiplier of 31 bits it stays below 2^63. eps has no part in it. A row of equal values gives the bias.
    """
    D = x.shape[-1]
    mean = _divided(x.sum(axis=-1, keepdims=True), D)
    y = x - mean
    square = ((y >> constants.shift) ** 2).sum(axis=-1, keepdims=True)
    deviation = np.maximum(i_sqrt(square), 1) << constants.shift
    quotient = y * ((1 << 31) // deviation) >> 1
    return clamped(scaled(quotient + constants.bias, constants.output) + constants.late, ACTIVATION_BITS)


def _divided(x: Int, count: int) -> Int:
    """x / count, halves to even."""
    whole, rest = x // count, x % count
    return whole + ((2 * rest > count) | ((2 * rest == count) & (whole % 2 == 1)))


def i_sqrt(x: Int) -> Int:
    """Floor of the square root of 0 <= x < 2^62, by Newton's iteration from above (Algorithm 4). int64."""
    return np.array([_sqrt(int(value)) for value in np.ravel(x)], np.int64).reshape(np.shape(x))


def _sqrt(x: int) -> int:
    guess = 1 << (x.bit_length() + 1) // 2  # at least the root
    while x:
        better = (guess + x // guess) // 2
        if better >= guess:
            return guess
        guess = better
    return 0


def tanh_constants() -> Exp:
    """i-exp of -2 |x| for x in units of 2^-12, in units of 2^-30."""
    return exp_constants(np.float64(2.0 ** (1 - TANH_INPUT_BITS)), np.float64(2.0**-TANH_BITS))


def i_tanh(x: Int, constants: Exp) -> Int:
    """127 tanh(x / 2^12) = 127 (1 - e) / (1 + e) with e = i-exp(-2 |x|), to the nearest. [-127, 127] int64.

    |x| <= 2^31; 127 (1 - e) and the like have at most 39 bits. Not in I-BERT, whose head is float; at most
    1.5e-3 + 0.5 / 127 off (tests/test_integer.py).
    """
    one = 1 << TANH_BITS
    e = np.minimum(i_exp(-np.abs(x), constants), one)
    return np.sign(x) * ((2 * TANH_LIMIT * (one - e) + one + e) // (2 * (one + e)))


def i_relu(x: Int, factor: Dyadic) -> Int:
    """max(x, 0) in another scale and 8 bits."""
    return requantize(np.maximum(x, 0), factor, ACTIVATION_BITS)
