"""Safetensors checkpoints: headers checked against the model before any data is read, then tensors widened to float32.

The safetensors package validates each header (length, offsets, overlaps, sizes, dtypes). No other format is opened.
"""

from __future__ import annotations

import json
import struct
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig, read_json
from ..errors import ModelFileError, WeightsError
from ..quantize import Quantized, dequantize_rows
from . import names

Float32 = NDArray[np.float32]
FLOATS = ("F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "model.bin", "model.pt", "pytorch_model.pt", "pytorch_model.bin.index.json")
WORD_TABLE = "embeddings.word.weight"
SCALE_SUFFIX = "_scale"  # `X.weight` as int8 rows goes with `X.weight_scale`, one float32 per row


@dataclass(frozen=True)
class Stored:
    """One tensor's header entry. begin_bytes counts from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin_bytes: int

    def read(self, file: BinaryIO) -> NDArray[Any]:
        """The tensor as stored, read-only; bfloat16 comes as its uint16 bit pattern. file: the one at `path`.

        It is mapped, not copied: pages that nobody touches, as most of a word table's, take no memory, and processes
        share the others.
        """
        dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1"}[self.dtype]
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        mapped = np.memmap(file, dtype, "r", self.begin_bytes, self.shape)
        return np.require(np.asarray(mapped), requirements="A")


class Weights(Mapping[str, Any]):
    """Tensors by our names, read when asked for and not kept. The files stay open, so they stay the same.

    float32, but for those of `as_stored` that the file holds as int8 rows: they are `Quantized`. Asking raises
    WeightsError where a value is not finite; the word table, whose rows are read when they are looked up, `check`s it.
    """

    def __init__(self, stored: Mapping[str, Stored], wanted: Mapping[str, str], as_stored: Collection[str]):
        self._stored, self._wanted, self._as_stored = stored, wanted, as_stored
        self._files = {path: open(path, "rb") for path in {entry.path for entry in stored.values()}}  # noqa: SIM115
        for file in self._files.values():
            weakref.finalize(self, file.close)

    def __getitem__(self, name: str) -> Float32 | Quantized:
        theirs = self._wanted[name]
        entry = self._stored[theirs]
        if entry.dtype == "I8":
            scale = self._stored[theirs + SCALE_SUFFIX]
            quantized = Quantized(self._raw(entry), _finite(scale, self._raw(scale)))
            if name in self._as_stored:
                return quantized
            with np.errstate(over="ignore"):
                return _finite(entry, dequantize_rows(*quantized))
        tensor = widened(self._raw(entry), entry.dtype)
        return tensor if name == WORD_TABLE else _finite(entry, tensor)

    def check_word_table(self) -> None:
        """Raise WeightsError where one of its values is not finite."""
        entry = self._stored[self._wanted[WORD_TABLE]]
        if entry.dtype != "I8":
            _finite(entry, widened(self._raw(entry), entry.dtype))

    def _raw(self, entry: Stored) -> NDArray[Any]:
        return entry.read(self._files[entry.path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


def _finite(entry: Stored, tensor: Float32) -> Float32:
    """The tensor. One sum tells in nearly all cases: NaN and infinity stay in it."""
    with np.errstate(over="ignore", invalid="ignore"):
        sound = np.isfinite(tensor.sum()) or np.isfinite(tensor).all()
    if not sound:
        place = np.unravel_index(int(np.argmin(np.isfinite(tensor))), tensor.shape)
        raise WeightsError(
            f"{entry.path}: {entry.name} holds {tensor[place]} at {tuple(map(int, place))}: weights must be finite "
            f"numbers; the file was damaged, or training went wrong before it was saved"
        )
    return tensor


def widened(raw: NDArray[Any], dtype: str) -> Float32:
    """A stored tensor as float32, exactly: every float16 and bfloat16 value is a float32 value."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def load_weights(folder: Path, config: ModelConfig, as_stored: Collection[str] = ()) -> Weights:
    """All tensors that the model reads, by our names: float32, or int8 rows where `as_stored` names them.

    Raises ModelFileError for missing, damaged or pickled files and WeightsError for tensors that are missing,
    unexpected, doubled, or of the wrong shape or dtype; all of it before the first tensor is read.
    """
    stored = _by_normalised_name(read_headers(folder), config.family)
    wanted = names.checkpoint_names(config)
    shapes = names.expected_shapes(config)
    model = f"{config.family} {'classifier' if config.labels else 'encoder'}"
    _check(folder, stored, {wanted[ours]: shape for ours, shape in shapes.items()}, config.family, model)
    return Weights(stored, wanted, as_stored)


def read_ltp_offsets(folder: Path, layers: int) -> list[np.float32]:
    """The learned threshold offset of each layer in a checkpoint of the LTP code; zeros where none is stored."""
    wanted = [names.LTP_OFFSET.format(layer) for layer in range(layers)]
    found = read_numbers(folder, "ibert", wanted)
    return [found.get(name, np.float32(0)) for name in wanted]


def read_numbers(folder: Path, family: str, wanted: Iterable[str]) -> dict[str, np.float32]:
    """Those of the wanted tensors that the checkpoint has, each of which must be one number."""
    stored = _by_normalised_name(read_headers(folder), family)
    found = {}
    for name in wanted:
        entry = stored.get(name)
        if entry is not None and (entry.dtype not in FLOATS or entry.shape not in ((), (1,))):
            raise WeightsError(f"{entry.path}: {entry.name} must be one number, found {entry.dtype} {entry.shape}")
        if entry is not None:
            with open(entry.path, "rb") as file:
                found[name] = np.float32(widened(entry.read(file), entry.dtype).reshape(()))
    return found


def read_headers(folder: Path) -> list[Stored]:
    """Header entries of all tensors in the folder's checkpoint, sharded or not."""
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    for name in PICKLES:
        if (folder / name).exists():
            raise ModelFileError(
                f"{folder / name}: a pickle can run code, so minilpt never opens one. Convert it where torch is "
                f"installed: load the model with transformers and call save_pretrained(..., safe_serialization=True)"
            )
    raise ModelFileError(f"{folder}: neither {SINGLE} nor {INDEX} is there; a model folder needs one of them")


def _read_shards(folder: Path) -> list[Stored]:
    index_path = folder / INDEX
    shards = shards_of(index_path)
    weight_map = read_json(index_path)["weight_map"]
    entries = [entry for shard in shards for entry in _read_header(folder / shard)]
    found = {entry.name: entry.path.name for entry in entries}
    wrong = sorted(name for name, shard in weight_map.items() if found.get(name) != shard)
    if wrong:
        raise ModelFileError(f"{index_path}: not in the shard that weight_map names: {_listed(wrong)}")
    return entries


def shards_of(index_path: Path) -> list[str]:
    """The files that an index names, sorted. Raises ModelFileError for anything but plain names of safetensors."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelFileError(f"{index_path}: weight_map must map tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if shard != Path(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise ModelFileError(f"{index_path}: shard {shard!r} is not the plain name of a .safetensors file here")
    return shards


def _read_header(path: Path) -> list[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass  # opening validates: lengths, offsets, overlaps, sizes, dtypes
        with open(path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes), object_pairs_hook=_without_doubles)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not a sound safetensors file: {error}; fetch it again") from None
    return [
        Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    ]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if a key stands there twice, where two readers could see two different files."""
    record = dict(pairs)
    if len(record) < len(pairs):
        doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"the header names {_listed(doubled)} twice")
    return record


