"""Reference and engine against PyTorch: every architecture, and LTP kept token for kept token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import minilpt
from minilpt import backends, kernels, pruning, reference
from minilpt.engine import Engine, Forward
from minilpt.pruning import KeepRule

import checkpoints
import oracles
import tolerances
from oracles import Batch, Recorder, Step, Twin

Build = Callable[..., Twin]
DENSE = pruning.Relative(0)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`oracles.build` in a folder of its own, once for each set of arguments."""
    made: dict[Any, Twin] = {}

    def built(architecture: str, labels: int = 3, **settings: Any) -> Twin:
        key = (architecture, labels, *sorted(settings.items()))
        if key not in made:
            made[key] = oracles.build(tmp_path_factory.mktemp(architecture), architecture, labels, **settings)
        return made[key]

    return built


def assert_equal_to_rounding(twin: Twin, batch: Batch) -> None:
    """Reference and engine, dense, against transformers: packed, with and without trace, and one by one."""
    truth = oracles.transformers_logits(twin, batch)
    cost = tolerances.cost_of(twin.weights, twin.exact, twin.config, None, batch)
    model, (ids, segments) = minilpt.load(twin.folder), zip(*batch, strict=True)
    alone = [model.forward([row], [kinds]).logits for row, kinds in batch]
    for name, found, dtype in (
        ("reference", run_reference(twin, DENSE, batch)[0], np.float64),
        ("engine", model.forward(ids, segments).logits, np.float32),
        ("engine, traced", model.forward(ids, segments, trace=True).logits, np.float32),
        ("engine, one by one", np.concatenate(alone), np.float32),
    ):
        assert found.dtype == dtype
        assert_within(name, found, truth, tolerances.logits_bound(cost, truth, dtype))


def assert_within(name: str, found: NDArray[Any], truth: NDArray[Any], bound: float) -> None:
    worst = np.unravel_index(np.abs(found - truth).argmax(), truth.shape)
    error = abs(found[worst] - truth[worst])
    assert error <= bound, f"{name} at {worst}: {found[worst]} for {truth[worst]}, off by {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_every_architecture_answers_as_transformers_at_every_length(build: Build, architecture: str) -> None:
    twin = build(architecture)
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, range(1, twin.config.max_tokens + 1)))


@pytest.mark.parametrize("labels", [1, 2, 5])
@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_every_number_of_labels(build: Build, architecture: str, labels: int) -> None:
    twin = build(architecture, labels)
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, [7, 1, 30]))


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
@pytest.mark.parametrize("architecture", [name for name in oracles.ARCHITECTURES if name != "ibert"])
def test_every_activation(build: Build, architecture: str, activation: str) -> None:
    """gelu is in every other test; I-BERT has no other."""
    key = "activation" if architecture == "distilbert" else "hidden_act"
    twin = build(architecture, **{key: activation})
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, [12, 33, 2]))


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_a_literal_pad_token_is_a_token(build: Build, architecture: str) -> None:
    """RoBERTa gives it the padding row and does not count it as a position."""
    twin = build(architecture)
    pad = twin.config.pad_token_id
    ids = [[0, 7, pad, 9, 2], [pad, 5, 6], [4, pad, pad, 11, 12, pad, 3], [pad]]
    assert_equal_to_rounding(twin, [(row, [0] * len(row)) for row in ids])


@pytest.mark.parametrize(
    ("wrong", "in_float32"),
    [({"activation": "gelu_tanh"}, True), ({"position_offset": 1}, True), ({"eps": 1e-12}, False)],
)
def test_the_bounds_see_a_wrong_setting(build: Build, wrong: dict[str, Any], in_float32: bool) -> None:
    twin = build("roberta")
    batch = oracles.draw_batch(twin, [3, 20, 38])
    truth = oracles.transformers_logits(twin, batch)
    error = np.abs(run_reference(replace(twin, config=replace(twin.config, **wrong)), DENSE, batch)[0] - truth).max()
    cost = tolerances.cost_of(twin.weights, twin.exact, twin.config, None, batch)
    assert error > 1e6 * tolerances.logits_bound(cost, truth, np.float64)
    if in_float32:
        assert error > 10 * tolerances.logits_bound(cost, truth)


lengths = st.integers(1, 40)
batches_of_lengths = st.one_of(
    st.lists(lengths, min_size=1, max_size=1),
    st.lists(lengths, min_size=2, max_size=2),
    st.lists(lengths, min_size=3, max_size=8),
)
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=40)
@given(data=st.data(), lengths=batches_of_lengths, seed=seeds)
def test_any_batch_answers_as_transformers(build: Build, data: st.DataObject, lengths: list[int], seed: int) -> None:
    twin = build(data.draw(st.sampled_from(sorted(oracles.ARCHITECTURES))), data.draw(st.sampled_from([1, 2, 5])))
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, lengths, seed))


