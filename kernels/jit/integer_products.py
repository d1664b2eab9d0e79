"""Products of items with packed int8 weights, keys or values: exact int32 sums, and what is made of them."""

from __future__ import annotations

import numpy as np

from ..blocks import ROWS_OF_BLOCK, SUMS
from ..isa import chosen
from . import amx, tiles
from .integer_lines import ITEM, ITEM_BYTES, ITEM_ZERO, end_line
from .memory import compiled, view

RUNG = chosen()
TALL, COLUMNS, GROUP = RUNG.rows, RUNG.columns, RUNG.group
TILE, HALF_TILE = tiles.sum_tile(RUNG.vectors), tiles.sum_tile(max(1, RUNG.vectors // 2))
SIGN = np.uint32(0x80808080 if ITEM_ZERO else 0)


@compiled
def _vector_product(x, stride, count, matrix, begin, end, out, out_stride, ending, room):
    sums, panel_bytes = ending.kind == SUMS, matrix.depth * GROUP * COLUMNS
    item_bytes = 4 if sums else ITEM_BYTES
    for r in range(0, count, ROWS_OF_BLOCK):
        rows = min(ROWS_OF_BLOCK, count - r)
        height = (rows + TALL - 1) // TALL  # in tiles; each fetches its part of the panel that comes next
        for p in range(begin, end):
            panel, start = matrix.panels + p * panel_bytes, matrix.start + 4 * p * COLUMNS
            for tile in range(r, r + rows, TALL):
                high, here = min(TALL, r + rows - tile), out + tile * out_stride + p * COLUMNS * item_bytes
                place, place_stride = (here, out_stride) if sums else (room, 4 * COLUMNS)
                ahead = panel + panel_bytes + (tile - r) // TALL * (panel_bytes // height)
                soon = GROUP * COLUMNS // height
                TILE(x + tile * stride, stride, high, panel, start, matrix.depth, place, place_stride, ahead, soon)
                if not sums:
                    for row in range(high):
                        end_line(room + row * 4 * COLUMNS, COLUMNS, p * COLUMNS, ending, here + row * out_stride)


@compiled
def _amx_product(x, stride, count, matrix, begin, end, out, out_stride, ending, room):
    sums, panel_bytes = ending.kind == SUMS, matrix.depth * GROUP * COLUMNS
    item_bytes = 4 if sums else ITEM_BYTES
    for r in range(0, count, ROWS_OF_BLOCK):
        rows, source, target = min(ROWS_OF_BLOCK, count - r), x + r * stride, out + r * out_stride
        if rows < amx.FEW:
            _vector_product(source, stride, rows, matrix, begin, end, target, out_stride, ending, room)
            continue
        height = amx.tall(rows)
        amx.configure(height)
        for p in range(begin, end):
            panel, start = matrix.panels + p * panel_bytes, matrix.start + 4 * p * COLUMNS
            for turn in range(amx.turns(rows)):
                top, more = amx.tiles_of(turn, rows, height)
                here = target + top * out_stride + p * COLUMNS * item_bytes
                place, place_stride = (here, out_stride) if sums else (room, 4 * COLUMNS)
                a = source + top * stride
                amx.panel_sums(a, stride, more, panel, start, matrix.depth, place, place_stride, turn)
                if not sums:
                    for line in range(more + height):
                        end_line(room + line * 4 * COLUMNS, COLUMNS, p * COLUMNS, ending, here + line * out_stride)
        amx.release()


_product = _amx_product if RUNG.amx else _vector_product


@compiled
def integer_product(x, stride, count, matrix, begin, end, out, out_stride, ending, room):
    """What `ending` makes of x W^T + b, panels begin to end of the matrix, `count` rows of items from x on.

    Panel p's columns begin at out + p * COLUMNS of int32 (SUMS) or items. room: `Rung.sums_bytes` of this thread's own.
    """
    _product(x, stride, count, matrix, begin, end, out, out_stride, ending, room)


@compiled
def panel_sums(x, stride, rows, panel, start, groups, columns, out, out_stride):
    """int32 sums of `rows` rows of items with one panel, of which `columns` columns are wanted."""
    for r in range(0, rows, TALL):
        high, place, here = min(TALL, rows - r), x + r * stride, out + r * out_stride
        if columns <= COLUMNS // 2:
            HALF_TILE(place, stride, high, panel, start, groups, here, out_stride, panel, 0)
        else:
            TILE(place, stride, high, panel, start, groups, here, out_stride, panel, 0)


@compiled
def keys_bytes(n, head_width):
    """Room for one head's packed keys, and an int32 for each to start its sums with."""
    return (head_width + 4) * COLUMNS * ((n + COLUMNS - 1) // COLUMNS)


@compiled
def pack_keys(k, stride, n, head_width, keys):
    """n rows of items to panels of keys, (head_width / GROUP, COLUMNS, GROUP) int8 each; behind them what sums start with."""
    starts = keys + head_width * COLUMNS * ((n + COLUMNS - 1) // COLUMNS)
    start = view(starts, n, np.int32)
    for r in range(n):
        panel = keys + (r // COLUMNS) * head_width * COLUMNS + (r % COLUMNS) * GROUP
        items = view(k + r * stride, head_width, ITEM)
        total = 0
        for c in range(head_width):
            total += np.int64(items[c]) - ITEM_ZERO
        start[r] = -ITEM_ZERO * total
        if GROUP == 4:
            words = view(k + r * stride, head_width // 4, np.uint32)
            packed = view(panel, head_width // 4 * COLUMNS, np.uint32)
            for g in range(head_width // 4):
                packed[g * COLUMNS] = words[g] ^ SIGN
        else:
            packed_items = view(panel, head_width * COLUMNS, np.int8)
            for c in range(head_width):
                packed_items[c // GROUP * GROUP * COLUMNS + c % GROUP] = items[c]
    return starts


@compiled
def values_bytes(n, head_width):
    """Room for one head's packed values."""
    return (n + GROUP) * COLUMNS * ((head_width + COLUMNS - 1) // COLUMNS)


@compiled
def pack_values(v, stride, n, head_width, values):
    """n rows of items to panels of values, (n / GROUP, COLUMNS, GROUP) int8 each; the last group repeats row n - 1."""
    groups = (n + GROUP - 1) // GROUP
    for c in range(0, head_width, COLUMNS):
        panel, columns = values + c * groups * GROUP, min(COLUMNS, head_width - c)
        for g in range(groups):
            line = panel + g * GROUP * COLUMNS
            for j in range(GROUP):
                items = view(v + min(g * GROUP + j, n - 1) * stride + c * ITEM_BYTES, columns, ITEM)
                packed = view(line, columns * GROUP, np.int8)
                for i in range(columns):
                    packed[i * GROUP + j] = np.int8(np.int64(items[i]) - ITEM_ZERO)


@compiled
def context_sums(probs, probs_stride, rows, n, values, head_width, zeros, out, out_stride):
    """int32 sums of unsigned probabilities times packed values, (rows, head_width)."""
    groups = (n + GROUP - 1) // GROUP
    for c in range(0, head_width, COLUMNS):
        panel = values + c * groups * GROUP
        panel_sums(probs, probs_stride, rows, panel, zeros, groups, head_width - c, out + 4 * c, out_stride)
