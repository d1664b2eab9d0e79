"""What NVIDIA's compiler makes of every CUDA source, for three architectures and two CUDA versions, without a card.

Where its packages are not installed these tests are skipped; with CUDA_RIG_REQUIRED set, as `make cuda-compile` does,
they fail.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks import cuda_compile, files
from minilpt.kernels import cuda
from minilpt.kernels.cuda.float_kernels import FloatKernels
from minilpt.kernels.cuda.integer_kernels import IntegerKernels

from cuda_rig import compile_gate
from cuda_rig.compile_gate import KernelReport

SOURCES = sorted(path.stem for path in Path(cuda.__file__).parent.glob("*.cu"))
# Registers of a thread: at the default 128 threads a block these leave half of a T4's threads resident, or more. Shared
# memory that a launch asks for can leave fewer: benchmarks/cuda_compile.py says how many.
MOST_REGISTERS = 96
LEAST_OCCUPANCY = 0.5
MOST_STATIC_BYTES = 8 * 1024
# Float instructions: F but find-leading-one and fences, D but the wait for loads, H; conversions; MUFU's functions.
FLOAT = re.compile(r"F(?!LO|ENCE)|D(?!EPBAR)|H|MUFU|I2F")
# How the compiler divides integers: from a float estimate of the reciprocal, corrected in integers to what is exact.
QUOTIENT = re.compile(r"I2F|F2I|MUFU.RCP")
INTEGER_SOURCES = {  # and the float instructions that they may have
    "compact": re.compile("$.^"),
    "integer_attention": QUOTIENT,
    "integer_products": re.compile("$.^"),
    "integer_prune": QUOTIENT,
    "integer_rows": QUOTIENT,
}


# Reading from memory, and from shared memory, 16 bytes at a time: source, kernels, instruction.
VECTOR_LOADS = (
    ("rows", "embed_norm_f32 add_norm_f32 gather_rows_f32 head_out_f32 bias_gelu_f32", "LDG.E.128"),
    ("rows", "embed_norm_f16 add_norm_f16 gather_rows_f16 head_out_f16 bias_gelu_f16", "LDG.E.64"),
    ("attention", "attention_mass_f32 weighted_probs_f32 attention_context_f32_d64", "LDG.E.128"),
    ("attention", "attention_mass_f16 weighted_probs_f16 attention_context_f16_d64", "LDG.E.64"),
    (
        "attention",
        "attention_mass_f16 attention_mass_f32 attention_context_f16_d64 attention_context_f32_d128",
        r"LDS(\.U)?\.128",
    ),
    ("integer_attention", "attention_mass_i8 weighted_probs_i8 attention_context_i8", "LDG.E.128"),
    ("integer_products", "linear_i8", "LDG.E.128"),
    ("integer_rows", "gather_rows_i8", "LDG.E.128"),
)


def need(cuda_version: int) -> None:
    """This CUDA version's compiler."""
    reason = compile_gate.missing(cuda_version)
    if reason is not None:
        (pytest.fail if "CUDA_RIG_REQUIRED" in os.environ else pytest.skip)(f"the compile gate {reason}")


@pytest.fixture(scope="module", params=[(c, a) for c in compile_gate.COMPILERS for a in compile_gate.ARCHITECTURES])
def compiled(request: pytest.FixtureRequest) -> dict[str, dict[str, KernelReport]]:
    """The reports of all sources."""
    version, architecture = request.param
    need(version)
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


def test_the_committed_numbers_are_the_compiler_s() -> None:
    need(12)
    committed, found = files.read_json(cuda_compile.RESULT), cuda_compile.result()
    assert (found["nvrtc"], found["kernels"]) == (committed["nvrtc"], committed["kernels"])


@pytest.mark.parametrize("path", cuda_compile.sources(), ids=lambda path: path.stem)
def test_a_source_states_the_committed_numbers(path: Path) -> None:
    assert cuda_compile.header(files.read_json(cuda_compile.RESULT), path.name) in path.read_text(encoding="utf-8")


def test_every_kernel_s_launch_is_recorded() -> None:
    """With the threads and the shared memory that depend on the longest text."""
    launches = {tokens: cuda_compile.launches(tokens) for tokens in cuda_compile.TOKENS}
    for recorded in launches.values():
        assert set(recorded) == {name for source in SOURCES for name in cuda.signatures(cuda.source(source))}
    words = 4 * 4 * (64 // 4 + 1)  # bytes of a head's row of 64 floats in shared memory, a four more than it needs
    assert launches[128]["attention_mass_f16"] == (128, (16 + 32) * words + 4 * 128 * (16 + 1))
    assert launches[512]["add_norm_f32"] == launches[32]["add_norm_f32"] == (128, 4 * 4 * 768)
    assert launches[128]["linear_i8"] == (256, 0)


def test_without_the_compiler_the_gate_is_skipped_or_where_it_is_required_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_gate, "missing", lambda version: f"needs the library of CUDA {version}")
    monkeypatch.delenv("CUDA_RIG_REQUIRED", raising=False)
    with pytest.raises(pytest.skip.Exception, match="the compile gate needs the library of CUDA 13"):
        need(13)
    monkeypatch.setenv("CUDA_RIG_REQUIRED", "1")
    with pytest.raises(pytest.fail.Exception, match="the compile gate needs the library of CUDA 13"):
        need(13)


def test_opcodes(compiled: dict[str, dict[str, KernelReport]]) -> None:
    """Integer products by dp4a, float ones fused where the source says so, vectors; no double, no float in integers.

    Tensor cores are cuBLAS's: no kernel of ours asks for them.
    """

    def count(report: KernelReport, *prefixes: str) -> int:
        return sum(number for code, number in report.opcodes.items() if code.startswith(prefixes))

    product = compiled["integer_products"]["linear_i8"]
    assert count(product, "IDP.4A.S8.S8") >= 8 * 4 * 4  # a step of the tile, unrolled
    assert count(compiled["integer_attention"]["attention_mass_i8"], "IDP.4A.S8.S8")
    for name in ("attention_mass_f32", "attention_context_f16_d64"):
        assert count(compiled["attention"][name], "FFMA")
    for source, reports in compiled.items():
        for report in reports.values():
            assert not count(report, "DADD", "DMUL", "DFMA", "HMMA", "IMMA", "HGMMA", "IGMMA"), report.name
            if source in INTEGER_SOURCES:
                floats = {code for code in report.opcodes if FLOAT.match(code)}
                assert {code for code in floats if not INTEGER_SOURCES[source].match(code)} == set(), report.name
    for source, names, load in VECTOR_LOADS:
        for name in names.split():
            codes = compiled[source][name].opcodes
            assert any(re.match(load, code) for code in codes), f"{name} has no {load}"


def test_a_warning_is_an_error_and_an_error_says_where() -> None:
    need(12)
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