LAYERS = 6
EMULATED = ("bert", "electra-narrow", "roberta")
denominators = {
    "initial": st.just("initial"),
    "live": st.just("live"),
    "number": st.one_of(st.integers(1, 60), st.sampled_from([128, 40_000])),  # 40,000: the floor of 1e-5 removes, too
}
fractions = st.one_of(st.floats(0.1, 1.2), st.floats(0.1, 1.2), st.sampled_from([0, -1.0]))  # 0: no rule; -1: the floor
all_fractions = st.lists(fractions, min_size=LAYERS, max_size=LAYERS)
no_token, but_the_first = st.just([0] * LAYERS), st.just([1e6] * LAYERS)
any_fractions = st.one_of(all_fractions, all_fractions, all_fractions, no_token, but_the_first)


def threshold_record(fractions: list[float], denominator: str | int) -> dict[str, Any]:
    """Thresholds as fractions of the mean mass, which is 1, in a sequence of 20 tokens."""
    scale = 20 if isinstance(denominator, str) else denominator
    return {
        "rule": "threshold",
        "thresholds": [fraction / scale for fraction in fractions],
        "score_denominator": denominator,
    }


def ramp_record(final_threshold: float, denominator: str | int) -> dict[str, Any]:
    return {"rule": "ramp", "final_threshold": final_threshold, "score_denominator": denominator}


RECORDS: Mapping[str, st.SearchStrategy[dict[str, Any]]] = {
    **{f"threshold-{name}": st.builds(threshold_record, any_fractions, z) for name, z in denominators.items()},
    "ramp": st.builds(ramp_record, st.floats(-0.1, 0.2), st.one_of(*denominators.values())),
    # Not between 0 and 0.01: beside a threshold of 1e-200, every token with hardly any mass is a close call.
    "relative": st.builds(lambda value: {"rule": "relative", "token_threshold": value}, st.floats(0.01, 0.9)),
    "topk": st.builds(lambda value: {"rule": "topk", "token_keep_rate": value}, st.floats(0, 1)),
}
FIXED: Mapping[str, dict[str, Any]] = {
    "threshold": {"rule": "threshold", "thresholds": [0, 0.01, 0.02, 0.02, 0.03, 0.03], "score_denominator": "initial"},
    "ramp": {"rule": "ramp", "final_threshold": 0.05, "score_denominator": 40},
    "relative": {"rule": "relative", "token_threshold": 0.1},
    "topk": {"rule": "topk", "token_keep_rate": 0.3},
}


@dataclass
class Tally:
    """Tokens seen; decisions to remove one; and scores within the rounding bound of their threshold."""

    tokens: int = 0
    removed: int = 0
    close: int = 0


