"""Thresholds for a model's own texts, without gradients and, unless a target asks for them, without labels.

One half of the texts serves the search (`threshold_search`); the other half, which the search never sees, tells what
the thresholds that it found cost. The halves depend on the set of texts and the seed, not on their order.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from threading import Event, current_thread, main_thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import plots, pruning, ragged, threshold_search
from .api import Classifier, Item, text_items
from .batches import progress_bar, token_batch
from .config import ModelConfig
from .engine import Forward, Prefix
from .errors import CalibrationError, InputError, MinilptWarning
from .evaluate import accuracy, pearson
from .files import write_whole
from .text import TextOrPair
from .threshold_search import Live, Measured, Thresholds

Float64 = NDArray[np.float64]

FEWEST_TEXTS = 16
FEW_TEXTS = 100  # below it, with a warning
MOST_TEXTS = 1000  # of more, a sample
LOWEST_RATIO = 0.3  # how far the frontier reaches, unless a target lies lower
CONFIDENCE = 0.95  # of the lower bound on agreement
ROWS_BYTES = 2**28  # of rows between layers, kept from one run for the next ones
# The thresholds bound the attention mass itself, whose mean is 1 at any length.
RULE = {"rule": "threshold", "score_denominator": 1, "denominator_limit": None}
METHOD = "searched without gradients for the least divergence from the dense model (minilpt calibrate)"


@dataclass(frozen=True)
class Point:
    """Thresholds and what they cost on the held-out texts.

    flops_ratio: counted FLOPs over the dense model's; executed_ratio: FLOPs really run over those of the dense model.
    kl: mean Kullback-Leibler divergence of the scores from the dense ones, in nats (for regression, half the mean
    squared difference). agreement: share of texts with the dense model's label, and agreement_lower its lower bound at
    95 % confidence (Wilson's, one-sided); None for regression. metric: accuracy or Pearson correlation in percent, None
    without labels.
    """

    thresholds: Thresholds
    flops_ratio: float
    executed_ratio: float
    kl: float
    agreement: float | None
    agreement_lower: float | None
    metric: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found. frontier: from dense to few FLOPs; chosen: the point that the targets ask for.

    merge_removed: whether removed tokens go on as one. provenance: texts, targets, seed, date. interrupted: whether
    Ctrl-C ended the search early.
    """

    frontier: tuple[Point, ...]
    chosen: Point
    merge_removed: bool
    provenance: Mapping[str, Any]
    interrupted: bool = False

    @property
    def pruning(self) -> dict[str, Any]:
        """What `load(pruning=...)` and `Classifier.with_pruning` take, and ltp.json holds."""
        return {
            "schema_version": pruning.SCHEMA_VERSION,
            **RULE,
            "merge_removed": self.merge_removed,
            "thresholds": list(self.chosen.thresholds),
            "frontier": [asdict(point) for point in self.frontier],
            "method": METHOD,
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | Path) -> Path:
        """Write an ltp.json, whole or not at all, into a folder or to a file; returns the file's path."""
        target = Path(path)
        target = target / pruning.FILE_NAME if target.is_dir() else target
        write_whole(target, json.dumps(self.pruning, indent=2) + "\n")
        return target

    def plot(self, path: str | Path) -> None:
        """Draw agreement (or the metric) and divergence against FLOPs, in the format of the path's ending."""
        plots.frontier_plot(self.frontier, self.chosen, Path(path))


def calibrate(
    model: Classifier,
    texts: Iterable[Item],
    *,
    flops_ratio: float | None = None,
    agreement: float | None = None,
    max_drop: float | None = None,
    labels: Sequence[Any] | None = None,
    seed: int = 0,
    max_texts: int = MOST_TEXTS,
    merge_removed: bool = True,
    progress: bool = False,
) -> Calibration:
    """Search for per-layer thresholds on unlabelled texts; the model and its own pruning stay as they are.

    Targets, at least one: flops_ratio, counted FLOPs over the dense model's, at most; agreement, the share of held-out
    texts that keep the dense model's label, at least; max_drop, points of the task's metric that may be lost, for which
    alone labels are read: class names or numbers (accuracy), or values for regression (Pearson correlation). With
    flops_ratio the point that spends the most within it is chosen, else the one that spends the least.

    texts: as `Classifier.predict` takes them, each counted once; some hundred from where the model will be used, and of
    more than max_texts a sample. seed decides the sample, the halves and the search's random moves. merge_removed: the
    tokens that a layer removes go on as one; False is the paper's rule. Ctrl-C ends the search, and what was found
    until then is returned with a warning. Raises CalibrationError for too few texts and for targets that contradict
    each other or are out of reach, InputError for texts or labels that are none.
    """
    _check_targets(model.config, flops_ratio, agreement, max_drop, labels, seed, max_texts)
    items = text_items(texts)
    wanted = None if max_drop is None or labels is None else _gold(labels, model.config, len(items))
    search_half, held_out = (_Half(model, merge_removed, *half) for half in _halves(items, wanted, seed, max_texts))
    _warn_of_few(len(search_half) + len(held_out), search_half.truncated + held_out.truncated)
    last = search_half.start()
    lowest = LOWEST_RATIO if flops_ratio is None else min(LOWEST_RATIO, flops_ratio - 2 * threshold_search.STEP)
    found, interrupted = [last], False
    draw = np.random.default_rng(seed)
    with _Progress(model.config.layers, lowest, progress) as bar, _between_runs() as stop:

        def seen(trial: Measured) -> None:
            bar.tried(trial)
            if stop.is_set():
                raise KeyboardInterrupt

        try:
            for point in threshold_search.search(search_half, last, lowest, draw, seen):
                found.append(point)
        except KeyboardInterrupt:
            interrupted = True
        dense = Measured((0.0,) * model.config.layers, 1.0, 0.0)
        frontier = _falling(held_out.point(each.thresholds) for each in [dense, *_undominated(found)])
    targets = {"flops_ratio": flops_ratio, "agreement": agreement, "max_drop": max_drop}
    if interrupted:
        warnings.warn(
            f"interrupted: the frontier ends at {frontier[-1].flops_ratio:.3f} of the FLOPs",
            MinilptWarning,
            stacklevel=2,
        )
    provenance = {
        "program": "minilpt calibrate",
        "date": datetime.date.today().isoformat(),
        "texts": {"search": len(search_half), "held_out": len(held_out), "mean_tokens": round(held_out.mean_tokens, 1)},
        "precision": model.backend.precision,
        "targets": {name: value for name, value in targets.items() if value is not None},
        "seed": seed,
    }
    chosen = _chosen(frontier, interrupted=interrupted, **targets)
    return Calibration(frontier, chosen, merge_removed, provenance, interrupted)


def _check_targets(
    config: ModelConfig,
    flops_ratio: float | None,
    agreement: float | None,
    max_drop: float | None,
    labels: Sequence[Any] | None,
    seed: int,
    max_texts: int,
) -> None:
    limits = {"flops_ratio": (flops_ratio, 1.0), "agreement": (agreement, 1.0), "max_drop": (max_drop, 100.0)}
    if flops_ratio is None and agreement is None and max_drop is None:
        raise CalibrationError(f"a target is needed, at least one of {', '.join(limits)}")
    for name, (value, most) in limits.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= most):
            raise CalibrationError(f"{name} must be a number from 0 to {most:g}, found {value!r}")
    if not isinstance(seed, int) or seed < 0:
        raise CalibrationError(f"seed must be an integer of 0 or more, found {seed!r}")
    if max_texts < FEWEST_TEXTS:
        raise CalibrationError(f"max_texts must be {FEWEST_TEXTS} at least, found {max_texts!r}")
    if agreement is not None and config.problem_type == "regression":
        raise CalibrationError("agreement is not defined for regression; use flops_ratio, or max_drop with labels")
    if max_drop is not None and len(config.labels) != 1 and config.problem_type == "regression":
        raise CalibrationError(f"max_drop needs one output for regression; the model has {len(config.labels)}")
    if max_drop is not None and labels is None:
        raise CalibrationError("max_drop needs labels, one for each text")
    if labels is not None and max_drop is None:
        raise CalibrationError("labels serve max_drop only: give max_drop, or leave the labels out")


