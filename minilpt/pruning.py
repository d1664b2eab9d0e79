"""Which tokens stay: the keep rules, the ltp.json they are stored in, and the FLOPs accounting.

A rule sees, for one sequence and one layer, the attention mass of each live token k

    mass_k = (1 / H) * sum_h sum_q P_h[q, k]        (n,) float32, over live queries and keys; the masses sum to n

and says which tokens go on. The score of Learned Token Pruning is mass / Z (arXiv 2107.00910, section 3.2). The first
token is pinned by every rule. Layer numbers are 0-based.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .config import LARGEST, LtpSettings, ModelConfig, read_json
from .errors import PruningError
from .kernels import blocks

Float32 = NDArray[np.float32]
Keep = NDArray[np.bool_]
ScoreDenominator = str | int

# The original code keeps a token iff its score >= max(1e-5, threshold).
SCORE_FLOOR = np.float32(1e-5)
MOST_TOKENS = 2**31 - 1  # the largest denominator: what a C int holds, and no text reaches
SCHEMA_VERSION = 1
FILE_NAME = "ltp.json"


class Step(NamedTuple):
    """What a rule asks of one layer, in the words of the compiled kernels (`kernels.blocks.RULE`).

    kind: ABSOLUTE (mass / denominator >= value), RELATIVE (mass / max >= value), COUNT (the round(n_initial * value)
    largest) or KEEP_ALL. denominator: a number, INITIAL or LIVE, and never more than limit. merge: whether the removed
    tokens go on as one.
    """

    kind: int = blocks.KEEP_ALL
    denominator: int = 0
    limit: int = MOST_TOKENS
    merge: bool = False
    value: np.float32 = np.float32(0)


class KeepRule(Protocol):
    """What the forward pass asks of a rule."""

    @property
    def merge_removed(self) -> bool:
        """Whether the tokens that a layer removes go on as one, their mean weighted by mass (`reference`)."""

    def active(self, layer: int) -> bool:
        """Whether this layer can remove anything at all; if not, its masses are never computed."""

    def keep(self, mass: Float32, layer: int, n_initial: int) -> Keep:
        """(n,) bool: the tokens that go on. mass: (n,) float32; n_initial: the sequence's length before layer 0."""

    def step(self, layer: int) -> Step:
        """The same rule for the compiled kernels, for an active layer."""


@dataclass(frozen=True)
class Threshold:
    """LTP: keep k iff mass_k / Z >= max(1e-5, thresholds[layer]); a threshold of exactly 0 means no rule.

    score_denominator Z: "initial" (the sequence's length before layer 0), "live" (before this layer), or a number.
    denominator_limit: Z is never more. The masses of live tokens have mean 1 however long the text, so the mean score
    is 1 / Z: without a limit, thresholds that suit short texts would remove nearly all tokens of long ones.
    """

    thresholds: tuple[float, ...]
    score_denominator: ScoreDenominator
    denominator_limit: int = MOST_TOKENS
    merge_removed: bool = False

    def active(self, layer: int) -> bool:
        return self.thresholds[layer] != 0

    def keep(self, mass: Float32, layer: int, n_initial: int) -> Keep:
        score = mass / np.float32(self.denominator(len(mass), n_initial))
        return _pinned(score >= self._lowest(layer))

    def step(self, layer: int) -> Step:
        z = self.score_denominator
        denominator = {"initial": blocks.INITIAL, "live": blocks.LIVE}[z] if isinstance(z, str) else z
        return Step(blocks.ABSOLUTE, denominator, self.denominator_limit, self.merge_removed, self._lowest(layer))

    def _lowest(self, layer: int) -> np.float32:
        return max(SCORE_FLOOR, np.float32(self.thresholds[layer]))

    def denominator(self, n_live: int, n_initial: int) -> int:
        """Z for a sequence with these lengths."""
        lengths = {"initial": n_initial, "live": n_live}
        z = self.score_denominator
        return min(lengths[z] if isinstance(z, str) else z, self.denominator_limit)


@dataclass(frozen=True)
class Ramp(Threshold):
    """The paper's manual thresholds: final * layer / L, under the rule of `Threshold`."""

    @classmethod
    def to(
        cls,
        final: float,
        layers: int,
        score_denominator: ScoreDenominator,
        limit: int = MOST_TOKENS,
        merge_removed: bool = False,
    ) -> Ramp:
        thresholds = tuple(final * layer / layers for layer in range(layers))
        return cls(thresholds, score_denominator, limit, merge_removed)


