"""Which genes stand near which in a model: by the vectors it starts from, and by those it makes of them in cells.

Axis suffixes: `g` genes, `q` asked genes, `d` width, `k` neighbours.

Nearness is the cosine after the mean vector over all compared genes is taken off. Vectors of encoders share a large
common part (Mu and Viswanath 2018): without that step all pairs look alike. Only genes that occur in `min_cells` of the
cells are compared, in both tables, since a mean over two cells says little, and an input vector that was hardly trained
says less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import GeneTable

TABLES = ("contextual", "input")
QUERIES_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A gene near another one."""

    gene_id: str
    symbol: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class GeneNeighbours:
    """The nearest genes of one gene, nearest first, in each table."""

    gene_id: str
    symbol: str
    cells: int
    """How many of the cells have the gene."""
    contextual: tuple[Neighbour, ...]
    input: tuple[Neighbour, ...]


@dataclass(frozen=True, kw_only=True)
class ListCohesion:
    """How often neighbours of a list's genes are in the list themselves."""

    name: str
    genes: int
    """Genes of the list that are compared."""
    absent: int
    """Genes of the list in too few of the cells."""
    share: dict[str, float]
    """By table: mean share of a gene's nearest `k` that are in the list."""
    expected: float
    """That share if neighbours were drawn at random: (list - 1) / (compared genes - 1)."""
    p_value: dict[str, float]
    """By table: share of random lists of this size whose own share is at least as large (one-sided permutation)."""


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """Neighbourhoods of the asked genes, and how their lists hold together."""

    k: int
    min_cells: int
    compared: int
    """Genes that can be neighbours."""
    mean_cosine: dict[str, float]
    """By table: mean cosine of all pairs before the mean vector is taken off: near 1 means one shared direction."""
    genes: tuple[GeneNeighbours, ...]
    lists: tuple[ListCohesion, ...]
    absent: tuple[str, ...]
    """Asked genes that occur in too few of the cells, by symbol."""


def neighbourhoods(
    table: GeneTable,
    input_vd: np.ndarray,
    vocabulary: Vocabulary,
    *,
    k: int,
    min_cells: int,
    asked: np.ndarray | None = None,
    most_asked: int = 40,
    lists: Sequence[tuple[str, np.ndarray]] = (),
    permutations: int = 1_000,
    seed: int = 0,
) -> Neighbourhoods:
    """Nearest genes of `asked` tokens (None: the `most_asked` most frequent genes), and cohesion of lists of tokens.

    `input_vd` is the model's token embedding. Raises InputError when too few genes are in enough cells.
    """
    kept_g = np.flatnonzero(table.cells_g >= min_cells)
    if len(kept_g) <= k:
        raise InputError(
            f"{len(kept_g)} genes occur in {min_cells} of the cells or more; {k} neighbours need {k + 1}.",
            where="gene neighbourhoods",
            fix="Measure more cells, or ask for fewer cells per gene or fewer neighbours.",
        )
    tokens_g, cells_g = table.tokens_g[kept_g], table.cells_g[kept_g]
    vectors = {"contextual": table.embeddings_gd[kept_g], "input": input_vd[tokens_g]}
    directions = {name: _directions(values) for name, values in vectors.items()}
    if asked is None:
        asked_g = np.argsort(-cells_g, kind="stable")[:most_asked]
        absent: tuple[str, ...] = ()
    else:
        asked_g, gone = _positions(asked, tokens_g)
        absent = tuple(vocabulary.symbol_of(vocabulary.gene_of_token(int(token))) for token in gone)
    return Neighbourhoods(
        k=k,
        min_cells=min_cells,
        compared=len(kept_g),
        mean_cosine={name: _mean_cosine(values) for name, values in vectors.items()},
        genes=_described(asked_g[:most_asked], directions, tokens_g, cells_g, vocabulary, k),
        lists=tuple(
            _cohesion(name, tokens, tokens_g, directions, k=k, permutations=permutations, seed=seed)
            for name, tokens in lists
        ),
        absent=absent,
    )


def _directions(vectors_gd: np.ndarray) -> np.ndarray:
    """Unit vectors around the mean; a vector that is the mean has no direction and is near nothing."""
    centred_gd = vectors_gd.astype(np.float64) - vectors_gd.mean(axis=0, dtype=np.float64)
    lengths_g = np.linalg.norm(centred_gd, axis=1, keepdims=True)
    return (centred_gd / np.where(lengths_g > 0, lengths_g, 1.0)).astype(np.float32)


