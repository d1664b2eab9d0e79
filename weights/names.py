"""Weight names as tables: our name for each tensor and the name that each family's checkpoints use, both ways.

Our names: `embeddings.{word,position,segment,norm,project}`, `head.{dense,out}`, and
`layers.N.{query,key,value,attention_output,attention_norm,inner,outer,outer_norm}`, each with `.weight` and, except
for the tables of the embeddings, `.bias`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NameTable:
    """Names in one family's checkpoints. The prefix stands before encoder names; `{}` stands for the layer number."""

    prefix: str
    encoder: Mapping[str, str]
    layer: Mapping[str, str]
    head: Mapping[str, str]


_BERT_ENCODER = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.segment": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "embeddings.project": "embeddings_project",
}
_BERT_LAYER = {
    "query": "encoder.layer.{}.attention.self.query",
    "key": "encoder.layer.{}.attention.self.key",
    "value": "encoder.layer.{}.attention.self.value",
    "attention_output": "encoder.layer.{}.attention.output.dense",
    "attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "inner": "encoder.layer.{}.intermediate.dense",
    "outer": "encoder.layer.{}.output.dense",
    "outer_norm": "encoder.layer.{}.output.LayerNorm",
}
_DISTILBERT_LAYER = {
    "query": "transformer.layer.{}.attention.q_lin",
    "key": "transformer.layer.{}.attention.k_lin",
    "value": "transformer.layer.{}.attention.v_lin",
    "attention_output": "transformer.layer.{}.attention.out_lin",
    "attention_norm": "transformer.layer.{}.sa_layer_norm",
    "inner": "transformer.layer.{}.ffn.lin1",
    "outer": "transformer.layer.{}.ffn.lin2",
    "outer_norm": "transformer.layer.{}.output_layer_norm",
}
_ROBERTA_HEAD = {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}

TABLES: Mapping[str, NameTable] = {
    "bert": NameTable(
        "bert.", _BERT_ENCODER, _BERT_LAYER, {"head.dense": "bert.pooler.dense", "head.out": "classifier"}
    ),
    "roberta": NameTable("roberta.", _BERT_ENCODER, _BERT_LAYER, _ROBERTA_HEAD),
    "ibert": NameTable("ibert.", _BERT_ENCODER, _BERT_LAYER, _ROBERTA_HEAD),
    "electra": NameTable("electra.", _BERT_ENCODER, _BERT_LAYER, _ROBERTA_HEAD),
    "distilbert": NameTable(
        "distilbert.", _BERT_ENCODER, _DISTILBERT_LAYER, {"head.dense": "pre_classifier", "head.out": "classifier"}
    ),
}

# Tensors that checkpoints carry and a model without use for them never reads, as patterns on the name without its
# family prefix: poolers, language-model and discriminator heads, position buffers, and the quantisation buffers of the
# I-BERT and LTP code.
UNUSED = tuple(
    re.compile(pattern)
    for pattern in (
        r"pooler\..*",
        r"cls\..*",
        r"lm_head\..*",
        r"vocab_(transform|layer_norm|projector)\..*",
        r"(discriminator|generator)_\w+\..*",
        r"embeddings\.(position_ids|token_type_ids)",
        r"(.*\.)?(act_scaling_factor|x_min|x_max|shift)",
        r".*\.(weight_integer|bias_integer|weight_scaling_factor|fc_scaling_factor)",
        r"encoder\.layer\.\d+\.attention\.self\.pruner\.keep_threshold",
    )
)

