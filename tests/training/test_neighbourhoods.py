"""Gene neighbourhoods: cosines around the mean, lists that hold together, genes that are too rare."""

from __future__ import annotations

import numpy as np
import pytest

from genescale.platform.errors import InputError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import GeneTable
from genescale.training.evaluation.neighbourhoods import nearest, neighbourhoods

FAMILY = 8


def planted(vocabulary: Vocabulary) -> tuple[GeneTable, np.ndarray]:
    """Genes of eight share a direction; all share a far larger common part. The input table is noise."""
    draws = np.random.default_rng(0)
    n = len(vocabulary.gene_ids)
    directions = draws.normal(size=(n // FAMILY, 16))
    vectors = 50.0 + directions[np.arange(n) // FAMILY] + 0.2 * draws.normal(size=(n, 16))
    tokens = vocabulary.token_ids.astype(np.int64)
    table = GeneTable(
        gene_ids=vocabulary.gene_ids,
        tokens_g=tokens,
        embeddings_gd=vectors.astype(np.float32),
        cells_g=np.where(np.arange(n) < n - FAMILY, 50, 3),
    )
    return table, draws.normal(size=(vocabulary.size, 16)).astype(np.float32)


def test_planted_families_are_each_others_neighbours_in_cells_and_not_in_the_input(tiny_vocabulary: Vocabulary) -> None:
    table, input_vd = planted(tiny_vocabulary)
    family = tiny_vocabulary.token_ids[:FAMILY].astype(np.int64)
    mixed = tiny_vocabulary.token_ids[: FAMILY * FAMILY : FAMILY].astype(np.int64)
    rare = tiny_vocabulary.token_ids[-1:].astype(np.int64)
    lists = [("family", np.concatenate([family, rare])), ("mixed", mixed)]
    found = neighbourhoods(
        table, input_vd, tiny_vocabulary, k=5, min_cells=20, asked=family, lists=lists, permutations=200
    )
    assert found.compared == len(tiny_vocabulary.gene_ids) - FAMILY
    for gene in found.genes:
        assert {near.gene_id for near in gene.contextual} <= set(tiny_vocabulary.gene_ids[:FAMILY]) - {gene.gene_id}
        assert [near.cosine for near in gene.contextual] == sorted((n.cosine for n in gene.contextual), reverse=True)
        assert gene.symbol.startswith("GENE")
    # The common part makes all cosines alike until it is taken off.
    assert found.mean_cosine["contextual"] > 0.99
    assert abs(found.mean_cosine["input"]) < 0.1
    held, loose = found.lists
    assert held.share["contextual"] == 1.0
    assert held.p_value["contextual"] < 0.01
    assert held.share["input"] < 0.3
    assert held.absent == 1
    assert held.genes == FAMILY
    assert held.expected == pytest.approx((FAMILY - 1) / (found.compared - 1))
    assert loose.share["contextual"] < 0.2
    assert loose.p_value["contextual"] > 0.05


def test_without_a_list_the_most_frequent_genes_are_shown(tiny_vocabulary: Vocabulary) -> None:
    table, input_vd = planted(tiny_vocabulary)
    cells = table.cells_g.copy()
    cells[[30, 60]] = [400, 500]
    frequent = GeneTable(
        gene_ids=table.gene_ids, tokens_g=table.tokens_g, embeddings_gd=table.embeddings_gd, cells_g=cells
    )
    found = neighbourhoods(frequent, input_vd, tiny_vocabulary, k=3, min_cells=20, most_asked=2)
    assert [gene.symbol for gene in found.genes] == [tiny_vocabulary.symbols[60], tiny_vocabulary.symbols[30]]


def test_too_few_frequent_genes_are_an_error_with_advice(tiny_vocabulary: Vocabulary) -> None:
    table, input_vd = planted(tiny_vocabulary)
    with pytest.raises(InputError, match="Measure more cells"):
        neighbourhoods(table, input_vd, tiny_vocabulary, k=5, min_cells=1_000)


def test_ties_go_to_the_smaller_position() -> None:
    directions = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=np.float32)
    found, cosines = nearest(directions, np.array([0, 3]), 2)
    assert found.tolist() == [[1, 2], [1, 2]]
    assert cosines[1].tolist() == [1.0, 1.0]
