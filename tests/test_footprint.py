"""The peak memory that `model.memory` tells before a process runs is what the process then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from benchmarks import workloads
from minilpt import InputError, footprint
from minilpt.footprint import Held, held

import checkpoints

pytest.importorskip("numba", reason="compiled kernels need numba")

# All is told before the first text. The rows go through a good part of the vocabulary, or the mapped table would stay
# on disk; a user's texts do so in time.
PROGRAM = """
import json, sys, threading, numpy, minilpt
folder, settings, load = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = minilpt.load(folder or None, threads=2, **settings)
told = model.memory(**load)
draw = numpy.random.default_rng(0)
tokens, longest = load["batch_tokens"], load.get("longest", 512)
mixed = [longest] * (tokens // (2 * longest)) + [25] * (tokens // 50)
def work():
    for lengths in (mixed, [longest], [2] * min(100, tokens // 2)):
        model.forward([draw.integers(0, model.config.vocabulary, n).tolist() for n in lengths])
callers = [threading.Thread(target=work) for _ in range(load.get("callers", 1))]
for caller in callers: caller.start()
for caller in callers: caller.join()
lines = open("/proc/self/status").read().splitlines()
peak = int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024
print(json.dumps([told.peak, peak, vars(told)]))
"""
WITHOUT_NUMBA = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
warnings.simplefilter("ignore")
"""
LOADS = {
    "default": {"batch_tokens": 4096},
    "small": {"batch_tokens": 512, "longest": 128},
    "short": {"batch_tokens": 2048, "longest": 64},  # what NumPy takes seconds for
    "callers": {"batch_tokens": 4096, "callers": 6},
}


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, six layers of 384 columns."""
    folder = tmp_path_factory.mktemp("minilm")
    workloads.write_checkpoint(folder, "minilm-l6")
    return folder


def measured(
    folder: Path | None, settings: dict[str, Any], load: dict[str, int], before: str = ""
) -> tuple[int, int, dict[str, int]]:
    """Bytes: what the model told, what the process took, and the parts of what was told."""
    arguments = [str(folder or ""), json.dumps(settings), json.dumps(load)]
    done = subprocess.run(
        [sys.executable, "-c", f"{before}{PROGRAM}", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


on_linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the peak of a process is read from /proc")


@on_linux
@pytest.mark.parametrize("precision", ["fp32", "int8", "ibert"])
@pytest.mark.parametrize("load", ["default", "small", "callers"])
def test_the_bundled_models_peak_is_told_within_a_fifth(precision: str, load: str) -> None:
    told, peak, parts = measured(None, {"precision": precision}, LOADS[load])
    assert abs(told / peak - 1) <= 0.2, f"told {told}, took {peak}: {parts}"


@on_linux
@pytest.mark.parametrize(("before", "load"), [("", "default"), (WITHOUT_NUMBA, "short")], ids=["numba", "numpy"])
def test_a_wider_models_peak_is_told_within_a_fifth(wider: Path, before: str, load: str) -> None:
    told, peak, parts = measured(wider, {}, LOADS[load], before)
    assert abs(told / peak - 1) <= 0.2, f"told {told}, took {peak}: {parts}"


def test_shared_buffers_count_once_and_mappings_by_themselves(tmp_path: Path) -> None:
    whole = np.zeros((10, 10))
    np.save(tmp_path / "rows.npy", whole)
    mapped = np.asarray(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert held([whole, {"rows": (whole[:3], [whole.T])}, np.zeros(5, np.int8), "no array"]) == Held(805, 0)
    assert held([mapped, mapped[2:]]) == Held(0, 800)


def test_scratch_that_is_there_already_is_not_told_twice(tmp_path: Path) -> None:
    model = minilpt.load(checkpoints.write(tmp_path), threads=2)
    before = model.memory()
    model.forward([[5, 6, 7] * 10] * 200)
    after = model.memory()
    assert (after.weights, after.mapped, after.scratch) == (before.weights, before.mapped, before.scratch)
    assert abs(after.peak - before.peak) < 20_000_000


@pytest.mark.parametrize("name", ["batch_tokens", "longest", "callers"])
def test_what_is_no_load_is_refused(tmp_path: Path, name: str) -> None:
    model = minilpt.load(checkpoints.write(tmp_path), threads=1)
    for value in (0, -1, 1.5, True, "4096"):
        with pytest.raises(InputError, match=f"{name} must be a positive integer"):
            model.memory(**{name: value})


def test_where_the_system_does_not_tell_a_typical_process_is_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "PROCESS", tmp_path)
    model = minilpt.load(checkpoints.write(tmp_path), threads=1)
    assert model.memory().process == footprint.TYPICAL_PROCESS_BYTES
