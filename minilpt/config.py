"""What config.json says of a model, read into one frozen record and checked before any weight is touched.

Setting names and defaults are those of the Hugging Face configuration classes (transformers 4.57).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import MinilptWarning, ModelFileError, UnsupportedModelError

T = TypeVar("T")
MODULES = "modules.json"  # where sentence-transformers lists what follows the encoder


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one sequence classifier, or of an encoder without a head. Layer numbers are 0-based everywhere.

    family: "bert", "roberta", "distilbert", "electra" or "ibert" (the LTP code's own), which decides names and head.
    layers L, heads H, width D, inner F; embedding_width differs from D in small ELECTRAs only.
    positions: rows of the position table; position_offset: the row of the first token (pad id + 1 for RoBERTa).
    segments: rows of the segment table, 0 when the family has none. eps: added to the variance in LayerNorm.
    activation, head_activation: kernel names, in the feed-forward and between the head's two matrices.
    labels: one name per output; none if there is no classification head.
    problem_type: "regression", "single_label_classification", "multi_label_classification" or None.
    ltp: the pruning settings that checkpoints of the LTP code carry in config.json, else None.
    quant_mode: the weights are for integer-only inference, and mean something else in floating point.
    """

    family: str
    model_type: str
    layers: int
    heads: int
    width: int
    inner: int
    embedding_width: int
    vocabulary: int
    positions: int
    position_offset: int
    pad_token_id: int
    segments: int
    eps: float
    activation: str
    head_activation: str
    labels: tuple[str, ...]
    problem_type: str | None
    ltp: LtpSettings | None = None
    quant_mode: bool = False

    @property
    def max_tokens(self) -> int:
        """Longest sequence that has a position row for every token."""
        return self.positions - self.position_offset


@dataclass(frozen=True)
class LtpSettings:
    """`prune_mode` and its one parameter, as config.json of an LTP checkpoint gives them."""

    prune_mode: str
    parameter: float


@dataclass(frozen=True)
class Family:
    """How one model_type spells its settings, and the defaults of its configuration class.

    `keys` maps our field to the key in config.json; `defaults` holds values for keys that a file may leave out;
    `head_activation` stands between the two matrices of the classification head (modeling_*.py of transformers 4.57).
    """

    name: str
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    head_activation: str = "tanh"
    positions_after_padding: bool = False


_BERT_KEYS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "width": "hidden_size",
    "inner": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "segments": "type_vocab_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
}
_DISTILBERT_KEYS = {
    "layers": "n_layers",
    "heads": "n_heads",
    "width": "dim",
    "inner": "hidden_dim",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "activation": "activation",
}
_BERT_DEFAULTS = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0}
_ROBERTA_DEFAULTS = {**_BERT_DEFAULTS, "pad_token_id": 1}
_ROBERTA = Family("roberta", _BERT_KEYS, _ROBERTA_DEFAULTS, positions_after_padding=True)
_IBERT = Family("ibert", _BERT_KEYS, _ROBERTA_DEFAULTS, positions_after_padding=True)

FAMILIES: Mapping[str, Family] = {
    "bert": Family("bert", _BERT_KEYS, _BERT_DEFAULTS),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Family(
        "distilbert", _DISTILBERT_KEYS, {"activation": "gelu", "pad_token_id": 0}, head_activation="relu"
    ),
    "electra": Family("electra", _BERT_KEYS, _BERT_DEFAULTS, head_activation="gelu"),
    "ibert": _IBERT,
    "ltp": _IBERT,
}

# DistilBERT has no setting for it: modeling_distilbert.py fixes eps to 1e-12.
_DISTILBERT_EPS = 1e-12

ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# What config.json calls an encoder without a head in `architectures`: the classes of transformers.
ENCODERS = frozenset(
    "BertModel RobertaModel XLMRobertaModel CamembertModel DistilBertModel ElectraModel IBertModel".split()
)

# Far more than any model has. Everything else in config.json is held against the checkpoint before memory is spent on
# it, but names are made for every layer, and for every label that id2label does not name.
MOST_LAYERS = 1000
MOST_LABELS = 1_000_000
LARGEST = 3e38  # of thresholds and the like, which become float32

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# prune_mode of the LTP code -> the key of its one parameter.
LTP_PARAMETERS = {
    "absolute_threshold": "final_token_threshold",
    "threshold": "token_threshold",
    "topk": "token_keep_rate",
}