@dataclass(frozen=True)
class Relative:
    """Keep k iff mass_k / max_j mass_j >= token_threshold, in every layer ("threshold" in the LTP code)."""

    token_threshold: float
    merge_removed: bool = False

    def active(self, layer: int) -> bool:
        return self.token_threshold > 0

    def keep(self, mass: Float32, layer: int, n_initial: int) -> Keep:
        return _pinned(mass / mass.max() >= np.float32(self.token_threshold))

    def step(self, layer: int) -> Step:
        return Step(blocks.RELATIVE, merge=self.merge_removed, value=np.float32(self.token_threshold))


@dataclass(frozen=True)
class TopK:
    """SpAtten's cascade as the LTP code schedules it: the largest round(n_initial * rate) masses stay.

    With dense = max(3, ceil(0.15 L)) the rate is 1 below layer `dense` and then falls linearly to token_keep_rate in
    the last layer, never below 0.01. The pinned first token takes one of the places; ties go to the lower index.
    """

    token_keep_rate: float
    layers: int
    merge_removed: bool = False

    def rate(self, layer: int) -> float:
        dense = max(3, math.ceil(0.15 * self.layers))
        if layer < dense:
            return 1.0
        return max(0.01, 1 + (self.token_keep_rate - 1) * (layer - dense + 1) / (self.layers - dense))

    def active(self, layer: int) -> bool:
        return self.rate(layer) < 1

    def keep(self, mass: Float32, layer: int, n_initial: int) -> Keep:
        # In float32 and rounded half to even, as torch.round of the original's float32 lengths.
        count = max(1, int(np.rint(np.float32(n_initial) * np.float32(self.rate(layer)))))
        others = 1 + np.argsort(-mass[1:], kind="stable")
        keep = np.zeros(len(mass), dtype=bool)
        keep[others[: count - 1]] = True
        return _pinned(keep)

    def step(self, layer: int) -> Step:
        return Step(blocks.COUNT, merge=self.merge_removed, value=np.float32(self.rate(layer)))


def _pinned(keep: Keep) -> Keep:
    keep[0] = True
    return keep


@dataclass(frozen=True)
class Pruning:
    """A keep rule with its story. settings: the rule's own keys, as ltp.json holds them.

    frontier: other thresholds for the same model, by falling share of the dense FLOPs.
    """

    rule: KeepRule
    name: str
    settings: Mapping[str, Any]
    method: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    frontier: tuple[tuple[float, Threshold], ...] = ()

    def at(self, flops_ratio: float) -> Pruning:
        """The point of the frontier that spends the most within this share of the dense counted FLOPs.

        Raises PruningError if there is no frontier, or none of its points is that cheap.
        """
        if not self.frontier:
            raise PruningError(
                "flops_ratio needs an ltp.json with a frontier, and this model's has none: run minilpt calibrate"
            )
        for ratio, rule in self.frontier:
            if ratio <= flops_ratio:
                settings = {**self.settings, "thresholds": list(rule.thresholds)}
                return replace(self, rule=rule, settings=settings)
        raise PruningError(f"flops_ratio {flops_ratio!r} is below {self.frontier[-1][0]:.3f}, the frontier's lowest")

    def to_json(self) -> dict[str, Any]:
        """The content of an ltp.json that `parse` reads back to the same thing."""
        record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "rule": self.name, **self.settings}
        if self.method is not None:
            record["method"] = self.method
        return record | ({"provenance": dict(self.provenance)} if self.provenance else {})


# rule name -> the keys that it needs; docs/ltp-json.md explains each.
RULE_KEYS: Mapping[str, frozenset[str]] = {
    "threshold": frozenset({"thresholds", "score_denominator"}),
    "ramp": frozenset({"final_threshold", "score_denominator"}),
    "relative": frozenset({"token_threshold"}),
    "topk": frozenset({"token_keep_rate"}),
}
OPTIONAL_KEYS: Mapping[str, frozenset[str]] = {
    "threshold": frozenset({"denominator_limit", "frontier", "merge_removed"}),
    "ramp": frozenset({"denominator_limit", "merge_removed"}),
    "relative": frozenset({"merge_removed"}),
    "topk": frozenset({"merge_removed"}),
}
_COMMON_KEYS = frozenset({"schema_version", "rule", "method", "provenance"})


