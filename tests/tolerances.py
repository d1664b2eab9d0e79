"""Every tolerance of the suite that compares floating-point answers, derived here and nowhere else.

The reference computes in the dtype of its weights. In float64 it gives what the mathematics says; in float32 it shows
what the same mathematics costs in float32. `cost_of` measures that difference on the very sequences under test and on
a few fixed ones of the same checkpoint, so that one lucky input does not set the bound. Each bound is then

    FACTOR x the measured cost  +  a floor that any float32 computation may lose, whatever its order of summation

- FACTOR: another order of summation, another exp or erf give other errors of the same size, and one sequence's error is
  one draw. Over 3,840 single sequences of 96 tiny checkpoints, above the floor, the engine in float32 came to at most
  5.3 times the measured cost and transformers in float64 to 5.9 times (2026-11). So 8 holds, and test_equivalence.py
  shows that it hides no small mistake.
- The floor of a logit: FLOOR_ULPS units in the last place of the largest logit.
- The floor of a score: n queries and H heads are summed, all terms positive, so any order is within (n + H) EPS / 2 of
  the sum (N. Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); two more roundings divide by Z and
  store the threshold.

In precision int8 a value beside the middle of two integers may be rounded to either, and one such flip costs far more
than float32 does. Flips are rare, so the few sequences at hand may hold none in the reference and one in the engine:
there the cost is measured with embeddings that are off by NOISE, 256 times float32's precision, and the factor is
NOISE_FACTOR: that cost holds many more flips than any engine's (of all examples on all rungs, the engine came to at
most 2.8 times it; 2026-11). What this bound is too wide to see, test_equivalence.py measures as a mean over many
sequences.

A bound holds between one float32 result and the truth; two float32 results differ by at most twice as much. The
float64 result of another implementation is held to the same bound, scaled by the ratio of the two machine epsilons.
That the reference is right is not assumed: it is itself held to that float64 bound, by transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from minilpt import reference
from minilpt.config import ModelConfig
from minilpt.pruning import KeepRule
from minilpt.quantize import Quantized

EPS = float(np.finfo(np.float32).eps)
FACTOR = 8.0
FLOOR_ULPS = 4.0
PROBE_LENGTHS = (1, 2, 5, 11, 19, 33)

NOISE, NOISE_FACTOR = 2.0**-15, 4.0
Weights = reference.Weights
Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # (token ids, segment ids) of each


@dataclass(frozen=True)
class Cost:
    """What float32 costs, times a factor: the largest error of a logit, and of an attention mass in each layer."""

    logits: float
    masses: tuple[float, ...]


def widened(weights: Weights) -> Weights:
    """The same weights in float64, exactly."""
    return {
        name: Quantized(tensor.rows, tensor.scale.astype(np.float64))
        if isinstance(tensor, Quantized)
        else tensor.astype(np.float64)
        for name, tensor in weights.items()
    }


def cost_of(
    weights: Weights,
    exact: Weights,
    config: ModelConfig,
    rule: KeepRule | None,
    sequences: Sequences,
    forward: Callable[..., reference.Traced] = reference.forward,
) -> Cost:
    """Measure float32 weights against the same weights in float64. forward: whose answers `logits` are.

    A sequence that the two prune differently holds a score within its bound; it counts up to that layer only.
    """
    logits, masses, factor = 0.0, [0.0] * config.layers, FACTOR
    if any(isinstance(tensor, Quantized) for tensor in weights.values()):
        weights, factor = _disturbed(weights), NOISE_FACTOR
    for ids, segments in [*sequences, *_probes(config)]:
        tokens, kinds = np.asarray(ids, np.int32), np.asarray(segments, np.int32)
        narrow, wide = (forward(chosen, config, rule, tokens, kinds) for chosen in (weights, exact))
        for layer, (found, truth) in enumerate(zip(narrow.masses, wide.masses, strict=True)):
            if len(found) != len(truth):
                break
            masses[layer] = max(masses[layer], float(np.abs(found - truth).max()))
        else:
            if narrow.n_ffn == wide.n_ffn:
                logits = max(logits, float(np.abs(narrow.logits - wide.logits).max()))
    return Cost(factor * logits, tuple(factor * mass for mass in masses))


def _disturbed(weights: Weights) -> Weights:
    """The embedding tables with relative errors of NOISE."""
    draw = np.random.default_rng(21)
    return {
        name: (tensor * (1 + NOISE * draw.standard_normal(tensor.shape))).astype(np.float32)
        if name.startswith("embeddings.") and tensor.ndim == 2
        else tensor
        for name, tensor in weights.items()
    }


def logits_bound(cost: Cost, truth: NDArray[np.floating], dtype: DTypeLike = np.float32) -> float:
    """How far logits computed in this dtype may lie from the truth."""
    return (cost.logits + FLOOR_ULPS * EPS * float(np.abs(truth).max())) * _relative_to_float32(dtype)


def mass_bound(
    cost: Cost, layer: int, heads: int, mass: NDArray[np.floating], dtype: DTypeLike = np.float32
) -> NDArray[np.float64]:
    """How far each token's attention mass, summed over queries and averaged over heads, may lie from `mass`, (n,)."""
    any_order = (len(mass) + heads + 2) * EPS / 2 * np.asarray(mass, np.float64)
    return (cost.masses[layer] + any_order) * _relative_to_float32(dtype)


def sum_to_one_bound(n: int) -> float:
    """How far the float32 sum of n probabilities may lie from one: n divisions and n additions, in any order."""
    return n * EPS


def _relative_to_float32(dtype: DTypeLike) -> float:
    return float(np.finfo(dtype).eps) / EPS


def _probes(config: ModelConfig) -> Sequences:
    draw = np.random.default_rng(20)
    lengths = [min(n, config.max_tokens) for n in PROBE_LENGTHS]
    return [(draw.integers(0, config.vocabulary, n).tolist(), [0] * n) for n in lengths]
