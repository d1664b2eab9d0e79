"""The CUDA engine end to end, `load(device="cuda")` beside the CPU's engines: on the rig's stand-in, and on a card."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minilpt
from minilpt import cuda_device, ragged, reference
from minilpt.config import read_config
from minilpt.cuda_float import FloatCudaProgram
from minilpt.engine import Forward
from minilpt.kernels.cuda import BLOCK_SHARED_BYTES, MOST_WIDTH, Geometry
from minilpt.kernels.cuda.float_kernels import FloatKernels
from minilpt.ranges import quantize_sequences
from minilpt.weights import checkpoint

import checkpoints
import devices
import tolerances

# No mass comes within 1e-3 of a threshold: roundings, which differ from device to device, decide nothing.
RULES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "threshold": {"rule": "threshold", "thresholds": [0, 0.6, 0.8, 0.9, 0.9, 0.8], "score_denominator": 1},
    "relative": {"rule": "relative", "token_threshold": 0.3},
    "topk": {"rule": "topk", "token_keep_rate": 0.4},
    "topk, merged": {"rule": "topk", "token_keep_rate": 0.4, "merge_removed": True},
    "merged": {
        "rule": "threshold",
        "thresholds": [0.7, 0.6, 0.8, 0.9, 0.88, 0.8],
        "score_denominator": 1,
        "merge_removed": True,
    },
    "first only": {"rule": "threshold", "thresholds": [1e6] * 6, "score_denominator": 1},
}
WAITS = {"dense": 0, "threshold": 4, "relative": 5, "topk": 0, "topk, merged": 0, "merged": 5, "first only": 5}
SHAPE = {"num_hidden_layers": 6, "max_position_embeddings": 512}
LENGTHS = [1, 5, 17, 66, 2, 33]
TEXTS = [
    "a gorgeous , witty , seductive movie .",
    "the plot is nothing but boilerplate cliches from start to finish , and the jokes are older than that .",
    ("It is not good , not bad , just long .", "I expected little ."),
]


@pytest.fixture(scope="module", params=devices.ONE_SCHEDULE)
def cp(request: pytest.FixtureRequest) -> Any:
    return devices.cupy_of(request.param)


@pytest.fixture
def on_device(cp: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`load(device="cuda")` works; gives the CuPy module."""
    monkeypatch.setitem(sys.modules, "cupy", cp)
    monkeypatch.setattr(cuda_device, "installed", lambda: True)
    yield cp


