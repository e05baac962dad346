"""`genescale inspect`: it says what an ingest would do, and is right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.config import IngestConfig
from genescale.ingestion.inspect_command import inspect
from genescale.ingestion.reports.inspect_text import text
from genescale.ingestion.reports.inspection import Inspection, inspect_source, inspect_sources, sampled_ranges
from genescale.ingestion.sources import find_sources
from genescale.platform import cli
from genescale.platform.errors import SettingsError
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import Vocabulary
from genescale.platform.vocabulary_files import write_vocabulary

NO_RAY = (
    "import sys; from genescale.ingestion.inspect_command import inspect; status = inspect(sys.argv[1:]);"
    "print('ray' in sys.modules); sys.exit(status)"
)


@pytest.fixture
def known(vocabulary: Vocabulary, tmp_path: Path, local_store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of the vocabulary; the working folder is the test's own, without settings."""
    monkeypatch.chdir(tmp_path)
    write_vocabulary(vocabulary, str(tmp_path / "v.parquet"), local_store)
    return str(tmp_path / "v.parquet")


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def looked(path: Path, vocabulary: Vocabulary, store: Store, *, full: bool = False, **options: Any) -> Inspection:
    return inspect_source(str(path), store, vocabulary, IngestConfig(**options), full=full)


def test_a_good_file_is_described_and_exit_status_is_0(
    known: str, write_atlas: Any, counts_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = counts_of(50)
    obs = {"cell_type": ["T"] * 50, "Donor": ["d1"] * 50, "stim": ["a"] * 50}
    write_atlas("one.h5ad", np.log1p(counts), raw=counts, obs=obs)
    assert inspect(["one.h5ad", "--vocabulary", known, "--obs", "donor_id=Donor"]) == 0
    shown = capsys.readouterr().out
    for told in (
        "would be ingested, dataset 'one'",
        "h5ad, ",
        "50 cells × 60 genes",
        "raw.X: whole numbers up to",
        "not X: ",
        "var index",
        "100%",
        "all looked at: 100% kept (50)",
        "filled: cell_type, donor_id <- Donor",
        "not kept: stim",
        "1 of 1 would be accepted, with 50 new cells.",
    ):
        assert told in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_json_is_complete(known: str, write_atlas: Any, counts_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_atlas("one.h5ad", counts_of(50))
    assert inspect(["one.h5ad", "--vocabulary", known, "--json"]) == 0
    told = printed(capsys)
    assert (told["schema_version"], told["accepted"], told["vocabulary"]["genes"]) == (1, True, 60)
    (one,) = told["sources"]
    assert (one["outcome"], one["exact"], one["n_cells"], one["n_genes"]) == ("would_ingest", True, 50, 60)
    assert one["expected"]["kept"] == one["kept"] == 50
    assert one["gene_report"]["fates"]["mapped"]["genes"] == 60
    assert one["gene_report"]["fates"]["mapped"]["share_of_counts"] == 1.0
    assert one["distributions"]["genes"]["p50"] > 7
    assert one["stored"] == counts_of(50).nnz
    assert one["failure"] is None


def test_inspect_foretells_the_ingest(
    tmp_path: Path, ray_local: None, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    from genescale.ingestion.pipeline import ingest

    counts = counts_of(300).tolil()
    counts[:20] = 0
    obs = {"is_primary_data": [i % 3 > 0 for i in range(300)], "tissue": ["lung", "gut"] * 150}
    genes = [f"ENSG{i:011d}.{i % 4}" for i in range(1, 59)] + ["ERCC-00002", "ENSG00000999999"]
    path = write_atlas("one.h5ad", counts.tocsr(), genes=genes, obs=obs)
    write_atlas("empty.h5ad", counts_of(10) * 0)
    config = IngestConfig(where="tissue = 'lung'", min_genes=20)
    report = ingest(
        [str(tmp_path / "one.h5ad"), str(tmp_path / "empty.h5ad")],
        str(tmp_path / "corpus"),
        vocabulary=vocabulary,
        store=local_store,
        config=config,
    )
    good, bad = report.sources
    found = inspect_source(str(path), local_store, vocabulary, config)
    assert found.exact
    assert found.source.tally.dropped
    for field in ("read", "kept", "dropped", "tokens", "counts_by_fate", "length_bins", "depth_bins", "largest_count"):
        assert getattr(found.source.tally, field) == getattr(good.tally, field), field
    assert found.expected is not None
    assert (found.expected.kept, found.expected.tokens) == (good.tally.kept, good.tally.tokens)
    parts = sum(entry.size_bytes for entry in local_store.list(str(tmp_path / "corpus" / "dataset_id=one")))
    assert found.expected.corpus_bytes == parts
    assert found.source.fates == good.fates
    refused = inspect_source(bad.uri, local_store, vocabulary, config)
    assert refused.outcome == "would_refuse"
    assert refused.source.failure == bad.failure


def test_a_refused_file_is_told_with_the_error_and_exit_status_1(
    known: str, tmp_path: Path, write_atlas: Any, counts_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write_atlas("good.h5ad", counts_of(20))
    write_atlas("log.h5ad", np.log1p(counts_of(20)))
    mouse = [f"ENSMUSG{i:011d}" for i in range(1, 61)]
    write_atlas("mouse.h5ad", counts_of(20), genes=mouse, obs={"cell_type": ["B"] * 20})
    (tmp_path / "page.h5ad").write_text("<html>no such key</html>")
    assert inspect(["*.h5ad", "--vocabulary", known]) == 1
    shown = capsys.readouterr().out
    assert "1 of 4 would be accepted" in shown
    assert shown.count("WOULD BE REFUSED") == 3
    assert "[not_counts]" in shown
    assert "mouse" in shown
    assert inspect(["*.h5ad", "--vocabulary", known, "--json"]) == 1
    told = {source["dataset_id"]: source for source in printed(capsys)["sources"]}
    assert [name for name, source in told.items() if source["accepted"]] == ["good"]
    assert told["log"]["slots_seen"] == {} or "X" in told["log"]["slots_seen"]
    # What was found out before the refusal is there: the mouse file's format and counts.
    assert (told["mouse"]["kind"], told["mouse"]["counts_slot"]) == ("h5ad", "X")
    assert told["mouse"]["obs_columns"] == {"cell_type": "cell_type"}
    assert all(len(source["findings"][0]["next"]) > 20 for source in told.values() if not source["accepted"])


def test_bad_values_anywhere_are_found_by_a_full_read(
    write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genescale.ingestion.reports import inspection

    monkeypatch.setattr(inspection, "SAMPLED_CELLS", 64)
    monkeypatch.setattr(inspection, "SAMPLED_VALUES", 2_000)
    counts = counts_of(4_000).tolil()
    counts[2_003, 5] = 2.5
    path = write_atlas("one.h5ad", counts.tocsr())
    # The slot is named, because looking for it would read all of so small a file.
    sampled = looked(path, vocabulary, local_store, counts_slot="X")
    assert sampled.accepted
    assert not sampled.exact
    assert sampled.source.tally.read <= 64
    assert "spread over the file" in text([sampled], ())
    assert sampled.expected is not None
    assert sampled.expected.kept == 4_000
    true_tokens = sum(min(row.nnz, 62) + 2 for row in counts.tocsr())
    assert sampled.expected.tokens == pytest.approx(true_tokens, rel=0.1)
    full = looked(path, vocabulary, local_store, full=True, counts_slot="X")
    assert not full.accepted
    assert full.source.failure is not None
    assert "2.5" in full.source.failure.message
    assert "2,003" in full.source.failure.message


def test_a_sample_says_that_it_is_one_when_it_refuses(
    write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genescale.ingestion.reports import inspection

    monkeypatch.setattr(inspection, "SAMPLED_CELLS", 32)
    # One cell of a rare kind, which no sample meets.
    path = write_atlas("one.h5ad", counts_of(1_000), obs={"kind": ["rare" if i == 360 else "b" for i in range(1_000)]})
    sampled = looked(path, vocabulary, local_store, where="kind = 'rare'")
    assert sampled.source.failure is not None
    assert "--full" in sampled.source.failure.message
    full = looked(path, vocabulary, local_store, full=True, where="kind = 'rare'")
    assert full.accepted
    assert full.source.tally.kept == 1


def test_a_large_gene_major_file_is_read_only_when_asked_for(
    write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genescale.ingestion.reports import inspection

    path = write_atlas("one.h5ad", counts_of(200).tocsc())
    small = looked(path, vocabulary, local_store)
    assert (small.layout, small.sequential, small.exact) == ("csc", True, True)
    monkeypatch.setattr(inspection, "MOST_VALUES_AT_ONCE", 100)
    found = looked(path, vocabulary, local_store)
    assert found.accepted
    assert found.expected is None
    assert found.source.tally.read == 0
    shown = text([found], ())
    assert "its cells were not looked at (--full reads them)" in " ".join(shown.split())
    assert "read as a whole, by one task" in " ".join(shown.split())
    full = looked(path, vocabulary, local_store, full=True)
    assert full.expected == expected_in_its_time(full, small)


def expected_in_its_time(one: Inspection, other: Inspection) -> Any:
    """What another inspection expected, in the time of this one: seconds are measured, not reproduced."""
    assert one.expected is not None
    assert other.expected is not None
    return dataclasses.replace(other.expected, seconds=one.expected.seconds)


@pytest.mark.parametrize(("n_cells", "values"), [(0, 3), (1, 3), (4_096, 3), (4_097, 3), (50_000, 900), (50_000, 0)])
def test_sampled_rows_are_in_bounds_apart_and_few(n_cells: int, values: int) -> None:
    stored_before = np.arange(n_cells + 1, dtype=np.int64) * values
    ranges = sampled_ranges(stored_before)
    assert all(0 <= start < stop <= n_cells for start, stop in ranges)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
    cells = sum(stop - start for start, stop in ranges)
    assert cells <= 4_096
    if n_cells <= 4_096:
        assert cells == n_cells
    else:
        assert ranges[0][0] == 0
        assert ranges[-1][1] > 0.95 * n_cells


def test_one_cell_of_enormous_size_is_still_sampled() -> None:
    stored_before = np.array([0, 10**9, 2 * 10**9, 2 * 10**9 + 5], dtype=np.int64)
    assert sampled_ranges(stored_before) == [(0, 1), (1, 2), (2, 3)]


def test_corpus_knows_its_sources(
    known: str,
    tmp_path: Path,
    ray_local: None,
    write_atlas: Any,
    counts_of: Any,
    vocabulary: Vocabulary,
    local_store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from genescale.ingestion.pipeline import ingest

    corpus = str(tmp_path / "corpus")
    write_atlas("one.h5ad", counts_of(20))
    ingest([str(tmp_path / "one.h5ad")], corpus, vocabulary=vocabulary, store=local_store)
    write_atlas("two.h5ad", counts_of(20, seed=1))
    # Without --vocabulary, the corpus's own is used.
    assert inspect(["one.h5ad", "two.h5ad", "--corpus", corpus]) == 0
    shown = capsys.readouterr().out
    assert "is in the corpus already and would be left out" in shown
    assert "20 of 20 are in version 1" in shown
    assert "with 20 new cells" in shown
    # The same file with other content is a new version of its dataset.
    write_atlas("one.h5ad", counts_of(30, seed=2))
    assert inspect(["one.h5ad", "--corpus", corpus, "--json"]) == 0
    assert printed(capsys)["sources"][0]["outcome"] == "would_replace"
    # Another file of the same name is not.
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "two.h5ad", tmp_path / "other" / "one.h5ad")
    assert inspect(["other/one.h5ad", "--corpus", corpus]) == 1
    assert "another file is dataset 'one'" in " ".join(capsys.readouterr().out.split())
    assert inspect(["other/one.h5ad", "--corpus", corpus, "--dataset-id", "three"]) == 0


def test_works_on_object_storage(
    s3_store: tuple[Store, str], write_atlas: Any, counts_of: Any, vocabulary: Vocabulary
) -> None:
    store, bucket = s3_store
    store.upload(write_atlas("one.h5ad", counts_of(40)), join(bucket, "atlases", "one.h5ad"))
    before = store.list(bucket)
    (found,) = inspect_sources(find_sources([bucket], store).files, IngestConfig(), vocabulary, store)
    assert found.accepted
    assert found.source.tally.kept == 40
    assert store.list(bucket) == before


def test_needs_no_ray_and_leaves_nothing(
    known: str, tmp_path: Path, write_atlas: Any, counts_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atlas("one.h5ad", counts_of(20))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    before = sorted(path.name for path in tmp_path.iterdir())
    run = subprocess.run(
        [sys.executable, "-c", NO_RAY, "one.h5ad", "--vocabulary", known], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("False")
    assert [path.name for path in scratch.iterdir() if "genescale" in path.name] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_scratch_is_removed_when_the_file_is_bad(
    tmp_path: Path, write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store, monkeypatch: Any
) -> None:
    counts = counts_of(50).tolil()
    counts[49, 3] = -1
    path = write_atlas("one.h5ad", counts.tocsr())
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    assert not looked(path, vocabulary, local_store, counts_slot="X").accepted
    assert list((tmp_path / "scratch").iterdir()) == []


def test_hostile_names_do_not_reach_the_terminal(
    write_atlas: Any, counts_of: Any, vocabulary: Vocabulary, local_store: Store
) -> None:
    hostile = "a\x1b[2J\x07\nb"
    path = write_atlas("one.h5ad", counts_of(20), obs={hostile: [1] * 20}, var={hostile: [hostile] * 60})
    shown = text([looked(path, vocabulary, local_store)], ())
    assert all(line.isprintable() for line in shown.splitlines())


def test_wrong_use_is_told(known: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="neither --vocabulary nor --corpus"):
        inspect(["one.h5ad"])
    assert cli.main(["inspect", "missing.h5ad", "--vocabulary", known]) == 2
    assert "missing.h5ad" in capsys.readouterr().err


@pytest.mark.shared
def test_real_files_of_every_format(
    shared_data: Path, vocabulary: Vocabulary, local_store: Store, tmp_path: Path
) -> None:
    from genescale.platform.vocabulary import read_vocabulary

    # The vocabulary that comes as text, of the newer published model.
    known = read_vocabulary(str(shared_data / "vocabularies" / "geneformer_gc104M_genes.tsv"), local_store)
    sources = find_sources([str(shared_data / "atlases")], local_store)
    found = {
        one.source.uri.rpartition("/")[2]: one
        for one in inspect_sources(sources.files, IngestConfig(), known, local_store)
    }
    accepted = {name for name, one in found.items() if one.accepted}
    assert {
        "pbmc3k_counts_ensembl.h5ad", "pbmc3k_lognorm_X_counts_in_raw.h5ad",
        "kang_harmony_ctrl_stim_counts_symbols.h5ad", "pbmc_facs_train_counts_ensembl.h5ad", "pbmc_scenic.loom",
    } <= accepted  # fmt: skip
    assert {one.source.kind for one in found.values()} >= {"h5ad", "loom", "zarr", "10x-h5", "mtx"}
    panel = found["kang_muscat_ctrl_12k_counts_ensembl.h5ad"]
    assert panel.source.failure is not None
    assert "--min-genes-measured 1267" in panel.source.failure.message
    raw = found["pbmc3k_lognorm_X_counts_in_raw.h5ad"]
    assert raw.source.counts_slot == "raw.X"
    assert "log" in raw.source.slots_seen["X"]
    assert len(text(list(found.values()), ()).splitlines()) > 60
