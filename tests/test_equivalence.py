"""Reference and engines against PyTorch: every architecture, and LTP kept token for kept token, in every precision.

The compiled engine runs on the rung that MINILPT_ISA names or the machine's highest; test_rungs.py runs this file on
all.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import minilpt
from minilpt import pruning, reference
from minilpt.backends import Backend
from minilpt.batches import token_batch
from minilpt.compiled_engine import CompiledEngine
from minilpt.config import read_config
from minilpt.embeddings import means
from minilpt.engine import Engine, Forward
from minilpt.float_program import FloatProgram
from minilpt.numpy_engine import NumpyEngine
from minilpt.pruning import KeepRule
from minilpt.weights import checkpoint

import checkpoints
import oracles
import tolerances
from oracles import Batch, Step, Twin

Build = Callable[..., Twin]
INT8_ARCHITECTURES = [name for name in oracles.ARCHITECTURES if name != "ibert"]  # it has linear layers of its own
PRECISIONS: Mapping[str, Sequence[str]] = {"fp32": sorted(oracles.ARCHITECTURES), "int8": sorted(INT8_ARCHITECTURES)}
CASES = [(precision, architecture) for precision, names in PRECISIONS.items() for architecture in names]
COMPILED = importlib.util.find_spec("numba") is not None
THREADS = 2


def engines(twin: Twin, rule: KeepRule | None) -> dict[str, Engine]:
    """By name, those that have the twin's precision."""
    found: dict[str, Engine] = {}
    if twin.precision == "fp32":
        found["numpy"] = NumpyEngine(twin.config, twin.stored, rule, Backend("numpy", "cpu", "fp32", 1))
    if COMPILED:
        backend = Backend("numba", "cpu", twin.precision, THREADS)
        program = FloatProgram(twin.config, twin.stored, int8=twin.precision == "int8")
        found["compiled"] = CompiledEngine(twin.config, program, rule, backend)
    return found


def forward(twin: Twin, engine: Engine, batch: Batch, *, trace: bool = False) -> Forward:
    model = minilpt.Classifier(twin.folder, twin.config, engine, None, minilpt.TokenizerError("token ids only"))
    ids, segments = zip(*batch, strict=True)
    return model.forward(ids, segments, trace=trace)


