"""The benchmark for a real card, driven over the stand-in with a tiny model: it checks, it times, it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu, workloads
from benchmarks.gpu import Answers
from minilpt import cuda_device

import devices
from cuda_rig import simt

TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tiny shape in the place of all, PyTorch on the CPU, and the stand-in as the card."""
    if not simt.available():
        pytest.skip(simt.WHY_NOT)
    shape = workloads.SHAPES["minilm-l6"]
    monkeypatch.setattr(workloads, "SHAPES", {"tiny": replace(shape, config=shape.config | TINY)})
    monkeypatch.setattr(gpu, "TORCH_DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, "cupy", devices.cupy_of("fifo"))
    monkeypatch.setattr(cuda_device, "installed", lambda: True)


def test_every_engine_is_checked_and_timed(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--out", str(tmp_path / "gpu.json"), "--sequences", "6", "--rounds", "2"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    measured = found["shapes"]["tiny"]
    engines = {f"{name} {precision}" for name in ("minilpt", "PyTorch") for precision in ("fp32", "fp16")}
    engines |= {"minilpt fp32, pruned", "minilpt fp16, pruned"}
    assert set(measured["checks"]) == set(measured["sequences_per_s"]) == engines
    assert all(len(speeds) == 2 for speeds in measured["sequences_per_s"].values())
    assert measured["checks"]["minilpt fp32, pruned"]["others_kept"] <= 1e-3
    assert (found["card"], found["left_out"]) == ("Tesla T4 (stand-in)", None)
    assert set(measured["card_ms"].values()) == {None}  # there is no card to ask
    assert "| tiny, PyTorch fp32 | " in (table := capsys.readouterr().out)
    assert "| 1.00 x |" in table


def test_without_a_cuda_build_of_pytorch_the_report_says_what_is_left_out(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "why_no_torch", lambda: "PyTorch has no CUDA here")
    gpu.main(["--out", str(tmp_path / "gpu.json"), "--sequences", "2", "--rounds", "1", "--shapes", "tiny"])
    assert capsys.readouterr().out.startswith("left out: PyTorch has no CUDA here")
    checks = json.loads((tmp_path / "gpu.json").read_text())["shapes"]["tiny"]["checks"]
    assert not any("PyTorch" in name for name in checks)


def test_without_a_card_one_sentence_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_device, "installed", lambda: False)
    with pytest.raises(SystemExit, match="CuPy is not installed: pip install"):
        gpu.main(["--out", str(tmp_path / "gpu.json")])


def test_the_document_shows_the_stored_result(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--report"])
    assert capsys.readouterr().out in (gpu.RESULT.parents[2] / "docs" / "cuda.md").read_text(encoding="utf-8")


def test_wrong_answers_are_not_timed() -> None:
    kept = np.array([[5, 6, 7], [2, 3, 4]])
    truth = Answers(np.zeros((3, 2)), kept)
    near, far = np.full((3, 2), 5e-4), np.full((3, 2), 0.2)
    assert gpu.check("minilpt fp32, pruned", Answers(near, kept), truth)["logit"] == 5e-4
    for name, wrong in {
        "PyTorch fp32": Answers(near * 10),
        "minilpt fp16": Answers(far),
        "minilpt fp32, pruned": Answers(far, kept),
        "minilpt fp16, pruned": Answers(near, kept - 1),
        "minilpt fp32": Answers(near * np.nan),
    }.items():
        with pytest.raises(SystemExit, match=f"{name}: beside the CPU a logit is off by .*nothing was timed"):
            gpu.check(name, wrong, truth)


def test_a_text_at_a_threshold_may_keep_another_token_and_then_answers_otherwise() -> None:
    kept = np.full((2, 1000), 5)
    other, logits = kept.copy(), np.zeros((1000, 2))
    other[1, 3], logits[3] = 6, 1.0
    found = gpu.check("minilpt fp32, pruned", Answers(logits, other), Answers(np.zeros((1000, 2)), kept))
    assert found == {"logit": 0.0, "others_kept": 1e-4, "texts_compared": 0.999}
