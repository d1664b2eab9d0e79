"""One small adapter per engine: how it loads a prepared folder, how it takes a batch, and which settings are tried.

An engine is opened in a worker process of its own. What it gets is prepared outside the timed part in the form that it
likes best: peers get padded arrays, minilpt the lists of token ids.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .convert import ONNX_INT8

Ids = list[int]
Logits = NDArray[np.floating]
Settings = dict[str, Any]
Run = Callable[[Any], Logits]  # a prepared batch to (B, labels)

BATCHES = (4, 8, 16, 32, 64)  # sequences in a peer's padded batch
BATCH_TOKENS = (1024, 4096, 16384)  # in minilpt's ragged one; 4096 is what `predict` takes


@dataclass(frozen=True)
class Engine:
    """label: for tables. precision: "fp32" or "int8", which decides whom it is compared with.

    package: whose version is reported. opened: (folder, settings, threads) to a Run. prepared: padded ids and mask
    to what Run takes. needs: conversions, by their names in `convert`. variants: settings to choose from, all else
    equal. The settings "streams" (batches in flight, sharing the threads) and "batch" are chosen for every peer.
    """

    label: str
    precision: str
    package: str
    opened: Callable[[Path, Settings, int], Run]
    prepared: Callable[[NDArray[np.int64], NDArray[np.int64]], Any]
    needs: tuple[str, ...] = ()
    variants: tuple[Settings, ...] = field(default=({},))
    ours: bool = False
    pruned: bool = False


def batches(engine: Engine, rows: Sequence[Ids], settings: Settings) -> Iterator[tuple[list[int], Any]]:
    """(places in rows, prepared batch) of every row once, longest first, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for places in _by_tokens(rows, order, settings) if engine.ours else _by_count(order, settings["batch"]):
        members = [rows[place] for place in places]
        yield places, members if engine.ours else engine.prepared(*padded(members))


def _by_count(order: Sequence[int], count: int) -> Iterator[list[int]]:
    for start in range(0, len(order), count):
        yield list(order[start : start + count])


def _by_tokens(rows: Sequence[Ids], order: Sequence[int], settings: Settings) -> Iterator[list[int]]:
    batch: list[int] = []
    for place in order:
        if batch and sum(len(rows[other]) for other in batch) + len(rows[place]) > settings["batch"]:
            yield batch
            batch = []
        batch.append(place)
    yield batch


