"""The integer-only forward pass over one ragged batch, run by every thread of a team at once, as `encoder` does it.

Every array is of integers. Sums are exact and every operation stands on one row, so neither the batch nor the threads
change a bit; no rung does either.
"""

from __future__ import annotations

import numpy as np

from .. import blocks
from ..blocks import QUERIES, ROWS_OF_BLOCK
from ..isa import LANES
from . import integer_lines as lines
from .encoder import chunk_end, head_places, initial_length, trace
from .integer_lines import ITEM_BYTES
from .integer_products import (
    COLUMNS,
    GROUP,
    context_sums,
    integer_product,
    keys_bytes,
    pack_keys,
    pack_values,
    panel_sums,
    values_bytes,
)
from .integer_rules import keep, merge, merge_rows, total_mass
from .memory import compiled, copy, record, share, view, wait


@compiled
def integer_forward(model_address, batch_address, work_address, thread, threads):
    """Classify the batch. Addresses of one `blocks.INTEGER_MODEL`, `blocks.BATCH` and `blocks.INTEGER_WORK`."""
    model, batch, work = (
        record(model_address, blocks.INTEGER_MODEL),
        record(batch_address, blocks.BATCH),
        record(work_address, blocks.INTEGER_WORK),
    )
    B = batch.sequences
    local = work.local + thread * work.local_bytes
    bounds, after = view(local, B + 1, np.int64), view(local + 8 * (B + 1), B + 1, np.int64)
    copy(local, batch.cu_seqlens, 8 * (B + 1))
    scratch = local + 16 * (B + 1)
    embed(model, batch, work, scratch, thread, threads)
    for number in range(model.layers):
        layer = view(model.layer, number + 1, blocks.INTEGER_LAYER)[number]
        if batch.first_row_only and number == model.layers - 1:
            first_row_layer(model, layer, batch, work, bounds, after, scratch, thread, threads)
        else:
            full_layer(model, layer, number, batch, work, bounds, after, scratch, thread, threads)
        if thread == 0:
            n_attention = view(batch.n_attention + 4 * number * B, B, np.int32)
            n_ffn = view(batch.n_ffn + 4 * number * B, B, np.int32)
            for b in range(B):
                n_attention[b], n_ffn[b] = bounds[b + 1] - bounds[b], after[b + 1] - after[b]
        copy(local, local + 8 * (B + 1), 8 * (B + 1))
    classify(model, batch, work, bounds, scratch, thread, threads)


@compiled
def embed(model, batch, work, scratch, thread, threads):
    """Tables' rows added in 16 bits, and LayerNorm, in work.x. scratch: (D,) int32."""
    begin, end = share(batch.tokens, thread, threads)
    D, most = model.width, 1 << 15
    ids, positions = view(batch.ids, end, np.int32), view(batch.positions, end, np.int32)
    segments, total = view(batch.segments, end, np.int32), view(scratch, D, np.int32)
    for token in range(begin, end):
        row, multiplier, shift = table_row(model.word, model.word_factor, np.int64(ids[token]), D)
        for i in range(D):
            total[i] = lines.rounded(np.int64(row[i]) * multiplier, shift)
        if model.segment:
            row, multiplier, shift = table_row(model.segment, model.segment_factor, np.int64(segments[token]), D)
            for i in range(D):
                total[i] += lines.rounded(np.int64(row[i]) * multiplier, shift)
        row, multiplier, shift = table_row(model.position, model.position_factor, np.int64(positions[token]), D)
        for i in range(D):
            value = min(max(np.int64(total[i]), -most), most - 1) + lines.rounded(np.int64(row[i]) * multiplier, shift)
            total[i] = min(max(value, -most), most - 1)
        out = work.x + token * work.x_stride
        lines.norm_line(scratch, lines.sum_line(scratch, D), D, model.embedding_norm, 0, 1, out)
    wait(work, threads)


@compiled
def table_row(rows, factor, place, D):
    """A row of an embedding table, (D,) int8, and its multiplier and shift."""
    multiplier = view(factor.multiplier, place + 1, np.int32)[place]
    shift = view(factor.shift, place + 1, np.int32)[place]
    return view(rows + place * D, D, np.int8), np.int64(multiplier), np.int64(shift)