def sequences(lengths: list[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 60, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("bert"), checkpoints.config(**SHAPE))


def assert_same_story(folder: Path, found: Forward, wanted: Forward, rows: list[list[int]], rule: Any) -> None:
    """The same tokens at every step; masses and logits within twice what float32 costs, as both sides round."""
    for name in ("kept_tokens", "attention_lengths", "ffn_lengths", "executed_flops", "counted_flops"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
    config = read_config(folder)
    weights = checkpoint.load_weights(folder, config)
    cost = tolerances.cost_of(
        weights, tolerances.widened(weights), config, rule, [(row, [0] * len(row)) for row in rows]
    )
    for mine, theirs in zip(found.kept or (), wanted.kept or (), strict=True):
        assert np.array_equal(mine, theirs)
    for layer, (mine, theirs) in enumerate(zip(found.masses or (), wanted.masses or (), strict=True)):
        bound = tolerances.mass_bound(cost, layer, config.heads, np.full(512, theirs.max()))[0]
        assert np.abs(mine - theirs).max() <= 2 * bound
    assert found.logits.dtype == np.float32
    assert np.abs(found.logits - wanted.logits).max() <= 2 * tolerances.logits_bound(cost, wanted.logits)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trace", [False, True])
def test_float32_answers_as_on_the_cpu(folder: Path, on_device: Any, rule: str, trace: bool) -> None:
    rows = sequences()
    gpu, cpu = (minilpt.load(folder, device=device, pruning=RULES[rule]) for device in ("cuda", "cpu"))
    assert (gpu.backend.name, gpu.backend.device) == ("cuda", "cuda")
    found, wanted = (model.forward(rows, trace=trace) for model in (gpu, cpu))
    assert_same_story(folder, found, wanted, rows, gpu.engine.rule)


@pytest.mark.parametrize("rule", RULES)
def test_integers_are_those_of_the_cpu(on_device: Any, quantized: Path, rule: str) -> None:
    """Logits, masses and kept tokens, bit for bit."""
    rows = sequences()
    gpu, cpu = (
        minilpt.load(quantized, device=device, precision="ibert", pruning=RULES[rule]) for device in ("cuda", "cpu")
    )
    for trace in (False, True):
        found, wanted = (model.forward(rows, trace=trace) for model in (gpu, cpu))
        for name in ("logits", "kept_tokens", "attention_lengths", "ffn_lengths"):
            assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
        for name in ("masses", "kept"):
            for mine, theirs in zip(getattr(found, name) or (), getattr(wanted, name) or (), strict=True):
                assert np.array_equal(mine, theirs), name


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small BERT with static ranges of its own activations on a few sequences."""
    out = tmp_path_factory.mktemp("integers") / "model"
    model = minilpt.load(folder, device="cpu", pruning=None)
    rows = sequences([9, 30, 17, 2] * 25, 3)
    quantize_sequences(model, rows, [[0] * len(row) for row in rows], out, search=False)
    return out


@pytest.mark.parametrize("name", ["dense", "threshold"])
def test_float16_is_within_what_float16_costs(folder: Path, on_device: Any, name: str) -> None:
    """Against float64 on the same float16 weights, where both keep the same tokens."""
    rows, config = sequences([1, 12, 40, 33]), read_config(folder)
    model = minilpt.load(folder, device="cuda", precision="fp16", pruning=RULES[name])
    half = {name: tensor.astype(np.float16) for name, tensor in checkpoint.load_weights(folder, config).items()}
    exact, rule = tolerances.widened(half), model.engine.rule
    bound = tolerances.cost_of(half, exact, config, rule, [(row, [0] * len(row)) for row in rows]).logits
    same = 0
    for row in rows:
        found, ids = model.forward([row], trace=True), np.array(row, np.int32)
        truth = reference.forward(exact, config, rule, ids, np.zeros_like(ids))
        if [len(row), *found.ffn_lengths[:, 0]][1:] == truth.n_ffn:
            same += 1
            assert np.abs(found.logits[0] - truth.logits).max() <= bound
    assert same >= 3


@pytest.mark.parametrize("architecture", checkpoints.CONFIGS)
def test_every_architecture(tmp_path: Path, on_device: Any, architecture: str) -> None:
    folder, rows = checkpoints.write(tmp_path, checkpoints.config(architecture)), sequences([3, 1, 30])
    found, wanted = (
        minilpt.load(folder, device=device, pruning=None).forward(rows, trace=True) for device in ("cuda", "cpu")
    )
    assert_same_story(folder, found, wanted, rows, None)


def test_the_bundled_model_classifies_text(on_device: Any) -> None:
    gpu, cpu = (minilpt.load(device=device) for device in ("cuda", "cpu"))
    for mine, theirs in zip(gpu.predict(TEXTS), cpu.predict(TEXTS), strict=True):
        assert (mine.label, mine.kept_tokens) == (theirs.label, theirs.kept_tokens)
        assert mine.executed_flops == theirs.executed_flops
        assert abs(mine.score - theirs.score) < 1e-4
    assert np.abs(gpu.embed(TEXTS) - cpu.embed(TEXTS)).max() < 1e-4
    assert gpu.predict([]) == []


def test_the_last_layer_s_rows(folder: Path, on_device: Any) -> None:
    rows, lengths = [row for text in sequences() for row in text], ragged.boundaries(LENGTHS)
    ids, zeros = np.array(rows, np.int32), np.zeros(len(rows), np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in LENGTHS])
    batch = ragged.TokenBatch(ids, positions, zeros, lengths)
    gpu, cpu = (minilpt.load(folder, device=device, pruning=RULES["merged"]).engine for device in ("cuda", "cpu"))
    for first_only in (False, True):
        found, wanted = (engine.last_rows(batch, first_only=first_only) for engine in (gpu, cpu))
        assert np.array_equal(found.cu_seqlens, wanted.cu_seqlens)
        assert found.rows.dtype == np.float32
        assert np.abs(found.rows - wanted.rows).max() < 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_the_host_waits_once_for_each_layer_that_masses_decide(
    cp: Any, folder: Path, on_device: Any, rule: str
) -> None:
    if not hasattr(cp, "synchronisations"):
        pytest.skip("a real CuPy does not count how often the host waits")
    model, rows = minilpt.load(folder, device="cuda", pruning=RULES[rule]), sequences()
    before = cp.synchronisations()
    kept = model.forward(rows).kept_tokens
    assert RULES[rule] is None or (kept[-2] < LENGTHS).any(), "the rule must have something to decide"
    answers = 2  # the logits, and the bounds of all layers
    assert cp.synchronisations() - before == WAITS[rule] + answers


def test_threads_share_a_model(folder: Path, on_device: Any) -> None:
    model = minilpt.load(folder, device="cuda", pruning=RULES["threshold"])
    batches = [sequences([5, 9 + seed], seed) for seed in range(6)]
    wanted = [model.forward(rows).logits.tolist() for rows in batches]
    with ThreadPoolExecutor(3) as pool:
        assert [found.logits.tolist() for found in pool.map(model.forward, batches)] == wanted


def test_two_threads_in_the_middle_of_their_runs_have_streams_of_their_own(
    folder: Path, on_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that one computes depends on the other's work: the stand-in refuses what no wait puts in order."""
    model, batches = (
        minilpt.load(folder, device="cuda", pruning=RULES["merged"]),
        [sequences([5, 19], n) for n in (1, 2)],
    )
    wanted = [model.forward(rows).logits.tolist() for rows in batches]
    both, streams, project = threading.Barrier(2, timeout=60), [], FloatCudaProgram.project

    def meeting(program: FloatCudaProgram, layer: int, x: Any) -> Any:
        if layer == 2:
            streams.append(on_device.cuda.get_current_stream())
            both.wait()
        return project(program, layer, x)

    monkeypatch.setattr(FloatCudaProgram, "project", meeting)
    with ThreadPoolExecutor(2) as pool:
        assert [found.logits.tolist() for found in pool.map(model.forward, batches)] == wanted
    assert streams[0] != streams[1]
    assert on_device.cuda.get_current_stream() not in streams  # the default one


def test_a_run_uses_the_card_of_its_load_whatever_the_thread_s_current_one(
    folder: Path, on_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device.cuda.runtime.getDeviceCount() < 2:
        if not hasattr(on_device, "synchronisations"):
            pytest.skip("needs two cards")
        monkeypatch.setattr(on_device.cuda, "count", 2)
    rows, Device = sequences([4, 9]), on_device.cuda.Device
    model = minilpt.load(folder, device="cuda", pruning=RULES["threshold"])
    wanted = model.forward(rows).logits.tolist()
    with Device(1):
        assert model.forward(rows).logits.tolist() == wanted
        assert model.with_pruning(RULES["topk"]).forward(rows).logits.shape == (2, 3)
        assert on_device.cuda.runtime.getDevice() == 1
        other = minilpt.load(folder, device="cuda", pruning=RULES["threshold"])
    assert other.forward(rows).logits.tolist() == wanted  # from a thread whose current card is the first
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(model.forward, rows).result().logits.tolist() == wanted


def test_kernels_are_looked_up_once(folder: Path, on_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked_up = minilpt.load(folder, device="cuda", pruning=RULES["merged"]), []
    if not hasattr(on_device, "synchronisations"):
        pytest.skip("a real CuPy's class takes no other method")
    monkeypatch.setattr(on_device.RawModule, "get_function", lambda module, name: looked_up.append(name))
    model.forward(sequences([4, 9]))
    assert looked_up == []


GEOMETRIES: dict[str, tuple[dict[str, Any], str]] = {
    "no warp": ({"row_warps": 0}, "row_warps is an integer from 1 to 32, found 0"),
    "half a warp": ({"attention_warps": 2.5}, "attention_warps is an integer from 1 to 32, found 2.5"),
    "more threads than a block has": ({"sequence_warps": 33}, "sequence_warps is an integer from 1 to 32, found 33"),
    "no block": ({"most_blocks": 0}, "most_blocks is an integer from 1 to 2147483647, found 0"),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_geometry_that_no_card_launches_is_refused(name: str) -> None:
    settings, said = GEOMETRIES[name]
    with pytest.raises(ValueError, match=said):
        Geometry(**settings)


def test_more_warps_than_a_kernel_is_compiled_for_are_refused(on_device: Any) -> None:
    kernels, rows = FloatKernels(on_device, Geometry(row_warps=16), "float32"), np.zeros((40, 4), np.float32)
    x, places, norm = (on_device.asarray(part) for part in (rows, np.arange(40, dtype=np.int32), rows[0]))
    with pytest.raises(ValueError, match="add_norm_f32: a block has 1 to 8 warps, found 16"):
        kernels.add_norm(x, norm, x, places, (norm, norm), 1e-5, on_device.empty((40, 4), np.float32))


def test_the_widest_rows_have_room(on_device: Any) -> None:
    """In the shared memory that a block gets without asking: MOST_WIDTH is what fits."""
    kernels, ones = FloatKernels(on_device, Geometry(), "float32"), np.ones((1, MOST_WIDTH), np.float32)
    x, norm = on_device.asarray(ones), on_device.asarray(ones[0])
    places, out = on_device.asarray(np.zeros(1, np.int32)), on_device.empty(ones.shape, np.float32)
    kernels.add_norm(x, norm, x, places, (norm, norm), 1e-5, out)
    assert np.abs(on_device.asnumpy(out) - 1).max() < 1e-3  # equal values: the norm's bias
    assert MOST_WIDTH * 4 == BLOCK_SHARED_BYTES


def test_runs_take_streams_that_are_free(folder: Path, on_device: Any) -> None:
    """CuPy keeps freed memory for its stream: a new stream for each run would fill the card."""
    model = minilpt.load(folder, device="cuda", pruning=None)
    for _ in range(3):
        model.forward(sequences([3]))
    assert len(model.engine._streams) == 1  # type: ignore[attr-defined]


def test_more_sequences_than_a_grid_has_are_refused(folder: Path, on_device: Any) -> None:
    with pytest.raises(minilpt.InputError, match="a batch has 65536 sequences; the CUDA kernels take 65535"):
        minilpt.load(folder, device="cuda", pruning=None).forward([[5]] * 65536)


def test_a_text_that_does_not_fit_is_refused(tmp_path: Path, on_device: Any) -> None:
    shape = {"num_hidden_layers": 1, "max_position_embeddings": 4000, "hidden_size": 128, "num_attention_heads": 1}
    model = minilpt.load(checkpoints.write(tmp_path, checkpoints.config(**shape)), device="cuda", pruning=None)
    with pytest.raises(
        minilpt.InputError, match=r'a text has 3000 tokens; the CUDA kernels hold \d+: use device="cpu"'
    ):
        model.forward([[5] * 3000])


def test_heads_that_are_too_wide_are_refused(tmp_path: Path, on_device: Any) -> None:
    shape = {"hidden_size": 160, "num_attention_heads": 1}
    with pytest.raises(minilpt.BackendError, match=r'heads of 160 columns .* use device="cpu"'):
        minilpt.load(checkpoints.write(tmp_path, checkpoints.config(**shape)), device="cuda", pruning=None)


def test_a_kernel_gets_no_array_of_another_type(on_device: Any) -> None:
    kernels, x = FloatKernels(on_device, Geometry(), "float32"), on_device.asarray(np.zeros((2, 4), np.float64))
    with pytest.raises(TypeError, match="bias_relu_f32: argument 0 must be an array of float32, found float64"):
        kernels.bias_activation(x, on_device.asarray(np.zeros(4, np.float32)), "relu")
