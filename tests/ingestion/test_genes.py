"""Gene columns: which column names them, what each is, what is refused, and what the report says of them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from genescale.ingestion.annotation.gene_table import GeneTable, read_gene_table
from genescale.ingestion.annotation.genes import (
    COUNTED,
    FATES,
    GeneMap,
    GeneRules,
    ensembl_column,
    gene_columns,
    gene_report,
    gene_report_of_table,
    gene_table_bytes,
    map_genes,
    symbols,
)
from genescale.ingestion.annotation.species import MITOCHONDRIAL_IDS, mouse_spelled, named_species, read_name
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.opening import open_atlas
from genescale.platform.errors import AtlasError, SettingsError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, canonical_id, read_vocabulary

MakeAtlas = Callable[..., Atlas]
ANY_NUMBER = GeneRules(min_genes_measured=1)


def mapped(atlas: Atlas, vocabulary: Vocabulary, table: GeneTable | None = None, **rules: Any) -> GeneMap:
    named = {"gene_table": "table"} if table else {}
    return map_genes(atlas, vocabulary, rules=GeneRules(min_genes_measured=1, **named, **rules), table=table)


def fates(genes: GeneMap) -> list[str]:
    return [FATES[code] for code in genes.fate_g]


# --- one name --------------------------------------------------------------------------------------------------------


def test_ids_lose_their_version() -> None:
    assert canonical_id(" ensg00000141510.12 ") == "ENSG00000141510"
    assert canonical_id("RP11-34P13.7") == "RP11-34P13.7", "a dot in a symbol is no version"
    assert canonical_id("ENSG00000002586.20_PAR_Y") == "ENSG00000002586.20_PAR_Y", "the Y copy is another gene"


@pytest.mark.parametrize(
    ("text", "core", "kind", "species"),
    [
        ("ENSG00000141510.12", "ENSG00000141510", "id", "Homo sapiens"),
        ("ENSMUSG00000059552.3", "ENSMUSG00000059552", "id", "Mus musculus"),
        ("ENSG00000002586.20_PAR_Y", "ENSG00000002586.20_PAR_Y", "par_y", "Homo sapiens"),
        ("ENSGR0000182378", "ENSGR0000182378", "par_y", "Homo sapiens"),
        ("hg19_TP53", "TP53", "symbol", "Homo sapiens"),
        ("GRCh38______ENSG00000141510", "ENSG00000141510", "id", "Homo sapiens"),
        ("GRCh38-2020-A_TP53", "TP53", "symbol", "Homo sapiens"),
        ("mm10---Trp53", "TRP53", "symbol", "Mus musculus"),
        ("FBgn0000008", "FBGN0000008", "id", "Drosophila melanogaster"),
        ("ENSSASG00005000004", "ENSSASG00005000004", "id", "SARS-CoV-2"),
        ("ERCC-00002", "ERCC-00002", "spike_in", ""),
        ("gSpikein_ERCC-00013", "GSPIKEIN_ERCC-00013", "spike_in", ""),
        ("ERCC6L2", "ERCC6L2", "symbol", ""),
        ("SARS-CoV-2_ORF1ab", "SARS-COV-2_ORF1AB", "virus", ""),
        ("HIVEP1", "HIVEP1", "symbol", ""),
        ("CD3_TotalSeqB", "CD3_TOTALSEQB", "no_gene", ""),
        ("chr1:10109-10357", "CHR1:10109-10357", "no_gene", ""),
        ("__no_feature", "__NO_FEATURE", "no_gene", ""),
        ("HLA-A", "HLA-A", "symbol", ""),
        ("MT-ND1", "MT-ND1", "symbol", ""),
        ("RN7SL1", "RN7SL1", "symbol", ""),
    ],
)
def test_a_name_is_taken_apart(text: str, core: str, kind: str, species: str) -> None:
    name = read_name(text)
    assert (name.core, name.kind, name.species) == (core, kind, species)


@pytest.mark.shared
@pytest.mark.parametrize("file", ["hgnc_complete_set.txt.gz", "genes_homo_sapiens.csv.gz"])
def test_no_human_symbol_is_taken_for_something_else(file: str, shared_data: Path, local_store: Store) -> None:
    table = read_gene_table(str(shared_data / "genesets" / file), local_store)
    other = [symbol for symbol in table.approved if read_name(symbol).kind != "symbol" or read_name(symbol).prefixed]
    assert len(table.approved) > 40_000
    assert other == []


def test_mouse_spelling() -> None:
    assert all(map(mouse_spelled, ["Actb", "mt-Nd1", "Gm1234", "0610007P14Rik"]))
    assert not any(map(mouse_spelled, ["ACTB", "C1orf112", "actb", "MT-ND1", "A1BG", "7SK"]))


@pytest.mark.parametrize("text", ["NCBITaxon:10090", "Mus musculus", "mouse", "mus_musculus", "10090"])
def test_a_species_has_many_names(text: str) -> None:
    assert named_species(text) == "Mus musculus"


# --- the column ------------------------------------------------------------------------------------------------------


def test_the_column_that_the_vocabulary_knows_best_is_taken(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    ids = [f"{gene}.3" for gene in vocabulary.gene_ids[:10]]
    names = [f"x{i}" for i in range(10)]
    genes = mapped(table_atlas(names, var={"n_cells": list(range(10)), "my own ids": ids}), vocabulary)
    assert (genes.column, genes.n_mapped, genes.n_dropped, genes.n_versioned) == ("my own ids", 10, 0, 10)
    assert genes.targets_g.tolist() == vocabulary.token_ids[:10].tolist()
    assert genes.genes == tuple(ids), "names as the file has them"
    assert "removed the version from 10 ids" in genes.notes


def test_ids_are_preferred_to_symbols_that_name_as_many(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    known, foreign = list(vocabulary.gene_ids[:9]), ["ENSG99999999999"]
    var = {"gene_ids": known + foreign}
    names = [f"GENE{i}" for i in range(1, 11)]
    assert mapped(table_atlas(names, var=var), vocabulary).column == "gene_ids"
    retired = {"gene_ids": known[:5] + foreign * 5}
    assert mapped(table_atlas(names, var=retired), vocabulary).column == "index", "twice as many by symbol"


def test_a_column_can_be_named(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    atlas = table_atlas(vocabulary.gene_ids[:10], var={"feature_name": [f"GENE{i}" for i in range(11, 21)]})
    assert mapped(atlas, vocabulary).targets_g[0] == vocabulary.token_ids[0]
    named = mapped(atlas, vocabulary, gene_column="feature_name")
    assert (named.column, named.targets_g[0]) == ("feature_name", vocabulary.token_ids[10])
    with pytest.raises(AtlasError, match=r"lung.h5ad: var: .* no column 'feature_nam'.*Did you mean 'feature_name'"):
        mapped(atlas, vocabulary, gene_column="feature_nam")


def test_a_new_vocabulary_needs_ids() -> None:
    ids = [f"ENSG{i:011d}" for i in range(5)]
    assert ensembl_column({"index": list("abcde"), "gene_ids": ids}, where="x") == "gene_ids"
    with pytest.raises(AtlasError, match=r"no Ensembl gene ids found .*'a'"):
        ensembl_column({"index": list("abcde")}, where="x")


def test_symbols_stand_beside_ids_or_are_the_index(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    atlas = table_atlas(vocabulary.gene_ids[:2], var={"gene_symbols": ["A", None]})
    assert (symbols(atlas), list(gene_columns(atlas))) == (["A", ""], ["index", "gene_symbols"])
    assert symbols(table_atlas(["B", vocabulary.gene_ids[0]])) == ["B", ""]


# --- fates -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_column_has_its_fate(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    first, second = vocabulary.gene_ids[:2]
    rows = {
        first: "mapped",
        f"{second}.7": "renamed",
        "ENSG90000000001": "renamed",  # a retired id of the first gene
        f"hg19_{vocabulary.gene_ids[2]}": "renamed",
        "GENE4": "symbol",
        "ENSG88888888888": "unknown",
        f"{vocabulary.gene_ids[5]}_PAR_Y": "par_y",
        "ERCC-00002": "spike_in",
        "ENSMUSG00000059552": "other_species",
        "mm10_Actb": "other_species",
        "SARS-CoV-2": "other_species",
        "CD8A_TotalSeqC": "other_feature",
    }
    genes = mapped(table_atlas(list(rows)), vocabulary)
    assert fates(genes) == list(rows.values())
    assert genes.counted_g.tolist() == [fate in COUNTED for fate in rows.values()]
    assert genes.counted_g.tolist() == [True] * 7 + [False] * 5, "only genes of the right species make up the library"
    kept = vocabulary.token_ids[[0, 1, 0, 2, 3]].tolist()
    assert genes.targets_g.tolist() == kept + [-1] * 7
    assert genes.by_fate()["renamed"] == 3
    assert (genes.n_summed, genes.n_measured, genes.n_dropped) == (1, 4, 7)
    assert "2 columns share 1 gene; counts summed" in genes.notes


@pytest.mark.parametrize(
    ("column", "values", "fate"),
    [
        ("feature_types", ["Gene Expression", "Antibody Capture"], "other_feature"),
        ("feature_type", ["Gene Expression", "Peaks"], "other_feature"),
        ("feature_biotype", ["gene", "spike-in"], "spike_in"),
        ("genome", ["GRCh38", "mm10"], "other_species"),
    ],
)
def test_the_gene_table_says_what_is_no_gene(
    column: str, values: list[str], fate: str, vocabulary: Vocabulary, table_atlas: MakeAtlas
) -> None:
    genes = mapped(table_atlas(["GENE1", "GENE2"], var={column: values}), vocabulary)
    assert fates(genes) == ["symbol", fate], "a symbol alone would have named a gene"


def test_a_biotype_in_the_type_column_keeps_its_gene(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    var = {"feature_type": ["protein_coding", "lncRNA"], "genome": ["", "my assembly"]}
    assert fates(mapped(table_atlas(vocabulary.gene_ids[:2], var=var), vocabulary)) == ["mapped", "mapped"]


def test_a_mixture_of_two_species_keeps_the_right_one(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    human = [f"GRCh38_{gene}" for gene in vocabulary.gene_ids]
    mouse = [f"mm10___ENSMUSG{i:011d}" for i in range(60)]
    genes = mapped(table_atlas(human + mouse), vocabulary)
    assert genes.by_fate() == {"renamed": 60, "other_species": 60}
    assert not genes.counted_g[60:].any()
    note = next(note for note in genes.notes if "Mus musculus" in note)
    assert note == (
        "left out 60 genes of Mus musculus (mouse, NCBITaxon:10090); its cells are kept unless --where leaves them out"
    )
    infected = mapped(table_atlas([*vocabulary.gene_ids, "ENSSASG00005000004", "mm10_Actb"]), vocabulary)
    assert infected.notes == (
        "read 1 name without its genome's prefix, such as 'mm10_Actb'",
        "left out 1 gene of SARS-CoV-2 (coronavirus, NCBITaxon:2697049)",
        "left out 1 gene of Mus musculus (mouse, NCBITaxon:10090)",
    )


def test_mitochondrial_genes_are_found_by_id_and_by_symbol(table_atlas: MakeAtlas) -> None:
    ids = ["ENSG00000198888", "ENSG00000210049", "ENSG00000000003", "ENSG00000000005"]
    known = Vocabulary.build(ids, [1.0] * 4, symbols=["MT-ND1", "", "MTOR", "MT-NEW"], window=8)
    atlas = table_atlas([*ids, "mm10_mt-Nd1"], var={"feature_name": ["", "", "mtor", "", ""]})
    assert mapped(atlas, known).mito_g.tolist() == [True, True, False, True, False]
    assert len(MITOCHONDRIAL_IDS) == 37


@pytest.mark.shared
def test_the_mitochondrial_ids_are_those_of_the_gene_tables(shared_data: Path, local_store: Store) -> None:
    for name in ("genes_homo_sapiens.csv.gz", "hgnc_complete_set.txt.gz"):
        table = read_gene_table(str(shared_data / "genesets" / name), local_store)
        ids = {gene for symbol, genes in table.approved.items() if symbol.startswith("MT-") for gene in genes}
        assert ids == MITOCHONDRIAL_IDS, name


# --- symbols ---------------------------------------------------------------------------------------------------------


def of(*rows: tuple[str, str, str]) -> GeneTable:
    return GeneTable.of(rows, name="table")


def test_symbols_of_the_vocabulary_need_no_table(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    genes = mapped(table_atlas(["GENE1", "gene2", "OLDNAME2", "GENE4"]), vocabulary)
    assert fates(genes) == ["symbol", "symbol", "unknown", "symbol"]


def test_a_table_decides_alone(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    ids = vocabulary.gene_ids
    table = of(("GENE1", ids[5], "approved"), ("TWO", ids[1], "approved"), ("TWO", ids[2], "approved"))
    table = of(*table.pairs(), ("FAR", "ENSG77777777777", "approved"), ("OLD", ids[3], "former"))
    names = ["GENE1", "TWO", "FAR", "OLD", "GENE9", ids[8]]
    genes = mapped(table_atlas(names), vocabulary, table, min_share_of_symbols=0.5)
    assert fates(genes) == ["symbol", "ambiguous", "unknown", "symbol", "unknown", "mapped"]
    assert genes.targets_g[[0, 3]].tolist() == vocabulary.token_ids[[5, 3]].tolist()
    assert "dropped 1 symbol that names several genes, such as TWO" in genes.notes


def test_a_former_symbol_gives_way_to_the_gene_itself(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    # OLDNAME is a former name of the second gene; beside that gene's own name it must be another gene.
    alone = mapped(table_atlas(["OLDNAME", "GENE3"]), vocabulary)
    assert fates(alone) == ["symbol", "symbol"]
    both = mapped(table_atlas(["OLDNAME", "GENE3", "GENE2", "GENE4"]), vocabulary)
    assert fates(both) == ["ambiguous", "symbol", "symbol", "symbol"]


def test_the_share_of_symbols_counts_genes_outside_the_vocabulary_with_a_table(
    vocabulary: Vocabulary, table_atlas: MakeAtlas
) -> None:
    names = ["GENE1", *(f"FAR{i}" for i in range(9))]
    with pytest.raises(AtlasError, match="10% name exactly one gene, 70% are asked for"):
        mapped(table_atlas(names), vocabulary)
    rows = [("GENE1", vocabulary.gene_ids[0], "approved")]
    rows += [(f"FAR{i}", f"ENSG{70_000_000_000 + i}", "approved") for i in range(9)]
    assert mapped(table_atlas(names), vocabulary, of(*rows)).by_fate() == {"symbol": 1, "unknown": 9}


def test_a_named_table_must_be_read(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    with pytest.raises(SettingsError, match=r"genes\.tsv: the gene table was named but not read"):
        map_genes(table_atlas(), vocabulary, rules=GeneRules(gene_table="genes.tsv"))


# --- what is refused -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "options",
    [{"min_share": 0.0}, {"min_share_of_symbols": 1.5}, {"min_genes_measured": -1}, {"gene_column": ""}],
)
def test_rules_have_ranges(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        GeneRules(**options)


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_adds_up(vocabulary: Vocabulary, table_atlas: MakeAtlas) -> None:
    ids = vocabulary.gene_ids
    genes = mapped(table_atlas([*ids[:25], f"{ids[0]}.2", "ERCC-00002", "ENSG99999999999"]), vocabulary)
    counts = {"mapped": 60.0, "renamed": 20.0, "spike_in": 15.0, "unknown": 5.0}
    report = gene_report(genes, counts).to_dict()
    assert report["fates"]["mapped"] == {
        "genes": 25,
        "share_of_genes": 25 / 28,
        "counts": 60.0,
        "share_of_counts": 0.6,
        "examples": list(ids[:20]),
    }
    assert sum(facts["share_of_counts"] for facts in report["fates"].values()) == pytest.approx(1)
    assert sum(facts["genes"] for facts in report["fates"].values()) == 28
    assert report["summed"] == {"columns": 2, "genes": 1, "examples": [ids[0], f"{ids[0]}.2"]}
    assert report["measured"] == 25
    stored = gene_table_bytes(genes, vocabulary)
    assert gene_report_of_table(stored, counts).to_dict() == report
    table = pq.read_table(io.BytesIO(stored)).to_pylist()
    assert table[1] == {
        "gene": ids[1],
        "fate": "mapped",
        "token": int(vocabulary.token_ids[1]),
        "gene_id": ids[1],
        "symbol": "GENE2",
        "counted": True,
        "mitochondrial": False,
    }
    assert table[26] == {
        "gene": "ERCC-00002",
        "fate": "spike_in",
        "token": None,
        "gene_id": None,
        "symbol": None,
        "counted": False,
        "mitochondrial": False,
    }


# --- real files ------------------------------------------------------------------------------------------------------

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
