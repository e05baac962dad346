"""Gene columns: ids are found, duplicates and aliases add up, and a file of unknown genes is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from genescale.ingestion.genes import (
    GeneMap,
    ensembl_column,
    gathered,
    library_sizes,
    map_to_vocabulary,
)
from genescale.ingestion.h5ad import CountBlock
from genescale.platform.errors import AtlasError
from genescale.platform.vocabulary import Vocabulary, canonical_id


def mapped(vocabulary: Vocabulary, **candidates: list[str]) -> GeneMap:
    return map_to_vocabulary(candidates, vocabulary, min_share=0.1, min_share_of_symbols=0.5, where="a.h5ad")


def test_ids_lose_their_version() -> None:
    assert canonical_id(" ensg00000141510.12 ") == "ENSG00000141510"
    assert canonical_id("RP11-34P13.7") == "RP11-34P13.7", "a dot in a symbol is no version"
    assert canonical_id("ENSG00000002586.20_PAR_Y") == "ENSG00000002586.20_PAR_Y", "the Y copy is another gene"


def test_the_column_that_the_vocabulary_knows_best_is_taken(vocabulary: Vocabulary) -> None:
    ids = [f"{gene}.3" for gene in vocabulary.gene_ids[:10]]
    genes = mapped(vocabulary, index=[f"x{i}" for i in range(10)], ensembl_id=ids)
    assert (genes.column, genes.n_mapped, genes.n_dropped, genes.n_versioned) == ("ensembl_id", 10, 0, 10)
    assert genes.targets_g.tolist() == vocabulary.token_ids[:10].tolist()
    symbols = mapped(vocabulary, index=["GENE1", "gene2", "none"])
    assert symbols.targets_g.tolist() == [*vocabulary.token_ids[:2].tolist(), -1]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["GENE1", "a", "b"], "knows 1 of 3 genes (symbols or other names such as 'GENE1' in var index)"),
        ([f"ENSMUSG{i:011d}" for i in range(30)], "knows 0 of 30 genes (ids of the kind ENSMUSG… in var index)"),
        (["0", "1", "2"], "symbols or other names such as '0'"),
    ],
)
def test_unknown_genes_are_refused(names: list[str], text: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(AtlasError) as caught:
        mapped(vocabulary, index=names)
    assert text in str(caught.value)


def test_a_new_vocabulary_needs_ids() -> None:
    ids = [f"ENSG{i:011d}" for i in range(5)]
    assert ensembl_column({"index": list("abcde"), "gene_ids": ids}, where="x") == "gene_ids"
    with pytest.raises(AtlasError, match=r"no Ensembl gene ids found .*'a'"):
        ensembl_column({"index": list("abcde")}, where="x")


def test_repeated_columns_aliases_and_repeated_entries_are_summed(vocabulary: Vocabulary, counts_of: Any) -> None:
    # One gene four times: its id twice, with a version, and under a retired id; one entry of a row stored twice.
    first = vocabulary.gene_ids[0]
    genes = mapped(vocabulary, index=[first, vocabulary.gene_ids[5], first, f"{first}.7", "ENSG90000000001", "unknown"])
    assert (genes.n_summed, genes.n_dropped) == (3, 1)
    indices, counts = np.array([4, 0, 3, 1, 2, 5, 0, 5]), np.array([1.0, 2, 4, 8, 16, 32, 64, 7])
    block = CountBlock(np.array([0, 7, 7, 8]), indices, counts, 0)
    summed = gathered(block, genes.targets_g, vocabulary.size)
    assert summed[0, vocabulary.token_ids[0]] == 1 + 2 + 4 + 16 + 64
    assert summed[0, vocabulary.token_ids[5]] == 8
    assert np.diff(summed.indptr).tolist() == [2, 0, 0]
    assert library_sizes(block).tolist() == [127.0, 0.0, 7.0], "genes outside the vocabulary belong to the library"
