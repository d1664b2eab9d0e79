"""Finding a GPU: each thing that can be missing gives one message with what to install, and "auto" falls back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import backends, cli, cuda_device, cuda_engine

import checkpoints
from cuda_rig import fake_cupy, simt


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cupy.Cuda]:
    """A machine with CuPy and a T4, whose parts tests take away."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy)
    monkeypatch.setattr(cuda_device, "installed", lambda: True)
    monkeypatch.setattr(fake_cupy, "cuda", fake_cupy.Cuda())
    yield fake_cupy.cuda


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
        {"trouble": cuda_device.INSUFFICIENT_DRIVER},
        r"NVIDIA's driver is missing or older .* \(cudaErrorInsufficientDriver.*\): .* pip install .*cuda12x\[ctk\]",
    ),
    "card": ({"count": 0}, r"no CUDA card is visible \(cudaErrorNoDevice.*\): see nvidia-smi .* CUDA_VISIBLE_DEVICES"),
    "answer": ({"trouble": 46}, r"CUDA does not answer \(cudaErrorDevicesUnavailable.*\): see nvidia-smi"),
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
    with pytest.raises(minilpt.BackendError, match=f"precision 'fp16' needs a GPU: .*{said}"):
        backends.choose("auto", "fp16", None)  # without a word of a CPU that would run
    assert cuda_device.why_not() == backends.unavailable()["cuda"]


def test_without_cupy_the_message_says_how_to_install_it_and_auto_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_device, "installed", lambda: False)
    with pytest.raises(minilpt.BackendError, match=r'CuPy is not installed: pip install "cupy-cuda12x\[ctk\]"'):
        minilpt.load(device="cuda")
    assert backends.choose("auto", "fp32", None).device == "cpu"
    with pytest.raises(minilpt.BackendError, match=r"precision 'fp16' needs a GPU: CuPy is not installed"):
        backends.choose("auto", "fp16", None)
    with pytest.raises(minilpt.BackendError, match=r"precision 'fp16' needs a GPU: device is \"cpu\""):
        backends.choose("cpu", "fp16", None)


# Of a load on a machine where something is missing, or of a model that the card or the kernels do not hold: settings of
# the machine, of the model, and the message.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no NVRTC": (
        {"no_compiler": True},
        {},
        r"the kernels cannot be compiled \(.*libnvrtc.*\): NVRTC, .* headers come with pip install .*\[ctk\]",
    ),
    "no cuBLAS": (
        {"no_cublas": True},
        {},
        r'a library of CUDA is missing \(Failure finding "libcublas[^\n]*\): pip install "cupy-.*\[ctk\]" brings it',
    ),
    "no context": (
        {"busy": True},
        {},
        r"Tesla T4 .* refuses the model \(cudaErrorDevicesUnavailable.*: see nvidia-smi",
    ),
    "no memory": (
        {"free_bytes": 3000},
        {},
        r'no room for the model \(Out of memory allocating .*nvidia-smi.* precision="fp16", or use device="cpu"',
    ),
    "wide heads": ({}, {"hidden_size": 160, "num_attention_heads": 1}, r"heads of 160 columns are wider .*"),
    "wide rows": ({"widest": 16}, {}, "rows of 32 columns are wider than the 16 of the CUDA kernels"),
}