def parse(record: Mapping[str, Any], layers: int, where: str) -> Pruning:
    """Check the content of an ltp.json against a model of this many layers. `where` begins every message.

    Raises PruningError for an unknown version, rule or key, a missing key, or a value of the wrong kind or length.
    """
    check = _Checker(record, where)
    version = record.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise check.error(f"schema_version {version!r} is not {SCHEMA_VERSION}; a newer minilpt may read it")
    name = record.get("rule")
    if not isinstance(name, str) or name not in RULE_KEYS:
        raise check.error(f"rule {name!r} is not one of {', '.join(RULE_KEYS)}")
    optional, merge = OPTIONAL_KEYS[name], check.merge()
    check.keys(RULE_KEYS[name], optional, name)
    rule: KeepRule
    frontier: tuple[tuple[float, Threshold], ...] = ()
    if name == "threshold":
        rule = Threshold(check.thresholds(layers), check.denominator(), check.limit(), merge)
        frontier = tuple((ratio, replace(rule, thresholds=point)) for ratio, point in check.frontier(layers))
    elif name == "ramp":
        rule = Ramp.to(check.number("final_threshold"), layers, check.denominator(), check.limit(), merge)
    elif name == "relative":
        rule = Relative(check.number("token_threshold", 0, 1), merge)
    else:
        rule = TopK(check.number("token_keep_rate", 0, 1), layers, merge)
    settings = {key: record[key] for key in sorted(RULE_KEYS[name] | optional) if key in record}
    return Pruning(rule, name, settings, record.get("method"), record.get("provenance", {}), frontier)


