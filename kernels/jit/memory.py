"""Memory by address, and threads that wait for each other: what Numba has no words for."""

from __future__ import annotations

from llvmlite import ir
from numba import carray, njit
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from .vector import I8, I32, I64

# For functions that only compiled code calls: without the wrappers that would let Python call them.
compiled = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

SPINS = 4096  # polls of the barrier, some 50 us, before a waiting thread gives its core away


@intrinsic
def pointer(typingctx, address):
    """An int64 address as a void pointer."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), code


@compiled
def view(address, count, dtype):
    """A 1-D array over memory that somebody else owns."""
    return carray(pointer(address), count, dtype)


@compiled
def record(address, dtype):
    """One record of `blocks` at this address."""
    return carray(pointer(address), 1, dtype)[0]


@intrinsic
def copy(typingctx, target, source, size):
    """Copy `size` bytes between places that do not overlap."""

    def code(context, builder, signature, arguments):
        to, source, size = arguments
        cgutils.raw_memcpy(builder, *(builder.inttoptr(at, I8.as_pointer()) for at in (to, source)), size, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def _arrive(typingctx, address):
    """Atomically add one to the int64 at `address`; returns what was there."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "seq_cst")

    return types.int64(types.int64), code


@intrinsic
def _read(typingctx, address):
    """The int64 at `address`, written by another thread perhaps."""

    def code(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), code


@intrinsic
def _write(typingctx, address, value):
    """Write an int64 for other threads to see."""

    def code(context, builder, signature, arguments):
        place = builder.inttoptr(arguments[0], I64.as_pointer())
        builder.store_atomic(arguments[1], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _yield_core(typingctx, function):
    """Call the operating system's `int f(void)` at this address, which lets another thread run."""

    def code(context, builder, signature, arguments):
        kind = ir.FunctionType(I32, [])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), code


@compiled
def wait(work, threads):
    """Return when all threads of the team have come here: a counter and a generation, both int64, at work.barrier."""
    if threads == 1:
        return
    counter, generation = work.barrier, work.barrier + 64  # a cache line each
    now = _read(generation)
    if _arrive(counter) == threads - 1:
        _write(counter, 0)
        _write(generation, now + 1)
        return
    spins = 0
    while _read(generation) == now:
        spins += 1
        if spins > SPINS:
            _yield_core(work.yield_core)


@compiled
def share(count, thread, threads):
    """The part of range(count) that this thread does: begin, end."""
    return count * thread // threads, count * (thread + 1) // threads
