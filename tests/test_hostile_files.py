"""Hostile and broken weight files: refused with an error of our own, before memory is spent and without being run."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

import minilpt
from minilpt.config import read_config
from minilpt.weights import checkpoint

import checkpoints

SINGLE, INDEX = checkpoint.SINGLE, checkpoint.INDEX
PROJECTION = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT classifier."""
    return checkpoints.write(tmp_path / "model")


def load(folder: Path) -> dict[str, NDArray[np.float32]]:
    return checkpoint.load_weights(folder, read_config(folder))


@contextmanager
def at_most_a_mebibyte() -> Iterator[None]:
    """Fails if Python and NumPy together hold more at any moment."""
    tracemalloc.start()
    try:
        yield
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", size: int | None = None) -> Path:
    """A file of the safetensors shape with any header at all; sparse up to `size` bytes of data."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content + data)
        if size is not None:
            file.truncate(8 + len(content) + size)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_huge_tensor_that_config_does_not_ask_for_is_refused_before_it_is_read(folder: Path) -> None:
    """A sparse file claims 64 GiB, honestly as far as safetensors can tell."""
    rows, size = 1 << 29, 1 << 36
    tensors = checkpoints.tensors(folder)
    header, at = {"bert.embeddings.word_embeddings.weight": entry([rows, 32], 0, size)}, size
    for name in set(tensors) - set(header):
        header[name] = entry(list(tensors[name].shape), at, at + tensors[name].nbytes)
        at += tensors[name].nbytes
    write_raw(folder / SINGLE, header, size=at)
    said = r"has shape \(536870912, 32\); config\.json asks for \(60, 32\)"
    with at_most_a_mebibyte(), pytest.raises(minilpt.WeightsError, match=said):
        minilpt.load(folder)


# Files that lie.

HEADERS: dict[str, tuple[dict[str, Any] | bytes, bytes]] = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "same place": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "hole at the start": ({"a": entry([1], 4, 8)}, bytes(8)),
    "bytes left over": ({"a": entry([1], 0, 4)}, bytes(5)),
    "bytes missing": ({"a": entry([2], 0, 8)}, bytes(7)),
    "too small for its shape": ({"a": entry([3], 0, 8)}, bytes(8)),
    "too large for its shape": ({"a": entry([1], 0, 8)}, bytes(8)),
    "shape product overflows": ({"a": entry([1 << 33, 1 << 33], 0, 4)}, bytes(4)),
    "shape product overflows to fit": ({"a": entry([1 << 62, 4], 0, 0)}, b""),
    "negative size": ({"a": entry([-1], 0, 4)}, bytes(4)),
    "fractional size": ({"a": entry([1.0], 0, 4)}, bytes(4)),  # type: ignore[list-item]
    "end before begin": ({"a": entry([0], 4, 0)}, bytes(4)),
    "negative offset": ({"a": entry([1], -4, 0)}, bytes(4)),
    "unknown dtype": ({"a": entry([1], 0, 4, "F31")}, bytes(4)),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "entry is a list": ({"a": [1]}, bytes(4)),
    "metadata is no text": ({"__metadata__": {"a": 1}, "a": entry([1], 0, 4)}, bytes(4)),
    "list": (b"[]", b""),
    "nested": (b'{"a":' * 50_000, b""),
    "nested lists": (b"[" * 50_000, b""),
    "5000 digits": (b'{"a":{"dtype":"F32","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)),
    "not UTF-8": (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "doubled tensor": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "doubled key": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "no JSON": (b"\x00" * 16, b""),
    "no header": (b"", b""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_lying_header_is_refused(tmp_path: Path, case: str) -> None:
    write_raw(tmp_path / SINGLE, *HEADERS[case])
    with pytest.raises(minilpt.ModelFileError, match=r"model\.safetensors: not a sound safetensors file"):
        checkpoint.read_headers(tmp_path)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, 100_000_001, 3, 1])
def test_a_lying_header_length_is_refused_without_allocating_it(tmp_path: Path, length: int) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}")
    with at_most_a_mebibyte(), pytest.raises(minilpt.ModelFileError, match="not a sound safetensors file"):
        checkpoint.read_headers(tmp_path)


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    for kept in (0, 1, 7, 8, 9, 1000, len(whole) // 2, len(whole) - 1):
        (folder / SINGLE).write_bytes(whole[:kept])
        with pytest.raises(minilpt.ModelFileError):
            load(folder)
    (folder / SINGLE).write_bytes(whole + b"\0")
    with pytest.raises(minilpt.ModelFileError):
        load(folder)


# Shards.


def sharded(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """The folder with its tensors in two shards and an index, with changes to the weight_map."""
    tensors = checkpoints.tensors(folder)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: shards[index % 2] for index, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where | (changes or {})}))
    (folder / SINGLE).unlink()
    return folder


def test_a_sharded_checkpoint_is_one_checkpoint(folder: Path) -> None:
    wanted, found = load(folder), load(sharded(folder))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "..",
        "",
        "pytorch_model-00001-of-00002.bin",
    ],
)
def test_a_shard_must_be_a_plain_file_of_the_folder(folder: Path, shard: str) -> None:
    save_file({PROJECTION: np.ones((32, 32), np.float32)}, folder.parent / "outside.safetensors")
    sharded(folder, {PROJECTION: shard})
    with pytest.raises(minilpt.ModelFileError, match="not the plain name") as caught:
        load(folder)
    assert repr(shard) in str(caught.value)


@pytest.mark.parametrize("shard", ["model-00003-of-00002.safetensors", "nul\0.safetensors", "\ud800.safetensors"])
def test_a_shard_that_is_not_there_is_an_error(folder: Path, shard: str) -> None:
    sharded(folder, {PROJECTION: shard})
    with pytest.raises(minilpt.ModelFileError, match="not a sound safetensors file"):
        load(folder)


def test_the_index_must_name_the_right_shard(folder: Path) -> None:
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][PROJECTION] = shards[shards[0] == index["weight_map"][PROJECTION]]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(minilpt.ModelFileError, match=f"not in the shard that weight_map names: {PROJECTION}"):
        load(folder)


def test_the_index_may_not_name_a_tensor_that_no_shard_holds(folder: Path) -> None:
    sharded(folder, {"ghost.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(minilpt.ModelFileError, match=r"ghost\.weight"):
        load(folder)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_an_error(folder: Path, index: str) -> None:
    sharded(folder)
    (folder / INDEX).write_text(index)
    with pytest.raises(minilpt.ModelFileError, match=r"model\.safetensors\.index\.json"):
        load(folder)


# Files that are never opened.


@pytest.mark.parametrize("name", checkpoint.PICKLES)
def test_a_pickle_is_refused_with_advice_and_never_opened(folder: Path, name: str) -> None:
    (folder / SINGLE).unlink()
    trap = folder / "executed"
    (folder / name).write_bytes(f"cos\nsystem\n(S'touch {trap}'\ntR.".encode())
    (folder / name).chmod(0)
    with pytest.raises(minilpt.ModelFileError, match=r"never opens one.*safe_serialization=True"):
        load(folder)
    assert not trap.exists()


def test_a_pickle_beside_safetensors_does_no_harm(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    assert load(folder)


def test_a_folder_without_weights_says_what_is_needed(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(minilpt.ModelFileError, match=f"neither {SINGLE} nor {INDEX} is there"):
        load(folder)
