"""The ladder of instruction sets, and the tests of compiled code on every rung that this machine can execute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import minilpt
from minilpt.kernels import isa

import checkpoints

pytest.importorskip("numba", reason="compiled kernels need numba")

TESTS = Path(__file__).parent
INTEGER = ("integer", "integer_model", "integer_equivalence")


@pytest.mark.skipif(isa.VARIABLE in os.environ, reason="one rung was asked for")
@pytest.mark.parametrize("rung", [rung.name for rung in isa.usable()[1:]])
def test_kernels_and_equivalence_on_every_other_rung(rung: str) -> None:
    """The highest is what all other tests run on."""
    files = [str(TESTS / f"test_{name}.py") for name in ("kernels", "equivalence", "engines", *INTEGER)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env=os.environ | {isa.VARIABLE: rung}, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_the_ladder_falls_to_what_every_machine_has() -> None:
    assert isa.usable()
    assert isa.usable()[-1].name == "portable"
    for above, below in zip(isa.LADDER, isa.LADDER[1:], strict=False):
        assert set(above.needs) > set(below.needs)


def test_the_highest_usable_rung_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    isa.chosen.cache_clear()
    assert isa.chosen() == isa.usable()[0]
    isa.chosen.cache_clear()


@pytest.mark.parametrize("platform, answer, there", [("linux", 0, True), ("linux", -1, False), ("win32", 0, False)])
def test_matrix_registers_are_used_where_the_system_grants_them(
    platform: str, answer: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As no virtual machine may that its host gives no room to save them; Linux says so with an error."""
    names = frozenset(name for rung in isa.LADDER for name in rung.needs)
    system = SimpleNamespace(syscall=lambda *number: answer)
    monkeypatch.setattr(isa, "features", lambda: names)
    monkeypatch.setattr(isa, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(isa, "ctypes", SimpleNamespace(CDLL=lambda name: system))
    isa.usable.cache_clear()
    found = [rung.name for rung in isa.usable()]
    isa.usable.cache_clear()
    assert found == [rung.name for rung in isa.LADDER if there or not rung.amx]


def test_a_rung_that_is_not_there_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints.write(tmp_path)
    monkeypatch.setenv(isa.VARIABLE, "avx1024")
    isa.chosen.cache_clear()
    with pytest.raises(minilpt.BackendError, match=r"MINILPT_ISA='avx1024' is not a rung .* portable"):
        minilpt.load(folder)
    isa.chosen.cache_clear()


def test_linux_and_llvm_agree_on_what_the_cpu_has() -> None:
    from llvmlite import binding

    named = {name for rung in isa.LADDER for name in rung.needs}
    llvm = {name for name, there in binding.get_host_cpu_features().items() if there}
    assert isa.features() & named == llvm & named