@compiled
def full_layer(model, layer, number, batch, work, bounds, after, scratch, thread, threads):
    """Attention over all rows, the keep rule, and the rest for the kept rows, which move to the front of work.x."""
    rule, rows_of_chunk = view_rule(batch, number), max(work.chunk, batch.longest)
    kept = view(scratch, rows_of_chunk, np.int64)
    mass = view(scratch + 8 * rows_of_chunk, batch.longest, np.int64)
    room = scratch + 8 * (rows_of_chunk + batch.longest)
    after[0] = 0
    b = 0
    while b < batch.sequences:
        end = chunk_end(bounds, b, batch.sequences, work.chunk)
        first, rows = bounds[b], bounds[end] - bounds[b]
        qkv, stride, matrix = work.query_key_value, work.query_key_value_stride, layer.query_key_value
        from_panel, to_panel = share(matrix.count, thread, threads)
        x = work.x + first * work.x_stride
        integer_product(
            x, work.x_stride, rows, matrix, from_panel, to_panel, qkv, stride, layer.query_key_value_end, room
        )
        wait(work, threads)
        count = 0
        for s in range(b, end):
            n, place = bounds[s + 1] - bounds[s], qkv + (bounds[s] - first) * stride
            if rule.kind == blocks.KEEP_ALL and not batch.masses:
                attend(model, layer, work, place, n, count, room, thread, threads)
                for k in range(n):
                    kept[count + k] = bounds[s] + k
                found = n
            else:
                received = work.received + (s % 2) * work.received_bytes * model.heads
                score(model, layer, work, place, n, received, room, thread, threads)
                wait(work, threads)
                total_mass(received, work.received_bytes, model.heads, n, mass)
                found = keep(mass, n, rule, initial_length(batch, s), bounds[s], kept, count)
                if batch.masses and thread == 0:
                    masses = view(batch.masses + 8 * (number * batch.tokens + bounds[s]), n, np.int64)
                    trace(batch, number, bounds[s], n, mass, kept, count, found, masses)
                merged = -1
                if rule.merge and found < n:
                    merged = merge(mass, n, kept, count, found, bounds[s])
                    found += 1
                    if thread == 0:
                        x = work.x + bounds[s] * work.x_stride
                        merge_rows(x, work.x_stride, model.width, mass, n, merged, room)
                attend_kept(
                    model, layer, work, place, n, kept, count, found, bounds[s], mass, merged, room, thread, threads
                )
            count += found
            after[s + 1] = after[s] + found
        wait(work, threads)
        rest_of_layer(model, layer, work, work.x, kept, count, after[b], room, thread, threads)
        b = end


@compiled
def view_rule(batch, number):
    return view(batch.rule, number + 1, blocks.INTEGER_RULE)[number]