class Case:
    """A batch and a rule, with what is true of them. decided: per sequence, the layers before the first close call."""

    def __init__(self, twin: Twin, batch: Batch, record: Mapping[str, Any], tally: Tally):
        self.twin, self.batch = twin, batch
        self.rule = pruning.parse(record, twin.config.layers, "test").rule
        self.truth = truth = oracles.emulate(twin, batch, record)
        self.cost = tolerances.cost_of(twin.weights, twin.exact, twin.config, self.rule, batch)
        close = np.zeros_like(truth.alive)
        for layer, b in np.ndindex(close.shape[:2]):
            live = truth.alive[layer, b]
            close[layer, b, live] = truth.margin[layer, b, live] <= self.mass_bound(layer, b)
        self.decided = [int(np.append(close[:, b].any(axis=1), True).argmax()) for b in range(len(batch))]
        tally.tokens += sum(len(ids) for ids, _ in batch)
        tally.removed += int((truth.alive & ~truth.kept).sum())
        tally.close += sum(int(close[n, b].sum()) for b, n in enumerate(self.decided) if n < len(close))

    def mass_bound(self, layer: int, b: int, dtype: type = np.float32) -> NDArray[np.float64]:
        """Of the live tokens, (n,)."""
        mass = self.truth.mass[layer, b, self.truth.alive[layer, b]]
        return tolerances.mass_bound(self.cost, layer, self.twin.config.heads, mass, dtype)

    def logits_bound(self, dtype: type = np.float32) -> float:
        return tolerances.logits_bound(self.cost, self.truth.logits, dtype)

    def fully_decided(self) -> list[int]:
        """The sequences without a close call."""
        return [b for b, layers in enumerate(self.decided) if layers == len(self.truth.alive)]

    def check(self, name: str, logits: NDArray[Any], steps: list[list[Step]], dtype: type) -> None:
        """Masses, kept tokens and logits, as far as each sequence is decided."""
        truth = self.truth
        for b, layers in enumerate(self.decided):
            for layer, (kept, mass) in enumerate(steps[b][:layers]):
                where = f"{name}, sequence {b}, layer {layer}"
                assert kept == np.flatnonzero(truth.kept[layer, b]).tolist(), where
                if mass is not None:
                    error = np.abs(mass - truth.mass[layer, b, truth.alive[layer, b]])
                    assert (error <= self.mass_bound(layer, b, dtype)).all(), f"{where}: mass off by {error.max():.2e}"
        for b in self.fully_decided():
            assert_within(f"{name}, sequence {b}", logits[b], truth.logits[b], self.logits_bound(dtype))

    def check_all(self) -> None:
        """Reference and engine, traced and with the last-layer shortcut, against the emulation."""
        truth = self.truth
        self.check("reference", *run_reference(self.twin, self.rule, self.batch), np.float64)
        traced, steps = run(self.twin, self.rule, self.batch)
        self.check("engine, traced", traced.logits, steps, np.float32)
        short, steps = run(self.twin, self.rule, self.batch, trace=False)
        self.check("engine", short.logits, steps, np.float32)
        for b in self.fully_decided():
            assert traced.attention_lengths[:, b].tolist() == truth.attention_lengths[:, b].tolist()
            assert traced.ffn_lengths[:, b].tolist() == truth.ffn_lengths[:, b].tolist()
            assert short.kept_tokens[:, b].tolist() == [*truth.ffn_lengths[:-1, b], 1]


def run(
    twin: Twin, rule: KeepRule, batch: Batch, *, trace: bool = True, **kernels: Callable[..., Any]
) -> tuple[Forward, list[list[Step]]]:
    """The engine, with these kernels in place of its own: what it gives, and what the rule did in each sequence."""
    backend, recorder = backends.choose("cpu", "fp32", None), Recorder(rule)
    engine = Engine(twin.config, twin.weights, recorder, replace(backend, kernels={**backend.kernels, **kernels}))
    model = minilpt.Classifier(twin.folder, twin.config, engine, None, minilpt.TokenizerError("token ids only"))
    ids, segments = zip(*batch, strict=True)
    result = model.forward(ids, segments, trace=trace)
    return result, recorder.replay([len(row) for row in ids], twin.config.layers - (not trace))


def run_reference(twin: Twin, rule: KeepRule, batch: Batch) -> tuple[NDArray[np.float64], list[list[Step]]]:
    """The same of the reference, in float64: logits, and what the rule did."""
    logits, steps = [], []
    for ids, segments in batch:
        recorder = Recorder(rule)
        row, kinds = np.array(ids, np.int32), np.array(segments, np.int32)
        logits.append(reference.forward(twin.exact, twin.config, recorder, row, kinds).logits)
        steps += recorder.replay([len(ids)], twin.config.layers)
    return np.stack(logits), steps


def compare(build: Build, records: st.SearchStrategy[dict[str, Any]]) -> Tally:
    """Any batch under any of these rules, against the emulation."""
    tally = Tally()

    @settings(max_examples=50)
    @given(st.sampled_from(EMULATED), st.sampled_from([1, 2, 5]), records, batches_of_lengths, seeds)
    def check(architecture: str, labels: int, record: dict[str, Any], lengths: list[int], seed: int) -> None:
        twin = build(architecture, labels, num_hidden_layers=LAYERS)
        Case(twin, oracles.draw_batch(twin, lengths, seed), record, tally).check_all()

    check()
    return tally


def test_pruning_keeps_the_tokens_that_the_masked_emulation_keeps(build: Build, subtests: pytest.Subtests) -> None:
    """Under every rule; the closer cases of all rules together are counted and capped."""
    tallies: dict[str, Tally] = {}
    for name, records in RECORDS.items():
        with subtests.test(name):
            tallies[name] = tally = compare(build, records)
            assert tally.removed > tally.tokens / 10, f"hardly anything was removed: {tally}"
    print(tallies)
    tokens, close = (sum(getattr(tally, key) for tally in tallies.values()) for key in ("tokens", "close"))
    assert tokens > 10_000
    assert close <= tokens / 1000, f"{close} close calls among {tokens} tokens: {tallies}"


