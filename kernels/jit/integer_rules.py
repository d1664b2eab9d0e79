"""The keep rules of `minilpt.integer_rules` on one sequence's integer masses, and the token that stands for the removed."""

from __future__ import annotations

import numpy as np

from .. import blocks
from ..integer import MASS_DROP
from . import integer_lines as lines
from .memory import compiled, view
from .rules import keep_largest


@compiled
def keep(mass, n, rule, n_initial, offset, kept, at):
    """`minilpt.integer_rules`: the places of kept tokens, each plus `offset`, to kept[at:] in order; returns how many."""
    if rule.kind == blocks.COUNT:
        return keep_largest(mass, n, view(rule.counts, n_initial + 1, np.int32)[n_initial], offset, kept, at)
    lowest, drop, up = np.int64(0), 0, 0
    if rule.kind == blocks.ABSOLUTE:
        z = n_initial if rule.denominator == blocks.INITIAL else rule.denominator
        z = min(n if rule.denominator == blocks.LIVE else z, rule.limit)
        lowest = min(rule.lowest, blocks.MOST_MASS // z) * z
    elif rule.kind == blocks.RELATIVE:
        drop, up = MASS_DROP, blocks.RELATIVE_BITS
        most = np.int64(0)
        for k in range(n):
            most = max(most, mass[k] >> drop)
        lowest = rule.lowest * most
    count = 0
    for k in range(n):
        if k == 0 or rule.kind == blocks.KEEP_ALL or (mass[k] >> drop) << up >= lowest:
            kept[at + count] = offset + k
            count += 1
    return count


@compiled
def merge(mass, n, kept, at, count, offset):
    """Let the removed tokens go on as one, in the place of the first of them: its place among all, which is returned.

    mass: (n,) int64, becomes what `integer.merge_weights` says; kept[at : at + count]: as `keep` left it, with at least
    one token removed; the merged one's place is put in.
    """
    total, first, place = np.int64(0), -1, at
    for k in range(n):
        if place < at + count and kept[place] == offset + k:
            mass[k] = 0
            place += 1
        else:
            mass[k] = mass[k] >> MASS_DROP
            total += mass[k]
            first = k if first < 0 else first
    place = at
    for k in range(n):
        if place < at + count and kept[place] == offset + k:
            place += 1
        elif total == 0:
            mass[k] = 1
    for place in range(at + count, at + first, -1):
        kept[place] = kept[place - 1]
    kept[at + first] = offset + first
    return first


@compiled
def merge_rows(rows, stride, width, weight, n, first, room):
    """Row `first` becomes the weighted mean of n rows of items, halves up; rows before it have no weight.

    room: (width,) int64. What all items have too much for their values, the mean has too.
    """
    sums, total = view(room, width, np.int64), np.int64(0)
    for i in range(width):
        sums[i] = 0
    for k in range(first, n):
        if weight[k]:
            items = view(rows + k * stride, width, lines.ITEM)
            total += weight[k]
            for i in range(width):
                sums[i] += weight[k] * np.int64(items[i])
    target = view(rows + first * stride, width, lines.ITEM)
    for i in range(width):
        target[i] = (2 * sums[i] + total) // (2 * total)


@compiled
def total_mass(received, received_bytes, heads, n, mass):
    """(n,) int64: what the heads received."""
    for k in range(n):
        mass[k] = 0
    for h in range(heads):
        row = view(received + h * received_bytes, n, np.int64)
        for k in range(n):
            mass[k] += row[k]
