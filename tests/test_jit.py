"""The compiled kernels against the reference, on the rung that MINILPT_ISA names or the machine's highest."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from minilpt import reference
from minilpt.weights.checkpoint import quantize_rows

pytest.importorskip("numba", reason="compiled kernels need numba")

from minilpt.kernels.jit import attention, isa, products

Float32 = NDArray[np.float32]
UNIT = float(np.finfo(np.float32).eps)
SHAPES = [(1, 1, 1), (7, 36, 20), (6, 64, 64), (50, 96, 130), (97, 65, 63), (13, 384, 200)]


def normal(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng((seed, *shape)).standard_normal(shape, dtype=np.float32)


def float64(*arrays: Float32) -> list[NDArray[np.float64]]:
    return [array.astype(np.float64) for array in arrays]


@pytest.mark.parametrize("N, K, M", SHAPES)
def test_a_float_product_is_the_reference_s_to_rounding(N: int, K: int, M: int) -> None:
    x, weight, bias = normal(N, K), normal(M, K, seed=1), normal(M)
    found = products.linear(x, products.pack(weight, bias))
    expected = reference.linear(*float64(x, weight, bias))
    bound = (K + 1) * UNIT * (np.abs(x) @ np.abs(weight).T + np.abs(bias))  # Higham, Accuracy and Stability, 3.1
    assert (np.abs(found - expected) <= bound).all()


@pytest.mark.parametrize("N, K, M", SHAPES)
def test_an_int8_product_is_the_integers_one(N: int, K: int, M: int) -> None:
    x, bias = normal(N, K), normal(M)
    weight, scale = quantize_rows(normal(M, K, seed=1))
    found = products.linear(x, products.pack_int8(weight, scale, bias))
    largest = np.abs(x).max(axis=1, keepdims=True)
    quantized = np.rint(x * (np.float32(127) / largest)).astype(np.int64)
    product = quantized @ weight.T.astype(np.int64) * (largest.astype(np.float64) / 127 * scale)
    assert (np.abs(found - (product + bias)) <= 4 * UNIT * (np.abs(product) + np.abs(bias))).all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("N, K, M", SHAPES)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(N: int, K: int, M: int, int8: bool) -> None:
    x, weight, bias = normal(N, K), normal(M, K, seed=1), normal(M)
    packed = products.pack_int8(*quantize_rows(weight), bias) if int8 else products.pack(weight, bias)
    together = products.linear(x, packed)
    for row in range(N):
        assert np.array_equal(products.linear(x[row : row + 1], packed)[0], together[row]), row


def test_a_row_of_zeros_and_a_row_of_huge_values_survive_int8() -> None:
    x = np.zeros((3, 32), np.float32)
    x[1], x[2] = 1e30, 1e-42
    weight, scale = quantize_rows(np.ones((4, 32), np.float32))
    found = products.linear(x, products.pack_int8(weight, scale, np.ones(4, np.float32)))
    assert np.allclose(found, [[1.0] * 4, [3.2e31] * 4, [1.0] * 4], rtol=1e-6)


def test_int8_products_that_could_overflow_are_refused() -> None:
    weight = np.zeros((1, 70_000), np.int8)
    with pytest.raises(ValueError, match="overflow an int32 sum"):
        products.pack_int8(weight, np.ones(1, np.float32), np.zeros(1, np.float32))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("N, D, F", [(1, 32, 64), (50, 36, 100), (97, 64, 40)])
def test_the_feed_forward_is_the_reference_s(N: int, D: int, F: int, activation: str) -> None:
    x, first, second = normal(N, D), normal(F, D) / np.float32(D**0.5), normal(D, F, seed=1) / np.float32(F**0.5)
    b1, b2, weight, bias = normal(F), normal(D), normal(D, seed=2), normal(D, seed=3)
    code = products.ACTIVATIONS[activation]
    found = products.feed_forward(x, products.pack(first, b1), code, products.pack(second, b2), weight, bias, 1e-5)
    X, W1, B1, W2, B2, G, B = float64(x, first, b1, second, b2, weight, bias)
    inner = reference.ACTIVATIONS[activation](reference.linear(X, W1, B1))
    expected = reference.layer_norm(X + reference.linear(inner, W2, B2), G, B, 1e-5)
    assert np.abs(found - expected).max() < 64 * UNIT * np.abs(expected).max()


@pytest.mark.parametrize("D, heads", [(8, 2), (36, 4), (96, 3), (128, 1), (200, 2), (1024, 16)])
def test_attention_over_a_ragged_batch_is_the_reference_s(D: int, heads: int) -> None:
    lengths = [5, 1, 70, 17]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    q, kv = normal(bounds[-1], D), normal(bounds[-1], 2 * D)
    mass = checked(attention.attention_mass(q, kv, bounds, heads))
    context = attention.attention_context(q, kv, bounds, bounds, heads)
    for begin, end in pairwise(bounds):
        Q, K, V = float64(q[begin:end], kv[begin:end, :D], kv[begin:end, D:])
        probs = reference.attention_probs(Q, K, heads)
        n = end - begin
        assert np.abs(mass[begin:end] - reference.attention_mass(probs)).max() < 64 * UNIT * n
        assert np.abs(context[begin:end] - reference.attention_context(probs, V)).max() < 64 * UNIT * np.abs(V).max()


def checked(mass: Float32) -> Float32:
    """The masses, after a check that they sum to the number of queries."""
    assert abs(mass.sum() - len(mass)) < 1e-3
    return mass


def test_kept_queries_have_the_bits_that_they_have_among_all() -> None:
    bounds, keep = np.array([0, 40, 75], np.int32), np.arange(75) % 3 == 0
    q, kv = normal(75, 96), normal(75, 192)
    everything = attention.attention_context(q, kv, bounds, bounds, 3)
    kept = np.concatenate([[0], np.cumsum(keep)])[bounds].astype(np.int32)
    assert np.array_equal(attention.attention_context(q[keep], kv, kept, bounds, 3), everything[keep])


@pytest.mark.skipif(isa.VARIABLE in os.environ, reason="one rung was asked for")
@pytest.mark.parametrize("rung", [rung.name for rung in isa.usable()[1:]])
def test_every_rung_that_this_machine_can_execute(rung: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, isa.VARIABLE: rung}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_unknown_rung_is_refused_with_the_names_of_the_others() -> None:
    code = "from minilpt.kernels.jit import isa; isa.chosen()"
    environment = {**os.environ, isa.VARIABLE: "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "MINILPT_ISA='sse9' is not a rung that this machine can execute" in done.stderr
    assert "portable" in done.stderr
