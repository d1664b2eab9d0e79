"""Vector code as LLVM IR: the arithmetic that the intrinsics of this folder share.

Everything works on vectors of 16 float32 lanes in a fixed order, so results do not depend on how LLVM splits them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from ..elementwise import ERFC_POLYNOMIAL, ERFC_SLOPE
from ..isa import LANES, chosen

F32, I32, I64, I8, I16 = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.IntType(16)
VECTOR, INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)
Value = Any  # llvmlite ships no types

# 2^r = sum of these times powers of r, lowest first, on [-1/2, 1/2]: relative error at most 1.9e-9 in exact arithmetic
# and 1e-7 in float32 (benchmarks/fit_exp2.py).
EXP2_POLYNOMIAL = (
    1.0000000005541823,
    0.6931472057375819,
    0.2402264689052251,
    0.055503287761126244,
    0.009618488966937011,
    0.001339993161108357,
    0.00015345810196156634,
)
ROUNDER = 1.5 * 2**23  # a float32 plus this has its nearest integer in its low bits
LOWEST = -127.0  # 2 to this is 0 here: float32's smallest normal number is 2^-126
LOG2_E = math.log2(math.e)


class Emitter:
    """Appends instructions to one LLVM function through an IRBuilder."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder

    def call(self, name: str, result: Value, arguments: Sequence[Value]) -> Value:
        """Call the LLVM intrinsic `name`."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)

    def splat(self, value: Value | float, kind: ir.VectorType = VECTOR) -> Value:
        """The same number in every lane."""
        if isinstance(value, (int, float)):
            return ir.Constant(kind, [value] * kind.count)
        single = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
        return self.builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), zeros)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the rung has the instruction."""
        if chosen().fma:
            return self.call("llvm.fma.v16f32", VECTOR, [a, b, c])
        return self.builder.fadd(self.builder.fmul(a, b), c)

    def larger(self, a: Value, b: Value) -> Value:
        """Lane by lane; NaN in `a` stays."""
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), b, a)

    def pointer(self, address: Value, kind: Value, offset: Value | int = 0) -> Value:
        """A pointer to `kind` at `address` plus `offset` bytes."""
        if isinstance(offset, int):
            offset = ir.Constant(I64, offset)
        return self.builder.inttoptr(self.builder.add(address, offset), kind.as_pointer())

    def load(self, address: Value, kind: Value, offset: Value | int = 0, align: int = 4) -> Value:
        """Read one `kind`."""
        return self.builder.load(self.pointer(address, kind, offset), align=align)

    def store(self, value: Value, address: Value, offset: Value | int = 0) -> None:
        """Write one value."""
        self.builder.store(value, self.pointer(address, value.type, offset), align=4)

    def prefetch(self, address: Value, offset: int) -> None:
        """Ask for one cache line, to be read later; any address will do."""
        flags = [ir.Constant(I32, value) for value in (0, 2, 1)]  # to read, into the second level, data
        self.call("llvm.prefetch.p0", ir.VoidType(), [self.pointer(address, I8, offset), *flags])

    def loop(
        self, count: Value, state: Sequence[Value], body: Callable[[Value, list[Value]], list[Value]]
    ) -> list[Value]:
        """`for i in range(count): state = body(i, state)`; returns the last state. count, i: int64."""
        builder = self.builder
        before, head = builder.block, builder.append_basic_block("head")
        inside, after = builder.append_basic_block("body"), builder.append_basic_block("after")
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(I64)
        phis = [builder.phi(value.type) for value in state]
        for phi, value in zip([index, *phis], [ir.Constant(I64, 0), *state], strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
        builder.position_at_end(inside)
        changed = body(index, list(phis))
        following = builder.add(index, ir.Constant(I64, 1))
        for phi, value in zip([index, *phis], [following, *changed], strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return phis

    def lanes_below(self, at: Value, end: Value) -> Value:
        """Which of the lanes at, at + 1, ... are before `end` (int64)."""
        left = self.builder.trunc(self.builder.sub(end, at), I32)
        return self.builder.icmp_signed("<", ir.Constant(INTEGERS, list(range(LANES))), self.splat(left, INTEGERS))

    def load_some(self, mask: Value, address: Value, offset: Value, otherwise: float = 0.0) -> Value:
        """The masked lanes of a float32 vector; the others are not read."""
        pointer = self.pointer(address, VECTOR, offset)
        arguments = [pointer, ir.Constant(I32, 4), mask, self.splat(otherwise)]
        return self.call("llvm.masked.load.v16f32.p0", VECTOR, arguments)

    def store_some(self, mask: Value, value: Value, address: Value, offset: Value) -> None:
        """Write the masked lanes only."""
        pointer = self.pointer(address, VECTOR, offset)
        self.call("llvm.masked.store.v16f32.p0", ir.VoidType(), [value, pointer, ir.Constant(I32, 4), mask])

    def sum(self, value: Value) -> Value:
        """Of the lanes, in one order: the upper half is added to the lower until one lane is left."""
        half = LANES
        while half > 1:
            half //= 2
            low, high = (ir.Constant(ir.VectorType(I32, half), [*range(at, at + half)]) for at in (0, half))
            nothing = ir.Constant(value.type, ir.Undefined)
            parts = (self.builder.shuffle_vector(value, nothing, lanes) for lanes in (low, high))
            value = self.builder.fadd(*parts)
        return self.builder.extract_element(value, ir.Constant(I32, 0))

    def largest(self, value: Value) -> Value:
        """Of the lanes; a NaN loses."""
        return self.call("llvm.vector.reduce.fmax.v16f32", F32, [value])

    def exp2(self, x: Value) -> Value:
        """2^x for x <= 0, to 1e-7 relative; below 2^-126 less exact, from x = -127 down 0."""
        builder = self.builder
        bounded = self.larger(x, self.splat(LOWEST))
        shifted = builder.fadd(bounded, self.splat(ROUNDER))
        rest = builder.fsub(bounded, builder.fsub(shifted, self.splat(ROUNDER)))
        value = builder.bitcast(self._polynomial(EXP2_POLYNOMIAL, rest), INTEGERS)
        power = builder.shl(builder.bitcast(shifted, INTEGERS), self.splat(23, INTEGERS))
        return builder.bitcast(builder.add(value, power), VECTOR)

    def gelu(self, x: Value) -> Value:
        """x Phi(x) in the form of `kernels.elementwise.gelu`, which states the error."""
        builder = self.builder
        size = self.call("llvm.fabs.v16f32", VECTOR, [x])
        size = builder.select(builder.fcmp_ordered(">", size, self.splat(16.0)), self.splat(16.0), size)
        slope = self.splat(float(ERFC_SLOPE) * math.sqrt(0.5))
        t = builder.fdiv(self.splat(1.0), self.fma(size, slope, self.splat(1.0)))
        tail = builder.fmul(self._polynomial(ERFC_POLYNOMIAL, t), t)
        tail = builder.fmul(tail, self.exp2(builder.fmul(builder.fmul(size, size), self.splat(-LOG2_E / 2))))
        tail = builder.fmul(tail, builder.fmul(size, self.splat(0.5)))
        return builder.fsub(self.larger(x, self.splat(0.0)), tail)

    def gelu_tanh(self, x: Value) -> Value:
        """0.5 x (1 + tanh u) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), with the larger power outside."""
        builder = self.builder
        cube = builder.fmul(builder.fmul(x, x), x)
        u = builder.fmul(self.fma(cube, self.splat(0.044715), x), self.splat(2 * math.sqrt(2 / math.pi)))
        power = self.exp2(builder.fmul(self.call("llvm.fabs.v16f32", VECTOR, [u]), self.splat(-LOG2_E)))
        below = builder.fdiv(x, builder.fadd(self.splat(1.0), power))
        negative = builder.fcmp_ordered("<", u, self.splat(0.0))
        return builder.select(negative, builder.fmul(below, power), below)

    def tanh(self, x: Value) -> Value:
        """sign(x) (1 - p) / (1 + p), p = exp(-2 |x|). Absolute error below 2e-7 (tests/test_kernels.py)."""
        builder = self.builder
        size = self.call("llvm.fabs.v16f32", VECTOR, [x])
        power = self.exp2(builder.fmul(size, self.splat(-2 * LOG2_E)))
        value = builder.fdiv(builder.fsub(self.splat(1.0), power), builder.fadd(self.splat(1.0), power))
        return self.call("llvm.copysign.v16f32", VECTOR, [value, x])

    def relu(self, x: Value) -> Value:
        """max(x, 0)."""
        return self.larger(x, self.splat(0.0))

    def _polynomial(self, coefficients: Sequence[float], x: Value) -> Value:
        """Lowest power first."""
        value = self.splat(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            value = self.fma(value, x, self.splat(coefficient))
        return value
