"""Gene columns: which column names them, what each is, what is refused, and what the report says of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from genescale.platform.errors import AtlasError, SettingsError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, canonical_id

MakeAtlas = Callable[..., Atlas]
ANY_NUMBER = GeneRules(min_genes_measured=1)


def mapped(atlas: Atlas, vocabulary: Vocabulary, table: GeneTable | None = None, **rules: Any) -> GeneMap:
    named = {"gene_table": "table"} if table else {}
    return map_genes(atlas, vocabulary, rules=GeneRules(min_genes_measured=1, **named, **rules), table=table)


def fates(genes: GeneMap) -> list[str]:
    return [FATES[code] for code in genes.fate_g]


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


@pytest.mark.parametrize(
    "options",
    [{"min_share": 0.0}, {"min_share_of_symbols": 1.5}, {"min_genes_measured": -1}, {"gene_column": ""}],
)
def test_rules_have_ranges(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        GeneRules(**options)


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
