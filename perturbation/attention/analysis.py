"""Attention of an encoder over cells: one pass, everything that is asked for summed as it goes by.

Axis suffixes: `l` layers, `h` heads and, last, their mean, `g` genes of a cell, `n` cells, `t` token ids,
`k` genes of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from genescale.perturbation.attention.config import MOST_GRAPH_GENES, NONE, AttentionConfig
from genescale.perturbation.attention.list_shares import ListShares, NamedGenes
from genescale.perturbation.attention.list_tests import Donors, gene_rows, list_table
from genescale.perturbation.attention.matching import gene_features
from genescale.perturbation.attention.pair_sums import PairSums
from genescale.perturbation.attention.rank_profile import RankProfile
from genescale.perturbation.attention.stream import CellGenes, attention_rows
from genescale.platform.errors import LimitError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.vocabulary import Vocabulary
from genescale.training.model import Encoder


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionTables:
    """What was found, as tables."""

    between_ranks: pl.DataFrame
    """Rank bin to rank bin by layer and head (`RankProfile.between_ranks`)."""
    heads: pl.DataFrame
    """To itself, to special tokens, and how wide (`RankProfile.heads`)."""
    genes: pl.DataFrame
    """One row per gene in the cells: n_cells, mean_rank, and what it receives in each layer."""
    lists: pl.DataFrame | None = None
    """One row per list, layer and head (`list_tests.list_table`)."""
    list_genes: pl.DataFrame | None = None
    """One row per gene of a list, layer and head."""
    nodes: pl.DataFrame | None = None
    edges: pl.DataFrame | None = None
    n_pairs: int = 0
    """Ordered pairs of graph genes that stand together in enough cells."""


def analyse(
    encoder: Encoder,
    vocabulary: Vocabulary,
    cells: Iterable[np.ndarray],
    donors: Donors,
    config: AttentionConfig,
    *,
    cells_t: np.ndarray,
    lists: Sequence[NamedGenes] = (),
    progress: Progress = SILENT,
) -> AttentionTables:
    """Look at every cell once; `cells` come in the order of `donors` and are never held together.

    encoder: in evaluation mode, on its device; cells_t: how many of the cells have each token (`detected`).
    """
    layers, heads, n_cells = len(encoder.layers), encoder.config.heads, len(donors.code_n)
    ranks = RankProfile(layers, heads, longest=min(vocabulary.window, encoder.config.positions))
    pairs = _pair_sums(encoder, vocabulary, config, lists, cells_t)
    shares = [ListShares(genes, n_cells, layers, heads + 1, vocabulary.size) for genes in lists]
    features_tf = gene_features(vocabulary, cells_t, n_cells)
    received_tl, rank_t, weight_t = np.zeros((vocabulary.size, layers)), *np.zeros((2, vocabulary.size))
    weight_n = donors.weight_n
    for number, tokens in enumerate(cells):
        cell, weight = CellGenes.of(tokens, vocabulary), float(weight_n[number])
        received_lhg = _one_cell(encoder, cell, ranks, pairs, weight)
        for one in shares:
            one.add(number, cell, received_lhg, features_tf=features_tf, controls=config.controls, weight=weight)
        genes_g = cell.genes_g
        received_tl[genes_g] += weight * received_lhg[:, -1].T
        rank_t[genes_g] += np.arange(1, len(genes_g) + 1)
        weight_t[genes_g] += weight
        progress.advance(1)
    asked = {"min_cells": config.min_cells, "confidence": config.confidence, "draws": config.draws}
    found = [list_table(one, donors, **asked, seed=config.seed) for one in shares]  # type: ignore[arg-type]
    edges, n_pairs = _edges(pairs, vocabulary, config)
    return AttentionTables(
        between_ranks=ranks.between_ranks(),
        heads=ranks.heads(),
        genes=_gene_table(vocabulary, received_tl, rank_t, weight_t, cells_t),
        lists=pl.concat(found) if found else None,
        list_genes=pl.concat([gene_rows(one, vocabulary) for one in shares]) if shares else None,
        nodes=_nodes(pairs, vocabulary, config, lists),
        edges=edges,
        n_pairs=n_pairs,
    )


def detected(cells: Iterable[np.ndarray], size: int) -> np.ndarray:
    """(t) int64: how many of the cells have each token."""
    cells_t = np.zeros(size, dtype=np.int64)
    for tokens in cells:
        cells_t[tokens.astype(np.int64)] += 1
    return cells_t


def _one_cell(
    encoder: Encoder, cell: CellGenes, ranks: RankProfile, pairs: PairSums | None, weight: float
) -> np.ndarray:
    """(l, h, g): mean attention that each gene receives from the others, over uniform attention."""
    import torch

    n_genes = len(cell.places_g)
    device = encoder.embeddings.tokens.weight.device
    shape = (len(encoder.layers), encoder.config.heads, n_genes)
    received_lhg = torch.zeros(shape, dtype=torch.float64, device=device)
    ranks.begin(cell)
    if pairs:
        pairs.begin(cell)
    for rows in attention_rows(encoder, cell):
        received_lhg[rows.layer] += rows.to_others_hqg.sum(dim=1)
        ranks.see(rows)
        if pairs:
            pairs.see(rows)
    ranks.end(weight)
    if pairs:
        pairs.end()
    received = received_lhg.cpu().numpy() / (max(n_genes - 1, 1) * cell.uniform)
    return np.concatenate([received, received.mean(axis=1, keepdims=True)], axis=1)


def _pair_sums(
    encoder: Encoder,
    vocabulary: Vocabulary,
    config: AttentionConfig,
    lists: Sequence[NamedGenes],
    cells_t: np.ndarray,
) -> PairSums | None:
    if config.graph == NONE:
        return None
    listed = np.unique([token for genes in lists for token in genes.tokens]).astype(np.int64)
    listed = listed[cells_t[listed] >= config.min_cells]
    genes = np.sort(vocabulary.token_ids.astype(np.int64))
    often = genes[np.argsort(-cells_t[genes], kind="stable")][: config.detected_genes]
    tokens_k = np.union1d(listed, often[cells_t[often] >= config.min_cells])
    if len(tokens_k) > MOST_GRAPH_GENES:
        raise LimitError(
            f"the graph would have {len(tokens_k):,} genes, {len(listed):,} of them from the lists.",
            where="graph",
            fix=f"At most {MOST_GRAPH_GENES:,} fit: give shorter lists, a smaller number, or graph 'none'.",
        )
    return PairSums(
        tokens_k,
        vocabulary.size,
        layers=[n - 1 for n in config.graph_layers] or range(len(encoder.layers)),
        heads=[n - 1 for n in config.graph_heads] or range(encoder.config.heads),
    )


def _edges(pairs: PairSums | None, vocabulary: Vocabulary, config: AttentionConfig) -> tuple[pl.DataFrame | None, int]:
    if pairs is None:
        return None, 0
    return pairs.edges(
        vocabulary,
        min_cells=config.min_cells,
        order=config.edge_order,
        threshold=config.threshold,
        most=config.edges,
    )


def _nodes(
    pairs: PairSums | None, vocabulary: Vocabulary, config: AttentionConfig, lists: Sequence[NamedGenes]
) -> pl.DataFrame | None:
    """Genes of the graph with the names of the lists that hold them."""
    if pairs is None:
        return None
    members = [(one.name, frozenset(one.tokens)) for one in lists]
    names = ["; ".join(name for name, inside in members if token in inside) for token in pairs.tokens_k.tolist()]
    return pairs.nodes(vocabulary, min_cells=config.min_cells).with_columns(lists=pl.Series(names, dtype=pl.String))


def _gene_table(
    vocabulary: Vocabulary, received_tl: np.ndarray, rank_t: np.ndarray, weight_t: np.ndarray, cells_t: np.ndarray
) -> pl.DataFrame:
    """gene_id, symbol, n_cells, mean_rank, received_layer_1 …: relative attention, mean over heads and cells."""
    tokens = np.sort(vocabulary.token_ids.astype(np.int64))
    tokens = tokens[weight_t[tokens] > 0]
    ids = [vocabulary.gene_of_token(token) for token in tokens.tolist()]
    received = received_tl[tokens] / weight_t[tokens, None]
    return pl.DataFrame(
        {
            "gene_id": ids,
            "symbol": [vocabulary.symbol_of(gene) for gene in ids],
            "n_cells": cells_t[tokens],
            "mean_rank": rank_t[tokens] / cells_t[tokens],
            **{f"received_layer_{number + 1}": received[:, number] for number in range(received.shape[1])},
        }
    )
