"""The compiled kernels: an object file for each part, found in the cache or compiled once, and called through ctypes.

Numba is needed to compile only; a process that finds the object file loads neither Numba nor a compiler, and a bundle's
shared objects need no LLVM either. Calls release the GIL. The operations below have the names and arguments of
`minilpt.reference`; the engine calls `run` itself.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import blocks, bundled, packing
from .isa import LANES, Rung, chosen
from .packing import aligned

Float32 = NDArray[np.float32]

CACHE_VARIABLE = "MINILPT_CACHE_DIR"
PARTS = ("float", "integer")  # "integer": of integer-only models, which the others never need
ENTRY = "minilpt_kernels"  # an object file's one function
# Numba's convention: (result, exception, arguments...) -> status. Ours has no result and raises nothing.
_CALL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def run(operation: int, *arguments: int) -> None:
    """One operation of `blocks` on numbers, addresses and byte strides. Compiles at the first call in a new cache."""
    prepared(operation, *arguments)()


def prepared(operation: int, *arguments: int, memory: object = None) -> Callable[[], None]:
    """What `run` would do, for a later call: whatever can fail in Python has not by then. memory: kept until then."""
    block = np.array(arguments + (0,) * (10 - len(arguments)), np.int64)
    ignored = (ctypes.c_void_p * 2)()
    place = ctypes.addressof(ignored)
    call = place, place + 8, operation, block.ctypes.data
    return partial(_done, entry(part_of(operation)), call, (block, ignored, memory))


def _done(function: Any, call: tuple[int, ...], memory: object) -> None:
    status = function(*call)
    assert status == 0, f"operation {call[2]} ended with {status}"


@cache
def yield_address() -> int:
    """The operating system's function that lets another thread run."""
    windows = os.name == "nt"
    function = ctypes.CDLL("kernel32").SwitchToThread if windows else ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def cache_folder() -> Path:
    """Where object files are kept: MINILPT_CACHE_DIR, else `minilpt` in the user's cache folder.

    A user without a home, as a container's number may be, has a path where nothing can be: no folder `~` appears in the
    working folder, and no code is loaded from a place that others write to.
    """
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    home = os.path.expanduser("~")
    return Path(base or (Path(os.devnull, "no home") if home == "~" else Path(home, ".cache")), "minilpt")


def part_of(operation: int) -> str:
    """The part that has this operation of `blocks`."""
    return "integer" if operation >= blocks.RUN_INTEGER_FORWARD else "float"


def cache_file(rung: Rung, part: str = "float") -> Path:
    """A part's object file for a rung, named by the sources, the instruction set and llvmlite's version.

    Numba's own version is left out: reading it takes 15 ms at every start, and each minor version of Numba needs a
    llvmlite of its own. Between its patch releases an object file stays in use.
    """
    import llvmlite
    from llvmlite import binding

    facts = [rung.name, binding.get_process_triple(), llvmlite.__version__]
    digest = hashlib.sha256("\n".join(facts).encode() + bundled.sources())
    return cache_folder() / f"{part}-{rung.name}-{digest.hexdigest()[:16]}.bin"


def kernel_file(part: str) -> Path:
    """What `entry` loads for the chosen rung: the bundle's file, else the cache's."""
    return cache_file(chosen(), part) if bundled.rungs() is None else bundled.path(part, chosen().name)


def warm_up(part: str = "float") -> Path:
    """Load a part's kernels, compiling them if the cache has none for this rung. Returns the object file's path."""
    entry(part)
    return kernel_file(part)


@cache
def entry(part: str) -> Any:
    """The part's compiled function. ValueError where a bundle has none that this machine loads."""
    if bundled.rungs() is None:
        return _CALL(_linked_here(part))
    file = bundled.path(part, chosen().name)
    try:
        return _CALL((ENTRY, ctypes.CDLL(str(file))))
    except OSError as error:
        raise ValueError(f"{file}: the system does not load it: {error}") from None


def _linked_here(part: str) -> int:
    """The address of the object file's function, in memory that LLVM's own linker has filled."""
    from llvmlite import binding

    code = _object_file(part)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address: int = engine.get_function_address(ENTRY)
    engine.detach()  # never freed: at the interpreter's end a daemon thread may be running the code
    return address


def stored(rung: Rung, part: str) -> bytes | None:
    """The part's object file for a rung, None where the cache has none."""
    return _read_whole(cache_file(rung, part))