def _by_normalised_name(entries: list[Stored], family: str) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for entry in entries:
        name = names.normalise(entry.name, family)
        if name in stored:
            raise WeightsError(f"{entry.path}: {entry.name} and {stored[name].name} are the same tensor, {name}")
        stored[name] = entry
    return stored


def _check(
    folder: Path, stored: Mapping[str, Stored], wanted: Mapping[str, names.Shape], family: str, model: str
) -> None:
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors of this {model} are missing: {_listed(missing)}. "
            f"minilpt never makes up weights: use a checkpoint fine-tuned for sequence classification"
        )
    scales = {name + SCALE_SUFFIX for name in wanted if stored[name].dtype == "I8"}
    extra = [name for name in stored if name not in wanted and name not in scales]
    unexpected = [stored[name].name for name in extra if not names.is_unused(name, family)]
    if unexpected:
        raise WeightsError(
            f"{folder}: {len(unexpected)} tensors have no place in this {model}: {_listed(unexpected)}. "
            f"Is config.json the right one for these weights?"
        )
    for name, shape in wanted.items():
        _check_tensor(stored, name, shape)


def _check_tensor(stored: Mapping[str, Stored], name: str, shape: names.Shape) -> None:
    entry = stored[name]
    if entry.shape != shape:
        raise WeightsError(f"{entry.path}: {entry.name} has shape {entry.shape}; config.json asks for {shape}")
    if entry.dtype in FLOATS:
        return
    scale = stored.get(name + SCALE_SUFFIX)
    if entry.dtype != "I8" or len(shape) != 2:
        raise WeightsError(
            f"{entry.path}: {entry.name} has dtype {entry.dtype}; wanted {', '.join(FLOATS)}, or I8 rows"
        )
    if scale is None or scale.dtype != "F32" or scale.shape != shape[:1]:
        raise WeightsError(f"{entry.path}: {entry.name} is I8 and needs {name + SCALE_SUFFIX}, F32, shape {shape[:1]}")


def _listed(items: list[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(sorted(items)[:most]) + more