@pytest.mark.parametrize("architecture", EMULATED)
def test_the_emulation_without_a_rule_is_the_model(build: Build, architecture: str) -> None:
    twin = build(architecture)
    batch = oracles.draw_batch(twin, [1, 17, 40, 2])
    truth = oracles.transformers_logits(twin, batch)
    cost = tolerances.cost_of(twin.weights, twin.exact, twin.config, None, batch)
    bound = tolerances.logits_bound(cost, truth, np.float64)
    assert_within("emulation", oracles.emulate(twin, batch, None).logits, truth, bound)


def test_a_score_on_its_threshold_is_counted_and_not_compared(build: Build) -> None:
    twin = build("bert", num_hidden_layers=LAYERS)
    batch = oracles.draw_batch(twin, [20, 30])
    record = {"rule": "threshold", "thresholds": [1e-9] * LAYERS, "score_denominator": "initial"}
    score = oracles.emulate(twin, batch, record).score[2, 1, 17]
    tally = Tally()
    case = Case(twin, batch, record | {"thresholds": [0, 0, float(score), 0, 0, 0]}, tally)
    case.check_all()
    assert (tally.close, case.decided) == (1, [LAYERS, 2])


@pytest.mark.parametrize("wrong", [{"score_denominator": "live"}, {"thresholds": [0, 0, 0, 0, 0.02, 0]}])
def test_the_comparison_sees_a_wrong_rule(build: Build, wrong: dict[str, Any]) -> None:
    twin = build("bert", num_hidden_layers=LAYERS)
    case = Case(twin, oracles.draw_batch(twin, [40, 33, 25]), FIXED["threshold"], Tally())
    case.check_all()
    case.rule = pruning.parse(FIXED["threshold"] | wrong, LAYERS, "test").rule
    with pytest.raises(AssertionError, match=r"reference, sequence \d"):
        case.check_all()


@pytest.mark.parametrize("rule", FIXED)
@settings(max_examples=15)
@given(lengths=batches_of_lengths, seed=seeds)
def test_a_permuted_batch_gives_permuted_results(build: Build, rule: str, lengths: list[int], seed: int) -> None:
    """The same tokens stay; BLAS may change a logit's last bits with the rows beside it."""
    twin = build("bert", num_hidden_layers=LAYERS)
    case = Case(twin, oracles.draw_batch(twin, lengths, seed), FIXED[rule], Tally())
    order = np.random.default_rng(seed).permutation(len(lengths))
    straight, kept = run(twin, case.rule, case.batch)
    shuffled, kept_shuffled = run(twin, case.rule, [case.batch[b] for b in order])
    for place, b in enumerate(order.tolist()):
        if b in case.fully_decided():
            alone, (kept_alone,) = run(twin, case.rule, [case.batch[b]])
            for here, there, single in zip(kept[b], kept_shuffled[place], kept_alone, strict=True):
                assert here.kept == there.kept == single.kept
            assert_within("permuted", shuffled.logits[place], straight.logits[b], 2 * case.logits_bound())
            assert_within("alone", alone.logits[0], straight.logits[b], 2 * case.logits_bound())


@pytest.mark.parametrize("rule", [None, *FIXED])
def test_a_text_alone_gets_the_same_bits_whatever_is_asked_beside_it(tmp_path: Path, rule: str | None) -> None:
    folder = checkpoints.write_vocabulary(checkpoints.write(tmp_path, checkpoints.config(num_hidden_layers=LAYERS)))
    model = minilpt.load(folder, pruning=rule and FIXED[rule])
    words = [word for word in checkpoints.WORDS if word.isalpha()]
    draw = np.random.default_rng(5)
    texts = [" ".join(draw.choice(words, n)) for n in (1, 30, 2, 2, 17, 36, 9)]
    alone = [model.predict([text])[0] for text in texts]
    assert model.predict(texts, batch_tokens=1) == alone
    assert model.predict(texts[::-1], batch_tokens=1) == alone[::-1]
    for text, prediction in zip(texts, alone, strict=True):
        assert model.forward(*model.encode([text])).logits[0].tolist() == list(prediction.logits)


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize(
    "record",
    [
        {"rule": "threshold", "thresholds": [0] * LAYERS, "score_denominator": "live"},
        {"rule": "ramp", "final_threshold": 0, "score_denominator": "initial"},
        {"rule": "relative", "token_threshold": 0},
        {"rule": "topk", "token_keep_rate": 1},
    ],
    ids=lambda record: record["rule"],
)
def test_a_rule_that_keeps_everything_is_dense_bit_for_bit(build: Build, record: dict[str, Any], trace: bool) -> None:
    twin = build("roberta", num_hidden_layers=LAYERS)
    ids = [row for row, _ in oracles.draw_batch(twin, [40, 1, 23])]
    pruned, dense = (minilpt.load(twin.folder, pruning=rule).forward(ids, trace=trace) for rule in (record, None))
    for name in Forward.__dataclass_fields__:
        assert np.array_equal(getattr(pruned, name), getattr(dense, name)), name