class _Checker:
    def __init__(self, record: Mapping[str, Any], where: str):
        self.record, self.where = record, where

    def error(self, message: str) -> PruningError:
        return PruningError(f"{self.where}: {message}")

    def keys(self, wanted: frozenset[str], optional: frozenset[str], rule: str) -> None:
        missing = sorted(wanted - set(self.record))
        unknown = sorted(set(self.record) - wanted - optional - _COMMON_KEYS)
        if missing:
            raise self.error(f"rule {rule!r} needs {', '.join(missing)}")
        if unknown:
            raise self.error(f"rule {rule!r} does not know {', '.join(unknown)}")
        if not isinstance(self.record.get("provenance", {}), Mapping):
            raise self.error("provenance must be an object")
        if not isinstance(self.record.get("method"), (str, type(None))):
            raise self.error("method must be a string")

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        return self._number(key, self.record[key], low, high)

    def _number(self, key: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise self.error(f"{key} must be a finite number, found {value!r}")
        if not low <= value <= high:
            raise self.error(f"{key} must lie between {low} and {high}, found {value!r}")
        return float(value)

    def thresholds(self, layers: int) -> tuple[float, ...]:
        return self._thresholds("thresholds", self.record["thresholds"], layers)

    def _thresholds(self, key: str, values: object, layers: int) -> tuple[float, ...]:
        if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != layers:
            raise self.error(f"{key} must be a list of {layers} numbers, one per layer, found {values!r:.200}")
        return tuple(self._number(f"{key}[{layer}]", value) for layer, value in enumerate(values))

    def frontier(self, layers: int) -> list[tuple[float, tuple[float, ...]]]:
        points = self.record.get("frontier", [])
        if isinstance(points, str) or not isinstance(points, Sequence):
            raise self.error(f"frontier must be a list of objects, found {points!r:.200}")
        found: list[tuple[float, tuple[float, ...]]] = []
        for number, point in enumerate(points):
            at = f"frontier[{number}]"
            if not isinstance(point, Mapping) or not {"flops_ratio", "thresholds"} <= set(point):
                raise self.error(f"{at} must be an object with flops_ratio and thresholds, found {point!r:.200}")
            ratio = self._number(f"{at}.flops_ratio", point["flops_ratio"], 0, 1)
            if found and ratio >= found[-1][0]:
                raise self.error(f"{at}.flops_ratio must be below that of the point before, found {ratio}")
            found.append((ratio, self._thresholds(f"{at}.thresholds", point["thresholds"], layers)))
        return found

    def denominator(self) -> ScoreDenominator:
        value = self.record["score_denominator"]
        if value not in ("initial", "live") and not _is_length(value):
            raise self.error(
                f'score_denominator must be "initial", "live" or a positive integer below 2^31, found {value!r}'
            )
        return value

    def merge(self) -> bool:
        value = self.record.get("merge_removed", False)
        if not isinstance(value, bool):
            raise self.error(f"merge_removed must be true or false, found {value!r}")
        return value

    def limit(self) -> int:
        value = self.record.get("denominator_limit")
        if value is not None and not _is_length(value):
            raise self.error(f"denominator_limit must be a positive integer below 2^31 or null, found {value!r}")
        return MOST_TOKENS if value is None else value


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS


def read_pruning(path: Path, layers: int) -> Pruning:
    """The pruning stored in an ltp.json file (or in the ltp.json of a folder) for a model of this many layers."""
    path = path / FILE_NAME if path.is_dir() else path
    return parse(read_json(path), layers, str(path))


def overridden(stored: Pruning | None, changes: Mapping[str, Any], layers: int) -> Pruning:
    """The stored pruning with some keys changed, or a new one where another rule is named or none is stored.

    What the file said of its origin no longer holds, so method, provenance and frontier are dropped.
    """
    where = "pruning="
    if stored is not None and changes.get("rule", stored.name) == stored.name:
        kept = {key: value for key, value in stored.settings.items() if key != "frontier"}
        return parse({"rule": stored.name, **kept, **changes}, layers, where)
    if "rule" not in changes:
        raise PruningError(
            f'{where}: the model holds no pruning to change, so "rule" is needed: {", ".join(RULE_KEYS)}'
        )
    return parse(changes, layers, where)


def from_ltp_checkpoint(settings: LtpSettings, offsets: Sequence[np.float32], score_denominator: int) -> Pruning:
    """The rule of a checkpoint that the original LTP code wrote.

    "absolute_threshold" stores a learned offset per layer; theta_N = offset + final_token_threshold * N / L.
    """
    record: dict[str, Any] = {"method": "original LTP code"}
    layers = len(offsets)
    if settings.prune_mode == "absolute_threshold":
        ramp = [settings.parameter * layer / layers for layer in range(layers)]
        thresholds = [float(offset + np.float32(base)) for offset, base in zip(offsets, ramp, strict=True)]
        record |= {"rule": "threshold", "thresholds": thresholds, "score_denominator": score_denominator}
    elif settings.prune_mode == "threshold":
        record |= {"rule": "relative", "token_threshold": settings.parameter}
    else:
        record |= {"rule": "topk", "token_keep_rate": settings.parameter}
    return parse(record, layers, "config.json")


def counted_flops(
    config: ModelConfig, n_attention: NDArray[np.integer], n_ffn: NDArray[np.integer]
) -> NDArray[np.int64]:
    """FLOPs as Table I of the paper counts them, (B,) int64: 2 x the MACs of all layers.

    MACs of a layer: 4 D^2 n_a + 2 D n_a^2 + 2 D F n_f, with n_a live tokens before and n_f after its pruning.
    Embeddings, softmax, LayerNorm and head are left out. n_attention, n_ffn: (L, B) integers.
    """
    D, F = config.width, config.inner
    n_a, n_f = n_attention.astype(np.int64), n_ffn.astype(np.int64)
    return 2 * (4 * D * D * n_a + 2 * D * n_a**2 + 2 * D * F * n_f).sum(axis=0)


def dense_flops(config: ModelConfig, lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """`counted_flops` without pruning and without padding, (B,) int64. lengths: (B,) integers."""
    every_layer = np.broadcast_to(lengths, (config.layers, len(lengths)))
    return counted_flops(config, every_layer, every_layer)


def executed_flops(
    config: ModelConfig, n_attention: NDArray[np.integer], n_ffn: NDArray[np.integer], *, first_row_only: bool
) -> NDArray[np.int64]:
    """FLOPs of the matrix products that the engine really runs, (B,) int64; the same parts are left out.

    Queries that are about to be pruned stop after their scores, and with first_row_only the last layer computes one
    query row, whatever n_ffn says there. MACs of a layer: 3 D^2 n_a + D n_a^2 (Q, K, V, scores), then D n_a n_f (P V),
    D^2 n_f (output) and 2 D F n_f (feed-forward).
    """
    D, F = config.width, config.inner
    n_a, n_f = n_attention.astype(np.int64), n_ffn.astype(np.int64)
    queries = n_a.copy()
    if first_row_only:
        queries[-1] = n_f[-1] = 1
    attention = 2 * D * D * n_a + D * D * queries + D * queries * n_a
    rest = D * n_a * n_f + D * D * n_f + 2 * D * F * n_f
    return 2 * (attention + rest).sum(axis=0)