@pytest.fixture
def memory(machine: fake_cupy.Cuda) -> Iterator[None]:
    """What a test does to the card's memory ends with it."""
    before = fake_cupy.configure(free_bytes=None)
    yield
    fake_cupy.configure(**before)


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
@pytest.mark.parametrize("what", REFUSED)
def test_a_load_that_the_card_refuses(
    machine: fake_cupy.Cuda, memory: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    """`device="cuda"` says why, and "auto" says it and runs on the CPU, which gives the same answers as ever."""
    settings, shape, said = dict(REFUSED[what][0]), *REFUSED[what][1:]
    folder = checkpoints.write(tmp_path, checkpoints.config(**shape))
    fake_cupy.configure(free_bytes=settings.pop("free_bytes", None))
    monkeypatch.setattr(cuda_engine, "MOST_WIDTH", settings.pop("widest", cuda_engine.MOST_WIDTH))
    for name, value in settings.items():
        setattr(machine, name, value)
    with pytest.raises(minilpt.BackendError, match=said):
        minilpt.load(folder, device="cuda", pruning=None)
    with pytest.warns(minilpt.MinilptWarning, match=f"{said}.*; running on the CPU"):
        model = minilpt.load(folder, pruning=None, threads=1)
    assert (model.backend.device, model.backend.threads) == ("cpu", 1)
    wanted = minilpt.load(folder, device="cpu", pruning=None, threads=1)
    assert np.array_equal(model.forward([[5, 6, 7]]).logits, wanted.forward([[5, 6, 7]]).logits)
    with pytest.raises(minilpt.BackendError, match=said):
        minilpt.load(folder, precision="fp16", pruning=None)  # which the CPU does not have


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
def test_auto_leaves_a_model_to_the_cpu_some_of_whose_texts_the_kernels_do_not_hold(
    machine: fake_cupy.Cuda, tmp_path: Path
) -> None:
    shape = {"num_hidden_layers": 1, "max_position_embeddings": 4000, "hidden_size": 128, "num_attention_heads": 1}
    folder = checkpoints.write(tmp_path, checkpoints.config(**shape))
    with pytest.warns(
        minilpt.MinilptWarning, match=r"takes texts of 4000 tokens, the CUDA kernels hold \d+; .* the CPU"
    ):
        model = minilpt.load(folder, pruning=None)
    assert model.forward([[5] * 3000]).logits.shape == (1, 3)
    assert minilpt.load(folder, device="cuda", pruning=None).backend.device == "cuda"
    assert minilpt.load(folder, precision="fp16", pruning=None).backend.device == "cuda"


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
def test_integers_need_no_cublas(machine: fake_cupy.Cuda) -> None:
    machine.no_cublas = True
    model = minilpt.load(device="cuda", precision="ibert")
    assert model.forward([[5, 6]]).logits.shape == (1, 2)


def test_the_card_is_the_current_one_of_each_load(machine: fake_cupy.Cuda) -> None:
    machine.count = 2
    assert cuda_device.find().ordinal == 0
    with machine.Device(1):
        assert cuda_device.find().ordinal == 1
    assert cuda_device.find().ordinal == 0


def test_precisions_that_only_the_cpu_has_are_refused(machine: fake_cupy.Cuda) -> None:
    for precision in ("int8", "ibert-float-head"):
        with pytest.raises(
            minilpt.BackendError, match=f"device \"cuda\" has precision fp32, fp16, ibert, not '{precision}'"
        ):
            minilpt.load(device="cuda", precision=precision)


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
def test_too_little_memory_says_what_to_do(machine: fake_cupy.Cuda, memory: None, tmp_path: Path) -> None:
    model = minilpt.load(checkpoints.write(tmp_path), device="cuda", pruning=None)
    fake_cupy.configure(free_bytes=1000)
    with pytest.raises(minilpt.BackendError, match=r"no room for 40 tokens at once .*smaller batch_tokens"):
        model.forward([[5] * 40])
    fake_cupy.configure(free_bytes=None)
    assert model.forward([[5] * 40]).logits.shape == (1, 3)
    assert len(model.engine._streams) == 1  # type: ignore[attr-defined] # a run that failed gives its stream back


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
def test_products_leave_cublas_s_mode_as_it_was(machine: fake_cupy.Cuda, tmp_path: Path) -> None:
    model = minilpt.load(checkpoints.write(tmp_path), device="cuda", precision="fp16", pruning=None)
    handle = machine.device.get_cublas_handle()
    machine.cublas.setMathMode(handle, 3)
    model.forward([[5, 6]])  # the stand-in refuses products that cuBLAS may sum in float16
    assert machine.cublas.getMathMode(handle) == 3


@pytest.mark.skipif(not simt.available(), reason=simt.WHY_NOT)
def test_warmup_compiles_the_kernels(machine: fake_cupy.Cuda, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup", "--device", "cuda"]) == 0
    assert capsys.readouterr().out.startswith("sm_75: kept by CuPy")
