"""Genes that do not fit are refused with what was seen, and real atlases map with the defaults."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.annotation.gene_table import GeneTable, read_gene_table
from genescale.ingestion.annotation.genes import (
    GeneMap,
    GeneRules,
    map_genes,
)
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.opening import open_atlas
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, read_vocabulary

MakeAtlas = Callable[..., Atlas]


def mapped(atlas: Atlas, vocabulary: Vocabulary, table: GeneTable | None = None, **rules: Any) -> GeneMap:
    named = {"gene_table": "table"} if table else {}
    return map_genes(atlas, vocabulary, rules=GeneRules(min_genes_measured=1, **named, **rules), table=table)


@pytest.mark.parametrize(
    ("names", "what", "fix"),
    [
        (["GENE1", "a", "b"], "knows 1 of 3 genes by symbols or other names in var index, such as", "--gene-table"),
        (["0", "1", "2"], "knows 0 of 3 genes by symbols or other names in var index, such as '0': 0%", "Ensembl ids"),
        (
            [f"ENSG{70_000_000_000 + i}" for i in range(30)],
            "knows 0 of 30 genes by the ids in var index, such as 'ENSG70000000000': 0% of its species' genes, 10%",
            "--min-share",
        ),
        (
            [f"ENSMUSG{i:011d}" for i in range(30)],
            "30 of 30 names in var index are genes of Mus musculus (mouse, NCBITaxon:10090), such as "
            "'ENSMUSG00000000000'; the vocabulary is of Homo sapiens (human, NCBITaxon:9606)",
            "use a vocabulary of that species",
        ),
        (["Gene1", "Gene2", "Actb", "Trp53"], "4 of 4 names in var index are symbols of a mouse or rat", "human"),
        ([f"mm10_GENE{i}" for i in range(1, 9)], "genes of Mus musculus", "Homo sapiens"),
    ],
)  # fmt: skip
def test_unfit_genes_are_refused(
    names: list[str], what: str, fix: str, vocabulary: Vocabulary, table_atlas: MakeAtlas
) -> None:
    with pytest.raises(AtlasError) as caught:
        mapped(table_atlas(names), vocabulary)
    assert what in caught.value.what
    assert caught.value.where == "lung.h5ad: var"
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("obs", "texts"),
    [
        ({}, {"organism_ontology_term_id": "NCBITaxon:10090"}),
        ({"organism_ontology_term_id": ["NCBITaxon:10090"] * 4}, {}),
        ({"organism": ["Mus musculus"] * 4}, {}),
    ],
)
def test_a_declared_other_species_is_refused(
    obs: dict[str, Any], texts: dict[str, str], vocabulary: Vocabulary, table_atlas: MakeAtlas
) -> None:
    atlas = table_atlas(vocabulary.gene_ids, obs=obs, texts=texts)
    with pytest.raises(AtlasError) as caught:
        mapped(atlas, vocabulary)
    assert str(caught.value) == (
        "lung.h5ad: organism: the file declares Mus musculus (mouse, NCBITaxon:10090); the vocabulary is of "
        "Homo sapiens (human, NCBITaxon:9606). Use a vocabulary of that species, or --ignore-organism if its genes "
        "were translated before."
    )
    assert mapped(atlas, vocabulary, ignore_organism=True).n_mapped == len(vocabulary.gene_ids)


@pytest.mark.parametrize("organism", ["unknown", "na", "", "my lab's cell line"])
def test_what_names_no_species_declares_none(organism: str, vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    atlas = table_atlas(vocabulary.gene_ids, obs={"organism": [organism] * 4}, texts={"organism": organism})
    assert mapped(atlas, vocabulary).n_mapped == len(vocabulary.gene_ids)


def test_a_table_without_genes_is_refused(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    atlas = table_atlas(["CD3", "CD8", "ERCC-00002"], var={"feature_types": ["Antibody Capture"] * 2 + [""]})
    with pytest.raises(AtlasError) as caught:
        mapped(atlas, vocabulary)
    assert caught.value.what.startswith("none of 3 columns is a gene (2 other_feature, 1 spike_in)")
    assert caught.value.fix == "Give the matrix of gene expression."


def test_several_declared_species_are_told(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    obs = {"organism_ontology_term_id": ["NCBITaxon:9606", "NCBITaxon:10090"] * 2}
    genes = mapped(table_atlas(vocabulary.gene_ids, obs=obs), vocabulary)
    assert any("declares other organisms too: Mus musculus" in note for note in genes.notes)


def test_a_panel_is_refused_unless_it_is_meant(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    atlas = table_atlas(vocabulary.gene_ids[:19])
    with pytest.raises(AtlasError) as caught:
        map_genes(atlas, vocabulary, rules=GeneRules())
    assert caught.value.what.startswith("only 19 of 60 vocabulary genes are present, 20 are asked for")
    assert "--min-genes-measured 19" in caught.value.fix
    assert map_genes(atlas, vocabulary, rules=GeneRules(min_genes_measured=19)).n_measured == 19
    assert map_genes(table_atlas(vocabulary.gene_ids[:20]), vocabulary, rules=GeneRules()).n_measured == 20


REAL = {
    # file: (column, measured in V1, measured in V2, mitochondrial)
    "pbmc_facs_train_counts_ensembl.h5ad": ("index", 13_907, 13_534, 13),
    "pbmc3k_counts_ensembl.h5ad": ("index", 12_132, 11_875, 13),
    "pbmc3k_lognorm_X_counts_in_raw.h5ad": ("ensembl_id_hg19_10x", 12_132, 11_875, 13),
    "kang_harmony_ctrl_stim_counts_symbols.h5ad": ("ensembl_id_hg19_10x", 8_693, 8_614, 0),
    "pbmc_scenic.loom": ("index", 7_621, 7_966, 0),
}


@pytest.fixture(scope="module", params=["gc30M", "gc104M"])
def published(request: pytest.FixtureRequest, shared_data: Path) -> Vocabulary:
    from genescale.platform.settings import StorageSettings

    file = shared_data / "vocabularies" / f"token_dictionary_{request.param}.pkl"
    return read_vocabulary(str(file), Store(StorageSettings()))


@pytest.mark.shared
@pytest.mark.parametrize("file", REAL)
def test_real_atlases_map_with_the_defaults(
    file: str, published: Vocabulary, shared_data: Path, local_store: Store
) -> None:
    column, v1, v2, mito = REAL[file]
    with open_atlas(str(shared_data / "atlases" / file), local_store) as atlas:
        genes = map_genes(atlas, published, rules=GeneRules())
    measured = v1 if published.cls is None else v2
    assert (genes.column, genes.n_measured, int(genes.mito_g.sum())) == (column, measured, mito)
    assert genes.counted_g.all()


@pytest.mark.shared
def test_symbols_and_ids_of_a_real_atlas_agree(published: Vocabulary, shared_data: Path, local_store: Store) -> None:
    path = str(shared_data / "atlases" / "kang_harmony_ctrl_stim_counts_symbols.h5ad")
    table = read_gene_table(str(shared_data / "genesets" / "hgnc_complete_set.txt.gz"), local_store)
    with open_atlas(path, local_store) as atlas:
        by_id = mapped(atlas, published)
        by_symbol = mapped(atlas, published, gene_column="index")
        by_table = mapped(atlas, published, table, gene_column="index")
    for other, share in ((by_symbol, 0.88), (by_table, 0.95)):
        both = (by_id.targets_g >= 0) & (other.targets_g >= 0)
        agree = (by_id.targets_g == other.targets_g)[both].mean()
        assert other.n_measured >= share * len(other.genes)
        assert agree > 0.99


@pytest.mark.shared
@pytest.mark.parametrize(
    ("file", "options", "expected"),
    [
        ("atlases/kang_muscat_ctrl_12k_counts_ensembl.h5ad", {}, r"only 1,2\d\d of .*--min-genes-measured 12\d\d"),
        ("atlases/tenx/cellranger3/filtered_feature_bc_matrix.h5", {}, r"only 2\d\d of"),
        ("odd/broken/versioned_ensembl_ids.h5ad", {"min_genes_measured": 1}, ""),
        ("odd/broken/duplicate_var_names.h5ad", {"min_genes_measured": 1}, ""),
    ],
)
def test_small_and_odd_files(
    file: str, options: dict[str, Any], expected: str, published: Vocabulary, shared_data: Path, local_store: Store
) -> None:
    with open_atlas(str(shared_data / file), local_store) as atlas:
        if expected:
            with pytest.raises(AtlasError, match=expected):
                map_genes(atlas, published, rules=GeneRules(**options))
            return
        genes = map_genes(atlas, published, rules=GeneRules(**options))
    if "versioned" in file:
        assert (genes.n_versioned, genes.by_fate()["renamed"]) == (800, genes.n_mapped)
    else:
        assert genes.n_summed == 2
        assert "4 columns share 2 genes; counts summed" in genes.notes


@pytest.mark.shared
def test_cellxgene_spike_ins_are_set_apart(published: Vocabulary, shared_data: Path, local_store: Store) -> None:
    path = shared_data / "odd" / "cellxgene_schema" / "example_invalid_primary_data.h5ad"
    with open_atlas(str(path), local_store) as atlas:
        genes = mapped(atlas, published)
    assert genes.by_fate()["spike_in"] == 1
    assert genes.genes[int(np.flatnonzero(~genes.counted_g)[0])] == "ERCC-00002"
    assert any(re.search("declares other organisms too", note) for note in genes.notes)