def run(engine: Engine, twin: Twin, batch: Batch) -> tuple[Forward, list[list[Step]]]:
    """A traced run, and what it did to each sequence in each layer."""
    result = forward(twin, engine, batch, trace=True)
    assert result.masses is not None
    assert result.kept is not None
    merge = engine.rule is not None and engine.rule.merge_removed
    return result, oracles.steps_of([len(ids) for ids, _ in batch], result.masses, result.kept, merge)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`oracles.build` in a folder of its own, once for each set of arguments."""
    made: dict[Any, Twin] = {}

    def built(architecture: str, labels: int = 3, precision: str = "fp32", **settings: Any) -> Twin:
        key = (architecture, labels, precision, *sorted(settings.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[key] = oracles.build(folder, architecture, labels, precision, **settings)
        return made[key]

    return built


def assert_equal_to_rounding(twin: Twin, batch: Batch) -> None:
    """Reference and engines, dense, against transformers: packed, with and without trace, and one by one."""
    truth = oracles.transformers_logits(twin, batch)
    cost = tolerances.cost_of(twin.weights, twin.exact, twin.config, None, batch)
    found = {"reference": run_reference(twin, None, batch)[0]}
    for name, engine in engines(twin, None).items():
        alone = np.concatenate([forward(twin, engine, [sequence]).logits for sequence in batch])
        found[f"{name}"] = forward(twin, engine, batch).logits
        found[f"{name}, traced"] = forward(twin, engine, batch, trace=True).logits
        found[f"{name}, one by one"] = alone
        if name == "compiled":
            assert np.array_equal(alone, found[name])
    for name, logits in found.items():
        dtype = np.float64 if name == "reference" else np.float32
        assert logits.dtype == dtype
        assert_within(name, logits, truth, tolerances.logits_bound(cost, truth, dtype))


def assert_within(name: str, found: NDArray[Any], truth: NDArray[Any], bound: float) -> None:
    worst = np.unravel_index(np.abs(found - truth).argmax(), truth.shape)
    error = abs(found[worst] - truth[worst])
    assert error <= bound, f"{name} at {worst}: {found[worst]} for {truth[worst]}, off by {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize(("precision", "architecture"), CASES)
def test_every_architecture_answers_as_transformers_at_every_length(
    build: Build, precision: str, architecture: str
) -> None:
    twin = build(architecture, precision=precision)
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, range(1, twin.config.max_tokens + 1)))


@pytest.mark.parametrize("labels", [1, 2, 5])
@pytest.mark.parametrize(("precision", "architecture"), CASES)
def test_every_number_of_labels(build: Build, precision: str, architecture: str, labels: int) -> None:
    twin = build(architecture, labels, precision)
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, [7, 1, 30]))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("width", "heads"), [(32, 1), (36, 3), (100, 5), (200, 2), (384, 12), (1024, 16)])
def test_every_width(build: Build, precision: str, width: int, heads: int) -> None:
    """Vectors have 16 columns, panels 16 or 64: widths of no whole number of them are padded, heads one by one."""
    shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width + 12}
    twin = build("bert", precision=precision, num_hidden_layers=2, **shape)
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, [1, 7, 40]))


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", [name for name in oracles.ARCHITECTURES if name != "ibert"])
def test_every_activation(build: Build, architecture: str, precision: str, activation: str) -> None:
    """gelu is in every other test; I-BERT has no other."""
    key = "activation" if architecture == "distilbert" else "hidden_act"
    twin = build(architecture, precision=precision, **{key: activation})
    assert_equal_to_rounding(twin, oracles.draw_batch(twin, [12, 33, 2]))


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_a_literal_pad_token_is_a_token(build: Build, architecture: str) -> None:
    """RoBERTa gives it the padding row and does not count it as a position."""
    twin = build(architecture)
    pad = twin.config.pad_token_id
    ids = [[0, 7, pad, 9, 2], [pad, 5, 6], [4, pad, pad, 11, 12, pad, 3], [pad]]
    assert_equal_to_rounding(twin, [(row, [0] * len(row)) for row in ids])


def embedded(pooling: str) -> Callable[..., reference.Traced]:
    """`reference.forward` with an embedding for logits."""

    def forward(*arguments: Any) -> reference.Traced:
        rows, *steps = reference.encode(*arguments)
        return reference.Traced(rows[0] if pooling == "cls" else reference.mean_pooled(rows), *steps)

    return forward


def assert_embeddings(twin: Twin, rule: KeepRule | None, batch: Batch, truth: NDArray[Any], pooling: str) -> None:
    """Reference and engines, packed and one by one."""
    cost = tolerances.cost_of(twin.weights, twin.exact, twin.config, rule, batch, embedded(pooling))
    rows = [(np.array(ids, np.int32), np.array(kinds, np.int32)) for ids, kinds in batch]
    exact = np.stack([embedded(pooling)(twin.exact, twin.config, rule, *row).logits for row in rows])
    assert_within("reference", exact, truth, tolerances.logits_bound(cost, truth, np.float64))
    for name, engine in engines(twin, rule).items():

        def run(batch: Batch, engine: Engine = engine) -> NDArray[np.float64]:
            packed = token_batch(twin.config, *zip(*batch, strict=True))
            return means(*engine.last_rows(packed, first_only=pooling == "cls"))

        found, alone = run(batch), np.concatenate([run([sequence]) for sequence in batch])
        if name == "compiled":
            assert np.array_equal(found, alone)
        assert_within(name, found, truth, tolerances.logits_bound(cost, truth))
        assert_within(f"{name}, one by one", alone, truth, tolerances.logits_bound(cost, truth))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize(("precision", "architecture"), CASES)
def test_an_encoder_without_a_head_embeds_as_transformers(
    build: Build, tmp_path: Path, precision: str, architecture: str, pooling: str
) -> None:
    """From what save_pretrained writes of BertModel and its like: no prefix on any name, and sometimes a pooler."""
    deepcopy(build(architecture).model.base_model).float().save_pretrained(tmp_path)
    twin = build(architecture, precision=precision)
    config = read_config(tmp_path)
    stored = dict(checkpoint.load_weights(tmp_path, config))
    assert stored.keys() == {name for name in twin.stored if not name.startswith("head.")}
    assert all(np.array_equal(tensor, twin.stored[name]) for name, tensor in stored.items())
    assert config == replace(twin.config, labels=())
    twin = replace(twin, config=config, stored=stored)
    batch = oracles.draw_batch(twin, range(1, config.max_tokens + 1, 3))
    assert_embeddings(twin, None, batch, oracles.transformers_embeddings(twin, batch, pooling), pooling)


@pytest.mark.skipif(not COMPILED, reason="int8 needs the compiled kernels")
def test_int8_is_as_near_to_its_truth_as_the_reference_in_float32(build: Build) -> None:
    """Over many sequences, where rare flips average out; weights that are not quantised would be 20 times as far."""
    twin, plain = build("roberta", precision="int8"), build("roberta")
    batch = oracles.draw_batch(twin, [*range(1, 41)] * 5)
    truth = oracles.transformers_logits(twin, batch)
    in_float32 = run_reference(replace(twin, exact=twin.weights), None, batch)[0]
    by, other = forward(twin, engines(twin, None)["compiled"], batch).logits, oracles.transformers_logits(plain, batch)
    errors = [float(np.abs(found - truth).mean()) for found in (in_float32, by, other)]
    assert errors[1] <= 2 * errors[0], errors
    assert errors[2] > 20 * max(errors[:2]), errors


@pytest.mark.parametrize(
    ("wrong", "in_float32"),
    [({"activation": "gelu_tanh"}, True), ({"position_offset": 1}, True), ({"eps": 1e-12}, False)],
)
def test_the_bounds_see_a_wrong_setting(build: Build, wrong: dict[str, Any], in_float32: bool) -> None:
    twin = build("roberta")
    batch = oracles.draw_batch(twin, [3, 20, 38])
    truth = oracles.transformers_logits(twin, batch)
    error = np.abs(run_reference(replace(twin, config=replace(twin.config, **wrong)), None, batch)[0] - truth).max()
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
    precision, architecture = data.draw(st.sampled_from(CASES))
    twin = build(architecture, data.draw(st.sampled_from([1, 2, 5])), precision)
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


def merged_record(fractions: list[float], denominator: str | int) -> dict[str, Any]:
    return threshold_record(fractions, denominator) | {"merge_removed": True}


def ramp_record(final_threshold: float, denominator: str | int) -> dict[str, Any]:
    return {"rule": "ramp", "final_threshold": final_threshold, "score_denominator": denominator}


def limited_record(fractions: list[float], denominator: str, limit: int) -> dict[str, Any]:
    return threshold_record(fractions, denominator) | {"denominator_limit": limit}


RECORDS: Mapping[str, st.SearchStrategy[dict[str, Any]]] = {
    **{f"threshold-{name}": st.builds(threshold_record, any_fractions, z) for name, z in denominators.items()},
    "threshold-limited": st.builds(
        limited_record, any_fractions, st.sampled_from(["initial", "live"]), st.integers(5, 40)
    ),
    "threshold-merged": st.builds(merged_record, any_fractions, denominators["live"]),
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
    "topk-merged": {"rule": "topk", "token_keep_rate": 0.3, "merge_removed": True},
    "merged": {"rule": "threshold", "thresholds": [0.4, 0.7, 0.8, 0.8, 0.9, 0.9], "score_denominator": 1}
    | {"merge_removed": True},
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
                error = np.abs(mass - truth.mass[layer, b, truth.alive[layer, b]])
                assert (error <= self.mass_bound(layer, b, dtype)).all(), f"{where}: mass off by {error.max():.2e}"
        for b in self.fully_decided():
            assert_within(f"{name}, sequence {b}", logits[b], truth.logits[b], self.logits_bound(dtype))

    def check_all(self) -> None:
        """Reference and engines, traced and with the last-layer shortcut, against the emulation."""
        truth = self.truth
        self.check("reference", *run_reference(self.twin, self.rule, self.batch), np.float64)
        for name, engine in engines(self.twin, self.rule).items():
            traced, steps = run(engine, self.twin, self.batch)
            short = forward(self.twin, engine, self.batch)
            self.check(f"{name}, traced", traced.logits, steps, np.float32)
            for b in self.fully_decided():
                assert_within(f"{name}, sequence {b}", short.logits[b], truth.logits[b], self.logits_bound())
                assert traced.attention_lengths[:, b].tolist() == truth.attention_lengths[:, b].tolist()
                assert traced.ffn_lengths[:, b].tolist() == truth.ffn_lengths[:, b].tolist()
                assert short.kept_tokens[:, b].tolist() == [*truth.ffn_lengths[:-1, b], 1]
            if name == "compiled":
                for b, sequence in enumerate(self.batch):
                    assert np.array_equal(forward(self.twin, engine, [sequence]).logits[0], short.logits[b])


def run_reference(twin: Twin, rule: KeepRule | None, batch: Batch) -> tuple[NDArray[np.float64], list[list[Step]]]:
    """The same of the reference, in float64: logits, and what the rule did."""
    logits, steps = [], []
    for ids, segments in batch:
        row, kinds = np.array(ids, np.int32), np.array(segments, np.int32)
        traced = reference.forward(twin.exact, twin.config, rule, row, kinds)
        logits.append(traced.logits)
        merge = rule is not None and rule.merge_removed
        steps += oracles.steps_of([len(ids)], traced.masses, traced.kept, merge)
    return np.stack(logits), steps


def compare(build: Build, precision: str, records: st.SearchStrategy[dict[str, Any]]) -> Tally:
    """Any batch under any of these rules, against the emulation."""
    tally = Tally()

    @settings(max_examples=50)
    @given(st.sampled_from(EMULATED), st.sampled_from([1, 2, 5]), records, batches_of_lengths, seeds)
    def check(architecture: str, labels: int, record: dict[str, Any], lengths: list[int], seed: int) -> None:
        twin = build(architecture, labels, precision, num_hidden_layers=LAYERS)
        Case(twin, oracles.draw_batch(twin, lengths, seed), record, tally).check_all()

    check()
    return tally


@pytest.mark.parametrize(("precision", "cap", "left_out"), [("fp32", 0.001, ()), ("int8", 0.1, ("topk",))])
def test_pruning_keeps_the_tokens_that_the_masked_emulation_keeps(
    build: Build, subtests: pytest.Subtests, precision: str, cap: float, left_out: Sequence[str]
) -> None:
    """Under every rule; the closer cases of all rules together are counted and capped.

    int8's rounding makes every tenth token of these tiny models close. Among ranks nearly all of them would be.
    """
    tallies: dict[str, Tally] = {}
    for name, records in RECORDS.items():
        if name in left_out:
            continue
        with subtests.test(name):
            tallies[name] = tally = compare(build, precision, records)
            assert tally.removed > tally.tokens / 10, f"hardly anything was removed: {tally}"
    print(tallies)
    tokens, close = (sum(getattr(tally, key) for tally in tallies.values()) for key in ("tokens", "close"))
    assert tokens > 10_000
    assert close <= cap * tokens, f"{close} close calls among {tokens} tokens: {tallies}"


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


@pytest.mark.parametrize("rule", FIXED)
def test_a_pruned_model_s_mean_is_over_the_rows_that_the_emulation_keeps(build: Build, rule: str) -> None:
    twin = build("bert", num_hidden_layers=LAYERS)
    case = Case(twin, oracles.draw_batch(twin, [40, 1, 23, 17]), FIXED[rule], Tally())
    assert len(case.fully_decided()) == 4
    assert case.truth.ffn_lengths[-1].sum() < 81
    assert_embeddings(twin, case.rule, case.batch, case.truth.embedding, "mean")


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
def test_on_numpy_a_permuted_batch_gives_permuted_results(
    build: Build, rule: str, lengths: list[int], seed: int
) -> None:
    """The same tokens stay; BLAS may change a logit's last bits with the rows beside it."""
    twin = build("bert", num_hidden_layers=LAYERS)
    case = Case(twin, oracles.draw_batch(twin, lengths, seed), FIXED[rule], Tally())
    engine = engines(twin, case.rule)["numpy"]
    order = np.random.default_rng(seed).permutation(len(lengths))
    straight, kept = run(engine, twin, case.batch)
    shuffled, kept_shuffled = run(engine, twin, [case.batch[b] for b in order])
    for place, b in enumerate(order.tolist()):
        if b in case.fully_decided():
            alone, (kept_alone,) = run(engine, twin, [case.batch[b]])
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
    rules = [pruning.Threshold((theta, 0, 0), denominator) for theta in (low, low + step)]
    lower, higher = (run(engines(twin, rule)["numpy"], twin, batch)[1] for rule in rules)
    for (more, *_), (fewer, *_) in zip(lower, higher, strict=True):
        assert np.array_equal(more.mass, fewer.mass)
        assert 0 in fewer.kept
        assert set(fewer.kept) <= set(more.kept)


