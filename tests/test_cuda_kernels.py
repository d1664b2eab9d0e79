"""Every CUDA kernel against NumPy: the unmodified sources, through their own launches, on the CPU or on a card.

Float kernels are held to what the reference itself loses in float32, integer kernels to equality.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilpt import ragged, reference
from minilpt.integer_rules import integer_rule
from minilpt.kernels import cuda, integer
from minilpt.kernels.cuda import QUERIES, Geometry, integer_kernels
from minilpt.kernels.cuda.float_kernels import HEAD_WIDTHS, FloatKernels
from minilpt.kernels.cuda.integer_kernels import IntegerKernels
from minilpt.pruning import KeepRule, Relative, Step, Threshold, TopK

import devices
import tolerances

EPS = tolerances.EPS
HALF_EPS = float(np.finfo(np.float16).eps)
TYPES = ("float32", "float16")
GEOMETRIES = (Geometry(), Geometry(1, 1, 1, 2), Geometry(2, 2, 3, 1))
# Of attention: number and width of heads, and lengths. Widths are whole fours, an even and an odd number of them, and
# others, for each of the context kernels. Long texts, one to four blocks of queries, have narrow heads: they take long.
HEADS = ((1, 1), (2, 8), (3, 12), (2, 33), (1, 64), (1, 66), (1, 128))
CASES = [(*heads, lengths) for heads in HEADS for lengths in ((1,), (2, 1, 33))]
CASES += [(2, 8, (63, 64, 65)), (3, 12, (130, 7)), (1, 66, (64, 200))]
seeds = st.integers(0, 2**32 - 1)
lengths_of_batches = st.lists(st.sampled_from([1, 2, 5, 31, 32, 33, 64, 65, 100]), min_size=1, max_size=4)
geometries = st.sampled_from(GEOMETRIES)


@pytest.fixture(scope="module", params=devices.EVERY_SCHEDULE)
def cp(request: pytest.FixtureRequest) -> Any:
    return devices.cupy_of(request.param)


def host(array: Any) -> Any:
    """A device's array, or one that is here, as NumPy's."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def normal(draw: np.random.Generator, dtype: str, *shape: int, scale: float = 1) -> Any:
    return (scale * draw.standard_normal(shape)).astype(dtype)


def wide(*arrays: Any) -> Any:
    """The same values in float64."""
    return tuple(np.asarray(array, np.float64) for array in arrays)


def assert_computes(found: Any, exact: Any, narrow: Any) -> None:
    """Within 8 times what float32 loses, and 8 units in its last place of the largest; float16 is rounded to once more.

    found: the kernel's; exact, narrow: the reference's in float64 and float32.
    """
    found = host(found)
    assert found.shape == exact.shape
    bound = 8 * (np.abs(narrow - exact).max(initial=0) + EPS * np.abs(exact).max(initial=0))
    rounding = HALF_EPS / 2 * (np.abs(exact) + bound) + 2.0**-25 if found.dtype == np.float16 else 0
    error = np.abs(found.astype(np.float64) - exact)
    worst = np.unravel_index((error - rounding).argmax(), error.shape)
    assert (error <= bound + rounding).all(), f"at {worst}: {found[worst]} for {exact[worst]}, more than {bound} off"


# What sources and launches must agree on.