def store(rung: Rung, part: str, code: bytes) -> None:
    """Put an object file into the cache, or warn that it cannot be kept."""
    path = cache_file(rung, part)
    try:
        _write_whole(path, code)
    except OSError as error:
        warnings.warn(
            f"{path.parent}: compiled kernels cannot be kept here ({error.strerror}), so every process compiles "
            f"them anew; set {CACHE_VARIABLE} to a folder that can be written",
            stacklevel=2,
        )


def _object_file(part: str) -> bytes:
    code = stored(chosen(), part)
    if code is None:
        import logging

        from .jit.build import build

        logging.getLogger("minilpt").info(
            "compiling the %s kernels for %s, once for this machine: some 20 seconds", part, chosen().name
        )
        code = build(part)
        store(chosen(), part, code)
    return code


def _read_whole(path: Path) -> bytes | None:
    """The file's content behind its SHA-256; None if it is missing, cut short or altered."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[: bundled.DIGEST_BYTES], content[bundled.DIGEST_BYTES :]
    return code if hashlib.sha256(code).digest() == digest else None


def _write_whole(path: Path, code: bytes) -> None:
    """Write beside it, then rename: another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            file.write(hashlib.sha256(code).digest() + code)
            file.close()
            os.replace(file.name, path)
        except BaseException:  # a full disk above all: nothing may be left that keeps it full
            Path(file.name).unlink(missing_ok=True)
            raise


