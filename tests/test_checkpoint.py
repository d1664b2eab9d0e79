"""Checkpoints: what is stored comes back exactly under its one name, and what has no place is named and refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.numpy import save_file

import minilpt
from minilpt import quantize
from minilpt.config import read_config
from minilpt.weights import checkpoint, names, save

import checkpoints

Tensors = dict[str, NDArray[Any]]
SINGLE = checkpoint.SINGLE
PROJECTION = "bert.encoder.layer.1.attention.self.query.weight"
NORM = "bert.encoder.layer.2.output.LayerNorm.bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT classifier."""
    return checkpoints.write(tmp_path / "model")


def load(folder: Path) -> dict[str, NDArray[np.float32]]:
    return checkpoint.load_weights(folder, read_config(folder))


def stored_as(folder: Path, change: Callable[[Tensors], Tensors | None]) -> Path:
    """The folder with its tensors changed (in place, or for those returned)."""
    tensors: Tensors = dict(checkpoints.tensors(folder))
    save_file(change(tensors) or tensors, folder / SINGLE)
    return folder


def renamed(folder: Path, name: Callable[[str], str]) -> Path:
    return stored_as(folder, lambda tensors: {name(key): tensor for key, tensor in tensors.items()})


def same(found: dict[str, NDArray[np.float32]], wanted: dict[str, NDArray[np.float32]]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == np.float32 and found[name].tobytes() == wanted[name].tobytes() for name in wanted
    )


# What is stored comes back.


@pytest.mark.parametrize("model_type", checkpoints.CONFIGS)
def test_saved_weights_come_back_bit_for_bit_under_our_names(tmp_path: Path, model_type: str) -> None:
    folder = checkpoints.write(tmp_path, checkpoints.config(model_type))
    theirs, config = checkpoints.tensors(folder), read_config(folder)
    wanted = {ours: theirs[name] for ours, name in names.checkpoint_names(config).items()}
    assert same(load(folder), wanted)