def _gold(labels: Sequence[Any], config: ModelConfig, texts: int) -> Float64:
    """Class numbers in the model's own order, or values for regression, (texts,) float64."""
    regression = config.problem_type == "regression"
    if config.problem_type == "multi_label_classification" or (len(config.labels) == 1 and not regression):
        raise CalibrationError("max_drop has no metric for independent labels; use agreement or flops_ratio")
    if len(labels) != texts:
        raise InputError(f"{texts} texts but {len(labels)} labels")
    names = {name.lower(): float(number) for number, name in enumerate(config.labels)}
    numbers = {str(number): float(number) for number in range(len(config.labels))}
    named = all(str(label).lower() in names for label in labels)  # else a number is a class's number, not its name
    known, values = names if named else names | numbers, []
    for place, label in enumerate(labels):
        try:
            values.append(float(label) if regression else known[str(label).lower()])
        except (KeyError, TypeError, ValueError):
            wanted = "a number" if regression else f"one of {', '.join([*config.labels, *numbers])}"
            raise InputError(f"label {place} must be {wanted}, found {label!r:.80}") from None
    if not np.isfinite(values).all():
        raise InputError(f"label {int(np.argmin(np.isfinite(values)))} must be a finite number")
    return np.array(values)


def _halves(
    items: list[TextOrPair], gold: Float64 | None, seed: int, most: int
) -> Iterator[tuple[list[TextOrPair], Float64 | None]]:
    """The distinct texts, at most so many, in an order that only they and the seed decide; every other one first."""
    keys = [hashlib.blake2b(repr((seed, item)).encode("utf-8", "surrogatepass")).digest() for item in items]
    distinct: dict[bytes, int] = {}
    for place, key in enumerate(keys):
        first = distinct.setdefault(key, place)
        if gold is not None and gold[first] != gold[place]:
            raise InputError(f"texts {first} and {place} are the same and have different labels; leave one out")
    order = [distinct[key] for key in sorted(distinct)][:most]
    if len(order) < FEWEST_TEXTS:
        raise CalibrationError(
            f"{FEWEST_TEXTS} different texts are needed at least, better {FEW_TEXTS}; found {len(order)}"
        )
    for places in (order[::2], order[1::2]):
        yield [items[place] for place in places], None if gold is None else gold[places]


