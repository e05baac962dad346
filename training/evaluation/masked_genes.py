"""How well a model finds hidden genes: loss and accuracy by rank and by kind of cell, against floors without a model.

Axis suffixes: `m` hidden genes of all cells, `n` cells, `g` groups (donors), `v` vocabulary, `k` rank bins, `q` scores.

Genes are hidden as in pretraining, by (seed, cell): the same cell of a corpus version has the same genes hidden
whatever batch it is in and whatever other cells are measured. Loss is the mean negative log likelihood
(nats) over hidden genes, accuracy the share whose most likely gene is the right one.

The floors need no model. For a hidden gene of a cell they are counted over the *other* cells that are measured: how
often a gene occurs at all, how often at that rank bin, and the last among genes that the cell does not show elsewhere.
Genes that were not counted get the share of Witten and Bell (1991): with n counts of T different genes,
p = (count + T q) / (n + T), where q is the floor one step wider (overall for a bin, all genes alike for overall). The
floors know the corpus that the model is measured on, which is kind to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from genescale.platform.progress import SILENT, Progress
from genescale.training.batches import BatchPlan, CellSource, MicroBatch, StepBatch, evaluation_batches, prefetch
from genescale.training.masking import Masking
from genescale.training.model import MaskedGeneModel

RANK_EDGES = (0, 10, 30, 100, 300, 1_000, 3_000)
"""Bins of the rank of a gene in its cell, the highest rank value first: 1 to 10, 11 to 30, …"""
SCORES = ("model", "rank_bin_unseen", "rank_bin", "overall")
"""The model, then the floors from the strongest to the weakest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenGenes:
    """Every hidden gene with the loss and the success of the model and of each floor, ordered by cell."""

    cell_m: np.ndarray
    """(m) int64: position of its cell among the measured cells."""
    rank_m: np.ndarray
    """(m) int64: rank in its cell, 0 for the first gene."""
    loss_qm: np.ndarray
    """(q, m) float64 nats, by SCORES."""
    hit_qm: np.ndarray
    """(q, m) bool: the most likely gene is the hidden one."""

    @property
    def bin_m(self) -> np.ndarray:
        """(m) int64: rank bin."""
        return rank_bin(self.rank_m)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over hidden genes with its 95 % bootstrap interval (None with fewer than two groups)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """Scores of one stratum: a rank bin, a value of a column, or everything."""

    name: str
    cells: int
    genes: int
    """Hidden genes."""
    groups: int
    """Donors (or cells, where those are resampled) that have some of them."""
    loss: dict[str, Score]
    """By SCORES."""
    accuracy: dict[str, Score]
    gain: Score
    """Loss of the best floor of this stratum minus loss of the model: above 0 the model knows more."""
    best_floor: str


def rank_bin(rank_m: np.ndarray) -> np.ndarray:
    """Number of the bin of each rank (0 for the first gene)."""
    return np.searchsorted(RANK_EDGES, rank_m, side="right") - 1


def bin_name(number: int) -> str:
    """Such as `11 to 30`."""
    first = RANK_EDGES[number] + 1
    return f"{first:,} to {RANK_EDGES[number + 1]:,}" if number + 1 < len(RANK_EDGES) else f"{first:,} and more"


