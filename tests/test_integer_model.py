"""Integer-only inference as a whole: the same integers from the reference and the engine, in any batch, on any rung."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import minilpt
from minilpt import integer_reference, ranges, scales
from minilpt.integer_program import IntegerProgram
from minilpt.kernels import blocks, compiled

import checkpoints

pytest.importorskip("numba", reason="compiled kernels need numba")

WORDS = checkpoints.WORDS[5:]
LENGTHS = (1, 2, 15, 16, 17, 40, 64, 65, 130, 7)
RULES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "threshold": {"rule": "threshold", "thresholds": [0, 0.7, 0.9, 0.9], "score_denominator": 1},
    "initial": {"rule": "threshold", "thresholds": [0.02, 0.03, 0.02, 0.02], "score_denominator": "initial"},
    "live": {"rule": "threshold", "thresholds": [0.02, 0.04, 0, 0.03], "score_denominator": "live"},
    "limited": {"rule": "threshold", "thresholds": [0.05] * 4, "score_denominator": "live", "denominator_limit": 20},
    "relative": {"rule": "relative", "token_threshold": 0.3},
    "topk": {"rule": "topk", "token_keep_rate": 0.4},
    "merged": {"rule": "threshold", "thresholds": [0.7, 0.6, 0.8, 0.9], "score_denominator": 1, "merge_removed": True},
    "merged to two": {"rule": "threshold", "thresholds": [1e6] * 4, "score_denominator": 1, "merge_removed": True},
    "merged topk": {"rule": "topk", "token_keep_rate": 0.4, "merge_removed": True},
    "first only": {"rule": "threshold", "thresholds": [1e6] * 4, "score_denominator": 1},
}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "num_hidden_layers": 4},
    "roberta": {"model_type": "roberta", "num_hidden_layers": 4},
    "distilbert": {"model_type": "distilbert"},
    "electra": {"model_type": "electra", "embedding_size": 32},
    "relu": {"model_type": "bert", "hidden_act": "relu"},
    "odd": {"model_type": "bert", "hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 70},
    "wide": {"model_type": "bert", "hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 200},
}
Quantised = Callable[[str], Path]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(3, 30)).tolist()) for _ in range(count)]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """The folder of a tiny model of some shape, quantised."""
    made: dict[str, Path] = {}

    def of(shape: str) -> Path:
        if shape not in made:
            folder = tmp_path_factory.mktemp(shape)
            positions = 202 if shape == "roberta" else 200
            content = checkpoints.config(**{**SHAPES[shape], "max_position_embeddings": positions})
            checkpoints.write_vocabulary(checkpoints.write(folder / "float", content))
            minilpt.quantize_model(minilpt.load(folder / "float"), texts(100), folder / "integer")
            made[shape] = folder / "integer"
        return made[shape]

    return of


def sequences(lengths: tuple[int, ...] = LENGTHS, words: int = 60) -> list[list[int]]:
    draw = np.random.default_rng(1)
    return [draw.integers(5, words, n).tolist() for n in lengths]


def program_of(model: minilpt.Classifier) -> IntegerProgram:
    program = model.engine.program  # type: ignore[attr-defined]
    assert isinstance(program, IntegerProgram)
    return program


def reference(model: minilpt.Classifier, ids: list[int]) -> integer_reference.Traced:
    program = program_of(model)
    rule = program.integer_rule(model.pruning.rule) if model.pruning else None
    arrays = np.array(ids, np.int32), np.zeros(len(ids), np.int32)
    return integer_reference.forward(program.model, model.config, rule, *arrays)


def check(model: minilpt.Classifier, rows: list[list[int]]) -> None:
    """The engine against the reference, bit for bit: logits, masses, who stays, all lengths, alone and together."""
    program, traced, short = program_of(model), model.forward(rows, trace=True), model.forward(rows)
    assert traced.masses is not None and traced.kept is not None and traced.ffn_lengths is not None
    at = [0] * model.config.layers
    for place, row in enumerate(rows):
        wanted = reference(model, row)
        logits = program.logits(wanted.logits[None], np.zeros((1, 0), np.int32))[0]
        for found in (traced.logits[place], short.logits[place], model.forward([row]).logits[0]):
            assert found.tolist() == logits.tolist()
        assert traced.ffn_lengths[:, place].tolist() == wanted.n_ffn
        for layer, (mass, kept) in enumerate(zip(wanted.masses, wanted.kept, strict=True)):
            here = slice(at[layer], at[layer] + len(mass))
            assert traced.masses[layer][here].tolist() == program.masses(mass).tolist()
            assert traced.kept[layer][here].tolist() == kept.tolist()
            at[layer] += len(mass)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_equals_the_reference(quantised: Quantised, shape: str) -> None:
    check(minilpt.load(quantised(shape), precision="ibert"), sequences())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_engine_equals_the_reference_when_it_prunes(quantised: Quantised, rule: str, threads: int) -> None:
    model = minilpt.load(quantised("bert"), precision="ibert", pruning=RULES[rule], threads=threads)
    check(model, sequences())
    if rule != "dense":
        lengths = model.forward(sequences(), trace=True).ffn_lengths
        assert lengths is not None and lengths[-1].sum() < sum(LENGTHS)


def test_the_same_integers_in_any_batch_order_and_thread_count(quantised: Quantised) -> None:
    rows = sequences((1, 150, 5, 17, 64, 2, 129, 97, 40, 160, 3, 33) * 4)
    order = np.random.default_rng(2).permutation(len(rows)).tolist()
    settings = {"precision": "ibert", "pruning": RULES["threshold"]}
    models = [minilpt.load(quantised("roberta"), **settings, threads=count) for count in (1, 2, 3)]
    wanted = models[0].forward(rows).logits
    for model in models:
        assert np.array_equal(model.forward(rows).logits, wanted)
        assert np.array_equal(model.forward([rows[place] for place in order]).logits, wanted[order])


def test_no_floating_point_between_token_ids_and_logits(quantised: Quantised) -> None:
    """Neither in the records and arrays of the compiled path, nor anywhere in its code."""
    from minilpt.kernels.jit.build import optimised

    program = program_of(minilpt.load(quantised("bert"), precision="ibert"))
    for value in (program.record, program.layers, program.rules(None).records):
        assert all(np.issubdtype(dtype, np.integer) for dtype in leaves(value.dtype))
    for dtype in (blocks.BATCH, blocks.INTEGER_WORK, blocks.INTEGER_RULE):
        assert all(np.issubdtype(field, np.integer) for field in leaves(dtype))
    arrays = [array for kept in program._arrays for array in (kept[:2] if isinstance(kept, tuple) else [kept])]
    assert len(arrays) > 50
    assert all(np.issubdtype(array.dtype, np.integer) for array in arrays)
    assert np.issubdtype(program.logits_type, np.integer) and np.issubdtype(program.masses_type, np.integer)
    code = str(optimised("integer"))
    assert "v16i32" in code or "<16 x i32>" in code  # it is the code that is meant
    assert not re.findall(r"\b(?:float|double|half|bfloat|fp128)\b", code)


def leaves(dtype: np.dtype[Any]) -> list[np.dtype[Any]]:
    """The plain fields of a record."""
    if dtype.fields is None:
        return [dtype]
    return [leaf for field, *_ in dtype.fields.values() for leaf in leaves(field)]


def test_every_array_of_the_reference_is_of_integers(quantised: Quantised) -> None:
    model = minilpt.load(quantised("bert"), precision="ibert", pruning=RULES["threshold"])
    for step in reference(model, sequences()[5]).steps:
        assert all(np.issubdtype(values.dtype, np.integer) for values in step.values())


def test_quantising_stays_near_the_float_model(quantised: Quantised) -> None:
    folder = quantised("bert")
    model, plain = minilpt.load(folder, precision="ibert"), minilpt.load(folder.parent / "float")
    items = texts(50, seed=9)
    wanted = plain.logits(items)
    assert np.sqrt(np.mean((model.logits(items) - wanted) ** 2)) < 0.2 * wanted.std()  # random weights magnify it
    as_float = minilpt.load(folder, precision="ibert-float-head")
    assert np.abs(as_float.logits(items) - model.logits(items)).max() < 0.02  # of the head alone


def test_quantising_does_not_depend_on_the_threads(quantised: Quantised, tmp_path: Path) -> None:
    source = quantised("bert").parent / "float"
    for threads in (1, 3):
        minilpt.quantize_model(minilpt.load(source, threads=threads), texts(100), tmp_path / str(threads))
    first, second = (json.loads((tmp_path / name / scales.FILE_NAME).read_text()) for name in ("1", "3"))
    assert first == second


def test_a_channel_with_outliers_can_have_a_scale_of_its_own() -> None:
    values = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    values[:, 3] *= 60
    ways = {way.method: way for way in ranges._ranges(values, by_channel=True)}
    channels = ways.pop("channels")
    assert channels.exponents is not None and channels.exponents[3] in (5, 6) and channels.exponents.sum() < 12
    size = np.exp2(channels.exponents)
    own = np.square(quantised_to(channels, values / size) * size - values)[:, :3].mean()
    assert all(own < np.square(quantised_to(way, values) - values)[:, :3].mean() / 10 for way in ways.values())


def quantised_to(way: ranges.Range, values: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.clip(np.rint(values / way.scale), -128, 127) * way.scale


def test_scales_by_channel_are_folded_and_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are then for integers only."""
    folder = checkpoints.write_vocabulary(checkpoints.write(tmp_path / "float", checkpoints.config()))
    all_ways = ranges._ranges

    def by_channel_first(values: NDArray[np.float32], by_channel: bool) -> list[ranges.Range]:
        ways = list(all_ways(values, by_channel))
        return [way for way in ways if way.method == "channels"] or ways[:1]

    monkeypatch.setattr(ranges, "CHANNEL_QUANTILE", 0.5)  # or channels this alike would all have one scale
    monkeypatch.setattr(ranges, "_ranges", by_channel_first)
    found = minilpt.quantize_model(minilpt.load(folder), texts(100), tmp_path / "integer")
    assert len(found.scales.exponents) == 7  # the embeddings', and two of each layer
    model = minilpt.load(tmp_path / "integer", precision="ibert")
    check(model, sequences((1, 20, 33)))
    wanted = minilpt.load(folder).logits(texts(50, seed=9))
    assert np.sqrt(np.mean((model.logits(texts(50, seed=9)) - wanted) ** 2)) < 0.2 * wanted.std()
    as_float = minilpt.load(tmp_path / "integer", precision="ibert-float-head")
    assert np.abs(as_float.logits(texts(50)) - model.logits(texts(50))).max() < 0.05  # of the head alone
    with pytest.raises(minilpt.UnsupportedModelError, match=r'quant_mode is true.*precision="ibert"'):
        minilpt.load(tmp_path / "integer")


