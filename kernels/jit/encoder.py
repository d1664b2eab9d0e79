"""The whole forward pass over one ragged batch, run by every thread of a team at once.

All threads walk through the same layers, chunks and sequences; each computes its share of the panels of a product, of
the heads of attention and of the rows of a LayerNorm, and they wait for each other in between. How the work is shared
changes no sum, so any number of threads gives the same bits. A chunk is a few whole sequences whose activations stay in
the second-level cache from the first product of a layer to its last.
"""

from __future__ import annotations

import numpy as np

from .. import blocks
from ..blocks import QUERIES, ROWS_OF_BLOCK
from . import lines, rules
from .attention import (
    add_mass,
    attention_context,
    attention_probs,
    average_mass,
    clear,
    keys_bytes,
    pack_keys,
    pack_values,
    probs_stride,
)
from .memory import compiled, copy, record, share, view, wait
from .products import product, quantize


@compiled
def forward(model_address, batch_address, work_address, thread, threads):
    """Run the batch. Addresses of one `blocks.MODEL`, `blocks.BATCH` and `blocks.WORK`; thread in range(threads)."""
    model, batch, work = (
        record(model_address, blocks.MODEL),
        record(batch_address, blocks.BATCH),
        record(work_address, blocks.WORK),
    )
    B = batch.sequences
    local = work.local + thread * work.local_bytes
    own = local + keys_bytes(batch.longest, model.head_width) + 4 * batch.longest * model.head_width
    bounds, after = view(own, B + 1, np.int64), view(own + 8 * (B + 1), B + 1, np.int64)
    scratch = own + 16 * (B + 1)
    if batch.begin:
        copy(own, batch.begin_bounds, 8 * (B + 1))
        take_up(model, batch, work, bounds[B], thread, threads)
    else:
        copy(own, batch.cu_seqlens, 8 * (B + 1))
        embed(model, batch, work, thread, threads)
    for layer in range(batch.begin, model.layers):
        if batch.entering:
            copy_rows(model, work, view(batch.entering, layer + 1, np.int64)[layer], bounds[B], thread, threads)
        last = batch.first_row_only and layer == model.layers - 1
        if last:
            first_row_layer(model, layer, batch, work, bounds, after, local, scratch, thread, threads)
        else:
            full_layer(model, layer, batch, work, bounds, after, local, scratch, thread, threads)
        if thread == 0:
            n_attention = view(batch.n_attention + 4 * layer * B, B, np.int32)
            n_ffn = view(batch.n_ffn + 4 * layer * B, B, np.int32)
            for b in range(B):
                n_attention[b], n_ffn[b] = bounds[b + 1] - bounds[b], after[b + 1] - after[b]
        copy(own, own + 8 * (B + 1), 8 * (B + 1))
    copy_rows(model, work, batch.rows, bounds[B], thread, threads)
    if batch.logits:
        classify(model, batch, work, bounds, thread, threads)


@compiled
def embed(model, batch, work, thread, threads):
    """Sum of the tables' rows, LayerNorm, and ELECTRA's projection where there is one."""
    if model.embedding_width == model.width:
        begin, end = share(batch.tokens, thread, threads)
        embed_rows(model, batch, begin, end, work.x.floats + begin * work.x.stride, work.x.stride)
    else:
        for r in range(0, batch.tokens, ROWS_OF_BLOCK):
            rows = min(ROWS_OF_BLOCK, batch.tokens - r)
            begin, end = share(rows, thread, threads)
            place = work.hidden.floats + begin * work.hidden.stride
            embed_rows(model, batch, r + begin, r + end, place, work.hidden.stride)
            wait(work, threads)
            begin, end = share(model.project.count, thread, threads)
            out = work.x.floats + r * work.x.stride
            product(work.hidden, 0, rows, model.project, begin, end, out, work.x.stride, 0)
            wait(work, threads)
    begin, end = share(batch.tokens, thread, threads)
    quantize_rows(model, work.x, begin, end, model.width)
    wait(work, threads)


@compiled
def take_up(model, batch, work, count, thread, threads):
    """The rows that enter layer number batch.begin, which an earlier run computed."""
    begin, end = share(count, thread, threads)
    for row in range(begin, end):
        copy(work.x.floats + row * work.x.stride, batch.begin_rows + 4 * row * model.width, 4 * model.width)
    quantize_rows(model, work.x, begin, end, model.width)
    wait(work, threads)


