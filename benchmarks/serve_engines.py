"""Servers to be measured: minilpt's own server code, in front of minilpt or of ONNX Runtime.

    python -m benchmarks.serve_engines ENGINE FOLDER THREADS BATCH_TOKENS

serves on a free port of the loopback and says which on stderr, until it gets SIGTERM.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import minilpt
from minilpt.engine import Forward
from minilpt.pruning import dense_flops
from minilpt.serving.options import ServeOptions
from minilpt.serving.server import serve

from .engines import padded


class OnnxModel:
    """A classifier whose layers ONNX Runtime runs, on padded batches; tokenizer and labels are minilpt's."""

    def __init__(self, folder: Path, threads: int, spinning: bool = True):
        self._model = minilpt.load(folder, pruning=None, threads=threads)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        if not spinning:  # its threads wait by spinning, which takes the cores from the server between batches
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(folder / "fused.onnx", options, providers=["CPUExecutionProvider"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, token_ids: Sequence[list[int]], segment_ids: Sequence[list[int]]) -> Forward:
        """The exported graph takes no segments, so these must be single texts."""
        assert not any(map(any, segment_ids)), "single texts only"
        ids, mask = padded(token_ids)
        (logits,) = self._session.run(None, {"input_ids": ids, "attention_mask": mask})
        config, lengths = self._model.config, np.array([len(row) for row in token_ids], np.int32)
        flops = dense_flops(config, lengths)
        return Forward(logits, np.tile(lengths, (config.layers, 1)), flops, flops)


MODELS: dict[str, Callable[[Path, int], Any]] = {
    "minilpt": lambda folder, threads: minilpt.load(folder, threads=threads),
    "minilpt-dense": lambda folder, threads: minilpt.load(folder, pruning=None, threads=threads),
    "minilpt-int8": lambda folder, threads: minilpt.load(folder, precision="int8", threads=threads),
    "onnxruntime": OnnxModel,
    "onnxruntime-idle": partial(OnnxModel, spinning=False),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve what the command line names."""
    engine, folder, threads, batch_tokens = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = ServeOptions(port=0, max_batch_tokens=int(batch_tokens), max_concurrent_requests=4096)
    serve(MODELS[engine](Path(folder), int(threads)), options, engine)


if __name__ == "__main__":
    main()