@pytest.mark.parametrize("path", sorted(Path(cuda.__file__).parent.glob("*.cu")), ids=lambda path: path.stem)
def test_the_constants_of_the_sources_are_those_of_the_launches(path: Path) -> None:
    found = {
        name: int(value) for name, value in re.findall(r"\b([A-Z_]+) = (\d+)[,;]", path.read_text(encoding="utf-8"))
    }
    wanted = {"WARP": cuda.WARP, "MOST_WARPS": 1024 // cuda.WARP, "QUERIES": QUERIES}
    if path.stem in ("attention", "integer_attention"):
        wanted |= {"ROWS": cuda.ROWS, "TILE": cuda.TILE}
        assert wanted.keys() - {"MOST_WARPS"} <= found.keys()
    if path.stem == "integer_products":
        wanted |= {"TILE": integer_kernels.PRODUCT_TILE, "SIDE": math.isqrt(8 * cuda.WARP)}  # a block has 8 warps
        assert {"TILE", "SIDE"} <= found.keys()
    assert {name: found[name] for name in wanted.keys() & found.keys()} == {
        name: wanted[name] for name in wanted.keys() & found.keys()
    }


def test_context_kernels_are_made_for_the_widths_that_launches_choose_from() -> None:
    text = cuda.source("attention")
    found = re.findall(r"attention_context_(f\d+)_d(\d+)\(.*?attention_context<\w+, (\d)>", text, re.DOTALL)
    assert [(kind, int(width)) for kind, width, _ in found] == [
        (kind, width) for kind in ("f32", "f16") for width in HEAD_WIDTHS
    ]
    assert all(int(width) == cuda.WARP * int(columns) for _, width, columns in found)


# Rows.


@pytest.mark.cuda_source(stem="rows")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 5, 32, 48, 132, 768])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_embed_norm(cp: Any, dtype: str, width: int, geometry: Geometry) -> None:
    draw, n = np.random.default_rng(width), 9
    tables = [normal(draw, dtype, rows, width) for rows in (20, 12, 2)]
    tokens = [draw.integers(0, len(table), n).astype(np.int32) for table in tables]
    norm, out = (normal(draw, "float32", width), normal(draw, "float32", width)), cp.empty((n, width), dtype)
    kernels = FloatKernels(cp, geometry, dtype)
    kernels.embed_norm(on(cp, *tokens), on(cp, *tables), on(cp, *norm), 1e-5, out)
    rows = [table[ids] for table, ids in zip(tables, tokens, strict=True)]
    exact, narrow = (
        reference.layer_norm(sum(table.astype(kind) for table in rows), *(part.astype(kind) for part in norm), 1e-5)
        for kind in (np.float64, np.float32)
    )
    assert_computes(out, exact, narrow)


def on(cp: Any, *arrays: Any) -> Any:
    return tuple(cp.asarray(array) for array in arrays)


@pytest.mark.cuda_source(stem="rows")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 33, 48, 1024])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_add_norm(cp: Any, dtype: str, width: int, geometry: Geometry) -> None:
    draw, n = np.random.default_rng(width), 7
    product, residual = normal(draw, dtype, n, width), normal(draw, dtype, 20, width)
    bias, weight, norm_bias = (normal(draw, "float32", width) for _ in range(3))
    places, out = draw.choice(20, n, replace=False).astype(np.int32), cp.empty((n, width), dtype)
    FloatKernels(cp, geometry, dtype).add_norm(
        *on(cp, product, bias, residual, places), on(cp, weight, norm_bias), 1e-12, out
    )
    values = product, bias, residual[places], weight, norm_bias
    exact, narrow = (
        reference.layer_norm(a + b + c, w, d, 1e-12)
        for a, b, c, w, d in (wide(*values), tuple(np.asarray(value, np.float32) for value in values))
    )
    assert_computes(out, exact, narrow)


@pytest.mark.cuda_source(stem="rows")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["none", *reference.ACTIVATIONS])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64)])
def test_bias_activation(cp: Any, dtype: str, name: str, shape: tuple[int, int]) -> None:
    draw = np.random.default_rng(shape[1])
    x, bias = normal(draw, dtype, *shape, scale=4), normal(draw, "float32", shape[1])
    found = cp.asarray(x)
    FloatKernels(cp, Geometry(most_blocks=2), dtype).bias_activation(found, cp.asarray(bias), name)
    activation = reference.ACTIVATIONS.get(name, np.positive)
    wanted = [activation(x.astype(kind) + bias.astype(kind)) for kind in (np.float64, np.float32)]
    assert_computes(found, *wanted)


@pytest.mark.cuda_source(stem="rows")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [33, 40, 200])
def test_gather_rows_and_head_out(cp: Any, dtype: str, width: int) -> None:
    draw = np.random.default_rng(0)
    x, places = normal(draw, dtype, 9, width), np.array([8, 0, 0, 3], np.int32)
    kernels, rows = FloatKernels(cp, Geometry(row_warps=3), dtype), cp.empty((4, width), dtype)
    kernels.gather_rows(cp.asarray(x), cp.asarray(places), rows)
    assert np.array_equal(host(rows), x[places])
    weight, bias, logits = normal(draw, dtype, 5, width), normal(draw, "float32", 5), cp.empty((4, 5), "float32")
    kernels.head_out(rows, cp.asarray(weight), cp.asarray(bias), logits)
    values = x[places], weight, bias
    exact = reference.linear(*wide(*values))
    assert_computes(logits, exact, reference.linear(*(np.asarray(value, np.float32) for value in values)))


