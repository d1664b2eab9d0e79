"""The keep rules of `pruning` for integer masses: the same decisions, compared as integers.

A mass is a sum of `kernels.integer.i_softmax`'s rows over heads and queries: 2^32 for each head stands for a mass of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .errors import PruningError
from .kernels import blocks
from .kernels.blocks import MOST_MASS, RELATIVE_BITS
from .kernels.integer import MASS_DROP, SOFTMAX_BITS, Int
from .pruning import KeepRule, Step

Keep = NDArray[np.bool_]


@dataclass(frozen=True)
class IntegerRule:
    """A rule whose thresholds are integers. steps: of each layer.

    Absolute: mass >= lowest[layer] * Z, with lowest the threshold in units of 2^-32 / H, rounded up. Relative:
    (mass >> 14) << 30 >= lowest[layer] * (max mass >> 14). Count: counts[layer][n_initial] largest masses.
    """

    steps: tuple[Step, ...]
    lowest: tuple[int, ...]
    counts: NDArray[np.int32]

    @property
    def merge_removed(self) -> bool:
        """Whether the tokens that a layer removes go on as one, see `kernels.integer.merged_row`."""
        return any(step.merge for step in self.steps)

    def keep(self, mass: Int, layer: int, n_initial: int) -> Keep:
        """(n,) bool: the tokens that go on; the first always does. mass: (n,) int64."""
        step, lowest = self.steps[layer], self.lowest[layer]
        kept = np.ones(len(mass), dtype=bool)
        if step.kind == blocks.ABSOLUTE:
            lengths = {blocks.INITIAL: n_initial, blocks.LIVE: len(mass)}
            z = min(lengths.get(step.denominator, step.denominator), step.limit)
            kept = mass >= min(lowest, MOST_MASS // z) * z
        elif step.kind == blocks.RELATIVE:
            short = mass >> MASS_DROP
            kept = short << RELATIVE_BITS >= lowest * short.max()
        elif step.kind == blocks.COUNT:
            order = np.argsort(-mass[1:], kind="stable") + 1
            kept = np.zeros(len(mass), dtype=bool)
            kept[order[: self.counts[layer, n_initial] - 1]] = True
        kept[0] = True
        return kept


def integer_rule(rule: KeepRule, layers: int, heads: int, max_tokens: int) -> IntegerRule:
    """A rule as integers. PruningError for a relative one where heads times tokens can be 2^15: too large masses."""
    steps = tuple(rule.step(layer) if rule.active(layer) else Step() for layer in range(layers))
    if any(step.kind == blocks.RELATIVE for step in steps) and heads * max_tokens >= 2**15:
        raise PruningError(
            f"a relative rule of {heads} heads and {max_tokens} tokens needs more than 64 bits in integers"
        )
    counts = np.ones((layers, max_tokens + 1), np.int32)
    for layer, step in enumerate(steps):
        if step.kind == blocks.COUNT:
            sizes = np.rint(np.arange(max_tokens + 1, dtype=np.float32) * step.value)
            counts[layer] = np.clip(sizes, 1, max_tokens).astype(np.int32)
    return IntegerRule(steps, tuple(_lowest(step, heads) for step in steps), counts)


def _lowest(step: Step, heads: int) -> int:
    """The threshold as the integer that masses, times what the rule says, are compared with."""
    unit = heads << SOFTMAX_BITS if step.kind == blocks.ABSOLUTE else 1 << RELATIVE_BITS
    exact = Fraction(float(step.value)) * unit
    return min(-(-exact.numerator // exact.denominator), MOST_MASS if step.kind == blocks.ABSOLUTE else unit + 1)