@settings(max_examples=25)
@given(
    low=st.floats(1e-3, 0.1),
    step=st.floats(0, 0.1),
    denominator=st.one_of(*denominators.values()),
    lengths=batches_of_lengths,
    seed=seeds,
)
def test_for_the_same_scores_a_higher_threshold_keeps_a_subset_with_the_first_token(
    build: Build, low: float, step: float, denominator: str | int, lengths: list[int], seed: int
) -> None:
    """In layer 0, where nothing before it can differ."""
    twin = build("bert")
    batch = oracles.draw_batch(twin, lengths, seed)
    lower, higher = (run(twin, pruning.Threshold((theta, 0, 0), denominator), batch)[1] for theta in (low, low + step))
    for (more, *_), (fewer, *_) in zip(lower, higher, strict=True):
        assert np.array_equal(more.mass, fewer.mass)
        assert 0 in fewer.kept
        assert set(fewer.kept) <= set(more.kept)


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("rule", FIXED)
def test_executed_flops_are_the_products_that_the_kernels_are_given(build: Build, rule: str, trace: bool) -> None:
    """Counted from the arrays passed to the kernels; the head and ELECTRA's projection, left out, are taken off."""
    twin = build("electra-narrow", num_hidden_layers=LAYERS)
    macs: list[int] = []
    sums: list[float] = []

    def linear(x: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[Any]:
        macs.append(len(x) * weight.size)
        return kernels.NUMPY["linear"](x, weight, bias)

    def attention_probs(q: NDArray[Any], k: NDArray[Any], heads: int) -> NDArray[Any]:
        probs = kernels.NUMPY["attention_probs"](q, k, heads)
        macs.append(probs.size * q.shape[1] // heads)
        sums.append(float(np.abs(probs.sum(axis=2) - 1).max()))
        return probs

    def attention_context(probs: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
        macs.append(probs.size * v.shape[1] // len(probs))
        return kernels.NUMPY["attention_context"](probs, v)

    spies = {"linear": linear, "attention_probs": attention_probs, "attention_context": attention_context}
    chosen = pruning.parse(FIXED[rule], LAYERS, "test").rule
    lengths, config = [40, 1, 23, 8], twin.config
    result, _ = run(twin, chosen, oracles.draw_batch(twin, lengths), trace=trace, **spies)
    left_out = sum(lengths) * config.embedding_width * config.width
    left_out += len(lengths) * config.width * (config.width + len(config.labels))
    assert result.executed_flops.sum() == 2 * (sum(macs) - left_out)
    assert (result.executed_flops < result.dense_flops).any()
    assert max(sums) <= tolerances.sum_to_one_bound(max(lengths))


def test_counted_flops_are_the_paper_s_formula_on_the_emulation_s_lengths(build: Build) -> None:
    twin = build("bert", num_hidden_layers=LAYERS)
    case = Case(twin, oracles.draw_batch(twin, [40, 1, 23]), FIXED["threshold"], Tally())
    assert len(case.fully_decided()) == 3
    result, _ = run(twin, case.rule, case.batch)
    d, inner = 32, 48
    for b, n_initial in enumerate([40, 1, 23]):
        pairs = zip(case.truth.attention_lengths[:, b], case.truth.ffn_lengths[:, b], strict=True)
        macs = sum(4 * d * d * n_a + 2 * d * n_a * n_a + 2 * d * inner * n_f for n_a, n_f in pairs)
        dense = LAYERS * (4 * d * d * n_initial + 2 * d * n_initial**2 + 2 * d * inner * n_initial)
        assert (result.counted_flops[b], result.dense_flops[b]) == (2 * macs, 2 * dense)


def test_inputs_and_weights_are_left_unchanged(build: Build) -> None:
    """They are made read-only, so that writing to one raises."""
    twin = build("electra-narrow", seed=1)  # of its own, since it is changed
    for tensor in twin.weights.values():
        tensor.setflags(write=False)
    batch = [(np.array(ids), np.array(segments)) for ids, segments in oracles.draw_batch(twin, [9, 30])]
    for array in (array for pair in batch for array in pair):
        array.setflags(write=False)
    rule = pruning.Threshold((0.01, 0.02, 0.03), "initial")
    for trace in (True, False):
        run(twin, rule, batch, trace=trace)
    for ids, segments in batch:
        reference.forward(twin.weights, twin.config, rule, ids, segments)