@compiled
def embed_rows(model, batch, begin, end, out, stride):
    """LayerNorm(word + segment + position) of tokens begin to end, at `out`."""
    E = model.embedding_width
    ids, positions = view(batch.ids, end, np.int32), view(batch.positions, end, np.int32)
    segments = view(batch.segments, end, np.int32)
    for token in range(begin, end):
        place = out + (token - begin) * stride
        x = view(place, E, np.float32)
        word = np.int64(ids[token])
        if model.word_scale:
            scale, row = view(model.word_scale, word + 1, np.float32)[word], view(model.word + word * E, E, np.int8)
            for i in range(E):
                x[i] = np.float32(row[i]) * scale
        else:
            copy(place, model.word + 4 * word * E, 4 * E)
        if model.segment:
            lines.add_line(place, model.segment + 4 * np.int64(segments[token]) * E, E)
        position, norm = model.position + 4 * np.int64(positions[token]) * E, model.embedding_norm
        lines.norm_line(place, position, place, norm.weight, norm.bias, E, model.eps)


@compiled
def quantize_rows(model, rows, begin, end, count):
    """Rows begin to end as an int8 model's products read them."""
    if model.is_int8:
        quantize(rows, begin, end, count)


@compiled
def full_layer(model, number, batch, work, bounds, after, local, scratch, thread, threads):
    """Attention over all rows, the keep rule, and the rest for the kept rows, which move to the front of work.x."""
    layer, rule, rows_of_chunk = view_layer(model, number), view_rule(batch, number), max(work.chunk, batch.longest)
    kept = view(scratch, rows_of_chunk, np.int64)
    mass = view(scratch + 8 * rows_of_chunk, batch.longest, np.float32)
    after[0] = 0
    b = 0
    while b < batch.sequences:
        end = chunk_end(bounds, b, batch.sequences, work.chunk)
        first, rows = bounds[b], bounds[end] - bounds[b]
        qkv, stride = work.query_key_value, work.query_key_value_stride
        from_panel, to_panel = share(layer.query_key_value.count, thread, threads)
        product(work.x, first, rows, layer.query_key_value, from_panel, to_panel, qkv, stride, 0)
        wait(work, threads)
        count = 0
        for s in range(b, end):
            n, offset = bounds[s + 1] - bounds[s], bounds[s] - first
            place = qkv + offset * stride
            if rule.kind == blocks.KEEP_ALL and not batch.masses:
                attend(model, work, place, n, count, local, thread, threads)
                for k in range(n):
                    kept[count + k] = bounds[s] + k
                found = n
            else:
                received = work.received + (s % 2) * work.received_bytes * model.heads
                score(model, work, place, n, local, received, thread, threads)
                wait(work, threads)
                average_mass(received, work.received_bytes, model.heads, n, mass)
                n_initial = initial_length(batch, s)
                found = rules.keep(mass, n, rule, n_initial, bounds[s], kept, count)
                if batch.masses and thread == 0:
                    masses = view(batch.masses + 4 * (number * batch.tokens + bounds[s]), n, np.float32)
                    trace(batch, number, bounds[s], n, mass, kept, count, found, masses)
                merged = -1
                if rule.merge and found < n:
                    merged = rules.merge(mass, n, kept, count, found, bounds[s])
                    found += 1
                    if thread == 0:
                        x = work.x.floats + bounds[s] * work.x.stride
                        rules.merge_rows(x, work.x.stride, model.width, mass, n, merged)
                attend_kept(model, work, place, n, kept, count, found, bounds[s], mass, merged, local, thread, threads)
            count += found
            after[s + 1] = after[s] + found
        wait(work, threads)
        rest_of_layer(model, layer, work, work.x, kept, count, after[b], thread, threads)
        b = end


@compiled
def trace(batch, layer, first, n, mass, kept, at, count, masses):
    """Record one sequence's masses, and which of its rows, first to first + n, are in kept[at : at + count].

    masses: where they go, as (n,) of their type.
    """
    goes_on = view(batch.kept + layer * batch.tokens + first, n, np.uint8)
    for k in range(n):
        masses[k], goes_on[k] = mass[k], 0
    for k in range(at, at + count):
        goes_on[kept[k] - first] = 1


@compiled
def view_layer(model, number):
    return view(model.layer, number + 1, blocks.LAYER)[number]


@compiled
def view_rule(batch, number):
    return view(batch.rule, number + 1, blocks.RULE)[number]


@compiled
def initial_length(batch, sequence):
    """Tokens before layer 0."""
    bounds = view(batch.cu_seqlens, sequence + 2, np.int64)
    return bounds[sequence + 1] - bounds[sequence]


@compiled
def chunk_end(bounds, begin, sequences, most):
    """The sequence behind the chunk that starts with `begin`: at most `most` rows, one sequence at least."""
    end = begin + 1
    while end < sequences and bounds[end + 1] - bounds[begin] <= most:
        end += 1
    return end


