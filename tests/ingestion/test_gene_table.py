"""Tables of symbols: every published form reads, ambiguity is kept, harvested tables come back as they were."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.annotation.gene_table import (
    GeneTable,
    harvest,
    harvest_table,
    read_gene_table,
    write_gene_table,
)
from genescale.ingestion.atlas import Atlas
from genescale.platform.errors import AtlasError, InputError, SettingsError
from genescale.platform.storage import Store

HGNC = """hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
HGNC:1\tAAA\tApproved\tA1|SHARED\tOLDA\tENSG00000000001
HGNC:2\tBBB\tApproved\tSHARED|AAA\tOLDB\tENSG00000000002
HGNC:3\tCCC\tApproved\tLOST\t\t
HGNC:4\tLOST\tApproved\t\t\t
HGNC:5\tGONE\tEntry Withdrawn\t\t\tENSG00000000005
HGNC:6\tDDD\tApproved\tLOST\t\tENSG00000000006
"""
CELLXGENE = "ENSG00000000001,AAA,2,1396,lncRNA\nENSG00000000002,TWIN,6,632,x\nENSG00000000003,TWIN,1,9,x\n"
OURS = "symbol\tgene_id\tkind\nAAA\tENSG00000000001.4\tapproved\nOLD\tENSG00000000001\tformer\n"


def read(content: str | bytes, name: str, folder: Path, store: Store) -> GeneTable:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_gene_table(str(path), store)


@pytest.mark.parametrize("packed", [False, True])
def test_hgnc(packed: bool, tmp_path: Path, local_store: Store) -> None:
    content = gzip.compress(HGNC.encode()) if packed else HGNC.encode()
    table = read(content, "hgnc.txt", tmp_path, local_store)
    assert table.find("aaa") == ("ENSG00000000001",), "an approved symbol wins over another gene's alias"
    assert table.find("OLDB") == ("ENSG00000000002",)
    assert (table.is_former("OLDB"), table.is_former("AAA")) == (True, False)
    assert table.find("SHARED") == ("ENSG00000000001", "ENSG00000000002"), "an alias of two genes"
    assert table.find("GONE") == (), "a withdrawn entry names nothing"
    assert table.find("LOST") == (), "the approved symbol of a gene without an id is no alias of another gene"


def test_cellxgene_and_our_own_form(tmp_path: Path, local_store: Store) -> None:
    table = read(CELLXGENE, "genes.csv", tmp_path, local_store)
    assert (table.find("AAA"), table.find("TWIN")) == (("ENSG00000000001",), ("ENSG00000000002", "ENSG00000000003"))
    ours = read(OURS, "ours.tsv", tmp_path, local_store)
    assert (ours.find("AAA"), ours.find("OLD"), ours.is_former("OLD")) == (("ENSG00000000001",),) * 2 + (True,)


def test_the_digest_pins_what_symbols_stand_for(tmp_path: Path, local_store: Store) -> None:
    table = read(HGNC, "hgnc.txt", tmp_path, local_store)
    head, *rows = HGNC.splitlines()
    turned = read("\n".join([head, *reversed(rows)]), "turned.txt", tmp_path, local_store)
    packed = read(gzip.compress(HGNC.encode()), "hgnc.txt.gz", tmp_path, local_store)
    other = read(HGNC.replace("000000006", "000000007"), "other.txt", tmp_path, local_store)
    assert table.digest == turned.digest == packed.digest != other.digest
    assert GeneTable.of(table.pairs()).digest == table.digest
    freed = read(HGNC.replace("HGNC:4\tLOST", "HGNC:4\tFOUND"), "freed.txt", tmp_path, local_store)
    assert (freed.find("LOST"), freed.digest == table.digest) == (("ENSG00000000006",), False)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("a,b\n1,2\n", r"its columns are \['a', 'b'\]"),
        ("", "not a gene table"),
        ("symbol\tgene_id\nAAA\t7157\n", "leads from no symbol to an Ensembl id"),
        ("symbol\tgene_id\tkind\nAAA\tENSG00000000001\tnickname\n", "'nickname' is no kind"),
        (b"\x1f\x8bnot gzip", "not a gene table"),
        (b"PAR1 not parquet", "not a gene table"),
        (b"\xff\xfe\xfd", "not a gene table"),
    ],
)
def test_what_is_no_table_is_refused(content: Any, what: str, tmp_path: Path, local_store: Store) -> None:
    with pytest.raises(InputError, match=what) as caught:
        read(content, "genes.txt", tmp_path, local_store)
    assert "genes.txt" in caught.value.where
    assert caught.value.fix


def test_atlases_that_carry_both_give_a_table(
    table_atlas: Callable[..., Atlas], tmp_path: Path, local_store: Store
) -> None:
    ids = ["ENSG00000000001.3", "ENSG00000000002", "ENSG00000000003_PAR_Y", "ERCC-00002", "ENSG00000000005"]
    first = table_atlas(ids, var={"feature_name": ["AAA", "BBB", "CCC", "ERCC-00002", None]})
    second = table_atlas(["hg19_AAA", "BBB"], var={"gene_ids": ["ENSG00000000001", "ENSG00000000009"]})
    none = table_atlas(["AAA", "BBB"])
    table = harvest([first, second, none])
    assert table.to_pylist() == [
        {"symbol": "AAA", "gene_id": "ENSG00000000001", "kind": "approved", "sources": 2},
        {"symbol": "BBB", "gene_id": "ENSG00000000002", "kind": "approved", "sources": 1},
        {"symbol": "BBB", "gene_id": "ENSG00000000009", "kind": "approved", "sources": 1},
    ]
    found = []
    for name in ("genes.parquet", "genes.tsv"):
        write_gene_table(table, str(tmp_path / name), local_store)
        found.append(read_gene_table(str(tmp_path / name), local_store))
    assert found[0].digest == found[1].digest
    assert (found[0].find("AAA"), len(found[0].find("BBB"))) == (("ENSG00000000001",), 2)
    with pytest.raises(AtlasError, match="none of 1 files carries symbols beside Ensembl ids"):
        harvest([none])
    with pytest.raises(SettingsError, match=r"\.parquet or \.tsv"):
        write_gene_table(table, str(tmp_path / "genes.csv"), local_store)


@pytest.mark.shared
def test_harvest_of_real_files(shared_data: Path, local_store: Store) -> None:
    files = ["pbmc3k_counts_ensembl.h5ad", "pbmc_facs_test_counts_ensembl.h5ad"]
    table = harvest_table([str(shared_data / "atlases" / file) for file in files], local_store)
    pairs = dict(zip(table.column("symbol").to_pylist(), table.column("gene_id").to_pylist(), strict=True))
    assert (pairs["CD3D"], pairs["LYZ"]) == ("ENSG00000167286", "ENSG00000090382")
    assert table.num_rows > 16_000
    assert max(table.column("sources").to_pylist()) == 2


@pytest.mark.shared
def test_the_published_tables(shared_data: Path, local_store: Store) -> None:
    hgnc = read_gene_table(str(shared_data / "genesets" / "hgnc_complete_set.txt.gz"), local_store)
    assert hgnc.find("TP53") == ("ENSG00000141510",)
    assert hgnc.find("SEPT9") == ("ENSG00000184640",), "a previous symbol"
    cellxgene = read_gene_table(str(shared_data / "genesets" / "genes_homo_sapiens.csv.gz"), local_store)
    assert cellxgene.find("TP53") == ("ENSG00000141510",)
    assert len(cellxgene.find("Y_RNA")) > 10