def _warn_of_few(texts: int, truncated: int) -> None:
    if texts < FEW_TEXTS:
        message = f"{texts} texts are few: agreement is uncertain, see its lower bound; {FEW_TEXTS} or more are better"
        warnings.warn(message, MinilptWarning, stacklevel=3)
    if truncated == texts:
        message = "every text is longer than the model's limit and was cut: the thresholds are for texts of full length"
        warnings.warn(message, MinilptWarning, stacklevel=3)


def _undominated(found: list[Measured]) -> list[Measured]:
    """Without those that a cheaper one equals or betters in divergence."""
    kept: list[Measured] = []
    for point in sorted(found, key=lambda point: (point.flops_ratio, point.divergence)):
        if not kept or point.divergence < kept[-1].divergence:
            kept.append(point)
    return kept[::-1]


def _falling(points: Iterable[Point]) -> tuple[Point, ...]:
    """Without those that are not cheaper than the one before, on the held-out texts."""
    kept: list[Point] = []
    for point in points:
        if not kept or point.flops_ratio < kept[-1].flops_ratio:
            kept.append(point)
    return tuple(kept)


def _chosen(
    frontier: Sequence[Point],
    *,
    flops_ratio: float | None,
    agreement: float | None,
    max_drop: float | None,
    interrupted: bool,
) -> Point:
    """The point that meets the targets. Those for quality hold for all dearer points too, not for this one by luck."""
    good = 0
    while good < len(frontier) and _is_good(frontier[good], frontier[0], agreement, max_drop):
        good += 1
    if not good:
        raise CalibrationError("the metric is undefined on the held-out half: its labels are all the same")
    if flops_ratio is None or (interrupted and frontier[-1].flops_ratio > flops_ratio):
        return frontier[good - 1]
    cheap = [number for number, point in enumerate(frontier) if point.flops_ratio <= flops_ratio]
    if not cheap:
        lowest = frontier[-1].flops_ratio
        raise CalibrationError(
            f"flops_ratio {flops_ratio:g} is out of reach: the cheapest thresholds found need {lowest:.3f}"
        )
    if cheap[0] >= good:
        reached = frontier[good - 1].flops_ratio
        raise CalibrationError(
            f"the targets contradict each other: the quality asked for is kept down to {reached:.3f} of the FLOPs, "
            f"and flops_ratio is {flops_ratio:g}; ask for less of one"
        )
    return frontier[cheap[0]]