# Attention.


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values of some sequences as the product gives them, and with their bias in float64."""

    qkv: Any
    bias: Any
    cu_seqlens: Any
    heads: int

    @classmethod
    def drawn(cls, seed: int, dtype: str, lengths: Sequence[int], heads: int, head_width: int) -> Attention:
        draw, D = np.random.default_rng(seed), heads * head_width
        qkv, bias = normal(draw, dtype, sum(lengths), 3 * D, scale=1.5), normal(draw, "float32", 3 * D)
        return cls(qkv, bias, ragged.boundaries(lengths), heads)

    @property
    def width(self) -> int:
        return self.qkv.shape[1] // 3

    @property
    def longest(self) -> int:
        return int(ragged.lengths(self.cu_seqlens).max())

    def partial(self, cp: Any, dtype: Any = np.float32) -> Any:
        return cp.empty((math.ceil(self.longest / QUERIES), self.heads, len(self.qkv)), dtype)

    def sequences(self, kind: Any) -> list[tuple[Any, Any]]:
        """Probabilities, (H, n, n), and values, (n, D), of each sequence in a dtype."""
        found = []
        for begin, end in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True):
            rows = self.qkv[begin:end].astype(kind) + self.bias.astype(kind)
            q, k, v = np.split(rows, 3, axis=1)
            found.append((reference.attention_probs(q, k, self.heads), v))
        return found


def summed(partial: Any, cu_seqlens: Any) -> list[Any]:
    """Of each sequence the (H, n) sums over its own blocks of queries; the rest of the array was never written."""
    array = host(partial)
    bounds = pairwise(cu_seqlens)
    return [array[: math.ceil((end - begin) / QUERIES), :, begin:end].sum(axis=0) for begin, end in bounds]


@pytest.mark.cuda_source(stem="attention")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "head_width", "lengths"), CASES, ids=str)
def test_attention_mass(cp: Any, dtype: str, heads: int, head_width: int, lengths: tuple[int, ...]) -> None:
    case = Attention.drawn(heads, dtype, lengths, heads, head_width)
    found = {}
    for geometry in GEOMETRIES[:2]:
        partial = case.partial(cp)
        FloatKernels(cp, geometry, dtype).attention_mass(
            *on(cp, case.qkv, case.bias, case.cu_seqlens), case.longest, partial
        )
        found[geometry] = summed(partial, case.cu_seqlens)
    for place, (exact, narrow) in enumerate(zip(case.sequences(np.float64), case.sequences(np.float32), strict=True)):
        mine = [sums[place] for sums in found.values()]
        assert np.array_equal(*mine), "the launch geometry changed a bit"
        assert_computes(mine[0], exact[0].sum(axis=1), narrow[0].sum(axis=1))


@pytest.mark.cuda_source(stem="attention")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "head_width", "lengths"), CASES, ids=str)
@pytest.mark.parametrize("kept", ["all", "first", "some"])
def test_attention_context(
    cp: Any, dtype: str, heads: int, head_width: int, lengths: tuple[int, ...], kept: str
) -> None:
    case = Attention.drawn(heads, dtype, lengths, heads, head_width)
    goes_on = flags(kept, case.cu_seqlens)
    places, bounds = ragged.compact(goes_on, case.cu_seqlens)
    out = cp.empty((len(places), case.width), dtype)
    qkv, bias, cu_seqlens = on(cp, case.qkv, case.bias, case.cu_seqlens)
    q = (qkv, *on(cp, places.astype(np.int32), bounds), int(ragged.lengths(bounds).max()))
    FloatKernels(cp, Geometry(attention_warps=2), dtype).attention_context(
        q, (qkv, case.width, 2 * case.width), cu_seqlens, bias, heads, out
    )
    exact, narrow = (context_of(case, goes_on, kind) for kind in (np.float64, np.float32))
    assert_computes(out, exact, narrow)


def flags(kept: str, cu_seqlens: Any) -> Any:
    """(N,) bool; the first token of a sequence always stays."""
    found = {"all": np.ones, "first": np.zeros}.get(kept, some)(cu_seqlens[-1], dtype=bool)
    found[cu_seqlens[:-1]] = True
    return found


def some(n: int, dtype: Any) -> Any:
    return np.random.default_rng(n).random(n) < 0.4


def context_of(case: Attention, goes_on: Any, kind: Any) -> Any:
    parts, begin = [], 0
    for probs, v in case.sequences(kind):
        parts.append(reference.attention_context(probs[:, goes_on[begin : begin + len(v)]], v))
        begin += len(v)
    return np.concatenate(parts)


@pytest.mark.cuda_source(stem="attention")
@pytest.mark.parametrize("dtype", TYPES)
def test_the_last_layer_s_queries_lie_apart_from_keys_and_values(cp: Any, dtype: str) -> None:
    case = Attention.drawn(1, dtype, (40, 3), 2, 16)
    D, first = case.width, case.cu_seqlens[:-1]
    q, kv = np.ascontiguousarray(case.qkv[first, :D]), np.ascontiguousarray(case.qkv[:, D:])
    out, one_each = cp.empty((2, D), dtype), np.arange(3, dtype=np.int32)
    FloatKernels(cp, Geometry(), dtype).attention_context(
        (*on(cp, q, one_each[:2], one_each), 1),
        (cp.asarray(kv), 0, D),
        *on(cp, case.cu_seqlens, case.bias),
        case.heads,
        out,
    )
    exact, narrow = (context_of(case, flags("first", case.cu_seqlens), kind) for kind in (np.float64, np.float32))
    assert_computes(out, exact, narrow)


# Rules, compaction, merging.

RULES: list[KeepRule] = [
    Threshold((0.9,), 1),
    Threshold((0.02,), "initial"),
    Threshold((0.02,), "live", denominator_limit=24),
    Threshold((-1.0,), "live"),
    Relative(0.4),
    TopK(0.3, 4),
]
LAYERS = {TopK: 3}  # of a rule that depends on it; elsewhere 0


def masses_of(draw: np.random.Generator, lengths: Sequence[int], heads: int) -> Any:
    """Partial masses, (Z, H, N), some equal, some zero; NaN where a sequence has no such block."""
    bounds, Z = ragged.boundaries(lengths), math.ceil(max(lengths) / QUERIES)
    partial = draw.choice([0, 0.25, 0.5, 1, 1.5], (Z, heads, sum(lengths))).astype(np.float32)
    partial[draw.random(partial.shape) < 0.5] *= np.float32(draw.random())
    partial[0, 0, bounds[:-1]] = 1  # some mass there always is
    for begin, n in zip(bounds, lengths, strict=False):
        partial[math.ceil(n / QUERIES) :, :, begin : begin + n] = np.nan
    return partial


@pytest.mark.cuda_source(stem="prune")
@pytest.mark.parametrize("rule", RULES, ids=str)
@given(seed=seeds, lengths=lengths_of_batches, heads=st.integers(1, 3), geometry=geometries)
@settings(max_examples=15)
def test_keep(cp: Any, rule: KeepRule, seed: int, lengths: list[int], heads: int, geometry: Geometry) -> None:
    draw, N, B, layer = np.random.default_rng(seed), sum(lengths), len(lengths), LAYERS.get(type(rule), 0)
    partial, bounds = masses_of(draw, lengths, heads), ragged.boundaries(lengths)
    initial = np.array([n + draw.integers(0, 9) for n in lengths], np.int32)
    mass, kept, counts = cp.empty((N,), "float32"), cp.empty((N,), "uint8"), cp.empty((B,), "int32")
    FloatKernels(cp, geometry, "float32").keep(rule.step(layer), *on(cp, partial, bounds, initial), mass, kept, counts)
    masses, found = host(mass), host(kept).astype(bool)
    for b, (begin, end) in enumerate(pairwise(bounds)):
        blocks = partial[: math.ceil((end - begin) / QUERIES), :, begin:end].astype(np.float64)
        exact = blocks.sum(axis=(0, 1)) / heads
        assert (np.abs(masses[begin:end] - exact) <= blocks[:, :, 0].size * EPS * exact).all()
        wanted = rule.keep(masses[begin:end], layer, int(initial[b]))
        assert np.array_equal(found[begin:end], wanted)
        assert host(counts)[b] == wanted.sum()


@pytest.mark.cuda_source(stem="prune")
def test_as_many_stay_as_are_counted_on_where_masses_are_nan(cp: Any) -> None:
    """The host starts the next products with a number that it does not read back: an overflow must not change it."""
    partial = np.ones((1, 1, 30), np.float32)
    partial[0, 0, [3, 4, 12, 13, 14, 15, 16, 17, 18, 19]] = np.nan
    mass, kept, counts = cp.empty((30,), "float32"), cp.empty((30,), "uint8"), cp.empty((2,), "int32")
    bounds, initial = np.array([0, 10, 30], np.int32), np.array([10, 20], np.int32)
    FloatKernels(cp, Geometry(), "float32").keep(
        TopK(0.5, 4).step(3), *on(cp, partial, bounds, initial), mass, kept, counts
    )
    assert host(counts).tolist() == [5, 10]
    assert host(kept)[3:5].sum() == 0


@pytest.mark.cuda_source(stem="compact")
@given(seed=seeds, lengths=lengths_of_batches, geometry=geometries, share=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=30)
def test_compact(cp: Any, seed: int, lengths: list[int], geometry: Geometry, share: float) -> None:
    draw, N, bounds = np.random.default_rng(seed), sum(lengths), ragged.boundaries(lengths)
    goes_on = (draw.random(N) < share).astype(np.uint8)
    goes_on[bounds[:-1]] = 1
    counts = np.add.reduceat(goes_on.astype(np.int32), bounds[:-1]).astype(np.int32)
    places, rank, new, totals = (cp.empty((size,), "int32") for size in (N, N, len(bounds), 2))
    FloatKernels(cp, geometry, "float32").compact(*on(cp, goes_on, counts, bounds), places, rank, new, totals)
    wanted_places, wanted_bounds = ragged.compact(goes_on.astype(bool), bounds)
    total = len(wanted_places)
    assert host(totals).tolist() == [total, counts.max()]
    assert np.array_equal(host(new), wanted_bounds)
    assert np.array_equal(host(places)[:total], wanted_places)
    assert np.array_equal(host(rank)[wanted_places], np.arange(total))


@pytest.mark.cuda_source(stem="prune")
@pytest.mark.cuda_source(stem="attention")
@pytest.mark.parametrize("dtype", TYPES)
@given(seed=seeds, lengths=lengths_of_batches, kept=st.sampled_from(["all", "first", "some"]), weightless=st.booleans())
@settings(max_examples=15)
def test_the_removed_go_on_as_one(
    cp: Any, dtype: str, seed: int, lengths: list[int], kept: str, weightless: bool
) -> None:
    """Shares, the row, its probabilities and its context, against `reference.merge_removed`."""
    case = Attention.drawn(seed, dtype, lengths, 2, 8)
    draw, N, B, D = np.random.default_rng(seed), sum(lengths), len(lengths), case.width
    stays, x = flags(kept, case.cu_seqlens), normal(draw, dtype, N, D)
    mass = np.zeros(N, np.float32) if weightless else draw.random(N).astype(np.float32)
    counts = cp.asarray(np.add.reduceat(stays.astype(np.int32), case.cu_seqlens[:-1]).astype(np.int32))
    qkv, bias, bounds, rows, kept_d, mass_d = on(
        cp, case.qkv, case.bias, case.cu_seqlens, x, stays.astype(np.uint8), mass
    )
    share, goes_on, stand_in = cp.empty((N,), "float32"), cp.empty((N,), "uint8"), cp.empty((B,), "int32")
    kernels = FloatKernels(cp, Geometry(), dtype)
    kernels.share_removed(mass_d, kept_d, bounds, share, goes_on, stand_in, counts)
    kernels.merge_rows(rows, share, stand_in, bounds)
    probs_zhn = case.partial(cp)
    kernels.weighted_probs(qkv, bias, bounds, share, case.longest, probs_zhn)
    following = host(goes_on).astype(bool)
    places, new_bounds = ragged.compact(following, case.cu_seqlens)
    assert np.array_equal(host(counts), ragged.lengths(new_bounds))
    rank = np.full(N, -1, np.int32)
    rank[places] = np.arange(len(places))
    context = cp.asarray(np.zeros((len(places), D), dtype))
    kernels.merged_context(probs_zhn, qkv, bias, bounds, stand_in, cp.asarray(rank), case.longest, context)
    for b, (begin, end) in enumerate(zip(case.cu_seqlens[:-1], case.cu_seqlens[1:], strict=True)):
        mine, place = stays[begin:end], int(host(stand_in)[b])
        assert place == (-1 if mine.all() else begin + np.argmin(mine))
        if place < 0:
            continue
        wanted = []
        for kind in (np.float64, np.float32):
            probs, v = case.sequences(kind)[b]
            merged_x, merged_probs, _ = reference.merge_removed(
                x[begin:end].astype(kind), probs, mass[begin:end].astype(kind), mine
            )
            at = place - begin
            wanted.append((merged_x[at], reference.attention_context(merged_probs[:, at : at + 1], v)[0]))
        assert following[place]
        assert_computes(host(rows)[place], *(each[0] for each in wanted))
        assert_computes(host(context)[rank[place]], *(each[1] for each in wanted))


# Integers, bit for bit.


@pytest.mark.cuda_source(stem="integer_rows")
@pytest.mark.parametrize("width", [33, 48, 528])
def test_integer_gather_rows(cp: Any, whole: IntegerKernels, width: int) -> None:
    draw, places, out = np.random.default_rng(0), np.array([8, 0, 0, 3], np.int32), cp.empty((4, width), "int8")
    x = bytes_of(draw, 9, width)
    whole.gather_rows(*on(cp, x, places), out)
    equal(out, x[places])


def bytes_of(draw: np.random.Generator, *shape: int) -> Any:
    """8-bit integers, one in ten of them an end of the range."""
    x = draw.integers(-128, 128, shape)
    ends = draw.random(shape)
    x[ends < 0.05], x[ends > 0.95] = -128, 127
    return x.astype(np.int8)


def sums_of(draw: np.random.Generator, shape: tuple[int, int], most: int = 2**31 - 1) -> Any:
    """Integers of every size and sign up to `most`."""
    size = np.exp2(draw.uniform(0, math.log2(most), shape)).astype(np.int64)
    x = size * draw.choice([-1, 0, 1], shape, p=[0.45, 0.1, 0.45])
    x[draw.random(shape) < 0.05] = -most
    return x.astype(np.int32)


def dyadics(draw: np.random.Generator, count: int, lowest: float = -34, highest: float = 8) -> integer.Dyadic:
    """One for each channel, of both signs; in one of three cases powers of two, so that halves occur."""
    bits = draw.uniform(lowest, highest, count)
    return integer.dyadic(np.exp2(np.floor(bits) if draw.random() < 1 / 3 else bits) * draw.choice([-1, 1], count))


def norms(draw: np.random.Generator, width: int) -> integer.Norm:
    weight, bias = draw.uniform(0.2, 2, width), draw.standard_normal(width)
    weight[draw.random(width) < 0.1] = 1e-3  # whose bias is added late
    return integer.norm_constants(weight, bias, np.float64(2.0 ** draw.uniform(-8, -4)), int(draw.integers(0, 3)), True)


def equal(found: Any, wanted: Any) -> None:
    found = host(found).astype(np.int64)
    different = np.argwhere(found != wanted)
    assert not len(different), (different[0], found[tuple(different[0])], wanted[tuple(different[0])])


@pytest.fixture(scope="module")
def whole(cp: Any) -> IntegerKernels:
    return IntegerKernels(cp, Geometry(row_warps=2, most_blocks=3))


@pytest.mark.cuda_source(stem="integer_products")
@given(seed=seeds, n=st.sampled_from([1, 3, 64, 65]), width=st.sampled_from([1, 4, 30, 32, 48, 68, 131]))
@settings(max_examples=25)
def test_integer_products(cp: Any, whole: IntegerKernels, seed: int, n: int, width: int) -> None:
    draw = np.random.default_rng(seed)
    M = int(draw.choice([1, 3, 64, 70]))
    x, weight, sums = bytes_of(draw, n, width), bytes_of(draw, M, width), cp.empty((n, M), "int32")
    bias = draw.integers(-(2**30), 2**30, M).astype(np.int32)
    whole.linear(*on(cp, x, weight, bias), sums)
    equal(sums, integer.linear(x, weight, bias))


@pytest.mark.cuda_source(stem="integer_rows")
@given(seed=seeds, n=st.integers(1, 5), width=st.sampled_from([1, 31, 32, 70]))
@settings(max_examples=25)
def test_integer_rows(cp: Any, whole: IntegerKernels, seed: int, n: int, width: int) -> None:
    """Requantisation, ReLU, GELU and tanh."""
    draw, again = np.random.default_rng(seed), (0, 0)
    sums, factor = sums_of(draw, (n, width)), dyadics(draw, width)
    device, out = integer_kernels.device_dyadic(cp, factor, width), cp.empty((n, width), "int8")
    whole.requantize(cp.asarray(sums), device, out)
    equal(out, integer.requantize(sums, factor, 8))
    whole.i_relu(cp.asarray(sums), device, again, out)
    equal(out, integer.i_relu(sums.astype(np.int64), factor))
    logits = cp.empty((n, width), "int32")
    whole.requantize(cp.asarray(sums), device, logits)
    equal(logits, integer.requantize(sums, factor, 32))
    whole.i_tanh(cp.asarray(sums), device, integer.tanh_constants(), out)
    equal(out, integer.i_tanh(integer.requantize(sums, factor, 32), integer.tanh_constants()))
    scale = 10.0 ** draw.uniform(-6, -2, width)
    gelu, small = integer.gelu_constants(scale, np.float64(0.05)), sums_of(draw, (n, width), 2**20)
    second = dyadics(draw, 1, -3, 3)
    twice = int(second.multiplier[0]), int(second.shift[0])
    whole.i_gelu(cp.asarray(small), integer_kernels.device_gelu(cp, gelu, width), twice, out)
    equal(out, integer.requantize(integer.i_gelu(small.astype(np.int64), gelu), second, 8))


@pytest.mark.cuda_source(stem="integer_rows")
@given(seed=seeds, n=st.integers(1, 5), width=st.sampled_from([1, 31, 32, 70, 768]))
@settings(max_examples=25)
def test_integer_norms(cp: Any, whole: IntegerKernels, seed: int, n: int, width: int) -> None:
    draw, norm = np.random.default_rng(seed), norms(np.random.default_rng(seed), width)
    sums, residual, places = sums_of(draw, (n, width)), bytes_of(draw, 9, width), draw.choice(9, n).astype(np.int32)
    sum_factor, residual_factor = dyadics(draw, width, -20, 0), dyadics(draw, width, -3, 12)
    second = dyadics(draw, 1, -3, 3)
    device = [integer_kernels.device_dyadic(cp, factor, width) for factor in (sum_factor, residual_factor)]
    constants, out = integer_kernels.device_norm(cp, norm), cp.empty((n, width), "int8")
    added = integer.add_requantized(sums, sum_factor, residual[places].astype(np.int64), residual_factor, 22)
    wanted = integer.i_layer_norm(added, norm)
    values = (cp.asarray(sums), device[0]), (cp.asarray(residual), device[1]), cp.asarray(places), constants
    whole.add_norm(*values, (0, 0), out)
    equal(out, wanted)
    whole.add_norm(*values, (int(second.multiplier[0]), int(second.shift[0])), out)
    equal(out, integer.requantize(wanted, second, 8))
    tables = [(bytes_of(draw, 7, width), dyadics(draw, 7, -4, 8)) for _ in range(3)]
    tokens = [draw.integers(0, 7, n).astype(np.int32) for _ in range(3)]
    on_device = tuple((cp.asarray(rows), integer_kernels.device_dyadic(cp, factor, 7)) for rows, factor in tables)
    whole.embed_norm(on(cp, *tokens), on_device, constants, out)
    word, position, segment = (
        integer.scaled(
            rows[ids].astype(np.int64), integer.Dyadic(factor.multiplier[ids, None], factor.shift[ids, None])
        )
        for (rows, factor), ids in zip(tables, tokens, strict=True)
    )
    equal(out, integer.i_layer_norm(integer.clamped(integer.clamped(word + segment, 16) + position, 16), norm))


@pytest.mark.cuda_source(stem="integer_attention")
@pytest.mark.cuda_source(stem="integer_prune")
@given(
    seed=seeds,
    lengths=lengths_of_batches,
    shape=st.sampled_from([(1, 1), (2, 6), (2, 8), (2, 12), (2, 16), (2, 32), (1, 33), (1, 64), (1, 80)]),
    kept=st.sampled_from(["all", "first", "some"]),
    weightless=st.booleans(),
    geometry=geometries,
)
@settings(max_examples=40)
def test_integer_attention(
    cp: Any, seed: int, lengths: list[int], shape: tuple[int, int], kept: str, weightless: bool, geometry: Geometry
) -> None:
    """Masses, contexts, and the row that stands for removed ones."""
    draw, (heads, d) = np.random.default_rng(seed), shape
    N, B, D, bounds = sum(lengths), len(lengths), heads * d, ragged.boundaries(lengths)
    qkv, x, kernels = bytes_of(draw, N, 3 * D), bytes_of(draw, N, D), IntegerKernels(cp, geometry)
    exp = integer.exp_constants(np.float64(10.0 ** draw.uniform(-5, -2)), np.float64(2.0**-14))
    factor = dyadics(draw, 1, -12, -2)
    numbers = int(factor.multiplier[0]), int(factor.shift[0])
    stays = flags(kept, bounds)
    wides, masses = [], []
    for begin, end in pairwise(bounds):
        q, k, _ = np.split(qkv[begin:end].astype(np.int64), 3, axis=1)
        scores = reference.split_heads(q, heads) @ reference.split_heads(k, heads).transpose(0, 2, 1)
        wides.append(integer.i_softmax(scores, exp))
        masses.append(integer.attention_mass(wides[-1]))
    longest, device = max(lengths), on(cp, qkv, bounds)
    partial = cp.empty((math.ceil(longest / QUERIES), heads, N), "int64")
    kernels.attention_mass(*device, exp, 0xFFFFFFFF, longest, partial)
    for found, wanted in zip(summed(partial, bounds), masses, strict=True):
        assert np.array_equal(found.sum(axis=0), wanted)
    kernels.attention_mass(*device, exp, 0xFF000000, longest, partial)
    for found, each in zip(summed(partial, bounds), wides, strict=True):
        assert np.array_equal(found.sum(axis=0), integer.attention_mass(integer.probs_of(each) << 24))

    mass = np.zeros(N, np.int64) if weightless else np.concatenate(masses)
    weights, total = cp.empty((N,), "int64"), cp.empty((B,), "int64")
    goes_on, stand_in = cp.empty((N,), "uint8"), cp.empty((B,), "int32")
    counts = cp.asarray(np.add.reduceat(stays.astype(np.int32), bounds[:-1]).astype(np.int32))
    kernels.weigh_removed(
        cp.asarray(mass), cp.asarray(stays.astype(np.uint8)), device[1], weights, total, goes_on, stand_in, counts
    )
    rows = cp.asarray(x)
    kernels.merge_rows(rows, weights, total, stand_in, device[1])
    places, new = ragged.compact(host(goes_on).astype(bool), bounds)
    rank = np.full(N, -1, np.int32)
    rank[places] = np.arange(len(places))
    context = cp.empty((len(places), D), "int8")
    queries = (device[0], *on(cp, places.astype(np.int32), new), int(ragged.lengths(new).max()))
    kernels.attention_context(queries, (device[0], D, 2 * D), device[1], heads, longest, exp, numbers, context)
    kernels.weighted_probs(*device, weights, exp, longest, partial)
    kernels.merged_context(partial, *device, total, stand_in, cp.asarray(rank), longest, numbers, context)
    contexts = []
    for b, (begin, end) in enumerate(pairwise(bounds)):
        values = reference.split_heads(qkv[begin:end, 2 * D :].astype(np.int64), heads)
        row, probs, on_ = x[begin:end].astype(np.int64), integer.probs_of(wides[b]), stays[begin:end]
        if not on_.all():
            row, probs, on_ = merged(row, probs, mass[begin:end], on_)
        equal(host(rows)[begin:end][on_], row[on_])
        contexts.append((probs[:, on_] @ values).transpose(1, 0, 2).reshape(on_.sum(), D))
    equal(context, integer.requantize(np.concatenate(contexts), factor, 8))


def merged(x: Any, probs: Any, mass: Any, keep: Any) -> Any:
    from minilpt.integer_reference import merge_removed

    return merge_removed(x, probs, mass, keep)


@pytest.mark.cuda_source(stem="integer_prune")
@pytest.mark.parametrize("rule", RULES, ids=str)
@given(seed=seeds, lengths=lengths_of_batches, heads=st.integers(1, 3), geometry=geometries)
@settings(max_examples=15)
def test_integer_keep(cp: Any, rule: KeepRule, seed: int, lengths: list[int], heads: int, geometry: Geometry) -> None:
    draw, N, B, bounds = np.random.default_rng(seed), sum(lengths), len(lengths), ragged.boundaries(lengths)
    layers = 4
    whole = integer_rule(Spread(rule), layers, heads, 120)
    partial = masses_of(draw, lengths, heads).astype(np.float64) * 2**32
    partial = np.nan_to_num(partial, nan=-(2.0**40)).astype(np.int64)  # of blocks that a sequence does not have
    initial = np.array([n + draw.integers(0, 9) for n in lengths], np.int32)
    mass, kept, counts = cp.empty((N,), "int64"), cp.empty((N,), "uint8"), cp.empty((B,), "int32")
    layer = 3
    step = whole.steps[layer]
    rule_record = Whole(*step[:3], whole.lowest[layer], cp.asarray(whole.counts[layer]))
    IntegerKernels(cp, geometry).keep(rule_record, *on(cp, partial, bounds, initial), mass, kept, counts)
    for b, (begin, end) in enumerate(pairwise(bounds)):
        exact = partial[: math.ceil((end - begin) / QUERIES), :, begin:end].sum(axis=(0, 1))
        equal(mass[begin:end], exact)
        wanted = whole.keep(exact, layer, int(initial[b]))
        assert np.array_equal(host(kept)[begin:end].astype(bool), wanted)
        assert host(counts)[b] == wanted.sum()


@dataclass(frozen=True)
class Whole:
    """What `IntegerKernels.keep` reads of a layer's rule."""

    kind: int
    denominator: int
    limit: int
    lowest: int
    counts: Any


@dataclass(frozen=True)
class Spread:
    """A rule of one layer in every layer."""

    rule: KeepRule
    merge_removed: bool = False

    def active(self, layer: int) -> bool:
        return True

    def keep(self, mass: Any, layer: int, n_initial: int) -> Any:
        return self.rule.keep(mass, LAYERS.get(type(self.rule), 0), n_initial)

    def step(self, layer: int) -> Step:
        return self.rule.step(LAYERS.get(type(self.rule), 0))
