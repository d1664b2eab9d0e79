"""Every kernel against the reference operation of the same name, one by one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minilpt import kernels, reference

EPS = np.finfo(np.float32).eps
ROWS = (1, 2, 3, 8, 31, 33)
WIDTHS = (4, 31, 32, 48, 257)


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def arguments(name: str, n: int, width: int) -> tuple[Any, ...]:
    """Inputs for one kernel, float32, by its name."""
    x = normal(n * width, n, width)
    heads = 4 if width % 4 == 0 else 1
    probs = reference.softmax(normal(1, heads, n, n + 2))
    return {
        "linear": (x, normal(2, 7, width), normal(3, 7)),
        "layer_norm": (3 * x + 5, normal(4, width), normal(5, width), 1e-5),
        "attention_probs": (x, normal(6, n + 2, width), heads),
        "attention_mass": (probs,),
        "attention_context": (probs, normal(7, n + 2, width)),
    }.get(name, (4 * x,))


def widened(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.astype(np.float64) if isinstance(value, np.ndarray) else value for value in values)


@pytest.mark.parametrize("name", kernels.NUMPY)
def test_a_kernel_has_the_signature_of_its_reference(name: str) -> None:
    def shape(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(kernels.NUMPY[name]) == shape(getattr(reference, name))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("name", kernels.NUMPY)
def test_a_kernel_computes_its_reference(name: str, n: int, width: int) -> None:
    """Within 8 times what the reference itself loses in float32, and 8 units in the last place of the largest value."""
    given_ = arguments(name, n, width)
    before = [np.copy(value) for value in given_]
    exact = getattr(reference, name)(*widened(given_))
    cost = np.abs(getattr(reference, name)(*given_) - exact).max()
    found = kernels.NUMPY[name](*given_)
    assert found.dtype == np.float32
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() <= 8 * (cost + EPS * np.abs(exact).max())
    for value, kept in zip(given_, before, strict=True):
        assert np.array_equal(value, kept), "a kernel changed its input"


@pytest.mark.parametrize("name", ["linear", "layer_norm", "gelu", "gelu_tanh", "relu", "tanh"])
def test_no_rows_give_no_rows(name: str) -> None:
    assert len(kernels.NUMPY[name](*(v[:0] if i == 0 else v for i, v in enumerate(arguments(name, 2, 32))))) == 0


def every_magnitude() -> NDArray[np.float32]:
    """A quarter of a million float32 values, spread evenly over all finite bit patterns."""
    bits = np.arange(0, 2**32, 16411, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    return values[np.isfinite(values)]


def test_gelu_keeps_its_stated_error_on_every_magnitude() -> None:
    x = np.concatenate([every_magnitude(), np.linspace(-8, 8, 100_001, dtype=np.float32)])
    exact = np.array([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()])
    error = np.abs(kernels.NUMPY["gelu"](x) - exact)
    assert (error <= 3e-7 * np.maximum(1, np.abs(exact))).all(), x[error.argmax()]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu"])
def test_activations_reach_their_limits(name: str) -> None:
    largest = np.finfo(np.float32).max
    with np.errstate(over="ignore", invalid="ignore"):  # gelu_tanh cubes its input, as its definition does
        found = kernels.NUMPY[name](np.array([-np.inf, -largest, -0.0, 0.0, largest, np.inf, np.nan], np.float32))
    finite = found[1:5]
    assert np.array_equal(finite, np.array([0, 0, 0, largest], np.float32))
    assert found[5] == np.inf
    assert np.isnan(found[6])


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
)
def test_attention_rows_sum_to_one_and_masses_to_the_number_of_queries(
    seed: int, m: int, n: int, heads: int, spread: float
) -> None:
    q, k = spread * normal(seed, m, 8), spread * normal(seed + 1, n, 8)
    probs = kernels.NUMPY["attention_probs"](q, k, heads)
    assert np.abs(probs.sum(axis=-1) - 1).max() <= 4 * n * EPS
    assert abs(kernels.NUMPY["attention_mass"](probs).sum() - m) <= 4 * m * n * EPS


def test_layer_norm_of_a_constant_row_is_the_bias() -> None:
    x, bias = np.full((2, 16), 3.0, np.float32), normal(1, 16)
    assert np.array_equal(kernels.NUMPY["layer_norm"](x, normal(2, 16), bias, 1e-12), np.stack([bias, bias]))
