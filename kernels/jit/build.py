"""Compile the kernels of the chosen rung to an object file for each part: the only place where Numba works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import binding
from numba import njit, types
from numba.core import config
from numba.core.registry import cpu_target

from .. import blocks
from ..isa import chosen
from . import integer_lines, lines, products
from .attention import add_mass, attention_context, attention_probs, average_mass, clear, pack_keys
from .encoder import forward
from .integer_encoder import integer_forward
from .integer_products import integer_product
from .integer_rules import keep as keep_integer
from .memory import record, view
from .products import product
from .rules import keep, merge_rows

COLUMNS = chosen().columns
ENTRY = "minilpt_kernels"
NO_DESTRUCTOR = "define void @NRT_MemInfo_call_dtor(ptr %0) { ret void }"  # views own nothing, so none is ever called


def _run(operation, arguments):
    """One operation of `blocks`; arguments: the address of (10,) int64: numbers, addresses and byte strides."""
    a = view(arguments, 10, np.int64)
    if operation == blocks.RUN_FORWARD:
        forward(a[0], a[1], a[2], a[3], a[4])
    elif operation == blocks.RUN_PRODUCT:
        rows, matrix = record(a[0], blocks.ROWS), record(a[1], blocks.MATRIX)
        product(rows, 0, a[2], matrix, 0, matrix.count, a[3], a[4], a[5])
    elif operation == blocks.RUN_QUANTIZE:
        products.quantize(record(a[0], blocks.ROWS), 0, a[1], a[2])
    elif operation == blocks.RUN_NORM:
        lines.norm_line(a[0], a[1], a[2], a[3], a[4], a[5], view(a[6], 1, np.float32)[0])
    elif operation == blocks.RUN_ACTIVATE:
        products.activate(a[0], a[1], a[2])
    elif operation == blocks.RUN_PROBS:
        pack_keys(a[3], a[4], a[5], a[6], a[9])
        zeros, scale = a[7], view(a[7] + 4 * COLUMNS, 1, np.float32)[0]
        attention_probs(a[0], a[1], a[2], a[9], a[5], a[6], scale, zeros, a[8])
    elif operation == blocks.RUN_MASS:
        for h in range(a[1]):
            clear(a[5] + h * a[6], a[3])
            add_mass(a[0] + h * a[4], a[2], a[3], a[5] + h * a[6])
        average_mass(a[5], a[6], a[1], a[3], view(a[7], a[3], np.float32))
    elif operation == blocks.RUN_CONTEXT:
        attention_context(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8])
    elif operation == blocks.RUN_MERGE:
        merge_rows(a[0], a[1], a[2], view(a[3], a[4], np.float32), a[4], a[5])
    elif operation == blocks.RUN_SOFTMAX:
        lines.softmax_line(a[0], a[1], view(a[2], 1, np.float32)[0])
    elif operation == blocks.RUN_KEEP:
        count = view(a[5], 1, np.int64)
        mass, kept = view(a[0], a[1], np.float32), view(a[4], a[1], np.int64)
        count[0] = keep(mass, a[1], record(a[2], blocks.RULE), a[3], 0, kept, 0)


def _run_integer(operation, arguments):
    """The same for the operations of integer-only models."""
    a = view(arguments, 10, np.int64)
    if operation == blocks.RUN_INTEGER_FORWARD:
        integer_forward(a[0], a[1], a[2], a[3], a[4])
    elif operation == blocks.RUN_INTEGER_SUMS:
        matrix, ending = record(a[3], blocks.MATRIX), record(a[6], blocks.ENDING)
        integer_product(a[0], a[1], a[2], matrix, 0, matrix.count, a[4], a[5], ending, a[7])
    elif operation == blocks.RUN_REQUANTIZE:
        integer_lines.requantize_line(a[0], a[1], record(a[2], blocks.DYADIC), a[3], a[4])
    elif operation == blocks.RUN_ADD_REQUANTIZED:
        factor, residual_factor = record(a[1], blocks.DYADIC), record(a[3], blocks.DYADIC)
        integer_lines.add_line(a[0], factor, a[2], residual_factor, a[4], a[5])
    elif operation == blocks.RUN_INTEGER_ACTIVATE:
        integer_lines.end_line(a[0], a[1], 0, record(a[2], blocks.ENDING), a[3])
    elif operation == blocks.RUN_INTEGER_NORM:
        total = integer_lines.sum_line(a[0], a[1])
        integer_lines.norm_line(a[0], total, a[1], record(a[2], blocks.INTEGER_NORM), 0, 1, a[3])
    elif operation == blocks.RUN_INTEGER_SOFTMAX:
        integer_lines.softmax_line(a[0], a[1], record(a[2], blocks.EXP), a[3], a[4], a[5], a[6])
    elif operation == blocks.RUN_INTEGER_KEEP:
        count = view(a[5], 1, np.int64)
        mass, kept = view(a[0], a[1], np.int64), view(a[4], a[1], np.int64)
        count[0] = keep_integer(mass, a[1], record(a[2], blocks.INTEGER_RULE), a[3], 0, kept, 0)


ENTRIES = {"float": _run, "integer": _run_integer}


def build(part: str) -> bytes:
    """A part's object file for `isa.chosen()`. It holds one function, ENTRY, which `minilpt.kernels.compiled` calls."""
    return _machine().emit_object(optimised(part))


def optimised(part: str) -> Any:
    """What the object file is made of, as an LLVM module."""
    with _numba_only_lowers():
        kind = types.void(types.int64, types.int64)
        run = njit(kind, error_model="numpy", no_cpython_wrapper=True)(ENTRIES[part])
        text = run.inspect_llvm(run.signatures[0])
    (result,) = run.overloads.values()
    module = binding.parse_assembly(text)
    module.link_in(binding.parse_assembly(NO_DESTRUCTOR))
    _keep_only(module, result.fndesc.llvm_func_name)
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    builder = binding.create_pass_builder(_machine(), tuning)
    builder.getModulePassManager().run(module, builder)
    return module


def _machine() -> Any:
    rung = chosen()
    return binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=rung.cpu, features=rung.features, opt=3, reloc="pic", codemodel="jitdefault"
    )


@contextmanager
def _numba_only_lowers() -> Iterator[None]:
    """Numba optimises every function once more for each of its callers; optimising the whole once takes a fifth."""
    cpu_target.target_context.codegen()  # made with the level that it shall have for everybody else
    level = config.OPT
    config.OPT = type(level)(0)
    try:
        yield
    finally:
        config.OPT = level


def _keep_only(module: Any, entry: str) -> None:
    """Rename one function to ENTRY and hide the rest, so that what it does not need is dropped."""
    for value in (*module.functions, *module.global_variables):
        if value.name == entry:
            value.name = ENTRY
        elif not value.is_declaration:
            value.linkage = "internal"