def hidden_genes(
    model: MaskedGeneModel,
    source: CellSource,
    index_n: np.ndarray,
    masking: Masking,
    *,
    token_budget: int,
    device: torch.device,
    progress: Progress = SILENT,
) -> HiddenGenes:
    """Hide genes of the cells `index_n` (rising indices into `source`), and score the model and the floors on them."""
    longest = int(source.lengths[index_n].max())
    plan = BatchPlan(
        lengths=source.lengths, cells=index_n, seed=masking.seed, token_budget=max(token_budget, longest), lanes=1
    )
    model = model.to(device).eval()
    progress.start(len(index_n), "cells with hidden genes")
    pieces = []
    batches = prefetch(evaluation_batches(source, plan, masking, rank=0, workers=1))
    for step, batch in enumerate(batches):
        cells = np.searchsorted(index_n, plan.epoch(0).micro_batch(step, 0))
        pieces.append(_scored(model, batch, cells, masking, device))
        progress.advance(len(cells))
    cell_m, rank_m, label_m, loss_m, hit_m = (np.concatenate(values) for values in zip(*pieces, strict=True))
    order = np.lexsort((rank_m, cell_m))
    cell_m, rank_m, label_m = cell_m[order], rank_m[order], label_m[order]
    floors = _floors(source.tokens(index_n), masking, cell_m, rank_m, label_m)
    return HiddenGenes(
        cell_m=cell_m,
        rank_m=rank_m,
        loss_qm=np.vstack([loss_m[order], floors[0]]),
        hit_qm=np.vstack([hit_m[order], floors[1]]),
    )


@torch.inference_mode()
def _scored(
    model: MaskedGeneModel, batch: StepBatch, cells: np.ndarray, masking: Masking, device: torch.device
) -> tuple[np.ndarray, ...]:
    """(cell, rank, hidden token, loss, hit) of each hidden gene of one micro-batch."""
    (micro_batch,) = batch.micro_batches
    assert isinstance(micro_batch, MicroBatch)
    packed, places = micro_batch.packed, micro_batch.masked_positions
    there = micro_batch.to(device)
    logits_mv = model(there.packed, there.masked_positions).float()
    loss_m = functional.cross_entropy(logits_mv, there.labels, reduction="none").double().cpu().numpy()
    hit_m = (logits_mv.argmax(-1) == there.labels).cpu().numpy()
    first = int(masking.vocabulary.cls is not None)
    return (
        cells[packed.cells_t()[places].numpy()],
        packed.positions_t[places].numpy() - first,
        micro_batch.labels.numpy(),
        loss_m,
        hit_m,
    )