def test_a_golden_file_holds_what_every_rung_computes(quantised: Quantised, tmp_path: Path) -> None:
    """`test_rungs` runs this file on every rung; the file is made by the reference, which knows none."""
    model = minilpt.load(quantised("bert"), precision="ibert", pruning=RULES["threshold"])
    items = [*texts(3, seed=4), ("good film", "bad film")]
    path = minilpt.export_golden(model, items, tmp_path / "golden.safetensors")
    golden = load_file(path)
    assert all(np.issubdtype(values.dtype, np.integer) for values in golden.values())
    ids = [golden[f"texts.{at}.ids"].tolist() for at in range(len(items))]
    segments = [golden[f"texts.{at}.segments"].tolist() for at in range(len(items))]
    assert (ids, segments) == model.encode(items)
    for depth in range(1, model.config.layers + 1):  # a model of the first layers gives their rows
        found = first_rows(model, depth, ids, segments)
        wanted = [golden[f"texts.{at}.layers.{depth - 1}.outer_norm"][0] for at in range(len(items))]
        assert np.array_equal(found, wanted)
    logits = np.stack([golden[f"texts.{at}.head.logits"][0] for at in range(len(items))])
    assert np.array_equal(model.forward(ids, segments).logits, program_of(model).logits(logits, np.zeros((0, 0))))
    traced = model.forward(ids, segments, trace=True)
    assert traced.kept is not None
    for layer, kept in enumerate(traced.kept):
        wanted = np.concatenate([golden[f"texts.{at}.layers.{layer}.keep"] for at in range(len(items))])
        assert kept.tolist() == wanted.astype(bool).tolist()