@compiled
def attend(model, work, qkv, n, row, local, thread, threads):
    """Contexts of all rows of one sequence, a block of queries at a time. They go to work.context from `row` on.

    local: room for one head's packed keys and, behind them, its values.
    """
    width, stride = 4 * model.head_width, work.query_key_value_stride
    keys, values = local, local + keys_bytes(n, model.head_width)
    begin, end = share(model.heads, thread, threads)
    for h in range(begin, end):
        q, k, v = head_places(model, work, qkv, h, 4)
        probs, out = work.probs + h * work.probs_bytes, work.context.floats + h * width
        pack_keys(k, stride, n, model.head_width, keys)
        pack_values(v, stride, n, model.head_width, values)
        for r in range(0, n, QUERIES):
            rows, here = min(QUERIES, n - r), q + r * stride
            attention_probs(here, stride, rows, keys, n, model.head_width, model.head_scale, work.zeros, probs)
            place = out + (row + r) * work.context.stride
            attention_context(probs, rows, n, values, width, model.head_width, work.zeros, place, work.context.stride)


@compiled
def head_places(model, work, qkv, h, item_bytes):
    """Addresses of one head's queries, keys and values, of so many bytes each."""
    part, width = work.query_key_value_stride // 3, item_bytes * model.head_width
    return qkv + h * width, qkv + part + h * width, qkv + 2 * part + h * width


@compiled
def score(model, work, qkv, n, keys, received, thread, threads):
    """Probabilities of one sequence, kept in work.probs, and what each key receives from all queries, head by head."""
    stride, line = work.query_key_value_stride, probs_stride(n)
    begin, end = share(model.heads, thread, threads)
    for h in range(begin, end):
        q, k, _ = head_places(model, work, qkv, h, 4)
        probs, total = work.probs + h * work.probs_bytes, received + h * work.received_bytes
        pack_keys(k, stride, n, model.head_width, keys)
        clear(total, n)
        for r in range(0, n, QUERIES):
            rows, here, place = min(QUERIES, n - r), q + r * stride, probs + r * line
            attention_probs(here, stride, rows, keys, n, model.head_width, model.head_scale, work.zeros, place)
            add_mass(place, rows, n, total)


@compiled
def attend_kept(model, work, qkv, n, kept, row, count, first, shares, merged, values, thread, threads):
    """Contexts of one sequence's kept rows from the probabilities that `score` left.

    The rows are kept[row : row + count], of which `first` is the sequence's row 0; work.context has them from `row` on.
    merged: the place of the one that stands for the removed ones, whose shares in it `shares` has, or -1. values: room
    for one head's values.
    """
    line, width = probs_stride(n), 4 * model.head_width
    begin, end = share(model.heads, thread, threads)
    for h in range(begin, end):
        _, _, v = head_places(model, work, qkv, h, 4)
        pack_values(v, work.query_key_value_stride, n, model.head_width, values)
        probs = work.probs + h * work.probs_bytes
        if merged >= 0:
            rules.merge_rows(probs, line, n, shares, n, merged)
        for at in range(count):
            source = kept[row + at] - first
            if source != at:
                copy(probs + at * line, probs + source * line, 4 * n)
        place = work.context.floats + row * work.context.stride + h * width
        attention_context(probs, count, n, values, width, model.head_width, work.zeros, place, work.context.stride)


@compiled
def rest_of_layer(model, layer, work, source, kept, count, target, thread, threads):
    """Output projection, feed-forward and the two residual norms of `count` contexts.

    Their residuals are rows kept[:count] of `source`; the results are rows target, target + 1, ... of work.x.
    """
    D, room, stride = model.width, work.room, work.room_stride
    begin, end = share(count, thread, threads)
    quantize_rows(model, work.context, begin, end, model.heads * model.head_width)
    wait(work, threads)
    from_panel, to_panel = share(layer.attention_output.count, thread, threads)
    product(work.context, 0, count, layer.attention_output, from_panel, to_panel, room, stride, 0)
    wait(work, threads)
    norm = layer.attention_norm
    for row in range(begin, end):
        residual, out = source.floats + kept[row] * source.stride, work.attended.floats + row * work.attended.stride
        lines.norm_line(room + row * stride, residual, out, norm.weight, norm.bias, D, model.eps)
    quantize_rows(model, work.attended, begin, end, D)
    wait(work, threads)
    for r in range(0, count, ROWS_OF_BLOCK):
        feed_forward(model, layer, work, r, min(ROWS_OF_BLOCK, count - r), target + r, thread, threads)


