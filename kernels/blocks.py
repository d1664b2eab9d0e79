"""The records that compiled kernels read, as NumPy dtypes: what a C program would call its structs.

A field is an int64 (a count, a stride in bytes, an address), a float32, or another record. Python and compiled code
read them by name.
"""

from __future__ import annotations

import numpy as np

# What the compiled entry can be asked to do (`jit/build.py`), and the activations that it knows.
(
    RUN_FORWARD,
    RUN_PRODUCT,
    RUN_QUANTIZE,
    RUN_NORM,
    RUN_ACTIVATE,
    RUN_PROBS,
    RUN_MASS,
    RUN_CONTEXT,
    RUN_KEEP,
    RUN_MERGE,
    RUN_SOFTMAX,
    RUN_INTEGER_FORWARD,
    RUN_INTEGER_SUMS,
    RUN_REQUANTIZE,
    RUN_ADD_REQUANTIZED,
    RUN_INTEGER_ACTIVATE,
    RUN_INTEGER_NORM,
    RUN_INTEGER_SOFTMAX,
    RUN_INTEGER_KEEP,
) = range(19)
NONE, GELU, GELU_TANH, RELU, TANH = range(5)
ACTIVATIONS = {"none": NONE, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU, "tanh": TANH}


def _record(integers: str = "", floats: str = "", **nested: np.dtype[np.void]) -> np.dtype[np.void]:
    fields = [*((name, np.int64) for name in integers.split()), *((name, np.float32) for name in floats.split())]
    return np.dtype([*fields, *nested.items()])


# A packed linear layer (`packing.Packed`): addresses of its arrays; depth: rows of one panel; count: panels.
MATRIX = _record("panels start scale bias inputs outputs depth count is_int8")
NORM = _record("weight bias")
LAYER = _record(
    query_key_value=MATRIX, attention_output=MATRIX, attention_norm=NORM, inner=MATRIX, outer=MATRIX, outer_norm=NORM
)
# width D; head_width: D / H padded to whole vectors; head_scale: 1 / sqrt(D / H); layer: address of L LAYER records.
# word: address of (vocabulary, E) float32 rows, or int8 ones where word_scale, an address too, is not 0.
MODEL = _record(
    "width heads head_width layers labels embedding_width activation head_activation is_int8 word word_scale position"
    " segment layer",
    floats="eps head_scale",
    embedding_norm=NORM,
    project=MATRIX,
    head_dense=MATRIX,
    head_out=MATRIX,
)

# What one layer's keep rule asks for, see `minilpt.pruning.Step`.
RULE = _record("kind denominator limit merge", floats="value")
KEEP_ALL, ABSOLUTE, RELATIVE, COUNT = range(4)
INITIAL, LIVE = 0, -1  # denominators that stand for a length; any other is the number itself; limit: never more

# Packed rows, and where the results go, or 0 for those that are not wanted: logits (B, labels) float32; rows, the last
# layer's, (N, D) float32; n_attention and n_ffn (L, B) int32; masses and kept, a trace's, (L, N) float32 and bool: each
# layer's live tokens come first in its row. Integer-only models give int32 logits, int64 masses and no rows, but in
# `last` the 8-bit ones that the head reads, (B, D) int32. entering: address of L addresses, or 0, where the rows that
# enter a layer go, (N, D) float32. begin: the first layer that is run, on rows at `begin_rows`, (N', D) float32, of
# sequences between the bounds at `begin_bounds`, (B + 1,) int64. Integer-only models know neither.
BATCH = _record(
    "sequences tokens longest ids positions segments cu_seqlens rule first_row_only logits rows last n_attention n_ffn"
    " masses kept entering begin begin_rows begin_bounds"
)

# Rows of activations: float32 at `floats` and, in an int8 model, quantised at `integers` with one factor each.
ROWS = _record("floats stride integers integer_stride factors")

# The scratch memory of one team of threads. Of what is `local_bytes` long every thread has its own: one head's packed
# keys (`jit.attention.keys_bytes`), its values, and the bookkeeping of `jit.encoder.forward`.
WORK = _record(
    "chunk zeros barrier yield_core local local_bytes probs probs_bytes received received_bytes query_key_value"
    " query_key_value_stride room room_stride",
    x=ROWS,
    first=ROWS,
    context=ROWS,
    attended=ROWS,
    hidden=ROWS,
)

# Integer-only models; `kernels.integer` says what the numbers mean. Multipliers, shifts, LayerNorm's biases, i-GELU's
# b are addresses of int32; its c and minus_one (-one) of int64, of every 16 the even ones first. An 8-bit value lies in
# memory as the rung's products read it: an item.
# usual: whether the constants are such that the kernels of `jit.integer_vector` may be taken.
DYADIC = _record("usual multiplier shift")
INTEGER_NORM = _record("usual bias late drop", output=DYADIC)
EXP = _record("usual ln2 magic magic_shift b c multiplier shift")  # numbers, ln2 > 0; magic: `integer.reciprocal`
# What becomes of sums: SUMS stay int32, all others end as items. again_multiplier: 0 for no second requantisation.
ENDING = _record("kind usual b c minus_one again_multiplier again_shift", output=DYADIC)
SUMS, TO_8_BITS, TO_8_BITS_RELU, TO_8_BITS_GELU, TO_8_BITS_TANH = range(5)
INTEGER_LAYER = _record(
    "context_multiplier context_shift again_multiplier again_shift",
    query_key_value=MATRIX,
    query_key_value_end=ENDING,
    exp=EXP,
    attention_output=MATRIX,
    attention_sum=DYADIC,
    attention_residual=DYADIC,
    attention_norm=INTEGER_NORM,
    inner=MATRIX,
    inner_end=ENDING,
    outer=MATRIX,
    outer_sum=DYADIC,
    outer_residual=DYADIC,
    outer_norm=INTEGER_NORM,
)
# Tables of int8 rows, factors by row. mass_mask: the bits of a wide probability that count as mass.
INTEGER_MODEL = _record(
    "width heads head_width layers labels mass_mask word position segment layer",
    word_factor=DYADIC,
    position_factor=DYADIC,
    segment_factor=DYADIC,
    embedding_norm=INTEGER_NORM,
    head_dense=MATRIX,
    head_dense_end=ENDING,
    head_out=MATRIX,
    logits=DYADIC,
)
# `minilpt.integer_rules.IntegerRule`: counts: address of (longest text + 1,) int32.
INTEGER_RULE = _record("kind denominator limit merge lowest counts")
# A relative threshold has 30 fractional bits: masses, of up to H n 2^32, lose `integer.MASS_DROP` bits before they are
# multiplied by it, which 63 bits hold for H n < 2^15. Nothing that a mass is compared with is more than 2^62.
RELATIVE_BITS, MOST_MASS = 30, 2**62

# Scratch memory of an integer-only batch: items in rows `..._stride` bytes apart, `room` for int32 sums.
INTEGER_WORK = _record(
    "chunk zeros barrier yield_core local local_bytes probs probs_bytes received received_bytes x first x_stride"
    " context context_stride attended query_key_value query_key_value_stride hidden hidden_stride room room_stride"
)


ROWS_OF_BLOCK = 96  # of a product: at K = 768, 74 KB of int8 or 295 KB of float32, which a second-level cache holds
QUERIES = 24  # rows of probabilities that stay in the first-level cache between softmax and context
CHUNK = 96  # rows of the sequences that go through a layer together
