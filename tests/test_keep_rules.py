"""Each keep rule against plain loops, and the FLOPs formulas against the products that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import minilpt
from minilpt import backends, kernels, numpy_engine, pruning
from minilpt.config import ModelConfig, read_config
from minilpt.pruning import Ramp, Relative, Threshold, TopK

import checkpoints

Mass = NDArray[np.float32]
LAYERS = 3

# Small grids of values make ties, and scores that equal their threshold.
masses = hnp.arrays(
    np.float32,
    st.integers(1, 24),
    elements=st.one_of(
        st.sampled_from(np.array([0, 1e-6, 0.25, 0.5, 0.5, 1, 2], np.float32).tolist()),
        st.floats(0, 24, width=32),
    ),
)
thresholds = st.one_of(st.sampled_from([-1.0, 1e-6, 1e-5, 0.03125, 0.125, 1.0, 50.0]), st.floats(-0.5, 1.5))
denominators = st.one_of(st.sampled_from(["initial", "live"]), st.integers(1, 130))


def kept(rule: pruning.KeepRule, mass: Mass, layer: int, n_initial: int) -> list[bool]:
    """What the rule keeps, after checking that it leaves its input alone."""
    before = mass.copy()
    keep = rule.keep(mass, layer, n_initial)
    assert keep.dtype == bool
    assert keep.shape == mass.shape
    assert np.array_equal(mass, before)
    return keep.tolist()


def by_threshold(mass: Mass, threshold: float, z: int) -> list[bool]:
    found = []
    for k, value in enumerate(mass):
        bound = np.float32(threshold) if np.float32(threshold) > np.float32(1e-5) else np.float32(1e-5)
        found.append(k == 0 or bool(value / np.float32(z) >= bound))
    return found


@given(
    mass=masses,
    threshold=thresholds,
    denominator=denominators,
    layer=st.integers(0, 2),
    extra=st.integers(0, 9),
    limit=st.integers(1, 150),
)
@example(mass=np.array([0, 0.25, 0.2499], np.float32), threshold=0.125, denominator=2, layer=1, extra=0, limit=9)
@example(mass=np.array([0, 1e-5, 0.9e-5], np.float32), threshold=-1.0, denominator=1, layer=1, extra=0, limit=9)
@example(mass=np.array([0, 0.25, 0.2499], np.float32), threshold=0.125, denominator="live", layer=1, extra=0, limit=2)
def test_threshold_compares_the_score_over_its_denominator(
    mass: Mass, threshold: float, denominator: str | int, layer: int, extra: int, limit: int
) -> None:
    n_initial = len(mass) + extra
    z = min(int({"initial": n_initial, "live": len(mass)}.get(str(denominator), denominator)), limit)
    values = [0.9, 0.9, 0.9]
    values[layer] = threshold
    rule = Threshold(tuple(values), denominator, limit)
    assert rule.denominator(len(mass), n_initial) == z
    assert kept(rule, mass, layer, n_initial) == by_threshold(mass, threshold, z)


@given(mass=masses, final=thresholds, layers=st.integers(1, 12), denominator=st.integers(1, 130), data=st.data())
def test_ramp_rises_linearly_to_just_below_its_final_threshold(
    mass: Mass, final: float, layers: int, denominator: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, layers - 1))
    rule = Ramp.to(final, layers, denominator)
    assert not rule.active(0)
    assert kept(rule, mass, layer, len(mass)) == by_threshold(mass, final * layer / layers, denominator)


@given(mass=masses, threshold=st.floats(0, 1), layer=st.integers(0, 2))
@example(mass=np.array([1, 0.5, 0.4999, 0.875], np.float32), threshold=0.5, layer=1)
def test_relative_compares_with_the_largest_mass(mass: Mass, threshold: float, layer: int) -> None:
    mass[-1] += np.float32(0.125)  # masses sum to the number of tokens, so the largest is never 0
    largest = max(mass)
    wanted = [k == 0 or bool(value / largest >= np.float32(threshold)) for k, value in enumerate(mass)]
    assert kept(Relative(threshold), mass, layer, 99) == wanted


@given(
    mass=masses,
    rate=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.25, 1.0])),
    layers=st.integers(1, 24),
    extra=st.integers(0, 9),
    data=st.data(),
)
def test_topk_keeps_the_largest_masses_and_of_equal_ones_the_first(
    mass: Mass, rate: float, layers: int, extra: int, data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, layers - 1))
    rule, n_initial = TopK(rate, layers), len(mass) + extra
    count = max(1, round(float(np.float32(n_initial) * np.float32(rule.rate(layer)))))  # Python rounds half to even
    left = set(range(1, len(mass)))
    chosen = {0}
    while left and len(chosen) < count:
        best = min(left, key=lambda k: (-mass[k], k))
        chosen.add(best)
        left.remove(best)
    assert kept(rule, mass, layer, n_initial) == [k in chosen for k in range(len(mass))]


def test_topk_falls_as_the_original_s_schedule() -> None:
    """12 layers: none before max(3, ceil(0.15 * 12)) = 3, then nine equal steps down to the rate."""
    found = [TopK(0.1, 12).rate(layer) for layer in range(12)]
    assert found == pytest.approx([1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert TopK(0.0, 12).rate(11) == 0.01
    assert [TopK(0.5, 24).rate(layer) for layer in (3, 4, 23)] == pytest.approx([1, 1 - 0.5 / 20, 0.5])
    assert [layer for layer in range(24) if not TopK(0.5, 24).active(layer)] == [0, 1, 2, 3]
    for shallow in (1, 2, 3):
        assert not any(TopK(0.0, shallow).active(layer) for layer in range(shallow))


@pytest.mark.parametrize("n_initial, count", [(1, 1), (3, 2), (5, 2), (7, 4), (9, 4), (40, 20)])
def test_topk_rounds_half_to_even_and_the_first_token_takes_a_place(n_initial: int, count: int) -> None:
    mass = np.arange(n_initial, dtype=np.float32)
    keep = kept(TopK(0.5, 4), mass, 3, n_initial)
    assert sum(keep) == count
    assert keep[0]


@given(mass=masses, low=thresholds, high=thresholds, denominator=denominators)
def test_a_higher_threshold_keeps_a_subset(mass: Mass, low: float, high: float, denominator: str | int) -> None:
    low, high = sorted((low, high))
    more, fewer = (np.array(kept(Threshold((value,), denominator), mass, 0, 24)) for value in (low, high))
    assert (fewer <= more).all()
    mass += np.float32(0.125)
    low, high = min(abs(low), 1.0), min(max(abs(low), abs(high)), 1.0)
    more, fewer = (np.array(kept(Relative(value), mass, 0, 24)) for value in (low, high))
    assert (fewer <= more).all()
    more, fewer = (np.array(kept(TopK(1 - value, 4), mass, 3, len(mass))) for value in (low, high))
    assert (fewer <= more).all()


def test_a_rule_says_where_it_cannot_remove_anything() -> None:
    rule = Threshold((0.0, -0.0, -1.0, 1e-300, 0.5), "live")
    assert [rule.active(layer) for layer in range(5)] == [False, False, True, True, True]
    assert not Relative(0.0).active(0)
    assert Relative(1e-9).active(0)
    assert not TopK(1.0, 12).active(11)


# FLOPs.


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(checkpoints.write(tmp_path_factory.mktemp("config")))


LENGTHS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=LAYERS, max_size=LAYERS)


def product(rows: int, inner: int, columns: int) -> int:
    """FLOPs of one matrix product."""
    return 2 * rows * inner * columns


@given(sequences=st.lists(LENGTHS, max_size=4))
def test_flops_are_those_of_the_matrix_products(config: ModelConfig, sequences: list[list[tuple[int, int]]]) -> None:
    D, H, F = config.width, config.heads, config.inner
    pairs = [[(max(pair), min(pair)) for pair in sequence] for sequence in sequences]
    counted, executed, first_row = [], [], []
    for sequence in pairs:
        paper = ours = shortcut = 0
        for layer, (n_a, n_f) in enumerate(sequence):
            paper += 4 * product(n_a, D, D) + 2 * H * product(n_a, D // H, n_a) + 2 * product(n_f, D, F)
            before = 3 * product(n_a, D, D) + H * product(n_a, D // H, n_a)
            after = H * product(n_f, n_a, D // H) + product(n_f, D, D) + 2 * product(n_f, D, F)
            ours += before + after
            if layer < LAYERS - 1:
                shortcut += before + after
            else:
                shortcut += product(1, D, D) + 2 * product(n_a, D, D) + 2 * H * product(1, D // H, n_a)
                shortcut += product(1, D, D) + 2 * product(1, D, F)
        counted.append(paper)
        executed.append(ours)
        first_row.append(shortcut)
    lengths = np.array(pairs, np.int32).reshape(len(pairs), LAYERS, 2)
    n_a, n_f = lengths[:, :, 0].T, lengths[:, :, 1].T.copy()
    assert pruning.counted_flops(config, n_a, n_f).tolist() == counted
    assert pruning.executed_flops(config, n_a, n_f, first_row_only=False).tolist() == executed
    n_f[-1] = 1
    assert pruning.executed_flops(config, n_a, n_f, first_row_only=True).tolist() == first_row


def test_dense_flops_are_counted_without_pruning_or_padding(config: ModelConfig) -> None:
    lengths = np.array([1, 7, 2**20], np.int32)
    every = np.tile(lengths, (LAYERS, 1))
    assert np.array_equal(pruning.dense_flops(config, lengths), pruning.counted_flops(config, every, every))
    assert pruning.dense_flops(config, lengths)[2] == 2 * LAYERS * ((4 * 32**2 + 2 * 32 * 48) * 2**20 + 2 * 32 * 2**40)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(
    "rule",
    [
        None,
        {"rule": "threshold", "thresholds": [0, 0.03, 0, 0.05], "score_denominator": "initial"},
        {"rule": "relative", "token_threshold": 0.4},
        {"rule": "topk", "token_keep_rate": 0.3},
    ],
    ids=str,
)
def test_executed_flops_are_what_the_kernels_multiply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any] | None, trace: bool
) -> None:
    """Counted at the kernels' doors. The head's two products, the last of all, are not part of the count."""
    done: list[int] = []

    def counting(kernel: Callable[..., Any], flops: Callable[..., int]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            done.append(flops(*arguments))
            return kernel(*arguments)

        return counted

    doors: dict[str, Callable[..., int]] = {
        "linear": lambda x, weight, bias: product(len(x), x.shape[1], len(weight)),
        "attention_probs": lambda q, k, heads: heads * product(len(q), q.shape[1] // heads, len(k)),
        "attention_context": lambda probs, v: len(probs) * product(*probs.shape[1:], v.shape[1] // len(probs)),
    }
    wrapped = {door: counting(kernels.NUMPY[door], flops) for door, flops in doors.items()}
    monkeypatch.setattr(numpy_engine, "NUMPY", {**kernels.NUMPY, **wrapped})
    monkeypatch.setattr(backends, "_why_not_compiled", lambda: "NumPy is tested here")
    folder = checkpoints.write(tmp_path, checkpoints.config(num_hidden_layers=4))
    with pytest.warns(minilpt.MinilptWarning, match="NumPy is tested here"):
        model = minilpt.load(folder, pruning=rule)
    draw = np.random.default_rng(7)
    found = model.forward([draw.integers(5, 60, n).tolist() for n in (1, 2, 11, 40)], trace=trace)
    assert found.executed_flops.sum() == sum(done[:-2])
    if rule and trace:
        assert found.ffn_lengths is not None
        assert found.ffn_lengths[-1].sum() < 54, "this rule removed nothing, so it tested nothing"