def padded(count: int, step: int = LANES) -> int:
    """The next multiple of step."""
    return -(-count // step) * step


def linear(x: Float32, weight: Float32, bias: Float32) -> Float32:
    """x W^T + b. x: (N, K), weight: (M, K), bias: (M,). Returns (N, M) float32."""
    return _product(x, packing.pack(weight, bias, chosen()))


def linear_int8(x: Float32, weight: NDArray[np.int8], scale: Float32, bias: Float32) -> Float32:
    """x W^T + b with rows of x quantised one by one. weight: (M, K) int8, scale, bias: (M,). Returns (N, M) float32."""
    return _product(x, packing.pack_int8(weight, scale, bias, chosen()))


def _product(x: Float32, packed: packing.Packed) -> Float32:
    N, K = x.shape
    rung, wide = chosen(), packed.start.size
    x, out = np.ascontiguousarray(x), np.empty((N, wide), np.float32)
    integers, factors = aligned(N * rung.items(K) * rung.item_bytes), np.empty(N, np.float32)
    places = (x.ctypes.data, 4 * K, integers.ctypes.data, rung.items(K) * rung.item_bytes, factors.ctypes.data)
    rows = np.array([places], blocks.ROWS)
    matrix = np.array([packed.record()], blocks.MATRIX)
    if matrix["is_int8"][0]:
        run(blocks.RUN_QUANTIZE, rows.ctypes.data, N, K)
    run(blocks.RUN_PRODUCT, rows.ctypes.data, matrix.ctypes.data, N, out.ctypes.data, 4 * wide, blocks.NONE)
    return out[:, : packed.outputs]


def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    """Rows to mean 0 and variance 1, then scaled and shifted. x: (N, D); weight, bias: (D,). Returns (N, D) float32."""
    out, nothing, epsilon = np.array(x, np.float32), np.zeros(x.shape[1], np.float32), np.array([eps], np.float32)
    weight, bias = (np.ascontiguousarray(line, np.float32) for line in (weight, bias))
    for row in out:
        lines = (row, nothing, row, weight, bias)
        run(blocks.RUN_NORM, *(line.ctypes.data for line in lines), x.shape[1], epsilon.ctypes.data)
    return out


def _activated(x: Float32, activation: int) -> Float32:
    out = np.zeros(padded(x.size), np.float32)
    out[: x.size] = x.ravel()
    run(blocks.RUN_ACTIVATE, out.ctypes.data, out.size, activation)
    return out[: x.size].reshape(x.shape)


def gelu(x: Float32) -> Float32:
    """x Phi(x), exact erf: the form, and the error, of `elementwise.gelu`."""
    return _activated(x, blocks.GELU)


def gelu_tanh(x: Float32) -> Float32:
    """The tanh form of GELU ("gelu_new"; arXiv 1606.08415, section 2)."""
    return _activated(x, blocks.GELU_TANH)


def relu(x: Float32) -> Float32:
    """max(x, 0)."""
    return _activated(x, blocks.RELU)


def tanh(x: Float32) -> Float32:
    """The hyperbolic tangent."""
    return _activated(x, blocks.TANH)


def softmax(x: Float32) -> Float32:
    """Rows that sum to one, along the last axis. x: (N, n). Returns (N, n) float32."""
    out, scale = np.array(x, np.float32), np.ones(1, np.float32)
    for row in out:
        run(blocks.RUN_SOFTMAX, row.ctypes.data, len(row), scale.ctypes.data)
    return out


def probs_stride_bytes(n: int) -> int:
    """Bytes of one row of n probabilities, as `jit.attention.probs_stride` says."""
    return 4 * (padded(n) + LANES)


def attention_probs(q: Float32, k: Float32, heads: int) -> Float32:
    """softmax(Q_h K_h^T / sqrt(D/H)) over keys. q: (m, D), k: (n, D). Returns (H, m, n) float32; rows sum to one."""
    m, n, d, columns = len(q), len(k), q.shape[1] // heads, chosen().columns
    q, k = _by_head(q, heads), _by_head(k, heads)
    probs = np.empty((heads, m, probs_stride_bytes(n) // 4), np.float32)
    line, room = 4 * q.shape[2], aligned(4 * padded(n, columns) * q.shape[2])
    constants = np.zeros(columns + 1, np.float32)
    constants[columns] = 1 / math.sqrt(d)
    for rows, keys, out in zip(q, k, probs, strict=True):
        places = (rows.ctypes.data, line, m, keys.ctypes.data, line, n, q.shape[2])
        run(blocks.RUN_PROBS, *places, constants.ctypes.data, out.ctypes.data, room.ctypes.data)
    return probs[:, :, :n]


def attention_mass(probs: Float32) -> Float32:
    """What each key receives: summed over queries, averaged over heads. probs: (H, m, n). Returns (n,) float32."""
    H, m, n = probs.shape
    strided, received, mass = _strided(probs), np.empty((H, n), np.float32), np.empty(n, np.float32)
    head_bytes = strided.strides[0]
    run(blocks.RUN_MASS, strided.ctypes.data, H, m, n, head_bytes, received.ctypes.data, 4 * n, mass.ctypes.data)
    return mass


def attention_context(probs: Float32, v: Float32) -> Float32:
    """P_h V_h, heads side by side. probs: (H, m, n), v: (n, D). Returns (m, D) float32."""
    H, m, n = probs.shape
    strided, values = _strided(probs), _by_head(v, H)
    wide, zeros = values.shape[2], np.zeros(chosen().columns, np.float32)
    out = np.empty((H, m, wide), np.float32)
    for head in range(H):
        places = (strided[head].ctypes.data, m, n, values[head].ctypes.data, 4 * wide, wide)
        run(blocks.RUN_CONTEXT, *places, zeros.ctypes.data, out[head].ctypes.data, 4 * wide)
    return np.ascontiguousarray(out[:, :, : v.shape[1] // H].transpose(1, 0, 2).reshape(m, -1))


def merged_row(rows: Float32, share: Float32) -> Float32:
    """The sum of rows times their shares: (K,) from rows (n, K) and share (n,), float32, in the order of the rows."""
    first, copied = int(np.argmax(share != 0)), np.array(rows, np.float32, order="C")
    share = np.ascontiguousarray(share, np.float32)
    places = (copied.ctypes.data, copied.strides[0], copied.shape[1], share.ctypes.data, len(share), first)
    run(blocks.RUN_MERGE, *places)
    return copied[first]


def keep(mass: Float32, rule: tuple[int, int, int, int, float], n_initial: int) -> NDArray[np.int64]:
    """Places of the kept tokens under a rule's step (kind, denominator, limit, merge, value). mass: (n,) float32."""
    record = np.array([rule], blocks.RULE)
    kept, count, mass = np.empty(len(mass), np.int64), np.zeros(1, np.int64), np.ascontiguousarray(mass)
    places = (mass.ctypes.data, len(mass), record.ctypes.data, n_initial, kept.ctypes.data, count.ctypes.data)
    run(blocks.RUN_KEEP, *places)
    return kept[: count[0]]


def _by_head(x: Float32, heads: int) -> Float32:
    """(n, D) to (H, n, D/H padded with zeros to whole vectors)."""
    n, d = len(x), x.shape[1] // heads
    out = np.zeros((heads, n, padded(d)), np.float32)
    out[:, :, :d] = x.reshape(n, heads, d).transpose(1, 0, 2)
    return out


def _strided(probs: Float32) -> Float32:
    """(H, m, n) with rows as far apart as the kernels want them."""
    H, m, n = probs.shape
    out = np.zeros((H, m, probs_stride_bytes(n) // 4), np.float32)
    out[:, :, :n] = probs
    return out