def padded(rows: Sequence[Ids]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and mask, (B, longest) int64. Padding is id 1 for RoBERTa's positions, and id 1 elsewhere is masked."""
    width = max(len(row) for row in rows)
    ids, mask = np.ones((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    return ids, mask


def _open_minilpt(precision: str, pruned: bool) -> Callable[[Path, Settings, int], Run]:
    def opened(folder: Path, settings: Settings, threads: int) -> Run:
        import minilpt

        pruning = settings["pruning"] if pruned else None
        model = minilpt.load(folder, precision=precision, pruning=pruning, threads=threads)
        return lambda rows: model.forward(rows).logits

    return opened


def _open_onnx(default: str) -> Callable[[Path, Settings, int], Run]:
    def opened(folder: Path, settings: Settings, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads // settings.get("streams", 1)
        options.inter_op_num_threads = 1
        path = folder / f"{settings.get('file', default)}.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]

    return opened


def _open_openvino(file: str) -> Callable[[Path, Settings, int], Run]:
    def opened(folder: Path, settings: Settings, threads: int) -> Run:
        import openvino as ov

        streams = settings.get("streams", 1)
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": settings.get("precision_hint", "f32"),
        }
        compiled = ov.Core().compile_model(folder / f"{file}.xml", "CPU", config)
        own = threading.local()

        def run(inputs: Any) -> Logits:
            if not hasattr(own, "request"):
                own.request = compiled.create_infer_request()
            return own.request.infer(inputs, share_inputs=True)[0]

        return run

    return opened


def _open_ctranslate2(folder: Path, settings: Settings, threads: int) -> Run:
    import ctranslate2

    streams, head = settings.get("streams", 1), np.load(folder / "ctranslate2" / "head.npz")
    dense, dense_bias, out, out_bias = (head[name] for name in ("dense_weight", "dense_bias", "out_weight", "out_bias"))
    encoder = ctranslate2.Encoder(
        str(folder / "ctranslate2"),
        compute_type=settings.get("compute_type", "int8"),
        inter_threads=streams,
        intra_threads=threads // streams,
    )

    def run(inputs: Any) -> Logits:
        first = np.asarray(encoder.forward_batch(*inputs).last_hidden_state)[:, 0]
        return np.tanh(first.astype(np.float32) @ dense.T + dense_bias) @ out.T + out_bias

    return run


def _prepare_ctranslate2(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
    import ctranslate2

    lengths = mask.sum(axis=1).astype(np.int32)
    return tuple(ctranslate2.StorageView.from_array(array) for array in (ids.astype(np.int32), lengths))


def _open_torch(int8: bool) -> Callable[[Path, Settings, int], Run]:
    def opened(folder: Path, settings: Settings, threads: int) -> Run:
        import torch

        from .convert import torch_model

        torch.set_num_threads(threads // settings.get("streams", 1))
        model = torch_model(folder, settings.get("attention", "sdpa"))
        if int8:
            torch.backends.quantized.engine = settings.get("quantized_engine", "x86")
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

        def run(inputs: Any) -> Logits:
            with torch.inference_mode():
                return model(input_ids=inputs[0], attention_mask=inputs[1]).logits.numpy()

        return run

    return opened


def _prepare_torch(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
    import torch

    return torch.from_numpy(ids), torch.from_numpy(mask)


def _named(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Any:
    return {"input_ids": ids, "attention_mask": mask}


def _minilpt(label: str, precision: str, pruned: bool) -> Engine:
    opened = _open_minilpt(precision, pruned)
    return Engine(label, precision, "minilpt", opened, _named, ours=True, pruned=pruned)


ENGINES: dict[str, Engine] = {
    "minilpt-fp32": _minilpt("minilpt fp32", "fp32", False),
    "minilpt-fp32-pruned": _minilpt("minilpt fp32, pruned", "fp32", True),
    "minilpt-int8": _minilpt("minilpt int8", "int8", False),
    "minilpt-int8-pruned": _minilpt("minilpt int8, pruned", "int8", True),
    "onnxruntime-fp32": Engine(
        "ONNX Runtime fp32, fused",
        "fp32",
        "onnxruntime",
        _open_onnx("fused"),
        _named,
        ("onnx",),
        ({"file": "fused"}, {"file": "model"}),
    ),
    "onnxruntime-int8": Engine(
        "ONNX Runtime int8, dynamic",
        "int8",
        "onnxruntime",
        _open_onnx("int8-all"),
        _named,
        ("onnx", "onnx-int8"),
        tuple({"file": f"int8-{name}"} for name in ONNX_INT8),
    ),
    "openvino-fp32": Engine(
        "OpenVINO fp32", "fp32", "openvino", _open_openvino("openvino-fp32"), _named, ("openvino",)
    ),
    "openvino-int8": Engine(
        "OpenVINO int8, static",
        "int8",
        "openvino",
        _open_openvino("openvino-int8"),
        _named,
        ("openvino",),
        ({"precision_hint": "f32"}, {"precision_hint": "bf16"}),
    ),
    "ctranslate2-int8": Engine(
        "CTranslate2 int8",
        "int8",
        "ctranslate2",
        _open_ctranslate2,
        _prepare_ctranslate2,
        ("ctranslate2",),
        ({"compute_type": "int8"}, {"compute_type": "int8_float32"}, {"compute_type": "int8_bfloat16"}),
    ),
    "torch-fp32": Engine("PyTorch fp32", "fp32", "torch", _open_torch(False), _prepare_torch),
    "torch-int8": Engine(
        "PyTorch int8, dynamic",
        "int8",
        "torch",
        _open_torch(True),
        _prepare_torch,
        (),
        ({"quantized_engine": "x86"}, {"quantized_engine": "onednn"}, {"quantized_engine": "fbgemm"}),
    ),
}