def _mean_cosine(vectors_gd: np.ndarray) -> float:
    """Mean cosine over all pairs of different genes: from the length of the sum of the unit vectors."""
    vectors_gd = vectors_gd.astype(np.float64)
    lengths_g = np.linalg.norm(vectors_gd, axis=1, keepdims=True)
    sum_d = (vectors_gd / np.where(lengths_g > 0, lengths_g, 1.0)).sum(axis=0)
    n = len(vectors_gd)
    return float((sum_d @ sum_d - n) / (n * (n - 1)))


def nearest(directions_gd: np.ndarray, asked_q: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cosines (q, k) of the nearest others, nearest first; ties go to the smaller position."""
    found, cosines = np.empty((len(asked_q), k), dtype=np.int64), np.empty((len(asked_q), k), dtype=np.float32)
    for start in range(0, len(asked_q), QUERIES_AT_ONCE):
        rows = asked_q[start : start + QUERIES_AT_ONCE]
        cosine_qg = directions_gd[rows] @ directions_gd.T
        cosine_qg[np.arange(len(rows)), rows] = -np.inf
        order = np.argsort(-cosine_qg, axis=1, kind="stable")[:, :k]
        found[start : start + len(rows)] = order
        cosines[start : start + len(rows)] = np.take_along_axis(cosine_qg, order, axis=1)
    return found, cosines


def _described(
    asked_g: np.ndarray,
    directions: dict[str, np.ndarray],
    tokens_g: np.ndarray,
    cells_g: np.ndarray,
    vocabulary: Vocabulary,
    k: int,
) -> tuple[GeneNeighbours, ...]:
    ids = [vocabulary.gene_of_token(int(token)) for token in tokens_g]
    symbols = [vocabulary.symbol_of(gene) for gene in ids]
    near = {name: nearest(values, asked_g, k) for name, values in directions.items()}
    told: dict[str, list[tuple[Neighbour, ...]]] = {
        name: [
            tuple(Neighbour(gene_id=ids[g], symbol=symbols[g], cosine=float(c)) for g, c in zip(*pair, strict=True))
            for pair in zip(*found, strict=True)
        ]
        for name, found in near.items()
    }
    return tuple(
        GeneNeighbours(
            gene_id=ids[gene],
            symbol=symbols[gene],
            cells=int(cells_g[gene]),
            contextual=told["contextual"][row],
            input=told["input"][row],
        )
        for row, gene in enumerate(asked_g.tolist())
    )


def _cohesion(
    name: str,
    tokens: np.ndarray,
    tokens_g: np.ndarray,
    directions: dict[str, np.ndarray],
    *,
    k: int,
    permutations: int,
    seed: int,
) -> ListCohesion:
    members, gone = _positions(tokens, tokens_g)
    expected = (len(members) - 1) / (len(tokens_g) - 1) if len(members) > 1 else 0.0
    share, p_value = {}, {}
    for table, values in directions.items():
        if len(members) < 2:
            share[table] = p_value[table] = float("nan")
            continue
        near_gk = nearest(values, np.arange(len(values)), k)[0]
        share[table] = _own_share(near_gk, members)
        generator = np.random.default_rng([seed, len(members)])
        drawn = [
            _own_share(near_gk, generator.choice(len(tokens_g), len(members), replace=False))
            for _ in range(permutations)
        ]
        at_least = sum(value >= share[table] - 1e-12 for value in drawn)
        p_value[table] = (at_least + 1) / (permutations + 1)
    return ListCohesion(
        name=name, genes=len(members), absent=len(gone), share=share, expected=expected, p_value=p_value
    )


def _own_share(near_gk: np.ndarray, members: np.ndarray) -> float:
    inside_g = np.zeros(len(near_gk), dtype=bool)
    inside_g[members] = True
    return float(inside_g[near_gk[members]].mean())


def _positions(tokens: np.ndarray, tokens_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of tokens among the rising `tokens_g`, in their order, and the tokens that are not there."""
    tokens = np.asarray(tokens, dtype=np.int64)
    at = np.minimum(np.searchsorted(tokens_g, tokens), len(tokens_g) - 1)
    there = tokens_g[at] == tokens
    return at[there], tokens[~there]
