"""Matrix products with packed weights, float32 or int8, and LayerNorm and quantisation of their rows."""

from __future__ import annotations

import numpy as np

from ..blocks import GELU, GELU_TANH, NONE, RELU, ROWS_OF_BLOCK, TANH
from ..isa import LANES, chosen
from . import amx, lines, tiles
from .memory import compiled, copy, view

RUNG = chosen()
TALL, COLUMNS, GROUP = RUNG.rows, RUNG.columns, RUNG.group
DEPTH = 384  # of one block of a float32 panel (98 KB); each sum goes on where the block before it stopped

_TILES = tuple(map(tiles.float_tile, range(1, RUNG.vectors + 1)))
TILE_1, TILE_2, TILE_3, TILE_4 = (_TILES[min(at, len(_TILES) - 1)] for at in range(4))


@compiled
def float_panel(a, a_stride, rows, b, b_stride, start, start_stride, c, c_stride, depth, vectors, ahead, ahead_bytes):
    """c = start + a b: `rows` rows by `vectors` vectors of columns, at most one panel's. Strides in bytes.

    Of the memory that will be read next, `ahead_bytes` from `ahead` on, every tile fetches its part; of 0 bytes, which
    caches hold already, the first lines over and over.
    """
    part = ahead_bytes // ((rows + TALL - 1) // TALL)
    step = part // depth
    for r in range(0, rows, TALL):
        x, begin, out, high = a + r * a_stride, start + r * start_stride, c + r * c_stride, min(TALL, rows - r)
        soon = ahead + r // TALL * part
        if vectors == 1:
            TILE_1(x, a_stride, high, b, b_stride, begin, start_stride, out, c_stride, depth, soon, step)
        elif vectors == 2:
            TILE_2(x, a_stride, high, b, b_stride, begin, start_stride, out, c_stride, depth, soon, step)
        elif vectors == 3:
            TILE_3(x, a_stride, high, b, b_stride, begin, start_stride, out, c_stride, depth, soon, step)
        else:
            TILE_4(x, a_stride, high, b, b_stride, begin, start_stride, out, c_stride, depth, soon, step)


@compiled
def activate(address, count, activation):
    """Apply an activation of `blocks.ACTIVATIONS` in place; count is a multiple of 16."""
    if activation == GELU:
        lines.gelu_line(address, count)
    elif activation == GELU_TANH:
        lines.gelu_tanh_line(address, count)
    elif activation == RELU:
        lines.relu_line(address, count)
    elif activation == TANH:
        lines.tanh_line(address, count)


@compiled
def activate_rows(address, stride, rows, count, activation):
    if activation != NONE:
        for row in range(rows):
            activate(address + row * stride, count, activation)


@compiled
def _float_product(x, first, count, matrix, begin, end, out, out_stride, activation):
    for r in range(0, count, ROWS_OF_BLOCK):
        rows = min(ROWS_OF_BLOCK, count - r)
        place = x.floats + (first + r) * x.stride
        for p in range(begin, end):
            here = out + r * out_stride + 4 * p * COLUMNS
            panel = matrix.panels + 4 * p * matrix.depth * COLUMNS
            for k in range(0, matrix.depth, DEPTH):
                start, start_stride = (here, out_stride) if k else (matrix.start + 4 * p * COLUMNS, 0)
                a, b, depth = place + 4 * k, panel + 4 * k * COLUMNS, min(DEPTH, matrix.depth - k)
                line = 4 * COLUMNS
                size = depth * line
                float_panel(
                    a,
                    x.stride,
                    rows,
                    b,
                    line,
                    start,
                    start_stride,
                    here,
                    out_stride,
                    depth,
                    COLUMNS // LANES,
                    b + size,
                    size,
                )
            activate_rows(here, out_stride, rows, COLUMNS, activation)


@compiled
def _vector_product(x, first, count, matrix, begin, end, out, out_stride, activation):
    for r in range(0, count, ROWS_OF_BLOCK):
        rows = min(ROWS_OF_BLOCK, count - r)
        height = (rows + TALL - 1) // TALL  # in tiles; each fetches its part of the panel that comes next
        panel_bytes = matrix.depth * GROUP * COLUMNS
        for p in range(begin, end):
            panel, column = matrix.panels + p * panel_bytes, 4 * p * COLUMNS
            for tile in range(r, r + rows, TALL):
                row, high = first + tile, min(TALL, r + rows - tile)
                here = out + tile * out_stride + column
                ahead = panel + panel_bytes + (tile - r) // TALL * (panel_bytes // height)
                tiles.int8_tile(
                    x.integers + row * x.integer_stride,
                    x.integer_stride,
                    high,
                    panel,
                    matrix.start + column,
                    matrix.depth,
                    x.factors + 4 * row,
                    matrix.scale + column,
                    matrix.bias + column,
                    here,
                    out_stride,
                    ahead,
                    GROUP * COLUMNS // height,
                )
                activate_rows(here, out_stride, high, COLUMNS, activation)


@compiled
def _amx_product(x, first, count, matrix, begin, end, out, out_stride, activation):
    """The same through matrix registers."""
    panel_bytes, stride, room = matrix.depth * GROUP * COLUMNS, x.integer_stride, amx.room()
    for r in range(0, count, ROWS_OF_BLOCK):
        rows, at, target = min(ROWS_OF_BLOCK, count - r), first + r, out + r * out_stride
        if rows < amx.FEW:
            _vector_product(x, at, rows, matrix, begin, end, target, out_stride, activation)
            continue
        height = amx.tall(rows)
        amx.configure(height)
        for p in range(begin, end):
            panel, column = matrix.panels + p * panel_bytes, 4 * p * COLUMNS
            for turn in range(amx.turns(rows)):
                top, more = amx.tiles_of(turn, rows, height)
                a, here = x.integers + (at + top) * stride, target + top * out_stride + column
                amx.panel_sums(a, stride, more, panel, matrix.start + column, matrix.depth, room, 4 * COLUMNS, turn)
                factors, scale, bias = x.factors + 4 * (at + top), matrix.scale + column, matrix.bias + column
                if activation == NONE:
                    tiles.scale_rows(room, more + height, factors, scale, bias, here, out_stride)
                else:
                    tiles.scale_rows(room, more + height, factors, scale, bias, room, 4 * COLUMNS)
                    activate(room, (more + height) * COLUMNS, activation)
                    for line in range(more + height):
                        copy(here + line * out_stride, room + line * 4 * COLUMNS, 4 * COLUMNS)
        amx.release()


_int8_product = _amx_product if RUNG.amx else _vector_product


@compiled
def product(x, first, count, matrix, begin, end, out, out_stride, activation):
    """out = activation(x W^T + b), rows first to first + count of x, panels begin to end of the matrix.

    x: a `blocks.ROWS` record, matrix: a `blocks.MATRIX` record. Row r and panel p go to out + r * out_stride bytes,
    columns p * COLUMNS on.
    """
    if matrix.is_int8:
        _int8_product(x, first, count, matrix, begin, end, out, out_stride, activation)
    else:
        _float_product(x, first, count, matrix, begin, end, out, out_stride, activation)


@compiled
def quantize(x, begin, end, count):
    """The `integers` and `factors` of rows begin to end of x from their `floats`, `count` values each."""
    factors = view(x.factors, end, np.float32)
    for row in range(begin, end):
        place = x.integers + row * x.integer_stride
        factors[row] = lines.quantize_line(x.floats + row * x.stride, place, count)
