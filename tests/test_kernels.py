"""Every kernel against the reference operation of the same name, one by one.

The compiled ones run on the rung that MINILPT_ISA names or the machine's highest; test_rungs.py runs this file on all.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minilpt import kernels, pruning, reference
from minilpt.kernels import compiled
from minilpt.quantize import quantize_rows

Float32 = NDArray[np.float32]
EPS = np.finfo(np.float32).eps
ROWS = (1, 2, 3, 8, 31, 33, 97)  # the tallest register tile has 6 rows, a block 96
WIDTHS = (4, 31, 32, 48, 257, 1024)  # a vector has 16 columns, a panel 16 or 64, a block of the depth 384
KERNELS = {"numpy": kernels.NUMPY}
if importlib.util.find_spec("numba"):
    KERNELS["compiled"] = kernels.COMPILED
NAMES = [(registry, name) for registry, table in KERNELS.items() for name in table]
ACTIVATIONS = [(registry, name) for registry, name in NAMES if name in reference.ACTIVATIONS]
needs_numba = pytest.mark.skipif("compiled" not in KERNELS, reason="compiled kernels need numba")


def normal(seed: int, *shape: int) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(n: int, width: int) -> Float32:
    """Rows that int8 holds exactly: integers up to 127, which occurs, times a power of two."""
    x = np.random.default_rng(n).integers(-127, 128, (n, width))
    x[:, 0] = 127
    return np.ldexp(x, -5).astype(np.float32)


def arguments(name: str, n: int, width: int) -> tuple[Any, ...]:
    """Inputs for one kernel, by its name: float32 but for int8 weights."""
    x = normal(n * width, n, width)
    heads = 4 if width % 4 == 0 else 1
    probs = reference.softmax(normal(1, heads, n, n + 2))
    return {
        "linear": (x, normal(2, 70, width), normal(3, 70)),
        "linear_int8": (integers(n, width), *quantize_rows(normal(2, 70, width)), normal(3, 70)),
        "layer_norm": (3 * x + 5, normal(4, width), normal(5, width), 1e-5),
        "attention_probs": (x, normal(6, n + 2, width), heads),
        "attention_mass": (probs,),
        "attention_context": (probs, normal(7, n + 2, width)),
        "merged_row": (x, np.maximum(normal(8, n) - (np.arange(n) < n // 3), 0) + (np.arange(n) == n - 1)),
    }.get(name, (4 * x,))


def widened(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """float32 arrays in float64."""
    narrow = [isinstance(value, np.ndarray) and value.dtype == np.float32 for value in values]
    return tuple(value.astype(np.float64) if is_ else value for value, is_ in zip(values, narrow, strict=True))


@pytest.mark.parametrize(("registry", "name"), NAMES)
def test_a_kernel_has_the_signature_of_its_reference(registry: str, name: str) -> None:
    def shape(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(KERNELS[registry][name]) == shape(getattr(reference, name))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("registry", "name"), NAMES)
def test_a_kernel_computes_its_reference(registry: str, name: str, n: int, width: int) -> None:
    """Within 8 times what the reference itself loses in float32, and 8 units in the last place of the largest value."""
    given_ = arguments(name, n, width)
    before = [np.copy(value) for value in given_]
    exact = getattr(reference, name)(*widened(given_))
    cost = np.abs(getattr(reference, name)(*given_) - exact).max()
    found = KERNELS[registry][name](*given_)
    assert found.dtype == np.float32
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() <= 8 * (cost + EPS * np.abs(exact).max())
    for value, kept in zip(given_, before, strict=True):
        assert np.array_equal(value, kept), "a kernel changed its input"


@pytest.mark.parametrize("registry", KERNELS)
@pytest.mark.parametrize("name", ["linear", "layer_norm", "gelu", "gelu_tanh", "relu", "tanh"])
def test_no_rows_give_no_rows(registry: str, name: str) -> None:
    given_ = arguments(name, 2, 32)
    assert len(KERNELS[registry][name](given_[0][:0], *given_[1:])) == 0


def every_magnitude() -> Float32:
    """A quarter of a million float32 values, spread evenly over all finite bit patterns."""
    bits = np.arange(0, 2**32, 16411, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("registry", KERNELS)
def test_gelu_keeps_its_stated_error_on_every_magnitude(registry: str) -> None:
    x = np.concatenate([every_magnitude(), np.linspace(-8, 8, 100_001, dtype=np.float32)])
    exact = np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()])
    error = np.abs(KERNELS[registry]["gelu"](x) - exact)
    assert (error <= 3e-7 * np.maximum(1, np.abs(exact))).all(), x[error.argmax()]


@pytest.mark.parametrize("registry", KERNELS)
def test_tanh_keeps_its_stated_error_on_every_magnitude(registry: str) -> None:
    x = np.concatenate([every_magnitude(), np.linspace(-10, 10, 100_001, dtype=np.float32)])
    error = np.abs(KERNELS[registry]["tanh"](x) - np.tanh(x.astype(np.float64)))
    assert error.max() <= 2e-7, x[error.argmax()]


@pytest.mark.parametrize(("registry", "name"), [pair for pair in ACTIVATIONS if pair[1] != "tanh"])
def test_activations_reach_their_limits(registry: str, name: str) -> None:
    largest = np.finfo(np.float32).max
    with np.errstate(over="ignore", invalid="ignore"):  # gelu_tanh cubes its input, as its definition does
        found = KERNELS[registry][name](np.array([-np.inf, -largest, -0.0, 0.0, largest, np.inf, np.nan], np.float32))
    finite = found[1:5]
    assert np.array_equal(finite, np.array([0, 0, 0, largest], np.float32))
    assert found[5] == np.inf
    assert np.isnan(found[6])


@pytest.mark.parametrize("registry", KERNELS)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 9),
    n=st.integers(1, 140),
    heads=st.sampled_from([1, 2, 4]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4, 1e8, 1e15]),
)
def test_attention_rows_sum_to_one_and_masses_to_the_number_of_queries(
    registry: str, seed: int, m: int, n: int, heads: int, spread: float
) -> None:
    q, k = spread * normal(seed, m, 8), spread * normal(seed + 1, n, 8)
    probs = KERNELS[registry]["attention_probs"](q, k, heads)
    assert np.abs(probs.sum(axis=-1) - 1).max() <= 4 * n * EPS
    assert abs(KERNELS[registry]["attention_mass"](probs).sum() - m) <= 4 * m * n * EPS


@needs_numba
def test_exp2_keeps_its_stated_error() -> None:
    """Through a softmax whose largest score is 0: probabilities are powers over their sum."""
    scores = np.concatenate([np.linspace(-80, 0, 20_001, dtype=np.float32), np.float32([-88.5, -1000, -3e38])])
    found = compiled.attention_probs(np.ones((1, 1), np.float32), scores[:, None], 1)[0, 0].astype(np.float64)
    powers, wanted = found[:20_001] / found[20_000], np.exp(scores[:20_001].astype(np.float64))
    # 1e-7 of the power; its argument is a product with a rounded constant, 2^-24 relative each; two quotients.
    assert (np.abs(powers / wanted - 1) <= 1e-7 + np.abs(scores[:20_001]) * 2.0**-23 + 3 * EPS).all()
    assert (found[20_001:] == 0).all()


@pytest.mark.parametrize("registry", KERNELS)
def test_layer_norm_of_a_constant_row_is_the_bias(registry: str) -> None:
    x, bias = np.full((2, 16), 3.0, np.float32), normal(1, 16)
    assert np.array_equal(KERNELS[registry]["layer_norm"](x, normal(2, 16), bias, 1e-12), np.stack([bias, bias]))


@needs_numba
@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 49, 96, 97])),
    K=st.one_of(st.integers(1, 70), st.integers(380, 400)),
    M=st.integers(1, 140),
    int8=st.booleans(),
)
def test_a_row_of_a_product_has_the_same_bits_alone_and_in_a_batch(
    seed: int, N: int, K: int, M: int, int8: bool
) -> None:
    x, weight, bias = normal(seed, N, K), normal(seed + 1, M, K), normal(seed + 2, M)
    product, layer = (compiled.linear_int8, quantize_rows(weight)) if int8 else (compiled.linear, (weight,))
    together = product(x, *layer, bias)
    for row in range(N):
        assert np.array_equal(product(x[row : row + 1], *layer, bias)[0], together[row]), row


@needs_numba
@given(seed=st.integers(0, 2**32 - 1), N=st.integers(1, 40), K=st.integers(1, 300), M=st.integers(1, 70))
def test_an_int8_product_is_exact_in_its_integers(seed: int, N: int, K: int, M: int) -> None:
    """The same integers on every rung; only the last step, to float32 with bias, rounds: product, factor, sum."""
    x, bias = normal(seed, N, K), normal(seed + 2, M)
    weight, scale = quantize_rows(normal(seed + 1, M, K))
    largest = np.abs(x).max(axis=1, keepdims=True)
    quantized = np.rint(x * (np.float32(127) / largest)).astype(np.int64)
    product = quantized @ weight.T.astype(np.int64) * (largest.astype(np.float64) / 127 * scale)
    found = compiled.linear_int8(x, weight, scale, bias)
    assert (np.abs(found - (product + bias)) <= 4 * EPS * (np.abs(product) + np.abs(bias))).all()


@needs_numba
def test_rows_of_zeros_and_of_tiny_and_huge_values_survive_int8() -> None:
    x = np.zeros((4, 32), np.float32)
    x[1], x[2], x[3] = 1e30, 1e-42, -3e38
    weight, scale = quantize_rows(np.ones((4, 32), np.float32))
    found = compiled.linear_int8(x, weight, scale * np.float32(2**-10), np.ones(4, np.float32))
    assert np.allclose(found, [[1.0] * 4, [3.2e31 / 1024] * 4, [1.0] * 4, [-96e38 / 1024] * 4], rtol=1e-6)


@needs_numba
def test_int8_products_that_could_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="overflow an int32 sum"):
        compiled.linear_int8(normal(1, 1, 70_000), np.zeros((1, 70_000), np.int8), normal(2, 1), normal(3, 1))


denominators = st.one_of(st.just("initial"), st.just("live"), st.integers(1, 500))
rules = st.one_of(
    st.builds(
        lambda value, z, limit: pruning.Threshold((value,), z, limit),
        st.floats(-0.1, 0.1),
        denominators,
        st.integers(1, 120),
    ),
    st.builds(pruning.Relative, st.floats(0, 1)),
    st.builds(lambda value: pruning.TopK(value, 4), st.floats(0, 1)),
)


@needs_numba
@given(rule=rules, seed=st.integers(0, 2**32 - 1), n=st.integers(1, 60), more=st.integers(0, 40), ties=st.booleans())
def test_the_compiled_keep_rules_are_those_of_pruning(
    rule: pruning.KeepRule, seed: int, n: int, more: int, ties: bool
) -> None:
    draw = np.random.default_rng(seed)
    mass = (draw.integers(0, 4, n) / 4 if ties else draw.exponential(size=n)).astype(np.float32) + np.float32(1e-3)
    layer = 3 if isinstance(rule, pruning.TopK) else 0
    assert (
        compiled.keep(mass, rule.step(layer), n + more).tolist()
        == np.flatnonzero(rule.keep(mass, layer, n + more)).tolist()
    )
