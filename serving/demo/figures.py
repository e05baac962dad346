"""Figures of the demo's report: loss, embedding map, confusion matrix. Each writes one PNG.

Axes: n cells, d width, k classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt

mpl.use("Agg")
from matplotlib import pyplot as plt

INK, SOFT = "#1b1f24", "#8a94a0"
# Okabe and Ito's colours, told apart with any colour vision; further classes take tab20.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
DPI = 150
MAP_CELLS = 2_000


def _finish(figure: plt.Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    return path


def loss_curve(steps: Sequence[int], losses: Sequence[float], held_out: dict[int, float], path: Path) -> Path:
    """Training loss by step, smoothed over a tenth of the run, and the loss on held-out cells where it was measured."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    axes.plot(steps, losses, color=SOFT, linewidth=0.7, label="each step")
    window = max(1, len(losses) // 10)
    if len(losses) > 2 * window:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(
            steps[window // 2 :][: len(smooth)], smooth, color=COLOURS[0], linewidth=2, label=f"mean of {window} steps"
        )
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o", color=COLOURS[4], label="held-out cells")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("masked-gene loss (nats)")
    axes.legend(frameon=False)
    return _finish(figure, path)


def embedding_map(embeddings_nd: npt.NDArray[np.float32], labels_n: Sequence[str], path: Path, *, seed: int) -> Path:
    """Cells in two dimensions (t-SNE of at most 2,000 cells), coloured by label."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen = np.random.default_rng(seed).permutation(len(embeddings_nd))[:MAP_CELLS]
    points_nd = embeddings_nd[chosen]
    parts = min(30, *points_nd.shape)
    reduced = PCA(n_components=parts, random_state=seed).fit_transform(points_nd)
    perplexity = float(min(30, max(2, (len(chosen) - 1) // 3)))
    xy = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(reduced)
    labels = np.asarray(labels_n)[chosen]
    names = sorted(set(labels))
    figure, axes = plt.subplots(figsize=(6, 5))
    for index, name in enumerate(names):
        colour = COLOURS[index] if len(names) <= len(COLOURS) else plt.get_cmap("tab20")(index % 20)
        at = labels == name
        axes.scatter(xy[at, 0], xy[at, 1], s=5, color=colour, linewidths=0, label=name)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("t-SNE 1")
    axes.set_ylabel("t-SNE 2")
    axes.legend(frameon=False, markerscale=3, bbox_to_anchor=(1.0, 1.0), loc="upper left", fontsize=8)
    return _finish(figure, path)


def confusion_matrix(counts_kk: npt.NDArray[np.int64], classes: Sequence[str], path: Path) -> Path:
    """Share of each true class (row) that was called each class (column), with the number of cells."""
    rows = counts_kk.sum(axis=1, keepdims=True)
    share = np.divide(counts_kk, rows, out=np.zeros(counts_kk.shape), where=rows > 0)
    side = 1.8 + 0.55 * len(classes)
    figure, axes = plt.subplots(figsize=(side + 1.2, side))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(classes)):
        for j in range(len(classes)):
            if counts_kk[i, j]:
                ink = "white" if share[i, j] > 0.55 else INK
                axes.text(j, i, f"{counts_kk[i, j]}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return _finish(figure, path)


def class_shifts(estimates: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """One point with its interval per class; `estimates` have `mean`, `low` and `high`."""
    figure, axes = plt.subplots(figsize=(6, 0.7 + 0.5 * len(estimates)))
    for row, (one, colour) in enumerate(zip(estimates.values(), COLOURS, strict=False)):
        axes.hlines(row, one["low"], one["high"], color=colour, linewidth=3, alpha=0.5)
        axes.plot(one["mean"], row, "o", color=colour)
    axes.axvline(0, color=SOFT, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.set_ylim(len(estimates) - 0.5, -0.5)
    axes.set_xlabel("log2 fold of the shift over control deletions")
    return _finish(figure, path)