def _floors(
    cells: Sequence[np.ndarray], masking: Masking, cell_m: np.ndarray, rank_m: np.ndarray, label_m: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and success (q - 1, m) of the floors in the order of SCORES; hidden genes are ordered by cell."""
    counts_kv = _counts(cells, masking)
    is_gene_v = np.zeros(counts_kv.shape[1], dtype=bool)
    is_gene_v[masking.vocabulary.token_ids] = True
    loss_qm, hit_qm = np.empty((3, len(cell_m))), np.empty((3, len(cell_m)), dtype=bool)
    limits = np.searchsorted(cell_m, np.arange(len(cells) + 1))
    alike_v, overall_v = is_gene_v / is_gene_v.sum(), counts_kv.sum(axis=0)
    for cell, tokens in enumerate(cells):
        own = slice(limits[cell], limits[cell + 1])
        genes = tokens[is_gene_v[tokens]].astype(np.int64)
        shown, bins = np.delete(genes, rank_m[own]), rank_bin(np.arange(len(genes)))
        hidden = rank_bin(rank_m[own])
        overall_v[genes] -= 1
        counts_kv[bins, genes] -= 1
        wider_v = backed_off(overall_v, alike_v)
        loss_qm[2, own], hit_qm[2, own] = _surprise(wider_v, label_m[own])
        for number in np.unique(hidden):
            # Positions among all hidden genes, of this cell and this bin.
            at = own.start + np.flatnonzero(hidden == number)
            share_v = backed_off(counts_kv[number], wider_v)
            loss_qm[1, at], hit_qm[1, at] = _surprise(share_v, label_m[at])
            share_v[shown] = 0.0
            loss_qm[0, at], hit_qm[0, at] = _surprise(share_v / share_v.sum(), label_m[at])
        overall_v[genes] += 1
        counts_kv[bins, genes] += 1
    return loss_qm, hit_qm


def _counts(cells: Sequence[np.ndarray], masking: Masking) -> np.ndarray:
    """(k, v) float64: cells that have each gene at each rank bin."""
    vocabulary = masking.vocabulary
    counts_kv = np.zeros((len(RANK_EDGES), vocabulary.size))
    specials = np.array(sorted(vocabulary.special.values()))
    for tokens in cells:
        genes = tokens[~np.isin(tokens, specials)].astype(np.int64)
        counts_kv[rank_bin(np.arange(len(genes))), genes] += 1
    return counts_kv


def backed_off(counts_v: np.ndarray, wider_v: np.ndarray) -> np.ndarray:
    """Shares (v) of counted genes, with a part for those that were not counted; the formula is at the top."""
    different = float(np.count_nonzero(counts_v)) or 1.0
    shares_v: np.ndarray = (counts_v + different * wider_v) / (counts_v.sum() + different)
    return shares_v


def _surprise(shares_v: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Negative log of the shares of `labels`, and whether each is the largest."""
    return -np.log(shares_v[labels]), labels == int(shares_v.argmax())


def score_rows(
    hidden: HiddenGenes,
    stratum_m: np.ndarray,
    names: Sequence[str],
    groups_n: np.ndarray,
    *,
    bootstrap: int,
    seed: int,
) -> list[ScoreRow]:
    """Scores of each stratum (`stratum_m`: number of the name of each hidden gene, -1 to leave it out).

    `groups_n` (int) are the donors of the cells; intervals resample them, all genes of all their cells together.
    """
    found = []
    for number, name in enumerate(names):
        at = np.flatnonzero(stratum_m == number)
        if len(at):
            found.append(_score_row(hidden, at, name, groups_n, bootstrap=bootstrap, seed=seed))
    return found


def _score_row(
    hidden: HiddenGenes, at: np.ndarray, name: str, groups_n: np.ndarray, *, bootstrap: int, seed: int
) -> ScoreRow:
    loss_qm, hit_qm = hidden.loss_qm[:, at], hidden.hit_qm[:, at]
    best = 1 + int(loss_qm[1:].mean(axis=1).argmin())
    values = np.vstack([loss_qm, hit_qm, loss_qm[best] - loss_qm[0]])
    scores = mean_scores(values, groups_n[hidden.cell_m[at]], bootstrap=bootstrap, seed=seed)
    half = len(SCORES)
    return ScoreRow(
        name=name,
        cells=len(np.unique(hidden.cell_m[at])),
        genes=len(at),
        groups=len(np.unique(groups_n[hidden.cell_m[at]])),
        loss=dict(zip(SCORES, scores[:half], strict=True)),
        accuracy=dict(zip(SCORES, scores[half : 2 * half], strict=True)),
        gain=scores[-1],
        best_floor=SCORES[best],
    )


def mean_scores(values_qm: np.ndarray, group_m: np.ndarray, *, bootstrap: int, seed: int) -> list[Score]:
    """The mean of each row with its 95 % percentile interval over resampled groups (cluster bootstrap).

    A resample draws as many groups as there are, with replacement; its mean is the sum of their sums over the sum of
    their sizes (Davison and Hinkley 1997, section 3.8). None where there are fewer than two groups.
    """
    means = values_qm.mean(axis=1)
    _, group_m = np.unique(group_m, return_inverse=True)
    n_groups = int(group_m.max()) + 1
    if n_groups < 2 or not bootstrap:
        return [Score(mean=float(mean), low=None, high=None) for mean in means]
    sizes_g = np.bincount(group_m, minlength=n_groups)
    sums_qg = np.stack([np.bincount(group_m, weights=row, minlength=n_groups) for row in values_qm.astype(float)])
    generator = np.random.default_rng([seed, n_groups])
    drawn = np.empty((bootstrap, len(values_qm)))
    for number in range(bootstrap):
        times_g = np.bincount(generator.integers(n_groups, size=n_groups), minlength=n_groups)
        drawn[number] = (sums_qg @ times_g) / (sizes_g @ times_g)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return [Score(mean=float(mean), low=float(a), high=float(b)) for mean, a, b in zip(means, low, high, strict=True)]