# Settings that change results: key -> the values under which we compute the same thing. Anything else is refused.
REFUSED_UNLESS: Mapping[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "relative_attention": (False, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "num_hidden_groups": (None,),
    "inner_group_num": (None,),
    "true_hidden_size": (None,),
    "use_bottleneck": (False, None),
    "adapters": ({}, None),
    "attention_window": (None,),
    "attention_type": (None, "original_full"),
    "rotary_value": (False, None),
    "rope_theta": (None,),
    "rope_scaling": (None,),
    "normalize_before": (False, None),
    "pre_norm": (False, None),
    "quantize": (False, None),
}

# Settings that training, generation, other heads or the library's own housekeeping read, never this forward pass.
HARMLESS = frozenset(
    """
    _name_or_path _num_labels _attn_implementation _attn_implementation_autoset architectures attn_implementation
    transformers_version adapter_version torch_dtype dtype use_cache output_attentions output_hidden_states output_past
    return_dict torchscript use_bfloat16 tf_legacy_loss tie_word_embeddings tie_encoder_decoder tie_weights_
    finetuning_task task_specific_params tokenizer_class prefix language name model_type id2label label2id num_labels
    problem_type bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id initializer_range initializer_factor classifier_dropout cls_dropout hidden_dropout_prob
    attention_probs_dropout_prob dropout attention_dropout qa_dropout seq_classif_dropout gradient_checkpointing
    chunk_size_feed_forward pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type directionality summary_activation summary_first_dropout summary_last_dropout summary_type
    summary_use_proj sinusoidal_pos_embds generator_hidden_size generator_size model_max_length max_seq_length
    embedding_size quant_mode prune_mode final_token_threshold token_threshold token_keep_rate type_vocab_size
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    force_dequant remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ModelFileError if the file is missing, is not JSON, or holds something else."""
    return _read_json(path, dict, "object")


def read_json_list(path: Path) -> list[Any]:
    """The same for a JSON array."""
    return _read_json(path, list, "array")


def _read_json(path: Path, kind: type[T], name: str) -> T:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; a model folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of 5,000 digits
        raise ModelFileError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, kind):
        raise ModelFileError(f"{path}: a JSON {name} was expected, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> ModelConfig:
    """Read and check config.json of a sequence classifier, or of an encoder without a head.

    Raises ModelFileError for an unreadable file, UnsupportedModelError for a setting that would change results and that
    minilpt does not run. A key that minilpt has never heard of gives one MinilptWarning.
    """
    return _Reader(folder / "config.json").config()


class _Reader:
    """The settings of one file, with the file's name at hand for the messages."""

    def __init__(self, path: Path):
        self.path = path
        self.raw = read_json(path)
        model_type = self.raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise self.unsupported(f"model_type {model_type!r} is not one of those that minilpt runs: {known}")
        self.model_type = model_type
        self.family = FAMILIES[model_type]

    def unsupported(self, message: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.path}: {message}")

    def config(self) -> ModelConfig:
        self._refuse_foreign_settings()
        family, keys = self.family, self.family.keys
        sizes = {field: self._integer(keys[field]) for field in ("heads", "width", "inner", "vocabulary", "positions")}
        layers = self._integer(keys["layers"], most=MOST_LAYERS)
        segments = self._integer(keys["segments"]) if "segments" in keys else 0
        if sizes["width"] % sizes["heads"]:
            raise self.unsupported(f"{keys['width']} {sizes['width']} is not a multiple of the {sizes['heads']} heads")
        pad_token_id = self._integer("pad_token_id", smallest=0)
        offset = pad_token_id + 1 if family.positions_after_padding else 0
        if offset >= sizes["positions"]:
            raise self.unsupported(
                f"{keys['positions']} {sizes['positions']} leaves no position after row {offset - 1}"
            )
        return ModelConfig(
            family=family.name,
            model_type=self.model_type,
            layers=layers,
            **sizes,
            embedding_width=self._embedding_width(sizes["width"]),
            position_offset=offset,
            pad_token_id=pad_token_id,
            segments=segments,
            eps=self._eps(),
            activation=self._activation(),
            head_activation=family.head_activation,
            labels=self._labels(),
            problem_type=self._problem_type(),
            ltp=self._ltp_settings(),
            quant_mode=self._quant_mode(),
        )

    def _get(self, key: str) -> Any:
        """The value in the file, or the configuration class's default, or None."""
        value = self.raw.get(key)
        return self.family.defaults.get(key) if value is None else value

    def _integer(self, key: str, smallest: int = 1, most: float = math.inf) -> int:
        value = self._get(key)
        if value is None:
            raise self.unsupported(f"{key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise self.unsupported(f"{key} must be an integer of at least {smallest}, found {value!r}")
        if value > most:
            raise self.unsupported(f"{key} {value} is more than the {most} that minilpt takes")
        return value

    def _eps(self) -> float:
        if "eps" not in self.family.keys:
            return _DISTILBERT_EPS
        value = self._get(self.family.keys["eps"])
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
            raise self.unsupported(f"{self.family.keys['eps']} must lie between 0 and 1, found {value!r}")
        return float(value)

    def _embedding_width(self, width: int) -> int:
        found = self.raw.get("embedding_size")
        if found is None:
            return width
        if self.family.name != "electra" and found != width:
            raise self.unsupported(f"embedding_size {found!r} differs from hidden_size {width}: factorised embeddings")
        return self._integer("embedding_size")

    def _activation(self) -> str:
        key = self.family.keys["activation"]
        value = self._get(key)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.unsupported(f"{key} {value!r} is not one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def _labels(self) -> tuple[str, ...]:
        """Names in the order of the outputs: id2label, else LABEL_0... for num_labels (or 2, the class default).

        None for an encoder without a head, as config.json or the modules.json of sentence-transformers says.
        """
        classes = self.raw.get("architectures") or []
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise self.unsupported(f"architectures must be an array of strings, found {classes!r}")
        classifies = any(name.endswith("ForSequenceClassification") for name in classes)
        if ENCODERS.intersection(classes) or ((self.path.parent / MODULES).is_file() and not classifies):
            return ()
        names = self.raw.get("id2label")
        if names is None:
            count = self.raw.get("num_labels", self.raw.get("_num_labels", 2))
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise self.unsupported(f"num_labels must be a positive integer, found {count!r}")
            if count > MOST_LABELS:
                raise self.unsupported(f"num_labels {count} is more than the {MOST_LABELS} that minilpt takes")
            return tuple(f"LABEL_{index}" for index in range(count))
        if not isinstance(names, dict) or not names:
            raise self.unsupported(f"id2label must be a non-empty object, found {names!r}")
        if set(names) != {str(index) for index in range(len(names))}:
            raise self.unsupported(f"id2label must have the keys 0 to {len(names) - 1}, found {sorted(names)}")
        labels = tuple(str(names[str(index)]) for index in range(len(names)))
        if len(set(labels)) != len(labels):
            raise self.unsupported(f"id2label names a label twice: {labels}; give every output its own name")
        return labels

    def _problem_type(self) -> str | None:
        value = self.raw.get("problem_type")
        if value is not None and value not in PROBLEM_TYPES:
            raise self.unsupported(f"problem_type {value!r} is not one of {', '.join(PROBLEM_TYPES)}")
        return value

    def _quant_mode(self) -> bool:
        """True for weights that are for integers; then nothing may be left in floating point."""
        value, dequantised = self.raw.get("quant_mode"), self.raw.get("force_dequant", "none")
        if value not in (True, False, None):
            raise self.unsupported(f"quant_mode must be true or false, found {value!r}")
        if value and dequantised not in ("none", None):
            raise self.unsupported(f"force_dequant {dequantised!r}: integer-only inference has no float operations")
        return bool(value)

    def _ltp_settings(self) -> LtpSettings | None:
        mode = self.raw.get("prune_mode")
        if mode is None or mode == "none":
            return None
        if self.family.name != "ibert" or not isinstance(mode, str) or mode not in LTP_PARAMETERS:
            raise self.unsupported(f"prune_mode {mode!r} is not one of {', '.join(LTP_PARAMETERS)} of the LTP code")
        key = LTP_PARAMETERS[mode]
        value = self.raw.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST:
            raise self.unsupported(f"prune_mode {mode!r} needs the number {key}, found {value!r}")
        return LtpSettings(mode, float(value))

    def _refuse_foreign_settings(self) -> None:
        for key, accepted in REFUSED_UNLESS.items():
            if key in self.raw and self.raw[key] not in accepted:
                raise self.unsupported(f"{key} {self.raw[key]!r} changes the results and is not something minilpt runs")
        known = HARMLESS.union(REFUSED_UNLESS, self.family.keys.values())
        unknown = sorted(set(self.raw) - known)
        if unknown:
            message = f"{self.path}: settings unknown to minilpt, taken as harmless: {', '.join(unknown)}"
            warnings.warn(message, MinilptWarning, stacklevel=5)  # the line that calls load()
