"""`load()`: from a name or a folder to a Classifier on the engine that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from . import backends, cuda_device
from .api import Classifier, no_embeddings_in, pruning_of
from .compiled_engine import CompiledEngine
from .config import ModelConfig, read_config
from .cuda_engine import CudaEngine, CudaProgram
from .cuda_float import FloatCudaProgram
from .cuda_integer import IntegerCudaProgram
from .engine import Engine
from .errors import BackendError, DependencyError, TokenizerError, UnsupportedModelError
from .float_program import FloatProgram
from .integer_model import load_integer_model
from .integer_program import IntegerProgram
from .numpy_engine import NumpyEngine
from .pruning import KeepRule, Pruning
from .text import TextEncoder
from .weights import checkpoint
from .weights.resolve import Source, resolve

FallBack = Callable[..., backends.Backend]  # `backends.fall_back`, but for its error and precision


def load(
    name_or_path: str | Path | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    device: str = "auto",
    precision: str = "fp32",
    pruning: str | Path | Mapping[str, Any] | None = "auto",
    threads: int | None = None,
) -> Classifier:
    """Load a sequence classifier from a folder, from a hub, or by a name of ours (None: the bundled default).

    An encoder without a head, as those of sentence-transformers, loads too; it can `embed`. The folder holds
    config.json, model.safetensors (or shards with an index), and a tokenizer unless only token ids will be classified.
    "org/name" is a repository of the hub, unless a folder here has that path: it is downloaded once, into the cache of
    huggingface_hub. A curated name (`minilpt models`) is one whose thresholds are searched at its first use and kept.
    revision: branch, tag or commit hash of a repository. local_files_only: take what the cache holds.
    pruning: "auto" takes the folder's ltp.json or what an LTP checkpoint carries, dense if neither; None is dense, a
    path names another ltp.json, a dict changes single keys of the folder's. device: "cpu", "cuda", or "auto", a GPU
    where CuPy finds one that can run this model, else the CPU, with a warning that says why not. precision: "fp32",
    "fp16" (GPU), "int8" (CPU), or "ibert", integers from the first table to the logits, for a folder that `minilpt
    quantize` wrote or a checkpoint trained with I-BERT ("ibert-float-head": but for the head, as I-BERT; CPU). threads:
    of the compiled kernels, by default one for each usable core; on NumPy they are BLAS's, set for the whole process if
    given.

    Raises UnknownModelError, HubError, ModelFileError, UnsupportedModelError, WeightsError, PruningError or
    BackendError, and for a curated name's first use CalibrationError. A missing tokenizer is an error only when texts
    are asked for.
    """
    backend = backends.choose(device, precision, threads)
    may_fall_back = device == "auto" and precision in backends.CPU_PRECISIONS
    fall_back = partial(backends.fall_back, threads=threads) if may_fall_back else None
    source = resolve(name_or_path, revision=revision, local_files_only=local_files_only)
    config = source.labelled(read_config(source.folder))
    if source.thresholds and (pruning == "auto" or isinstance(pruning, Mapping)):
        from . import curated

        plain = backends.choose(device, "fp32", threads)
        curated.keep_thresholds(source, lambda: _classifier(source, config, None, plain, fall_back))
    return _classifier(source, config, pruning_of(source, config, pruning), backend, fall_back)


def _classifier(
    source: Source, config: ModelConfig, chosen: Pruning | None, backend: backends.Backend, fall_back: FallBack | None
) -> Classifier:
    rule = chosen.rule if chosen else None
    try:
        engine = _engine(source.folder, config, rule, backend)
        if fall_back and isinstance(engine, CudaEngine):
            engine.check_every_text()
    except BackendError as error:
        if fall_back is None or backend.name != "cuda":
            raise
        engine = _engine(source.folder, config, rule, fall_back(error, precision=backend.precision))
    try:
        encoder: TextEncoder | TokenizerError | DependencyError = TextEncoder.from_folder(source.folder, config)
    except (TokenizerError, DependencyError) as error:
        encoder = error.with_traceback(None)  # raised when texts are asked for; its frames would hold the engine
    return Classifier(source, config, engine, chosen, encoder)


def _engine(folder: Path, config: ModelConfig, rule: KeepRule | None, backend: backends.Backend) -> Engine:
    """The weights, ready to run as the backend says."""
    integers = backend.precision in backends.INTEGER_PRECISIONS
    if integers and not config.labels:
        raise no_embeddings_in(backend)
    if config.quant_mode and not integers:
        raise UnsupportedModelError(
            f"{folder / 'config.json'}: quant_mode is true: these weights are for integers; load them with "
            f'precision="ibert", and take the float model for everything else'
        )
    if backend.name == "cuda":
        device = cuda_device.find()
        program: CudaProgram
        if integers:
            program = IntegerCudaProgram(config, load_integer_model(folder, config), device)
        else:
            program = FloatCudaProgram(config, checkpoint.load_weights(folder, config), backend.precision, device)
        return CudaEngine(config, program, rule, backend, device)
    if integers:
        head = backend.precision == "ibert-float-head"
        return CompiledEngine(config, IntegerProgram.load(folder, config, float_head=head), rule, backend)
    if backend.name == "numpy":
        return NumpyEngine(config, checkpoint.load_weights(folder, config), rule, backend)
    stored = FloatProgram.as_stored(config, backend.precision)
    weights = checkpoint.load_weights(folder, config, stored)
    return CompiledEngine(config, FloatProgram(config, weights, int8=backend.precision == "int8"), rule, backend)