@compiled
def feed_forward(model, layer, work, first, rows, target, thread, threads):
    """LayerNorm(x + outer(activation(inner(x)))) of rows first to first + rows of work.attended, at `target` of work.x."""
    D, hidden, room, stride = model.width, work.hidden, work.room, work.room_stride
    from_panel, to_panel = share(layer.inner.count, thread, threads)
    x, inner = work.attended, layer.inner
    product(x, first, rows, inner, from_panel, to_panel, hidden.floats, hidden.stride, model.activation)
    wait(work, threads)
    begin, end = share(rows, thread, threads)
    quantize_rows(model, hidden, begin, end, layer.outer.inputs)
    wait(work, threads)
    from_panel, to_panel = share(layer.outer.count, thread, threads)
    product(hidden, 0, rows, layer.outer, from_panel, to_panel, room, stride, 0)
    wait(work, threads)
    norm = layer.outer_norm
    for row in range(begin, end):
        residual = x.floats + (first + row) * x.stride
        out = work.x.floats + (target + row) * work.x.stride
        lines.norm_line(room + row * stride, residual, out, norm.weight, norm.bias, D, model.eps)
    quantize_rows(model, work.x, target + begin, target + end, D)
    wait(work, threads)


@compiled
def first_row_layer(model, number, batch, work, bounds, after, local, scratch, thread, threads):
    """The last layer for a classifier: one query row of each sequence against all its keys. Exact."""
    layer, B = view_layer(model, number), batch.sequences
    kept = view(scratch, B, np.int64)
    begin, end = share(B, thread, threads)
    gather_first(model, work, bounds, begin, end)
    for s in range(B):
        kept[s] = s
        after[s + 1] = s + 1
    after[0] = 0
    wait(work, threads)
    third = layer.query_key_value.count // 3
    from_panel, to_panel = share(third, thread, threads)
    queries, query_stride = work.room, work.room_stride
    product(work.first, 0, B, layer.query_key_value, from_panel, to_panel, queries, query_stride, 0)
    from_panel, to_panel = share(2 * third, thread, threads)
    from_head, to_head = share(model.heads, thread, threads)
    b = 0
    while b < B:
        next_ = chunk_end(bounds, b, B, work.chunk)
        rows, qkv, stride = bounds[next_] - bounds[b], work.query_key_value, work.query_key_value_stride
        matrix = layer.query_key_value
        product(work.x, bounds[b], rows, matrix, third + from_panel, third + to_panel, qkv, stride, 0)
        wait(work, threads)
        for s in range(b, next_):
            n, place = bounds[s + 1] - bounds[s], qkv + (bounds[s] - bounds[b]) * stride
            for h in range(from_head, to_head):
                _, k, v = head_places(model, work, place, h, 4)
                q = queries + s * query_stride + 4 * h * model.head_width
                out = work.context.floats + s * work.context.stride + 4 * h * model.head_width
                probs = work.probs + h * work.probs_bytes
                pack_keys(k, stride, n, model.head_width, local)
                attention_probs(q, 0, 1, local, n, model.head_width, model.head_scale, work.zeros, probs)
                attention_context(probs, 1, n, v, stride, model.head_width, work.zeros, out, 0)
        wait(work, threads)
        b = next_
    rest_of_layer(model, layer, work, work.first, kept, B, 0, thread, threads)


@compiled
def gather_first(model, work, bounds, begin, end):
    """Row 0 of sequences begin to end, from work.x to work.first."""
    for s in range(begin, end):
        x, target = work.x.floats + bounds[s] * work.x.stride, work.first.floats + s * work.first.stride
        copy(target, x, 4 * model.width)
    quantize_rows(model, work.first, begin, end, model.width)


@compiled
def copy_rows(model, work, out, count, thread, threads):
    """What a layer left in work.x, (count, D) float32, to the address `out` unless it is 0."""
    begin, end = share(count, thread, threads)
    if out:
        for row in range(begin, end):
            copy(out + 4 * row * model.width, work.x.floats + row * work.x.stride, 4 * model.width)


@compiled
def classify(model, batch, work, bounds, thread, threads):
    """The head on each sequence's first row, always in float32: (B, labels) logits."""
    B, labels, hidden, room, stride = batch.sequences, model.labels, work.hidden, work.room, work.room_stride
    for r in range(0, B, ROWS_OF_BLOCK):
        rows = min(ROWS_OF_BLOCK, B - r)
        begin, end = share(rows, thread, threads)
        gather_first(model, work, bounds, r + begin, r + end)
        wait(work, threads)
        from_panel, to_panel = share(model.head_dense.count, thread, threads)
        dense, activation = model.head_dense, model.head_activation
        product(work.first, r, rows, dense, from_panel, to_panel, hidden.floats, hidden.stride, activation)
        wait(work, threads)
        from_panel, to_panel = share(model.head_out.count, thread, threads)
        product(hidden, 0, rows, model.head_out, from_panel, to_panel, room, stride, 0)
        wait(work, threads)
        for row in range(begin, end):
            copy(batch.logits + 4 * (r + row) * labels, room + row * stride, 4 * labels)
        wait(work, threads)