def first_rows(
    model: minilpt.Classifier, depth: int, ids: list[list[int]], segments: list[list[int]]
) -> NDArray[np.int32]:
    """The 8-bit rows that the head would read behind some layers, (B, D), from the compiled path."""
    from dataclasses import replace

    found: list[NDArray[np.int32]] = []

    class Rows(IntegerProgram):
        def logits(self, raw: NDArray[np.int32], last: NDArray[np.int32]) -> NDArray[np.float32]:
            found.append(last)
            return super().logits(raw, last)

    whole = program_of(model).model
    config = replace(model.config, layers=depth)
    program = Rows(config, replace(whole, layers=whole.layers[:depth]))
    program.last_width = config.width
    rule = replace(model.pruning.rule, thresholds=model.pruning.rule.thresholds[:depth])  # type: ignore
    engine = minilpt.compiled_engine.CompiledEngine(config, program, rule, model.backend)
    encoder = model._text_encoder()
    minilpt.Classifier(model.source, config, engine, model.pruning, encoder).forward(ids, segments)
    return np.concatenate(found)


def test_only_integer_models_have_golden_files(quantised: Quantised, tmp_path: Path) -> None:
    plain = minilpt.load(quantised("bert").parent / "float")
    with pytest.raises(minilpt.UnsupportedModelError, match="made of integers"):
        minilpt.export_golden(plain, "good film", tmp_path / "golden.safetensors")
    with pytest.raises(minilpt.InputError, match="at least one text"):
        minilpt.export_golden(plain, [], tmp_path / "golden.safetensors")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda raw: raw.pop("scales"), "scales must name the"),
        (lambda raw: raw["scales"].pop("layers.1.inner"), "scales must name the"),
        (lambda raw: raw["scales"].update({"layers.1.inner": -1}), "layers.1.inner must be a positive number"),
        (lambda raw: raw["scales"].update({"layers.1.inner": True}), "must be a positive number"),
        (lambda raw: raw["scales"].update({"layers.0.query": 1e-9}), "layers.0.exp: i-exp needs a scale between"),
        (lambda raw: raw["scales"].update({"layers.2.outer": 1}), "scales must name the"),
        (lambda raw: raw["scales"].update({"layers.0.attention_sum": 1e-29}), "layers.0.attention_sum: a ratio"),
        (lambda raw: raw["scales"].update({"layers.0.exp": 1e5}), r"exp\(0\) is the integer 0"),
        (lambda raw: raw["scales"].update({"embeddings.norm": 1e-20}), "more than 32 bits hold"),
        (lambda raw: raw["scales"].update({"embeddings.sum": 1e-11}), "embeddings.word: .* is too many units"),
        (lambda raw: raw["scales"].update({"layers.0.inner.again": 1e20}), "leaves nothing of what it reads"),
        (lambda raw: raw.update({"schema_version": 2}), "schema_version 2"),
        (lambda raw: raw.update({"exponents": {"layers.0.inner": []}}), "exponents must name outputs of LayerNorms"),
        (lambda raw: raw.update({"exponents": {"embeddings.norm": [1, 2]}}), "must be 32 integers from 0 to 30"),
        (lambda raw: raw.update({"exponents": {"embeddings.norm": [31] * 32}}), "must be 32 integers from 0 to 30"),
    ],
)
def test_a_damaged_integer_json_is_refused(
    quantised: Quantised, tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    folder = copied(quantised("bert"), tmp_path)
    raw = json.loads((folder / scales.FILE_NAME).read_text())
    change(raw)
    (folder / scales.FILE_NAME).write_text(json.dumps(raw))
    with pytest.raises(minilpt.MinilptError, match=said):
        minilpt.load(folder, precision="ibert")


@pytest.fixture(scope="module")
def loose(quantised: Quantised, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose integer.json may be written over."""
    return copied(quantised("bert"), tmp_path_factory.mktemp("loose"))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_scales_are_refused_or_computed_as_the_reference_does(quantised: Quantised, loose: Path, seed: int) -> None:
    """Some of them are up to 2^24 times too large or too small: nothing overflows in one place only, or unsaid."""
    draw = np.random.default_rng(seed)
    raw = json.loads((quantised("bert") / scales.FILE_NAME).read_text())
    for name in draw.choice([*raw["scales"]], draw.integers(1, 4)):
        raw["scales"][name] *= float(2 ** draw.uniform(-24, 24))
    (loose / scales.FILE_NAME).write_text(json.dumps(raw))
    try:
        model = minilpt.load(loose, precision="ibert", pruning=RULES["merged"])
    except minilpt.UnsupportedModelError:
        return
    check(model, sequences((1, 9, 33)))


def copied(source: Path, folder: Path) -> Path:
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_channel_without_weight_has_its_bias_all_the_same(quantised: Quantised, tmp_path: Path) -> None:
    folder = copied(quantised("bert"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    at = "bert.encoder.layer.1.output.LayerNorm"
    weights[f"{at}.weight"][5:8] = 0, 1e-7, -1e-7
    weights[f"{at}.bias"][5:8] = 0.5, -0.5, 0
    save_file(weights, folder / "model.safetensors")
    model = minilpt.load(folder, precision="ibert")
    check(model, sequences((1, 20, 33)))
    unit = scales.read_scales(folder, model.config).scales["layers.1.outer_norm"]
    rows = reference(model, sequences((20,))[0]).steps[2]["outer_norm"][:, 5:8]
    assert (rows == [round(0.5 / unit), round(-0.5 / unit), 0]).all()


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.filterwarnings("ignore:(invalid|divide|overflow)")
@pytest.mark.parametrize(
    "name, value, said",
    [
        ("bert.encoder.layer.1.output.LayerNorm.weight", 1e30, "layers.1.outer_norm: a ratio of scales"),
        ("bert.encoder.layer.1.output.LayerNorm.bias", 1e30, "layers.1.outer_norm: channel 5: bias 1.0"),
        (f"{QUERY}.bias", 1e30, "layers.0.query: sums of output 5"),
        (f"{QUERY}.weight_scale", 0, "layers.0.query: scales of rows must be positive"),
        (f"{QUERY}.weight_scale", -1, "layers.0.query: scales of rows must be positive"),
    ],
)
def test_weights_that_integers_cannot_hold_are_refused_by_name(
    quantised: Quantised, tmp_path: Path, name: str, value: float, said: str
) -> None:
    folder = copied(quantised("bert"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights[name][5] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(minilpt.UnsupportedModelError, match=said):
        minilpt.load(folder, precision="ibert")


def test_without_ranges_it_says_how_to_get_them(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path)
    with pytest.raises(minilpt.ModelFileError, match="minilpt quantize"):
        minilpt.load(folder, precision="ibert")


def test_what_integers_cannot_do_is_refused(tmp_path: Path) -> None:
    content = checkpoints.config(hidden_act="gelu_new")
    other = checkpoints.write_vocabulary(checkpoints.write(tmp_path / "tanh", content))
    with pytest.raises(minilpt.UnsupportedModelError, match="gelu_tanh as activation"):
        minilpt.quantize_model(minilpt.load(other), texts(100), tmp_path / "out")
    narrow = checkpoints.config("electra")
    other = checkpoints.write_vocabulary(checkpoints.write(tmp_path / "narrow", narrow))
    with pytest.raises(minilpt.UnsupportedModelError, match="narrower"):
        minilpt.quantize_model(minilpt.load(other), texts(100), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("active", [0, 1])
def test_an_activation_that_is_nearly_always_zero_is_quantised(tmp_path: Path, active: int) -> None:
    """Its percentiles are 0, a range that no integers can have: those ways are left out."""
    content = checkpoints.config(hidden_act="relu")
    folder = checkpoints.write_vocabulary(checkpoints.write(tmp_path / "float", content))
    weights = load_file(folder / "model.safetensors")
    weights["bert.encoder.layer.1.intermediate.dense.bias"][active:] = -100
    save_file(weights, folder / "model.safetensors")
    minilpt.quantize_model(minilpt.load(folder), texts(100), tmp_path / "integer")
    check(minilpt.load(tmp_path / "integer", precision="ibert"), sequences((1, 20)))


def test_a_folder_holds_what_a_model_needs_and_nothing_else(quantised: Quantised) -> None:
    names = {path.name for path in quantised("bert").iterdir()}
    assert names == {"config.json", "integer.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"}


def test_a_relative_rule_of_too_many_tokens_is_refused(quantised: Quantised, tmp_path: Path) -> None:
    folder = copied(quantised("bert"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    table = "bert.embeddings.position_embeddings.weight"
    weights[table] = np.zeros((2**13, 32), np.int8)
    weights[f"{table}_scale"] = np.ones(2**13, np.float32)
    save_file(weights, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2**13}
    (folder / "config.json").write_text(json.dumps(content))
    minilpt.load(folder, precision="ibert", pruning=RULES["threshold"])
    with pytest.raises(minilpt.PruningError, match="4 heads and 8192 tokens"):
        minilpt.load(folder, precision="ibert", pruning=RULES["relative"])


def test_quantise_checks_before_it_works(quantised: Quantised, tmp_path: Path) -> None:
    plain = minilpt.load(quantised("bert").parent / "float")
    with pytest.raises(minilpt.CalibrationError, match="at least 16 texts, found 3; 100 are better"):
        minilpt.quantize_model(plain, texts(3), tmp_path / "out")
    with pytest.raises(minilpt.InputError, match="is there already"):
        minilpt.quantize_model(plain, texts(100), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == []
    with pytest.warns(minilpt.MinilptWarning, match="20 texts are few"):
        minilpt.quantize_model(plain, texts(20), tmp_path / "out")


def test_calibration_and_explain_work_on_integers(quantised: Quantised, tmp_path: Path) -> None:
    model = minilpt.load(quantised("bert"), precision="ibert")
    found = minilpt.calibrate(model, texts(100), flops_ratio=0.7)
    pruned = model.with_pruning(found.save(tmp_path / "ltp.json"))
    check(pruned, sequences((20, 33, 3)))
    assert pruned.explain("a good film").tokens[0].removed_in is None


def test_both_parts_of_the_kernels_are_named(tmp_path: Path) -> None:
    assert compiled.part_of(blocks.RUN_INTEGER_FORWARD) == "integer"
    assert compiled.part_of(blocks.RUN_FORWARD) == "float"