def test_counted_flops_are_the_paper_s_formula_on_the_emulation_s_lengths(build: Build) -> None:
    twin = build("bert", num_hidden_layers=LAYERS)
    case = Case(twin, oracles.draw_batch(twin, [40, 1, 23]), FIXED["threshold"], Tally())
    assert len(case.fully_decided()) == 3
    result, _ = run(engines(twin, case.rule)["numpy"], twin, case.batch)
    d, inner = 32, 48
    for b, n_initial in enumerate([40, 1, 23]):
        pairs = zip(case.truth.attention_lengths[:, b], case.truth.ffn_lengths[:, b], strict=True)
        macs = sum(4 * d * d * n_a + 2 * d * n_a * n_a + 2 * d * inner * n_f for n_a, n_f in pairs)
        dense = LAYERS * (4 * d * d * n_initial + 2 * d * n_initial**2 + 2 * d * inner * n_initial)
        assert (result.counted_flops[b], result.dense_flops[b]) == (2 * macs, 2 * dense)


def test_inputs_and_weights_are_left_unchanged(build: Build) -> None:
    """They are made read-only, so that writing to one raises."""
    twin = build("electra-narrow", 4)  # of its own, since it is changed
    for tensor in twin.stored.values():
        tensor.setflags(write=False)
    batch = [(np.array(ids), np.array(segments)) for ids, segments in oracles.draw_batch(twin, [9, 30])]
    for array in (array for pair in batch for array in pair):
        array.setflags(write=False)
    rule = pruning.Threshold((0.01, 0.02, 0.03), "initial")
    for engine in engines(twin, rule).values():
        for trace in (True, False):
            forward(twin, engine, batch, trace=trace)
    for ids, segments in batch:
        reference.forward(twin.weights, twin.config, rule, ids, segments)
