"""What NVIDIA's compiler makes of every CUDA source, for three architectures and two CUDA versions, without a card."""

from __future__ import annotations

from pathlib import Path

import pytest

from minilpt.kernels import cuda
from minilpt.kernels.cuda.float_kernels import FloatKernels
from minilpt.kernels.cuda.integer_kernels import IntegerKernels

from cuda_rig import compile_gate
from cuda_rig.compile_gate import KernelReport

SOURCES = sorted(path.stem for path in Path(cuda.__file__).parent.glob("*.cu"))
# Registers of a thread: at the default 128 threads a block these leave half of a T4's threads resident, or more.
MOST_REGISTERS = 96
LEAST_OCCUPANCY = 0.5
MOST_STATIC_BYTES = 8 * 1024


@pytest.fixture(scope="module", params=[(c, a) for c in compile_gate.COMPILERS for a in compile_gate.ARCHITECTURES])
def compiled(request: pytest.FixtureRequest) -> dict[str, dict[str, KernelReport]]:
    """The reports of all sources."""
    version, architecture = request.param
    reason = compile_gate.missing(version)
    if reason is not None:
        pytest.skip(f"the compile gate {reason}")
    return {name: compile_gate.compile_report(cuda.source(name), architecture, version) for name in SOURCES}


def test_every_kernel_that_is_launched_is_compiled(compiled: dict[str, dict[str, KernelReport]]) -> None:
    assert set(FloatKernels.sources) | set(IntegerKernels.sources) == set(SOURCES)
    for name, reports in compiled.items():
        assert set(reports) == set(cuda.signatures(cuda.source(name)))


def test_budgets(compiled: dict[str, dict[str, KernelReport]]) -> None:
    """No spill, no local memory, no more registers and shared memory than planned, half of a T4's threads resident."""
    for reports in compiled.values():
        for report in reports.values():
            local = [code for code in report.opcodes if code.startswith(("LDL", "STL"))]
            assert (report.spill_bytes, report.stack_bytes, local) == (0, 0, []), report.name
            assert report.registers <= MOST_REGISTERS, report.name
            assert report.shared_bytes <= MOST_STATIC_BYTES, report.name
            assert compile_gate.occupancy(report, 128, 0, "sm_75") >= LEAST_OCCUPANCY, report.name


def test_the_sources_state_their_registers() -> None:
    """Those that benchmarks/cuda_compile.py wrote down, with the pinned compiler."""
    if compile_gate.missing(12) is not None:
        pytest.skip(f"the compile gate {compile_gate.missing(12)}")
    for name in SOURCES:
        registers = [report.registers for report in compile_gate.compile_report(cuda.source(name), "sm_75").values()]
        assert f"Registers on sm_75: {min(registers)} to {max(registers)}, no spill" in cuda.source(name), name


def test_opcodes(compiled: dict[str, dict[str, KernelReport]]) -> None:
    """Integer products by dp4a, float ones fused where the source says so; no double anywhere, no float in integers."""

    def count(report: KernelReport, *prefixes: str) -> int:
        return sum(number for code, number in report.opcodes.items() if code.startswith(prefixes))

    product = compiled["integer_products"]["linear_i8"]
    assert count(product, "IDP.4A.S8.S8") >= 8 * 4 * 4  # a step of the tile, unrolled
    assert count(compiled["integer_attention"]["attention_mass_i8"], "IDP.4A.S8.S8")
    for name in ("attention_mass_f32", "attention_context_f16_d64"):
        assert count(compiled["attention"][name], "FFMA")
    for source, reports in compiled.items():
        for report in reports.values():
            assert not count(report, "DADD", "DMUL", "DFMA"), report.name
            if source == "integer_prune":
                assert not count(report, "FADD", "FMUL"), report.name
    for name in ("embed_norm_f32", "add_norm_f32"):
        assert count(compiled["rows"][name], "LDG.E.128"), f"{name} reads no vectors"


def test_a_warning_is_an_error_and_an_error_says_where() -> None:
    if compile_gate.missing(12) is not None:
        pytest.skip(f"the compile gate {compile_gate.missing(12)}")
    with pytest.raises(compile_gate.CompileError, match=r"source.cu\(1\): warning.*never referenced"):
        compile_gate.compile_report('extern "C" __global__ void k(int* x) { int y = 3; x[0] = 1; }', "sm_75")
    with pytest.raises(compile_gate.CompileError, match=r"source.cu\(1\): error"):
        compile_gate.compile_report('extern "C" __global__ void k(int* x) { nonsense; }', "sm_75")
    loads = "".join(f"int y{i} = x[i + {i}]; " for i in range(90))
    stores = "".join(f"x[{i}] = y{i}; " for i in range(90))  # of more values than 1,024 threads have registers for
    head = 'extern "C" __global__ void __launch_bounds__(1024, 1) k(int* x, int i)'
    text = f"{head} {{ {loads} __syncthreads(); {stores} }}"
    report = compile_gate.compile_report(text, "sm_75")["k"]
    assert report.spill_bytes and any(code.startswith("STL") for code in report.opcodes)


def test_occupancy() -> None:
    """Numbers of NVIDIA's occupancy calculator for compute capability 7.5."""
    for registers, threads, dynamic, wanted in [
        (32, 256, 0, 1),
        (64, 256, 0, 1),
        (65, 256, 0, 0.75),
        (32, 128, 20480, 0.375),
    ]:
        report = KernelReport("k", registers=registers)
        assert compile_gate.occupancy(report, threads, dynamic, "sm_75") == wanted
