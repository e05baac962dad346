"""Figures and Markdown tables of `truth.py`: the main setting, and the map around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from truth_baselines import CORRELATION, PARTIAL, WITHIN_TYPE
from truth_effects import ATTENTION, COSINE, LAST, MASKED, READOUTS
from truth_scores import MATCHED, NEGATIVES, PER_CELL, auroc, estimate
from truth_settings import MAIN, MAP

Points = Mapping[str, dict[str, Any]]
ABSOLUTE, ORACLE = "|correlation|", "oracle"
# Colours of Okabe and Ito, which most readers can tell apart.
COLORS = {MASKED: "#0072b2", ATTENTION: "#e69f00", LAST: "#cc79a7", COSINE: "#882255"}
GREY, DARK = "#999999", "#444444"
BASELINES = {CORRELATION: GREY, ABSOLUTE: GREY, WITHIN_TYPE: GREY, PARTIAL: GREY, ORACLE: DARK}
COMPARISONS = {
    MATCHED: "matched\ncontrols", PER_CELL: "matched controls,\ncell by cell",
    "all not reached": "all genes not\nreached", "unrelated": "unrelated\ngenes",
    "markers": "markers of\nits cell type", "indirect": "indirect\ntargets",
}  # fmt: skip


def pooled(points: Sequence[dict[str, Any]], model: str, readout: str, comparison: str) -> dict[str, float]:
    """Mean and interval over the regulators of all these points."""
    return estimate([value for one in points for value in one["scores"][model][readout][comparison]])


def draw(points: Points, folder: Path) -> None:
    """Write planted-truth-readouts and planted-truth-map, PNG and SVG, from the points that are there."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 8, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "svg.hashsalt": "truth"})
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [points[name] for name in MAIN if name in points]
    if seeds:
        _readouts(seeds, folder / "planted-truth-readouts")
    groups = {title: [(n, label) for n, label in values if n in points] for title, values in MAP.items()}
    groups = {title: values for title, values in groups.items() if len(values) > 1}
    if groups:
        _map(points, groups, folder / "planted-truth-map")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path.with_suffix(".png"), dpi=160, bbox_inches="tight")
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def _lines() -> Iterator[tuple[str, str, str, str, str]]:
    """(model, read-out, label, colour, marker) of everything that is compared."""
    for readout in (MASKED, ATTENTION, LAST, COSINE):
        yield "trained", readout, readout, COLORS[readout], "o"
    yield "random", MASKED, "masked gene, random weights", GREY, "x"
    yield "baselines", CORRELATION, CORRELATION, GREY, "s"
    yield "baselines", PARTIAL, PARTIAL, "#009e73", "^"
    yield "baselines", ORACLE, "oracle", DARK, "D"


