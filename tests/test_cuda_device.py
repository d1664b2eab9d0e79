"""Finding a GPU: each thing that can be missing gives one message with what to install, and "auto" falls back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minilpt
from minilpt import backends, cli, cuda_device

import checkpoints
import devices
from cuda_rig import fake_cupy, simt


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.Cuda]:
    """A machine with CuPy and a T4, whose parts tests take away."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setattr(cuda_device, "installed", lambda: True)
    monkeypatch.setattr(fake_cupy, "cuda", fake_cupy.Cuda())
    cuda_device._found.cache_clear()
    yield fake_cupy.cuda
    cuda_device._found.cache_clear()


def test_a_card_is_found(machine: fake_cupy.Cuda) -> None:
    found = cuda_device.find()
    assert (found.name, found.capability) == ("Tesla T4 (stand-in)", 75)
    assert cuda_device.why_not() is None
    assert backends.choose("cuda", "fp16", None) == backends.Backend("cuda", "cuda", "fp16", 1, "sm_75")
    assert backends.choose("auto", "fp32", None).device == "cuda"
    assert backends.choose("auto", "int8", None).device == "cpu"
    assert "cuda" not in backends.unavailable()


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "driver": (
        {"driver": "cudaErrorInsufficientDriver: driver is insufficient"},
        "install NVIDIA's driver",
    ),
    "card": ({"count": 0}, "no CUDA card is visible: see nvidia-smi"),
    "new card": ({"capability": "61", "name": "GeForce GTX 1080"}, r"GTX 1080 has compute capability 6.1, .* need 7.5"),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_said(machine: fake_cupy.Cuda, what: str) -> None:
    settings, said = MISSING[what]
    for name, value in settings.items():
        setattr(machine, name, value)
    with pytest.raises(minilpt.BackendError, match=f'device "cuda" is not available: .*{said}'):
        minilpt.load("no-such-folder", device="cuda")
    with pytest.warns(minilpt.MinilptWarning, match=f"{said}.*; running on the CPU"):
        assert backends.choose("auto", "fp32", None).device == "cpu"
    with (
        pytest.warns(minilpt.MinilptWarning, match=said),
        pytest.raises(minilpt.BackendError, match=r"precision 'fp16' needs a GPU"),
    ):
        backends.choose("auto", "fp16", None)
    assert cuda_device.why_not() == backends.unavailable()["cuda"]


def test_without_cupy_the_message_says_how_to_install_it_and_auto_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_device, "installed", lambda: False)
    cuda_device._found.cache_clear()
    with pytest.raises(minilpt.BackendError, match=r'CuPy is not installed: pip install "cupy-cuda12x\[ctk\]"'):
        minilpt.load(device="cuda")
    assert backends.choose("auto", "fp32", None).device == "cpu"
    with pytest.raises(minilpt.BackendError, match=r"precision 'fp16' needs a GPU: CuPy is not installed"):
        backends.choose("auto", "fp16", None)
    with pytest.raises(minilpt.BackendError, match=r"precision 'fp16' needs a GPU: device is \"cpu\""):
        backends.choose("cpu", "fp16", None)
    cuda_device._found.cache_clear()


def test_without_nvrtc_the_message_says_how_to_install_it(machine: fake_cupy.Cuda, tmp_path: Path) -> None:
    machine.no_compiler = True
    folder = checkpoints.write(tmp_path)
    with pytest.raises(minilpt.BackendError, match=r"kernels cannot be compiled \(.*libnvrtc.*\): NVRTC, .*\[ctk\]"):
        minilpt.load(folder, device="cuda", pruning=None)


def test_precisions_that_only_the_cpu_has_are_refused(machine: fake_cupy.Cuda) -> None:
    for precision in ("int8", "ibert-float-head"):
        with pytest.raises(
            minilpt.BackendError, match=f"device \"cuda\" has precision fp32, fp16, ibert, not '{precision}'"
        ):
            minilpt.load(device="cuda", precision=precision)


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
def test_too_little_memory_says_what_to_do(machine: fake_cupy.Cuda, tmp_path: Path) -> None:
    devices.cupy_of("fifo")
    model = minilpt.load(checkpoints.write(tmp_path), device="cuda", pruning=None)
    before = fake_cupy.configure(free_bytes=1000)
    try:
        with pytest.raises(minilpt.BackendError, match=r"no room for 40 tokens at once .*smaller batch_tokens"):
            model.forward([[5] * 40])
    finally:
        fake_cupy.configure(**before)
    assert model.forward([[5] * 40]).logits.shape == (1, 3)


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
def test_warmup_compiles_the_kernels(machine: fake_cupy.Cuda, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", "--device", "cuda"]) == 0
    assert capsys.readouterr().out.startswith("sm_75: kept by CuPy")
