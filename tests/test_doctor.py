"""What the doctor sees, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minilpt import cli, doctor, threads
from minilpt.kernels import compiled, isa
from minilpt.weights import resolve
from minilpt.weights.resolve import DEFAULT, MODELS

pytest.importorskip("numba", reason="compiled kernels need numba")

ABOUT = ["versions", "instruction set", "threads", "kernels", "bundled models", "BLAS", "GPU"]


@pytest.fixture(autouse=True)
def _rung_is_chosen_anew() -> Iterator[None]:
    isa.chosen.cache_clear()
    yield
    isa.chosen.cache_clear()


def found(about: str) -> doctor.Finding:
    (finding,) = (finding for finding in doctor.examine() if finding.about == about)
    return finding


def test_a_machine_with_kernels_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    for part in compiled.PARTS:
        compiled.warm_up(part)
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert [finding["about"] for finding in findings] == ABOUT
    assert {finding["level"] for finding in findings} <= {"ok", "note"}
    assert found("kernels").level == "ok"
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[1:4] == ["instruction", "set", f"{isa.chosen().name};"]


@pytest.mark.parametrize("command", ["doctor", "info"])
def test_looking_compiles_nothing_writes_nothing_and_loads_no_compiler(tmp_path: Path, command: str) -> None:
    program = (
        "import sys\nfrom minilpt.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not {'numba', 'cupy', 'tokenizers'} & set(sys.modules)\nsys.exit(code)"
    )
    environment = os.environ | {compiled.CACHE_VARIABLE: str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "to be compiled" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["numba", "tokenizers"])
def test_a_missing_package_is_a_problem(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == package else find(name))
    finding = found("versions")
    assert (finding.level, f"pip install {package}" in finding.advice) == ("problem", True)
    assert cli.main(["doctor"]) == 1


def test_a_lower_rung_is_noted_and_an_unknown_one_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    best, lowest = isa.usable()[0].name, isa.usable()[-1].name
    monkeypatch.setenv(isa.VARIABLE, "avx1024")
    assert (found("instruction set").level, found("kernels").level) == ("problem", "problem")
    if best == lowest:
        pytest.skip("this machine has one rung only")
    monkeypatch.setenv(isa.VARIABLE, lowest)
    isa.chosen.cache_clear()
    finding = found("instruction set")
    assert (finding.level, f"unset it to have {best}" in finding.advice) == ("note", True)


def test_a_quota_between_whole_cores_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "none")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    finding = found("threads")
    assert (finding.level, "quota is 0.5" in finding.found) == ("note", True)
    assert "load with threads=1 " in finding.advice
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert (found("threads").level, found("threads").advice) == ("ok", "")


def test_the_cache_is_empty_damaged_or_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path / "new"))
    assert (found("kernels").level, "minilpt warmup" in found("kernels").advice) == ("note", True)
    file = compiled.cache_file(isa.chosen())
    file.parent.mkdir()
    file.write_bytes(b"cut short")
    assert "float damaged" in found("kernels").found
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path / "file"))
    assert (found("kernels").level, compiled.CACHE_VARIABLE in found("kernels").advice) == ("problem", True)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_one_flipped_bit_or_a_lost_file_of_a_bundled_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder = tmp_path / DEFAULT
    shutil.copytree(MODELS / DEFAULT, folder)
    for module in (resolve, doctor):
        monkeypatch.setattr(module, "MODELS", tmp_path)
    assert (found("bundled models").level, DEFAULT in found("bundled models").found) == ("ok", True)
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    assert (found("bundled models").level, f"{DEFAULT}/{file}" in found("bundled models").found) == ("problem", True)
    (folder / "model.safetensors").unlink()
    assert f"{DEFAULT}/model.safetensors" in found("bundled models").found
    (folder / "README.md").unlink()
    assert (found("bundled models").level, "README.md" in found("bundled models").found) == ("problem", True)


def test_a_card_that_is_not_used_is_noted_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CUDA_DRIVER", "libcuda-of-nobody.so.1")
    assert found("GPU").level == "ok"
    monkeypatch.setattr(doctor, "_cuda_driver", lambda: "1 NVIDIA card(s), driver for CUDA 12.4")
    finding = found("GPU")
    if "used: " in finding.found:
        pytest.skip("this machine has a GPU and uses it")
    assert (finding.level, finding.advice != "") == ("note", True)
