"""One unit: what it writes, drops and counts, and that its bytes depend on its rows alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from genescale.ingestion import plan
from genescale.ingestion.annotation.cells import CellRules
from genescale.ingestion.annotation.genes import FATES, GeneRules, map_genes
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.plan import Unit
from genescale.ingestion.table.parts import PartWriter, part_bytes
from genescale.ingestion.tally import Tally
from genescale.ingestion.tokenise import write_part
from genescale.platform.errors import AtlasError
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary


def run(
    path: Path,
    vocabulary: Vocabulary,
    store: Store,
    corpus: Path,
    *,
    start: int = 0,
    stop: int | None = None,
    **given: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
    """Write one part; returns the answer, the quarantined cells, and the rows of the part (None without one)."""
    slot = given.pop("slot", "auto")
    with open_atlas(str(path), store, counts_slot=slot) as atlas:
        unit = Unit(uri=str(path), etag="", slot=atlas.slot, start=start, stop=atlas.n_cells if stop is None else stop)
        options: dict[str, Any] = {
            "cell_rules": CellRules(), "obs_mapping": {}, "allow_fractional": False, "bad_values": "refuse", **given
        }  # fmt: skip
        answer, quarantine = write_part(
            unit, atlas, map_genes(atlas, vocabulary, rules=GeneRules()), vocabulary=vocabulary,
            corpus_uri=str(corpus), dataset_id="d", store=store, **options,
        )  # fmt: skip
    dropped = pq.read_table(io.BytesIO(quarantine)).to_pylist() if quarantine else []
    part = answer["part"]
    return answer, dropped, pq.read_table(io.BytesIO(store.read(join(str(corpus), part["path"])))) if part else None


def test_rows_are_the_reference_and_the_tally_adds_up(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    counts = counts_of(50, seed=1).toarray()
    counts[7] = 0
    counts[9, 6:] = 0
    marks = np.arange(50) != 11
    path = write_atlas("a.h5ad", sparse.csr_matrix(counts), obs={"is_primary_data": marks, "cell_type": ["T"] * 50})
    answer, dropped, rows = run(path, vocabulary, local_store, tmp_path / "c", start=5, stop=45)
    tally = Tally(**answer["tally"])
    assert (tally.read, tally.kept) == (40, 37)
    assert tally.dropped == {"below_min_genes": 1, "empty_cell": 1, "not_primary_data": 1}
    assert [(row["source_row"], row["cell_id"], row["reason"]) for row in dropped] == [
        (7, "cell7", "empty_cell"), (9, "cell9", "below_min_genes"), (11, "cell11", "not_primary_data"),
    ]  # fmt: skip
    assert all(row["detail"] for row in dropped)
    kept = [n for n in range(5, 45) if n not in (7, 9, 11)]
    assert rows.column("source_row").to_pylist() == kept
    assert rows.column("cell_type").to_pylist() == ["T"] * 37
    for n, tokens, length, total in zip(
        kept, *(rows.column(name).to_pylist() for name in ("input_ids", "length", "total_counts")), strict=True
    ):
        genes = np.flatnonzero(counts[n])
        reference = rank_value_tokens(vocabulary.token_ids[genes], counts[n, genes], vocabulary)
        assert tokens == reference.input_ids.tolist()
        assert (length, total) == (len(tokens), counts[n].sum())
    assert tally.tokens == sum(rows.column("length").to_pylist())
    for bins in (tally.length_bins, tally.depth_bins, tally.genes_bins):
        assert sum(bins) == tally.kept
    assert tally.counts_by_fate == {FATES[0]: float(counts[5:45].sum())}
    assert set(tally.seconds) >= {"read", "rank", "write", "hash"}
    assert len(set(rows.column("content_hash").to_pylist())) > 1


def test_the_name_and_the_bytes_do_not_depend_on_how_rows_are_read(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store, monkeypatch: Any
) -> None:
    path = write_atlas("a.h5ad", counts_of(300, seed=2), obs={"donor_id": [f"d{i % 7}" for i in range(300)]})
    names = set()
    for nonzeros in (1, 137, 5_000, 10**7):
        monkeypatch.setattr(plan, "BLOCK_NONZEROS", nonzeros)
        answer, _, _ = run(path, vocabulary, local_store, tmp_path / "c")
        names.add(answer["part"]["path"])
    assert len(names) == 1


def test_bad_values_refuse_the_file_or_only_their_cells(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    counts = counts_of(2_000, seed=3)
    counts.data[counts.indptr[1_001] + 2] = -1
    counts.data[counts.indptr[1_500] + 1] = np.nan
    path = write_atlas("a.h5ad", counts)
    with pytest.raises(AtlasError, match=r"a\.h5ad.*(cell|negative|finite)"):
        run(path, vocabulary, local_store, tmp_path / "c", slot="X")
    answer, dropped, rows = run(path, vocabulary, local_store, tmp_path / "c", slot="X", bad_values="quarantine")
    assert answer["tally"]["dropped"] == {"bad_values": 2}
    assert [(row["source_row"], row["detail"]) for row in dropped] == [(1_001, "negative"), (1_500, "not finite")]
    assert rows.num_rows == 1_998


def test_no_cell_left_writes_no_part(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path = write_atlas("a.h5ad", counts_of(4), obs={"is_primary_data": [False] * 4})
    answer, dropped, rows = run(path, vocabulary, local_store, tmp_path / "c")
    assert (answer["part"], rows, len(dropped)) == (None, None, 4)
    assert not list((tmp_path / "c").rglob("*.parquet"))


def test_further_obs_columns_become_labels(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path = write_atlas("a.h5ad", counts_of(6), obs={"stim": ["a", "b"] * 3, "is_primary_data": [True, False] * 3})
    _, _, rows = run(path, vocabulary, local_store, tmp_path / "c", cell_rules=CellRules(keep_obs=("stim",)))
    assert [dict(row) for row in rows.column("labels").to_pylist()] == [{"stim": "a"}] * 3


def test_tallies_add_up_in_any_order_and_cells_can_leave_again() -> None:
    first = Tally(read=5, kept=4, dropped={"where": 1}, tokens=40, length_bins=[0, 4], counts_by_fate={"mapped": 3.0})
    second = Tally(read=3, kept=3, tokens=9, largest_count=7.0, length_bins=[3], counts_by_fate={"unknown": 1.0})
    one, other = Tally(), Tally()
    one.add(first), one.add(second), other.add(second), other.add(first)
    assert one == other
    assert (one.read, one.length_bins, one.largest_count) == (8, [3, 4], 7.0)
    one.drop(Tally(dropped={"duplicate_cell": 2}, tokens=10, length_bins=[0, 2]))
    assert (one.read, one.kept, one.n_dropped, one.tokens, one.length_bins) == (8, 5, 3, 39, [3, 2])


def test_part_bytes_do_not_depend_on_how_rows_are_handed_over(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    path = write_atlas("a.h5ad", counts_of(100, seed=5), obs={"stim": ["x", "y"] * 50})
    _, _, rows = run(path, vocabulary, local_store, tmp_path / "c", cell_rules=CellRules(keep_obs=("stim",)))
    rows = rows.cast(rows.schema.remove_metadata())
    whole = part_bytes(rows, row_group_cells=32)
    writer = PartWriter(rows.schema, row_group_cells=32)
    for start in range(0, 100, 7):
        writer.add(rows.slice(start, 7))
    assert writer.finish() == whole
    file = pq.ParquetFile(io.BytesIO(whole))
    assert [file.metadata.row_group(i).num_rows for i in range(4)] == [32, 32, 32, 4]
    columns = {file.metadata.row_group(0).column(i).path_in_schema: file.metadata.row_group(0).column(i)
               for i in range(file.metadata.num_columns)}  # fmt: skip
    assert columns["length"].is_stats_set
    assert not columns["input_ids.list.element"].is_stats_set