@compiled
def probs_stride(n):
    """Bytes of one row of n probabilities, whole vectors of items."""
    return ITEM_BYTES * LANES * ((n + LANES - 1) // LANES)


@compiled
def scores_stride(n):
    """Bytes of one row of n int32 scores, whole panels."""
    return 4 * COLUMNS * ((n + COLUMNS - 1) // COLUMNS)


@compiled
def attention_probs(layer, q, stride, rows, keys, starts, n, head_width, scores, probs, received, mask):
    """Probabilities of some query rows against all n packed keys, `probs_stride(n)` apart; see `lines.softmax_line`."""
    line = scores_stride(n)
    for c in range(0, n, COLUMNS):
        panel = keys + c * head_width
        panel_sums(q, stride, rows, panel, starts + 4 * c, head_width // GROUP, n - c, scores + 4 * c, line)
    for row in range(rows):
        out = probs + row * probs_stride(n)
        lines.softmax_line(scores + row * line, n, layer.exp, out, probs_stride(n) // ITEM_BYTES, received, mask)


@compiled
def attention_context(layer, work, probs, rows, n, values, head_width, sums, out):
    """Items of `rows` contexts at `out`, rows of work.context."""
    stride = 4 * COLUMNS * ((head_width + COLUMNS - 1) // COLUMNS)
    context_sums(probs, probs_stride(n), rows, n, values, head_width, work.zeros, sums, stride)
    for row in range(rows):
        place = out + row * work.context_stride
        lines.requantize_evenly(sums + row * stride, head_width, layer.context_multiplier, layer.context_shift, place)


@compiled
def attend(model, layer, work, qkv, n, row, room, thread, threads):
    """Contexts of all rows of one sequence, a block of queries at a time. They go to work.context from `row` on.

    room: of this thread, for one head's packed keys and values, and a block's scores, probabilities and sums.
    """
    width, stride = model.head_width, work.query_key_value_stride
    keys, values, scores = rooms(room, n, width)
    probs = scores + QUERIES * scores_stride(n)
    sums = probs + QUERIES * probs_stride(n)
    begin, end = share(model.heads, thread, threads)
    for h in range(begin, end):
        q, k, v = head_places(model, work, qkv, h, ITEM_BYTES)
        starts = pack_keys(k, stride, n, width, keys)
        pack_values(v, stride, n, width, values)
        out = work.context + h * ITEM_BYTES * width
        for r in range(0, n, QUERIES):
            rows, here = min(QUERIES, n - r), q + r * stride
            attention_probs(layer, here, stride, rows, keys, starts, n, width, scores, probs, 0, 0)
            place = out + (row + r) * work.context_stride
            attention_context(layer, work, probs, rows, n, values, width, sums, place)


@compiled
def rooms(room, n, width):
    """Addresses of one head's packed keys, its values, and what comes behind them."""
    values = room + 64 * ((keys_bytes(n, width) + 63) // 64)
    return room, values, values + 64 * ((values_bytes(n, width) + 63) // 64)


@compiled
def score(model, layer, work, qkv, n, received, room, thread, threads):
    """Probabilities of one sequence, kept in work.probs, and what each key receives from all queries, head by head."""
    width, stride = model.head_width, work.query_key_value_stride
    keys, _, scores = rooms(room, n, width)
    begin, end = share(model.heads, thread, threads)
    for h in range(begin, end):
        q, k, _ = head_places(model, work, qkv, h, ITEM_BYTES)
        probs, total = work.probs + h * work.probs_bytes, received + h * work.received_bytes
        starts = pack_keys(k, stride, n, width, keys)
        sums = view(total, n, np.int64)
        for at in range(n):
            sums[at] = 0
        for r in range(0, n, QUERIES):
            rows, here, place = min(QUERIES, n - r), q + r * stride, probs + r * probs_stride(n)
            attention_probs(layer, here, stride, rows, keys, starts, n, width, scores, place, total, model.mass_mask)


@compiled
def attend_kept(model, layer, work, qkv, n, kept, row, count, first, weight, merged, room, thread, threads):
    """Contexts of one sequence's kept rows from the probabilities that `score` left; work.context has them from `row` on.

    The rows are kept[row : row + count], of which `first` is the sequence's row 0. merged: the place of the one that
    stands for the removed ones, which count there as `weight` says, or -1.
    """
    line, width = probs_stride(n), model.head_width
    free, values, sums = rooms(room, n, width)
    begin, end = share(model.heads, thread, threads)
    for h in range(begin, end):
        _, _, v = head_places(model, work, qkv, h, ITEM_BYTES)
        pack_values(v, work.query_key_value_stride, n, width, values)
        probs = work.probs + h * work.probs_bytes
        if merged >= 0:
            merge_rows(probs, line, n, weight, n, merged, free)
        for at in range(count):
            source = kept[row + at] - first
            if source != at:
                copy(probs + at * line, probs + source * line, line)
        out = work.context + h * ITEM_BYTES * width
        for r in range(0, count, QUERIES):
            rows, place = min(QUERIES, count - r), out + (row + r) * work.context_stride
            attention_context(layer, work, probs + r * line, rows, n, values, width, sums, place)


@compiled
def rest_of_layer(model, layer, work, source, kept, count, target, room, thread, threads):
    """Output projection, feed-forward and the two residual norms of `count` contexts.

    Their residuals are rows kept[:count] of `source`; the results are rows target, target + 1, ... of work.x.
    """
    D, stride = model.width, work.x_stride
    begin, end = share(count, thread, threads)
    norm_sums(work, work.context, work.context_stride, count, layer.attention_output, room, thread, threads)
    for row in range(begin, end):
        sums = work.room + row * work.room_stride
        residual, out = source + kept[row] * stride, work.attended + row * stride
        total = lines.add_line(sums, layer.attention_sum, residual, layer.attention_residual, D, sums)
        lines.norm_line(sums, total, D, layer.attention_norm, layer.again_multiplier, layer.again_shift, out)
    wait(work, threads)
    for r in range(0, count, ROWS_OF_BLOCK):
        feed_forward(model, layer, work, r, min(ROWS_OF_BLOCK, count - r), target + r, room, thread, threads)


@compiled
def norm_sums(work, x, x_stride, rows, matrix, room, thread, threads):
    """int32 sums of a product, in work.room, for all threads to read."""
    from_panel, to_panel = share(matrix.count, thread, threads)
    sums = record(work.zeros, blocks.ENDING)  # of the kind SUMS
    integer_product(x, x_stride, rows, matrix, from_panel, to_panel, work.room, work.room_stride, sums, room)
    wait(work, threads)


@compiled
def feed_forward(model, layer, work, first, rows, target, room, thread, threads):
    """LayerNorm(x + outer(activation(inner(x)))) of rows first to first + rows of work.attended, at `target` of work.x."""
    D, stride, x = model.width, work.x_stride, work.attended + first * work.x_stride
    from_panel, to_panel = share(layer.inner.count, thread, threads)
    hidden, hidden_stride = work.hidden, work.hidden_stride
    integer_product(x, stride, rows, layer.inner, from_panel, to_panel, hidden, hidden_stride, layer.inner_end, room)
    wait(work, threads)
    norm_sums(work, hidden, hidden_stride, rows, layer.outer, room, thread, threads)
    begin, end = share(rows, thread, threads)
    for row in range(begin, end):
        sums, out = work.room + row * work.room_stride, work.x + (target + row) * stride
        total = lines.add_line(sums, layer.outer_sum, x + row * stride, layer.outer_residual, D, sums)
        lines.norm_line(sums, total, D, layer.outer_norm, 0, 1, out)
    wait(work, threads)


@compiled
def first_row_layer(model, layer, batch, work, bounds, after, scratch, thread, threads):
    """The last layer for a classifier: one query row of each sequence against all its keys. Exact."""
    B, width = batch.sequences, model.head_width
    kept, room = view(scratch, B, np.int64), scratch + 8 * max(max(work.chunk, batch.longest) + batch.longest, B)
    begin, end = share(B, thread, threads)
    for s in range(begin, end):
        copy(work.first + s * work.x_stride, work.x + bounds[s] * work.x_stride, work.x_stride)
    for s in range(B):
        kept[s] = s
        after[s + 1] = s + 1
    after[0] = 0
    wait(work, threads)
    matrix, ending = layer.query_key_value, layer.query_key_value_end
    third = matrix.count // 3
    from_panel, to_panel = share(third, thread, threads)
    queries, query_stride = work.room, work.room_stride
    integer_product(work.first, work.x_stride, B, matrix, from_panel, to_panel, queries, query_stride, ending, room)
    from_panel, to_panel = share(2 * third, thread, threads)
    from_head, to_head = share(model.heads, thread, threads)
    b = 0
    while b < B:
        next_ = chunk_end(bounds, b, B, work.chunk)
        rows, qkv, stride = bounds[next_] - bounds[b], work.query_key_value, work.query_key_value_stride
        x = work.x + bounds[b] * work.x_stride
        integer_product(x, work.x_stride, rows, matrix, third + from_panel, third + to_panel, qkv, stride, ending, room)
        wait(work, threads)
        for s in range(b, next_):
            n, place = bounds[s + 1] - bounds[s], qkv + (bounds[s] - bounds[b]) * stride
            keys, values, scores = rooms(room, n, width)
            probs = scores + scores_stride(n)
            sums = probs + 64 * ((probs_stride(n) + 63) // 64)
            for h in range(from_head, to_head):
                _, k, v = head_places(model, work, place, h, ITEM_BYTES)
                q = queries + s * query_stride + ITEM_BYTES * h * width
                starts = pack_keys(k, stride, n, width, keys)
                pack_values(v, stride, n, width, values)
                attention_probs(layer, q, 0, 1, keys, starts, n, width, scores, probs, 0, 0)
                out = work.context + s * work.context_stride + ITEM_BYTES * h * width
                attention_context(layer, work, probs, 1, n, values, width, sums, out)
        wait(work, threads)
        b = next_
    rest_of_layer(model, layer, work, work.first, kept, B, 0, room, thread, threads)


@compiled
def classify(model, batch, work, bounds, room, thread, threads):
    """The head on each sequence's first row: (B, labels) int32 logits."""
    B, labels = batch.sequences, model.labels
    for r in range(0, B, ROWS_OF_BLOCK):
        rows = min(ROWS_OF_BLOCK, B - r)
        begin, end = share(rows, thread, threads)
        for s in range(r + begin, r + end):
            copy(work.first + s * work.x_stride, work.x + bounds[s] * work.x_stride, work.x_stride)
            if batch.last:
                lines.value_line(work.first + s * work.x_stride, model.width, batch.last + 4 * s * model.width)
        wait(work, threads)
        from_panel, to_panel = share(model.head_dense.count, thread, threads)
        first, dense, ending = work.first + r * work.x_stride, model.head_dense, model.head_dense_end
        integer_product(
            first, work.x_stride, rows, dense, from_panel, to_panel, work.hidden, work.hidden_stride, ending, room
        )
        wait(work, threads)
        norm_sums(work, work.hidden, work.hidden_stride, rows, model.head_out, room, thread, threads)
        for row in range(begin, end):
            out = batch.logits + 4 * (r + row) * labels
            lines.requantize_line(work.room + row * work.room_stride, labels, model.logits, 32, out)
        wait(work, threads)