def _readouts(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """AUROC of each read-out in each comparison, with intervals."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7.4, 3.4))
    lines = list(_lines())
    for number, (model, readout, label, color, marker) in enumerate(lines):
        found = [pooled(seeds, model, readout, name) for name in COMPARISONS]
        x = np.arange(len(found)) + (number - (len(lines) - 1) / 2) * 0.11
        mean, low, high = (np.array([one[key] for one in found]) for key in ("mean", "low", "high"))
        panel.errorbar(x, mean, yerr=[mean - low, high - mean], fmt=marker, ms=4, color=color, lw=1.2, label=label)
    panel.axhline(0.5, color=GREY, lw=0.8, ls=":")
    panel.set_xticks(range(len(COMPARISONS)), list(COMPARISONS.values()))
    panel.set_ylim(-0.03, 1.05)
    panel.set_ylabel("AUROC of direct targets against …")
    figure.legend(
        *panel.get_legend_handles_labels(), frameon=False, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.08)
    )
    _save(figure, path)


def _map(points: Points, groups: Mapping[str, Sequence[tuple[str, str]]], path: Path) -> None:
    """AUROC against matched controls along each factor."""
    from matplotlib import pyplot

    columns = 3
    rows = -(-len(groups) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(8.6, 2.3 * rows), sharey=True, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, (title, values) in zip(panels.flat, groups.items(), strict=False):
        for model, readout, label, color, marker in _lines():
            found = [pooled([points[name]], model, readout, MATCHED) for name, _ in values]
            mean, low, high = (np.array([one[key] for one in found]) for key in ("mean", "low", "high"))
            style = "-" if model == "trained" else "--"
            panel.plot(range(len(values)), mean, marker=marker, ms=3.5, lw=1.2, ls=style, color=color, label=label)
            if readout == MASKED and model == "trained":
                panel.fill_between(range(len(values)), low, high, color=color, alpha=0.18, lw=0)
        panel.axhline(0.5, color=GREY, lw=0.8, ls=":")
        panel.set_xticks(range(len(values)), [label for _, label in values])
        panel.set_xlim(-0.25, len(values) - 0.75)
        panel.set_ylim(-0.03, 1.05)
        panel.set_title(title, fontsize=8, loc="left")
    for row in panels:
        row[0].set_ylabel("AUROC, matched")
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, loc="upper center", ncols=4,
                  bbox_to_anchor=(0.5, 1.05))  # fmt: skip
    figure.tight_layout()
    _save(figure, path)


def tables(points: Points) -> Iterator[str]:
    """Markdown: the main setting by read-out, pairs and effectors there, and the map by setting."""
    seeds = [points[name] for name in MAIN if name in points]
    if seeds:
        yield from _main_table(seeds)
        yield ""
        yield from _pairs_table(seeds)
        yield ""
        yield from _effectors_table(seeds)
        yield ""
    yield _row(["setting", "genes a cell", "held-out loss", *(label for _, _, label, _, _ in _lines())])
    yield "|---" * (3 + len(list(_lines()))) + "|"
    for name, one in points.items():
        cells = [_text(pooled([one], model, readout, MATCHED)) for model, readout, _, _, _ in _lines()]
        yield _row([name, f"{one['genes_per_cell']:.0f}", f"{one['loss']:.2f}", *cells])


def _row(cells: Sequence[str]) -> str:
    # A bar in a name would end the cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _main_table(seeds: Sequence[dict[str, Any]]) -> Iterator[str]:
    others = [name for name in NEGATIVES if name != "echoes"]
    columns = (MATCHED, PER_CELL, *others, "all not reached, by rank")
    yield _row(["", *columns])
    yield "|---" * (len(columns) + 1) + "|"
    for model, readout in (
        *(("trained", readout) for readout in READOUTS), *(("random", readout) for readout in READOUTS),
        *(("baselines", name) for name in BASELINES),
    ):  # fmt: skip
        cells = [_text(pooled(seeds, model, readout, name)) for name in columns]
        yield _row([f"{readout}, random weights" if model == "random" else readout, *cells])


def _pairs_table(seeds: Sequence[dict[str, Any]]) -> Iterator[str]:
    n_pairs = sum(len(one["pairs"]["trained"]["cooperates"]) for one in seeds)
    yield _row(["", "shared targets against other genes", f"cooperating against independent pairs ({n_pairs})"])
    yield "|---|---|---|"
    for model in ("trained", "random", "baselines"):
        for readout in (name for name in seeds[0]["pairs"][model] if name != "cooperates"):
            found = [one["pairs"][model][readout] for one in seeds]
            cooperates = [np.array(one["pairs"][model]["cooperates"]) for one in seeds]
            scores = [np.array(one["score"]) for one in found]
            told = [auroc(score[yes], score[~yes]) for score, yes in zip(scores, cooperates, strict=True)]
            within = estimate([value for one in found for value in one["shared targets"]])
            label = f"{readout}, random weights" if model == "random" else readout
            yield _row([label, _text(within), f"{np.nanmean(told):.2f}"])


def _effectors_table(seeds: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield _row(["AUROC against effectors", "trained", "random weights"])
    yield "|---|---|---|"
    for name in seeds[0]["effectors"]["trained"]:
        found = [estimate([v for one in seeds for v in one["effectors"][m][name]]) for m in ("trained", "random")]
        yield _row([name, *(_text(one) for one in found)])


def _text(found: Mapping[str, float]) -> str:
    return "–" if not found["n"] else f"{found['mean']:.2f} ({found['low']:.2f}–{found['high']:.2f})"
