"""Static ranges of activations from texts: any float checkpoint becomes one for integer-only inference.

The float model runs once over the texts, layer by layer. Each 8-bit activation gets the range that costs least in mean
squared error; then, activation by activation, its largest value, percentiles and, behind a LayerNorm, scales that
differ by channel are tried in the whole integer model, and what brings its logits nearer to the float ones on one half
of the texts stays. The other half tells what came out.
"""

from __future__ import annotations

import datetime
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import backends, ragged, reference
from .api import Classifier, Item, text_items
from .batches import progress_bar, token_batch
from .compiled_engine import CompiledEngine
from .config import ModelConfig
from .errors import CalibrationError, InputError, MinilptWarning, UnsupportedModelError
from .files import whole_folder
from .integer_model import check_supported, integer_model
from .integer_program import IntegerProgram
from .kernels import NUMPY
from .kernels.integer import ACTIVATION_BITS
from .quantize import quantize_rows
from .scales import AGAIN, FILE_NAME, Scales, activation_names, scale_of, write_scales
from .weights import checkpoint, names
from .weights.save import save_weights

Float32 = NDArray[np.float32]

FEWEST_TEXTS, FEW_TEXTS = 16, 100
MOST_TOKENS = 8192  # of the texts that are run: their activations in one layer, 14 D floats each, are held at a time
PERCENTILES = (99.9, 99.99)
CLIPS = np.linspace(0.2, 1, 33)  # of the largest value, among which the least squared error is searched
CHANNEL_QUANTILE = 0.9  # of channels have no scale of their own, where scales differ by channel
COPIED = (
    "ltp.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
WIDE_MARGIN = 2  # 16 and 22 bits have room for twice what the texts show


@dataclass(frozen=True)
class Range:
    """One way to quantise an activation. method: "mse", "max", a percentile or "channels"; exponents as in `Scales`."""

    method: str
    scale: np.float32
    exponents: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Ranges:
    """What `quantize_model` found. methods: chosen, by activation.

    rms: root mean squared differences of logits from the float model's, (before, after) the trials, on the half of the
    texts that chose; held_out_rms: the same on the other half; agreement: the share of equal labels there, after (None
    for regression).
    """

    scales: Scales
    methods: Mapping[str, str]
    rms: tuple[float, float]
    held_out_rms: tuple[float, float]
    agreement: float | None


def quantize_model(
    model: Classifier, texts: Iterable[Item], out: Path | str, *, by_channel: bool = True, progress: bool = False
) -> Ranges:
    """Write a folder for precision "ibert": int8 weights, integer.json, and the rest of the model's folder.

    texts: at least 16, of the kind that the model will see, no labels. The folder appears when it is whole; where
    scales differ by channel its config.json says quant_mode, since its weights are then for integers only. With
    by_channel=False they never do, and the new integer.json also fits into the model's own folder.
    Raises CalibrationError for too few texts, InputError if `out` is there, UnsupportedModelError for models that have
    no integer form.
    """
    target = Path(out)
    model.require_head()
    items = text_items(texts)
    return quantize_sequences(model, *model.encode(items), target, by_channel=by_channel, progress=progress)


def quantize_sequences(
    model: Classifier,
    ids: list[list[int]],
    segments: list[list[int]],
    target: Path,
    *,
    by_channel: bool = True,
    search: bool = True,
    progress: bool = False,
) -> Ranges:
    """The same for token and segment ids. Without search the ranges of least squared error are taken as they are."""
    _check(model, len(ids), target)
    stored = checkpoint.load_weights(model.folder, model.config)
    stored.check_word_table()
    weights = dict(stored.items())
    trials = _Search(model.config, weights, ids, segments, model.backend.threads)
    found = trials.run(by_channel, search, progress)
    provenance = {
        "method": "ranges of activations chosen by the logits' error (minilpt quantize)",
        "texts": len(trials.ids),
        "held_out_rms": found.held_out_rms[1],
        "agreement": found.agreement,
        "methods": dict(found.methods),
        "date": datetime.date.today().isoformat(),
    }
    _write(model, trials.folded(found.scales), found.scales, provenance, target)
    return found


def _check(model: Classifier, count: int, target: Path) -> None:
    if target.exists():
        raise InputError(f"{target}: is there already; name a folder that is to be made")
    if count < FEWEST_TEXTS:
        raise CalibrationError(f"ranges need at least {FEWEST_TEXTS} texts, found {count}; {FEW_TEXTS} are better")
    if count < FEW_TEXTS:
        message = f"{count} texts are few for the ranges of activations; {FEW_TEXTS} or more are better"
        warnings.warn(message, MinilptWarning, stacklevel=3)
    if model.config.quant_mode:
        raise UnsupportedModelError(f"{model.folder}: quant_mode is true: this model is quantised already")
    check_supported(model.config)


class _Search:
    """The float weights, the texts, and the integer models that are tried."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Float32],
        ids: list[list[int]],
        segments: list[list[int]],
        threads: int,
    ):
        self.config, self.weights = config, weights
        self._quantized: dict[str, Any] = {
            name: quantize_rows(tensor) if tensor.ndim == 2 else tensor for name, tensor in weights.items()
        }
        lengths = np.cumsum([len(row) for row in ids])
        count = max(FEWEST_TEXTS, int(np.searchsorted(lengths, MOST_TOKENS, side="right")))
        self.ids, self.segments = ids[:count], segments[:count]
        self._backend = backends.choose("cpu", "ibert", threads)
        self._engine: CompiledEngine | None = None
        self._float = [_logits(config, weights, *texts) for texts in zip(self.ids, self.segments, strict=True)]

    def run(self, by_channel: bool, search: bool, progress: bool) -> Ranges:
        """Choose every range."""
        options = dict(self._options(by_channel))
        chosen = {name: ways[0] for name, ways in options.items()}
        even, odd = self.ids[::2], self.ids[1::2]
        before = best = self._error(chosen, even, 0)
        held_out_before = self._error(chosen, odd, 1)
        trials = [(name, way) for name, ways in options.items() for way in ways[1:] if search]
        with progress_bar(len(trials), progress, unit="trial") as bar:
            for name, way in trials:
                try:
                    error = self._error({**chosen, name: way}, even, 0)
                except UnsupportedModelError:  # a range too small for integers of these widths
                    error = np.inf
                if error < best:
                    best, chosen = error, {**chosen, name: way}
                bar.update()
        logits = self._logits(chosen, odd, 1)
        wanted = np.stack(self._float[1::2])
        agreement = None
        if self.config.problem_type != "regression" and len(self.config.labels) > 1:
            agreement = float(np.mean(logits.argmax(axis=1) == wanted.argmax(axis=1)))
        methods = {name: way.method for name, way in chosen.items()}
        after = _rms(logits - wanted)
        return Ranges(self._scales(chosen), methods, (before, best), (held_out_before, after), agreement)

    def folded(self, scales: Scales) -> dict[str, Float32]:
        """The weights, those that read a LayerNorm with scales by channel multiplied by its powers of two."""
        weights = dict(self.weights)
        for norm, exponents in scales.exponents.items():
            for name in _readers(norm, self.config.layers):
                weights[f"{name}.weight"] = np.ldexp(weights[f"{name}.weight"], exponents)
        return weights

    def _error(self, chosen: Mapping[str, Range], ids: list[list[int]], first: int) -> float:
        """Root mean squared difference of logits."""
        return _rms(self._logits(chosen, ids, first) - np.stack(self._float[first::2]))

    def _logits(self, chosen: Mapping[str, Range], ids: list[list[int]], first: int) -> Float32:
        scales = self._scales(chosen)
        weights = dict(self._quantized)
        for name, tensor in self.folded(scales).items():
            if tensor is not self.weights[name]:
                weights[name] = quantize_rows(tensor)
        program = IntegerProgram(self.config, integer_model(self.config, weights, scales))
        if self._engine is None:
            self._engine = CompiledEngine(self.config, program, None, self._backend)
        engine = self._engine = self._engine.with_program(program)
        return engine.run(token_batch(self.config, ids, self.segments[first::2])).logits

    def _scales(self, chosen: Mapping[str, Range]) -> Scales:
        scales = {}
        for name, bits in activation_names(self.config).items():
            way = chosen.get(name.removesuffix(AGAIN))
            scales[name] = scale_of(np.float32(1), bits) if way is None else way.scale  # exponentials: at most 1
        exponents = {name: way.exponents for name, way in chosen.items() if way.exponents is not None}
        return Scales(scales, exponents, from_file=True)

    def _options(self, by_channel: bool) -> Iterator[tuple[str, list[Range]]]:
        """The ways to quantise each activation, the likeliest first."""
        bits = activation_names(self.config)
        for name, values in _activations(self.config, self.weights, self.ids, self.segments):
            if bits[name] > ACTIVATION_BITS:
                largest = np.abs(values).max() * np.float32(WIDE_MARGIN)
                yield name, [Range("max", scale_of(largest, bits[name]))]
            else:
                yield name, list(_ranges(values, by_channel and name.endswith("norm")))


def _ranges(values: Float32, by_channel: bool) -> Iterator[Range]:
    """Least squared error, the largest value, percentiles and, where asked for, powers of two by channel."""
    size = np.abs(values)
    if not size.any():
        yield Range("max", scale_of(np.float32(1), ACTIVATION_BITS))  # any will do
        return
    yield Range("mse", _least_squares(values))
    yield Range("max", scale_of(size.max(), ACTIVATION_BITS))
    for percentile in PERCENTILES:
        largest = np.float32(np.percentile(size, percentile))
        if largest > 0:
            yield Range(f"{percentile} %", scale_of(largest, ACTIVATION_BITS))
    if by_channel:
        channels = size.max(axis=0)
        base = np.quantile(channels, CHANNEL_QUANTILE)
        exponents = np.ceil(np.log2(np.maximum(channels, base) / base)).astype(np.int64)
        if exponents.any():
            yield Range("channels", _least_squares(np.ldexp(values, -exponents)), exponents)


def _least_squares(values: Float32) -> np.float32:
    """The scale of 8-bit integers with the least mean squared error."""
    largest = np.abs(values).max()
    scales = [scale_of(np.float32(largest * clip), ACTIVATION_BITS) for clip in CLIPS]
    errors = [np.mean((np.clip(np.rint(values / scale), -128, 127) * scale - values) ** 2) for scale in scales]
    return scales[int(np.argmin(errors))]


def _activations(
    config: ModelConfig, weights: Mapping[str, Float32], ids: list[list[int]], segments: list[list[int]]
) -> Iterator[tuple[str, Float32]]:
    """Every activation of the float model, (tokens, width), by name, in the order of the model; exponentials apart."""
    rows, bounds = [], np.cumsum([0, *map(len, ids)])
    for tokens, kinds in zip(ids, segments, strict=True):
        places = ragged.positions(
            np.array(tokens, np.int32), offset=config.position_offset, pad_token_id=config.pad_token_id
        )
        row = weights["embeddings.word.weight"][tokens] + weights["embeddings.position.weight"][places]
        rows.append(row + weights["embeddings.segment.weight"][kinds] if config.segments else row)
    x = np.concatenate(rows)
    yield "embeddings.sum", x
    x = _normed(weights, "embeddings.norm", x, config.eps)
    yield "embeddings.norm", x
    for layer in range(config.layers):
        at = f"layers.{layer}."
        q, k, v = (_projected(weights, f"{at}{name}", x) for name in ("query", "key", "value"))
        yield from ((f"{at}query", q), (f"{at}key", k), (f"{at}value", v))
        parts = [slice(*pair) for pair in pairwise(bounds)]
        context = np.concatenate(
            [
                reference.attention_context(reference.attention_probs(q[part], k[part], config.heads), v[part])
                for part in parts
            ]
        )
        yield f"{at}context", context
        x = x + _projected(weights, f"{at}attention_output", context)
        yield f"{at}attention_sum", x
        x = _normed(weights, f"{at}attention_norm", x, config.eps)
        yield f"{at}attention_norm", x
        inner = NUMPY[config.activation](_projected(weights, f"{at}inner", x))
        yield f"{at}inner", inner
        x = x + _projected(weights, f"{at}outer", inner)
        yield f"{at}outer_sum", x
        x = _normed(weights, f"{at}outer_norm", x, config.eps)
        yield f"{at}outer_norm", x
    if config.head_activation != "tanh":
        hidden = _projected(weights, "head.dense", x[bounds[:-1]])
        yield "head.dense", NUMPY[config.head_activation](hidden)


def _projected(weights: Mapping[str, Float32], name: str, x: Float32) -> Float32:
    return NUMPY["linear"](x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _normed(weights: Mapping[str, Float32], name: str, x: Float32, eps: float) -> Float32:
    return NUMPY["layer_norm"](x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def _logits(config: ModelConfig, weights: Mapping[str, Float32], ids: list[int], segments: list[int]) -> Float32:
    """Of the float model, one text."""
    *_, (name, last) = _activations(config, weights, [ids], [segments])
    if name == "head.dense":
        return _projected(weights, "head.out", last)[0]
    return reference.head(weights, config, last[0])


def _readers(norm: str, layers: int) -> list[str]:
    """The matrices that read a LayerNorm's output."""
    if norm.endswith("attention_norm"):
        return [norm.replace("attention_norm", "inner")]
    following = 0 if norm == "embeddings.norm" else int(norm.split(".")[1]) + 1
    if following == layers:
        return ["head.dense"]
    return [f"layers.{following}.{name}" for name in ("query", "key", "value")]


def _rms(difference: Float32) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def _write(
    model: Classifier, weights: Mapping[str, Float32], scales: Scales, provenance: Mapping[str, Any], target: Path
) -> None:
    """The folder, made beside its place and then renamed."""
    theirs = names.checkpoint_names(model.config)
    with whole_folder(target) as folder:
        for name in COPIED:
            if (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, folder / name)
        config = model.source.settings()
        if scales.exponents:
            config["quant_mode"] = True
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_weights(folder, {theirs[name]: tensor for name, tensor in weights.items()}, int8_rows=True)
        write_scales(folder / FILE_NAME, scales, provenance)