def _is_good(point: Point, dense: Point, agreement: float | None, max_drop: float | None) -> bool:
    if agreement is not None and (point.agreement is None or point.agreement < agreement):
        return False
    if max_drop is None or dense.metric is None or point.metric is None:
        return True
    return dense.metric - point.metric <= max_drop


class _Half:
    """Some of the texts under any thresholds: the `Objective` of the search, and the judge of what it finds."""

    def __init__(self, model: Classifier, merge_removed: bool, texts: list[TextOrPair], gold: Float64 | None):
        self._model, self._config, self._gold = model, model.config, gold
        self._rule = RULE | {"merge_removed": merge_removed}
        self._rows_of_last_layer = 1 + merge_removed  # that its rule leaves: the first token, and one for all others
        self._ids, _ = encoded = model.encode(texts)
        dense = model.with_pruning(None).predict(texts)
        self.truncated = sum(prediction.n_truncated > 0 for prediction in dense)
        self._logits = np.array([prediction.logits for prediction in dense], np.float32)
        self._executed = sum(prediction.executed_flops for prediction in dense)
        self._counted = sum(prediction.dense_flops for prediction in dense)
        self._batch = token_batch(self._config, *encoded)
        between = np.arange(1, self._config.layers)
        fitting = ROWS_BYTES // (4 * self._config.width * len(self._batch.ids))
        self._entering = between[:: max(1, -(-len(between) // fitting))].tolist() if fitting else []
        self._seen: tuple[Thresholds, Forward] | None = None  # the last traced run

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def mean_tokens(self) -> float:
        """Special tokens included."""
        return sum(len(row) for row in self._ids) / len(self._ids)

    def start(self) -> Measured:
        """Only the last layer prunes, all but the first token: nothing else of it is ever read."""
        return self.measure((0.0,) * (self._config.layers - 1) + (float(self._config.max_tokens),))

    def measure(self, thresholds: Thresholds) -> Measured:
        """Run the texts under these thresholds."""
        result = self._run(thresholds)
        ratio = float(self._flops(result, thresholds) / self._counted)
        return Measured(thresholds, ratio, float(divergence(self._config, self._logits, result.logits).mean()))

    def live(self, thresholds: Thresholds) -> list[Live]:
        """Every layer but the last under these thresholds."""
        traced = self._run(thresholds, trace=True)
        self._seen = thresholds, traced
        assert traced.attention_lengths is not None and traced.ffn_lengths is not None
        assert traced.masses is not None and traced.kept is not None
        savings = self._savings(traced.attention_lengths, traced.ffn_lengths)
        found = []
        for layer in range(self._config.layers - 1):
            pinned = np.zeros(len(traced.masses[layer]), np.bool_)
            pinned[ragged.boundaries(traced.attention_lengths[layer])[:-1]] = True
            found.append(Live(traced.masses[layer], traced.kept[layer], pinned, savings[layer]))
        return found

    def point(self, thresholds: Thresholds) -> Point:
        """What these thresholds cost on these texts."""
        result = self._run(thresholds)
        lower = same = metric = None
        if self._config.problem_type != "regression":
            same = float(_same_label(self._config, result.logits, self._logits).mean())
            lower = _lower_bound(same, len(self))
        if self._gold is not None:
            regression = self._config.problem_type == "regression"
            answers = result.logits[:, 0] if regression else result.logits.argmax(axis=1)
            metric = (pearson if regression else accuracy)(answers.astype(np.float64), self._gold)
        return Point(
            thresholds,
            float(self._flops(result, thresholds) / self._counted),
            float(result.executed_flops.sum() / self._executed),
            float(divergence(self._config, self._logits, result.logits).mean()),
            same,
            lower,
            metric,
        )

    def _run(self, thresholds: Thresholds, trace: bool = False) -> Forward:
        """Run the texts, but for the first layers where the last traced run had the same thresholds."""
        rule = pruning.parse(self._rule | {"thresholds": thresholds}, self._config.layers, "calibration")
        engine = self._model.with_pruning(rule).engine
        return engine.run(
            self._batch, trace=trace, entering=self._entering if trace else (), prefix=self._prefix(thresholds)
        )

    def _prefix(self, thresholds: Thresholds) -> Prefix | None:
        """What a run under these thresholds need not do again."""
        if self._seen is None:
            return None
        before, run = self._seen
        same = [layer for layer in run.entering or () if before[:layer] == thresholds[:layer]]
        return Prefix(run, max(same)) if same else None

    def _flops(self, result: Forward, thresholds: Thresholds) -> int:
        """Counted FLOPs of an untraced run, whose last layer has either no rule or that of `start`."""
        n_ffn = result.kept_tokens.copy()
        n_attention = np.concatenate([[[len(row) for row in self._ids]], n_ffn[:-1]])
        n_ffn[-1] = n_attention[-1] if thresholds[-1] == 0 else np.minimum(n_attention[-1], self._rows_of_last_layer)
        return int(pruning.counted_flops(self._config, n_attention, n_ffn).sum())

    def _savings(self, n_attention: NDArray[np.int32], n_ffn: NDArray[np.int32]) -> list[float]:
        """What one more token removed by each layer saves there and later on, as a share of the dense FLOPs."""
        D, F = self._config.width, self._config.inner
        n_a, n_f = n_attention.astype(np.float64), n_ffn.astype(np.float64)
        attention = (4 * D * D * n_a + 4 * D * n_a**2).sum(axis=1)  # the square's part counts twice: its derivative
        forward = (2 * D * F * n_f).sum(axis=1)
        return [
            float(2 * (forward[layer:].sum() + attention[layer + 1 :].sum()) / n_f[layer].sum() / self._counted)
            for layer in range(self._config.layers)
        ]


@contextmanager
def _between_runs() -> Iterator[Event]:
    """Ctrl-C sets the event that this gives, so that it ends the search after a run and never breaks into one.

    A second one acts as it always does.
    """
    event = Event()
    if current_thread() is not main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def once(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, once)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """A bar of the search's work, and of what is to come, in passes of the dense model over its texts."""

    def __init__(self, layers: int, lowest: float, wanted: bool):
        self._per_step = layers + threshold_search.EXCHANGES  # trials, and the run that shows the scores
        self._lowest, self._bar = lowest, progress_bar(None, wanted, unit="pass")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def tried(self, trial: Measured) -> None:
        """One more trial was run."""
        here = trial.flops_ratio
        steps = max(0.0, here - self._lowest) / threshold_search.STEP
        self._bar.total = self._bar.n + here + self._per_step * steps * (here + self._lowest) / 2
        self._bar.update(here)


def divergence(config: ModelConfig, dense: NDArray[np.float32], pruned: NDArray[np.float32]) -> Float64:
    """Kullback-Leibler divergence of the pruned scores from the dense ones, (B,), in nats. Both logits: (B, labels).

    Softmax scores as one distribution; independent sigmoids as one each, summed; regression as normal distributions of
    variance 1: half the squared difference.
    """
    p, q = dense.astype(np.float64), pruned.astype(np.float64)
    if config.problem_type == "regression":
        return ((p - q) ** 2 / 2).sum(axis=1)
    if config.problem_type == "multi_label_classification" or p.shape[1] == 1:
        p, q = (np.stack([logits, np.zeros_like(logits)], axis=-1) for logits in (p, q))  # yes and no of each label
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).reshape(len(p), -1).sum(axis=1)


def _same_label(config: ModelConfig, some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether two outputs, (B, labels) each, name the same label (or set of independent labels), (B,) bool."""
    if config.problem_type == "multi_label_classification" or some.shape[1] == 1:
        return ((some > 0) == (others > 0)).all(axis=1)
    return some.argmax(axis=1) == others.argmax(axis=1)


def _lower_bound(share: float, texts: int) -> float:
    """Wilson's one-sided lower bound of a share (E. B. Wilson, JASA 22, 1927)."""
    z = NormalDist().inv_cdf(CONFIDENCE)
    centre = share + z * z / (2 * texts)
    spread = z * math.sqrt(share * (1 - share) / texts + z * z / (4 * texts * texts))
    return (centre - spread) / (1 + z * z / texts)