@pytest.mark.parametrize("dtype, shift", [("F16", None), ("BF16", 16)])
def test_every_half_precision_value_widens_exactly(tmp_path: Path, dtype: str, shift: int | None) -> None:
    """All 65,536 bit patterns, NaN payloads included, against struct and the definition of bfloat16."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    header = json.dumps({"x": {"dtype": dtype, "shape": [256, 256], "data_offsets": [0, 1 << 17]}}).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    (entry,) = checkpoint.read_headers(tmp_path)
    with open(entry.path, "rb") as file:
        found = checkpoint.widened(entry.read(file), dtype).ravel()
    assert found.dtype == np.float32
    if shift:
        assert np.array_equal(found.view(np.uint32), bits.astype(np.uint32) << shift)
    else:
        wanted = np.array(struct.unpack("<65536e", bits.tobytes())).astype(np.float32)  # float32 holds them all
        assert np.array_equal(found, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(found), np.signbit(wanted))


def test_bfloat16_and_float16_checkpoints_equal_torch_s_own_widening(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensors = {name: torch.from_numpy(tensor) for name, tensor in checkpoints.tensors(folder).items()}
    ours = names.checkpoint_names(read_config(folder))
    for dtype in (torch.bfloat16, torch.float16):
        save_torch({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / SINGLE)
        assert same(load(folder), {our: tensors[name].to(dtype).float().numpy() for our, name in ours.items()})


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 40)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
@example(np.array([[1e-45, 0, -1e-45]], np.float32))
@example(np.array([[1e-40, 3e-41], [0, 0], [2e-36, 1e-36]], np.float32))
def test_int8_rows_are_off_by_half_a_step_at_most(weight: NDArray[np.float32]) -> None:
    """Half the row's scale, and 128 times float32's rounding of the division and the product."""
    quantized, scale = quantize.quantize_rows(weight)
    found = quantize.dequantize_rows(quantized, scale)
    assert (quantized.dtype, scale.dtype, found.dtype) == (np.int8, np.float32, np.float32)
    assert np.abs(quantized.astype(int)).max() <= 127
    rounding = 128 * np.finfo(np.float32).eps
    error = np.abs(found.astype(np.float64) - weight)
    assert (error <= (0.5 + rounding) * scale[:, None].astype(np.float64)).all(), (weight, found)
    assert (found[weight == 0] == 0).all()


def test_int8_rows_are_stored_for_matrices_only_and_quantise_once(folder: Path) -> None:
    tensors = checkpoints.tensors(folder)
    exact = load(folder)
    save.save_weights(folder, tensors, int8_rows=True)
    dtypes = {stored.name: stored.dtype for stored in checkpoint.read_headers(folder)}
    assert {name for name, dtype in dtypes.items() if dtype == "I8"} == {n for n, t in tensors.items() if t.ndim == 2}
    first = load(folder)
    for name, tensor in exact.items():
        if tensor.ndim == 1:
            assert np.array_equal(first[name], tensor)
        else:
            step = np.abs(tensor).max(axis=1, keepdims=True) / 127
            assert (np.abs(first[name] - tensor) <= 0.50001 * step).all(), name
    ours = names.checkpoint_names(read_config(folder))
    save.save_weights(folder, {ours[name]: tensor for name, tensor in first.items()}, int8_rows=True)
    assert max(np.abs(load(folder)[name] - tensor).max() for name, tensor in first.items()) < 1e-6


def test_a_failed_save_leaves_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / SINGLE).read_bytes()

    def half(tensors: Tensors, path: Path, metadata: object) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save.save_weights(folder, checkpoints.tensors(folder, seed=1))
    assert (folder / SINGLE).read_bytes() == before


# Names that stand for the same tensor.


@pytest.mark.parametrize(
    "name",
    [
        lambda name: f"module.{name}",
        lambda name: name.removeprefix("bert."),
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        lambda name: "module." + name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"),
    ],
    ids=["module.", "no prefix", "gamma and beta", "all of it"],
)
def test_old_and_wrapped_names_are_understood(folder: Path, name: Callable[[str], str]) -> None:
    wanted = load(folder)
    assert same(load(renamed(folder, name)), wanted)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra", "ltp"])
def test_a_missing_family_prefix_is_added(tmp_path: Path, model_type: str) -> None:
    folder = checkpoints.write(tmp_path, checkpoints.config(model_type))
    wanted, prefix = load(folder), names.TABLES[read_config(folder).family].prefix
    assert same(load(renamed(folder, lambda name: name.removeprefix(prefix))), wanted)


def test_only_a_layer_norm_s_gamma_is_a_weight(folder: Path) -> None:
    renamed(folder, lambda name: name.replace("classifier.weight", "classifier.gamma"))
    with pytest.raises(minilpt.WeightsError, match=r"1 tensors .* missing: classifier\.weight"):
        load(folder)


@pytest.mark.parametrize("twin", ["module." + NORM, NORM.removeprefix("bert."), NORM.replace("bias", "beta")])
def test_two_names_for_one_tensor_are_refused(folder: Path, twin: str) -> None:
    stored_as(folder, lambda tensors: tensors | {twin: tensors[NORM] + 1})
    with pytest.raises(minilpt.WeightsError) as caught:
        load(folder)
    assert twin in str(caught.value) and NORM in str(caught.value)


# Tensors that are missing, unexpected, or of another kind.


@pytest.mark.parametrize("model_type", checkpoints.CONFIGS)
def test_every_missing_tensor_is_named_and_the_head_is_never_made_up(tmp_path: Path, model_type: str) -> None:
    folder = checkpoints.write(tmp_path, checkpoints.config(model_type))
    whole = (folder / SINGLE).read_bytes()
    for name in checkpoints.tensors(folder):
        stored_as(folder, lambda tensors, name=name: {key: t for key, t in tensors.items() if key != name})
        with pytest.raises(minilpt.WeightsError) as caught:
            load(folder)
        assert f"1 tensors of this {read_config(folder).family} classifier are missing: {name}" in str(caught.value)
        (folder / SINGLE).write_bytes(whole)


def test_many_missing_tensors_are_counted_and_a_few_named(folder: Path) -> None:
    stored_as(folder, lambda tensors: {key: t for key, t in tensors.items() if "layer.2" not in key})
    with pytest.raises(minilpt.WeightsError, match=r"16 tensors .* missing: .*layer\.2.* and 8 more"):
        load(folder)


UNUSED = {
    "bert": [
        "bert.embeddings.position_ids",
        "embeddings.position_ids",
        "cls.predictions.bias",
        "cls.seq_relationship.weight",
    ],
    "roberta": ["roberta.pooler.dense.weight", "lm_head.dense.weight", "roberta.embeddings.token_type_ids"],
    "distilbert": ["vocab_transform.weight", "vocab_layer_norm.bias", "vocab_projector.weight"],
    "electra": [
        "discriminator_predictions.dense.weight",
        "generator_predictions.LayerNorm.bias",
        "generator_lm_head.bias",
    ],
    "ltp": [
        "ibert.encoder.layer.0.attention.self.pruner.keep_threshold",
        "ibert.encoder.layer.0.attention.self.query.weight_integer",
        "ibert.encoder.layer.0.attention.self.query.bias_integer",
        "ibert.encoder.layer.0.output.dense.fc_scaling_factor",
        "ibert.encoder.layer.0.output_activation.act_scaling_factor",
        "ibert.embeddings.word_embeddings.weight_scaling_factor",
        "ibert.encoder.layer.0.output_activation.x_min",
        "ibert.encoder.layer.0.output_activation.x_max",
        "ibert.encoder.layer.0.output.LayerNorm.shift",
        "ibert.pooler.dense.weight",
    ],
}


@pytest.mark.parametrize("model_type, name", [(family, name) for family, known in UNUSED.items() for name in known])
def test_tensors_known_to_be_unused_are_passed_over(tmp_path: Path, model_type: str, name: str) -> None:
    folder = checkpoints.write(tmp_path, checkpoints.config(model_type))
    wanted = load(folder)
    stored_as(folder, lambda tensors: tensors | {name: np.arange(3)})
    assert same(load(folder), wanted)


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.3.output.dense.weight",
        "bert.encoder.layer.0.attention.self.distance_embedding.weight",
        "bert.encoder.layer.0.crossattention.self.query.weight",
        "bert.encoder.layer.0.attention.self.query.lora_A.weight",
        "classifier.2.weight",
        "qa_outputs.weight",
        "roberta.embeddings.word_embeddings.weight",
        "classifier.weight_scale",
    ],
)
def test_an_unexpected_tensor_is_named_and_refused(folder: Path, name: str) -> None:
    stored_as(folder, lambda tensors: tensors | {name: np.zeros(3, np.float32)})
    with pytest.raises(minilpt.WeightsError, match="1 tensors have no place") as caught:
        load(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("shape", [(32, 31), (31, 32), (1024,), (32, 32, 1), (0, 32), ()])
def test_a_wrong_shape_is_refused_with_both_shapes(folder: Path, shape: tuple[int, ...]) -> None:
    stored_as(folder, lambda tensors: tensors | {PROJECTION: np.zeros(shape, np.float32)})
    with pytest.raises(minilpt.WeightsError) as caught:
        load(folder)
    assert all(said in str(caught.value) for said in (PROJECTION, str(shape), "(32, 32)"))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.bool_, np.int64])
def test_a_wrong_dtype_is_refused(folder: Path, dtype: type) -> None:
    stored_as(folder, lambda tensors: tensors | {PROJECTION: np.zeros((32, 32), dtype)})
    with pytest.raises(minilpt.WeightsError, match=r"query\.weight has dtype"):
        load(folder)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {PROJECTION + "_scale": np.ones(31, np.float32)},
        {PROJECTION + "_scale": np.ones((32, 1), np.float32)},
        {PROJECTION + "_scale": np.ones(32, np.float16)},
    ],
    ids=["no scale", "short", "column", "fp16"],
)
def test_int8_rows_need_a_scale_for_each_row(folder: Path, extra: Tensors) -> None:
    stored_as(folder, lambda tensors: tensors | {PROJECTION: np.ones((32, 32), np.int8)} | extra)
    with pytest.raises(minilpt.WeightsError, match=r"needs .*query\.weight_scale, F32"):
        load(folder)


def test_an_int8_vector_is_refused(folder: Path) -> None:
    stored_as(folder, lambda tensors: tensors | {NORM: np.ones(32, np.int8)})
    with pytest.raises(minilpt.WeightsError, match=r"LayerNorm\.bias has dtype I8"):
        load(folder)


# What LTP checkpoints carry beside weights.


def test_ltp_offsets_are_one_number_for_each_layer(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path, checkpoints.config("ltp"))
    stored_as(
        folder,
        lambda tensors: (
            tensors
            | {names.LTP_OFFSET.format(1): np.float32([0.25]), names.LTP_OFFSET.format(2): np.array(0.5, np.float16)}
        ),
    )
    assert checkpoint.read_ltp_offsets(folder, 3) == [0, 0.25, 0.5]
    for wrong in (np.zeros(2, np.float32), np.array([1]), np.zeros((1, 1), np.float32)):
        stored_as(folder, lambda tensors, wrong=wrong: tensors | {names.LTP_OFFSET.format(1): wrong})
        with pytest.raises(minilpt.WeightsError, match="keep_threshold must be one number"):
            checkpoint.read_ltp_offsets(folder, 3)
