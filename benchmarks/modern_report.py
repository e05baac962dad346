"""What the runs of `modern.py` say: the share of the compute that is enough, tables, and the figure of the curves."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from modern import Curve

UNIT = 1e12
COLORS = {"published": "#6b7280", "modern": "#0f766e"}


def enough(curves: Sequence[Curve], target: float) -> tuple[float, bool]:
    """FLOPs from which on runs of one recipe reach a held-out loss, with schedules of different lengths, and whether
    that is only a bound, because the shortest run is below it already.

    What counts is the longest run that is above the loss: from there to the next one the loss is taken as straight in
    the logarithm of the FLOPs. Infinite when the longest of all is above it.
    """
    ends = sorted((curve.flops[-1], curve.loss) for curve in curves)
    missed = [number for number, (_, loss) in enumerate(ends) if loss > target]
    if not missed:
        return ends[0][0], True
    if missed[-1] == len(ends) - 1:
        return math.inf, False
    (less, above), (more, below) = ends[missed[-1] : missed[-1] + 2]
    share = (above - target) / (above - below)
    return math.exp(math.log(less) + share * (math.log(more) - math.log(less))), False


def ratios(
    curves: Iterable[Curve], corpus: str, variant: str, reference: str = "published"
) -> dict[int, tuple[float, bool]]:
    """For each seed, the share of the reference's FLOPs after which a variant has the reference's final loss."""
    found = [curve for curve in curves if curve.trial.corpus == corpus]
    shares = {}
    for seed in sorted({curve.trial.seed for curve in found}):
        theirs = [c for c in found if c.trial.variant == reference and c.trial.seed == seed and c.trial.share == 1]
        ours = [c for c in found if c.trial.variant == variant and c.trial.seed == seed]
        if theirs and ours:
            whole = min(theirs, key=lambda curve: curve.loss)
            flops, bound = enough(ours, whole.loss)
            shares[seed] = (flops / whole.flops[-1], bound)
    return shares


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def changes_table(curves: Sequence[Curve], corpus: str) -> Iterator[str]:
    """Markdown rows: what each recipe reaches in how many steps, beside the published one in all of its own; seed 0."""
    mine = [curve for curve in curves if curve.trial.corpus == corpus and curve.trial.seed == 0]
    whole = min((curve for curve in mine if curve.trial.variant == "published"), key=lambda curve: curve.loss)
    yield "| recipe | rate | steps | FLOPs | held-out loss | difference | accuracy |"
    yield "|---|---|---|---|---|---|---|"
    for curve in sorted(set(mine), key=lambda curve: (-curve.trial.share, curve.loss)):
        trial, cost = curve.trial, curve.flops[-1] / whole.flops[-1]
        yield (
            f"| {trial.variant} | {trial.learning_rate:g} | {trial.share:.0%} | {cost:.2f} "
            f"| {curve.loss:.3f} | {curve.loss - whole.loss:+.3f} | {curve.accuracy:.3f} |"
        )


def draw(curves: Sequence[Curve], corpora: dict[str, str], path: Path) -> None:
    """Loss against FLOPs, mean and spread over seeds, one panel for each corpus: PNG and SVG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "svg.hashsalt": "modern"})
    figure, panels = pyplot.subplots(1, len(corpora), figsize=(4.6 * len(corpora), 3.9), squeeze=False)
    for panel, (corpus, title) in zip(panels[0], corpora.items(), strict=True):
        _panel(panel, [curve for curve in curves if curve.trial.corpus == corpus])
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("training compute (10¹² FLOPs)")
    panels[0][0].set_ylabel("held-out masked-gene loss (nats)")
    for panel in panels[0]:
        panel.legend(frameon=False, fontsize=8, loc="best")
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=160)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel: Any, curves: list[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for variant, color in COLORS.items():
        mine = [curve for curve in curves if curve.trial.variant == variant]
        if not mine:
            continue
        seeds_of = Counter(curve.trial.share for curve in mine)
        # A line with its spread for the longest runs of all seeds; the ends of other runs are points.
        longest = max(seeds_of, key=lambda share: (seeds_of[share], share))
        along = [curve for curve in mine if curve.trial.share == longest]
        flops = np.mean([curve.flops for curve in along], axis=0)[1:] / UNIT
        losses = np.array([curve.losses for curve in along])[:, 1:]
        mean, sd = losses.mean(0), losses.std(0, ddof=1) if len(losses) > 1 else np.zeros(losses.shape[1])
        seeds = f"{len(along)} seeds" if len(along) > 1 else "1 seed"
        panel.plot(flops, mean, color=color, lw=1.6, label=f"{variant}, {longest:.0%} of the steps ({seeds})")
        panel.fill_between(flops, mean - sd, mean + sd, color=color, alpha=0.25, lw=0)
        for share in sorted(set(seeds_of) - {longest}):
            ends = [curve for curve in mine if curve.trial.share == share]
            losses_of = [curve.loss for curve in ends]
            panel.errorbar(
                statistics.fmean(curve.flops[-1] for curve in ends) / UNIT, statistics.fmean(losses_of),
                yerr=statistics.stdev(losses_of) if len(ends) > 1 else 0.0, fmt="o", ms=4, color=color, capsize=2,
            )  # fmt: skip
            panel.annotate(f"{share:.0%}", (ends[0].flops[-1] / UNIT, ends[0].loss), xytext=(6, 2), color=color,
                           textcoords="offset points", fontsize=7)  # fmt: skip
        if variant == "published":
            panel.axhline(mean[-1], color=color, lw=0.8, ls="--")
    panel.set_xscale("log")
    panel.margins(x=0.08)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
