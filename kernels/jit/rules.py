"""The keep rules of `minilpt.pruning` on one sequence's attention masses."""

from __future__ import annotations

import numpy as np

from .. import blocks
from .memory import compiled, view


@compiled
def keep(mass, n, rule, n_initial, offset, kept, at):
    """Write the places of the kept tokens, each plus `offset`, to kept[at:] in order; returns how many. Token 0 stays.

    mass: (n,) float32, kept: int64, rule: a `blocks.RULE` record; n_initial: the length before layer 0.
    """
    if rule.kind == blocks.COUNT:
        return keep_largest(mass, n, _wanted(n_initial, rule.value), offset, kept, at)
    divisor = np.float32(_denominator(rule, n, n_initial))
    if rule.kind == blocks.RELATIVE:
        divisor = mass[0]
        for k in range(1, n):
            divisor = max(divisor, mass[k])
    count = 0
    for k in range(n):
        if k == 0 or rule.kind == blocks.KEEP_ALL or mass[k] / divisor >= rule.value:
            kept[at + count] = offset + k
            count += 1
    return count


@compiled
def merge(mass, n, kept, at, count, offset):
    """Let the removed tokens go on as one, in the place of the first of them: its place among all, which is returned.

    mass: (n,) float32, becomes each token's share of the merged one, 0 for the kept; kept[at : at + count]: as `keep`
    left it, with at least one token removed; the merged one's place is put in.
    """
    total, removed, first, place = np.float32(0), 0, -1, at
    for k in range(n):
        if place < at + count and kept[place] == offset + k:
            mass[k] = 0
            place += 1
        else:
            total += mass[k]
            removed += 1
            first = k if first < 0 else first
    place = at
    for k in range(n):
        if place < at + count and kept[place] == offset + k:
            place += 1
        else:
            mass[k] = mass[k] / total if total > 0 else np.float32(1) / np.float32(removed)
    for place in range(at + count, at + first, -1):
        kept[place] = kept[place - 1]
    kept[at + first] = offset + first
    return first


@compiled
def merge_rows(rows, stride, width, share, n, first):
    """Row `first` becomes the sum of n rows times their shares; rows before it have none. rows: address, width float32."""
    target = view(rows + first * stride, width, np.float32)
    for i in range(width):
        target[i] *= share[first]
    for k in range(first + 1, n):
        if share[k] != 0:
            source = view(rows + k * stride, width, np.float32)
            for i in range(width):
                target[i] += share[k] * source[i]


@compiled
def _denominator(rule, n, n_initial):
    if rule.denominator == blocks.INITIAL:
        return min(n_initial, rule.limit)
    if rule.denominator == blocks.LIVE:
        return min(n, rule.limit)
    return min(rule.denominator, rule.limit)


@compiled
def _wanted(n_initial, rate):
    """n_initial * rate in float32, rounded half to even, at least 1."""
    product = np.float32(n_initial) * rate
    whole = np.int64(product)
    rest = product - np.float32(whole)
    if rest > np.float32(0.5) or (rest == np.float32(0.5) and whole % 2 == 1):
        whole += 1
    return max(1, whole)


@compiled
def keep_largest(mass, n, wanted, offset, kept, at):
    """Token 0 and the wanted - 1 largest others; ties go to the lower place."""
    count = 0
    for k in range(n):
        rank = 1  # how many stand before k: the pinned token, and those with more mass
        for j in range(1, n):
            rank += mass[j] > mass[k] or (mass[j] == mass[k] and j < k)
        if k == 0 or rank < wanted:
            kept[at + count] = offset + k
            count += 1
    return count
