"""Charts. matplotlib is loaded where the first one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Protocol

from .errors import DependencyError, InputError
from .files import write_whole


class Cost(Protocol):
    """What is drawn of a point of a frontier (`calibration.Point`)."""

    @property
    def flops_ratio(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def agreement(self) -> float | None: ...
    @property
    def agreement_lower(self) -> float | None: ...
    @property
    def metric(self) -> float | None: ...


def frontier_plot(frontier: Sequence[Cost], chosen: Cost, path: Path) -> None:
    """Agreement with its lower bound, or the metric where labels gave one, and divergence against counted FLOPs.

    The format is that of the path's ending. Raises DependencyError without matplotlib, InputError for unknown formats.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot, so that no display is looked for
    except ImportError:
        raise DependencyError("charts need matplotlib: pip install 'minilpt[plot]'") from None
    kept = chosen.metric is not None or chosen.agreement is not None
    figure = Figure(figsize=(7, 6.5 if kept else 3.5), layout="constrained")
    axes = figure.subplots(1 + kept, 1, sharex=True, squeeze=False)[:, 0]
    above, below = axes[0], axes[-1]
    ratios = [point.flops_ratio for point in frontier]
    if chosen.metric is not None:
        above.plot(ratios, [point.metric for point in frontier], "o-", markersize=3)
        above.axhline(frontier[0].metric, color="grey", linestyle=":", label="dense")
        above.set_ylabel("metric, percent")
        above.legend()
    elif chosen.agreement is not None:
        above.plot(ratios, [point.agreement for point in frontier], "o-", markersize=3)
        above.fill_between(ratios, [p.agreement_lower for p in frontier], [p.agreement for p in frontier], alpha=0.2)
        above.set_ylabel("texts with the dense label\n(shaded to the lower bound)")
    below.plot(ratios, [point.kl for point in frontier], "o-", markersize=3)
    below.set_ylabel("divergence from dense, nats")
    below.set_xlabel("counted FLOPs, share of the dense model's")
    for axis in axes:
        axis.axvline(chosen.flops_ratio, color="tab:red", linewidth=1)
        axis.spines[["top", "right"]].set_visible(False)
    above.set_title(f"chosen: {chosen.flops_ratio:.2f} of the FLOPs", fontsize=10)
    content = BytesIO()
    try:
        figure.savefig(content, format=path.suffix.removeprefix(".") or "png", dpi=150)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    write_whole(path, content.getvalue())