# The modules of I-BERT that hold an activation's range, by our name for the activation (`minilpt.scales`).
_IBERT_ACTIVATIONS = {
    "embeddings.sum": "embeddings.embeddings_act1",
    "embeddings.norm": "embeddings.output_activation",
}
_IBERT_LAYER_ACTIVATIONS = {
    "query": "encoder.layer.{}.attention.self.query_activation",
    "key": "encoder.layer.{}.attention.self.key_activation",
    "value": "encoder.layer.{}.attention.self.value_activation",
    "exp": "encoder.layer.{}.attention.self.softmax.act",
    "context": "encoder.layer.{}.attention.self.output_activation",
    "attention_sum": "encoder.layer.{}.attention.output.ln_input_act",
    "attention_norm": "encoder.layer.{}.attention.output.output_activation",
    "attention_norm.again": "encoder.layer.{}.pre_intermediate_act",
    "inner": "encoder.layer.{}.intermediate.output_activation",
    "inner.again": "encoder.layer.{}.pre_output_act",
    "outer_sum": "encoder.layer.{}.output.ln_input_act",
    "outer_norm": "encoder.layer.{}.output.output_activation",
}

LTP_OFFSET = "ibert.encoder.layer.{}.attention.self.pruner.keep_threshold"


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor that this model reads, by our name, with its shape as checkpoints store it (rows are outputs)."""
    D, F, E = config.width, config.inner, config.embedding_width
    shapes: dict[str, Shape] = {
        "embeddings.word.weight": (config.vocabulary, E),
        "embeddings.position.weight": (config.positions, E),
    }
    if config.segments:
        shapes["embeddings.segment.weight"] = (config.segments, E)
    shapes |= {"embeddings.norm.weight": (E,), "embeddings.norm.bias": (E,)}
    if E != D:
        shapes |= _linear("embeddings.project", D, E)
    for layer in range(config.layers):
        at = f"layers.{layer}."
        for name in ("query", "key", "value", "attention_output"):
            shapes |= _linear(f"{at}{name}", D, D)
        shapes |= _linear(f"{at}inner", F, D) | _linear(f"{at}outer", D, F)
        for name in ("attention_norm", "outer_norm"):
            shapes |= {f"{at}{name}.weight": (D,), f"{at}{name}.bias": (D,)}
    if config.labels:
        shapes |= _linear("head.dense", D, D) | _linear("head.out", len(config.labels), D)
    return shapes


def _linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def checkpoint_names(config: ModelConfig) -> dict[str, str]:
    """Our name -> the name under which this family's checkpoints store the tensor, for every tensor read."""
    modules = dict(_modules(TABLES[config.family], config.layers))
    names = {}
    for ours in expected_shapes(config):
        module, parameter = ours.rsplit(".", 1)
        names[ours] = f"{modules[module]}.{parameter}"
    return names


def _modules(table: NameTable, layers: int) -> Iterator[tuple[str, str]]:
    for ours, theirs in table.encoder.items():
        yield ours, table.prefix + theirs
    for layer in range(layers):
        for ours, theirs in table.layer.items():
            yield f"layers.{layer}.{ours}", table.prefix + theirs.format(layer)
    yield from table.head.items()


def activation_modules(config: ModelConfig) -> dict[str, str]:
    """Our name of each activation of an I-BERT checkpoint -> the module that holds its range."""
    table = NameTable(TABLES["ibert"].prefix, _IBERT_ACTIVATIONS, _IBERT_LAYER_ACTIVATIONS, {})
    return dict(_modules(table, config.layers))


def norm_modules(config: ModelConfig) -> dict[str, str]:
    """Our name of each LayerNorm -> its module in this family's checkpoints."""
    modules = dict(_modules(TABLES[config.family], config.layers))
    return {name: module for name, module in modules.items() if name.endswith("norm")}


def normalise(name: str, family: str) -> str:
    """A stored name as this family writes it today: without `module.`, with weight/bias for gamma/beta, with prefix."""
    name = name.removeprefix("module.")
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    table = TABLES[family]
    if name.startswith(_BARE_STARTS):
        return table.prefix + name
    return name


# First components of encoder names; a stored name that begins with one lacks its family prefix.
_BARE_STARTS = ("embeddings.", "encoder.", "transformer.", "pooler.", "embeddings_project.")


def is_unused(normalised: str, family: str) -> bool:
    """Whether a tensor is on the list of those that may be there and are never read."""
    bare = normalised.removeprefix(TABLES[family].prefix)
    return any(pattern.fullmatch(bare) for pattern in UNUSED)
