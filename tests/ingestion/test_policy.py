"""The policy for the mess of real files, row by row: what is done with each, and that messages say what, where, next.

The rows are those of the policy table of the ingestion study (forty of them); a case is named after its row.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import sparse

from genescale.ingestion.pipeline import IngestConfig, ingest
from genescale.ingestion.reports.inspection import Inspection, inspect_source
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.platform.vocabulary_command import vocabulary as vocabulary_command

N_CELLS = 60
GENES = tuple(f"ENSG{i:011d}" for i in range(1, 61))
REFUSED = "would_refuse"
TAKEN = "would_ingest"


class Files:
    """Writes the file of a case."""

    def __init__(self, folder: Path, write_atlas: Any, counts_of: Any) -> None:
        self.folder, self._write, self._counts_of = folder, write_atlas, counts_of

    def counts(self, n_cells: int = N_CELLS) -> sparse.csr_matrix:
        found: sparse.csr_matrix = self._counts_of(n_cells, seed=4)
        return found

    def dense(self) -> Any:
        return self.counts().toarray()

    def write(self, counts: Any = None, **parts: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata remarks on some of the mess
            path: Path = self._write("lung.h5ad", self.counts() if counts is None else counts, **parts)
        return path

    def edited(self, edit: Callable[[h5py.File], None], counts: Any = None) -> Path:
        path = self.write(counts)
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    def other(self, kind: str) -> Path:
        """A file of another format; see `fuzz/originals.py`."""
        place = Path(__file__).parent / "fuzz" / "originals.py"
        spec = importlib.util.spec_from_file_location("fuzz_originals", place)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path: Path = module.write_original(kind, self.folder)
        return path


@dataclasses.dataclass(frozen=True)
class Case:
    """A file, what becomes of it, and words that the message (or the facts and notes) must hold."""

    name: str
    make: Callable[[Files], Path]
    outcome: str
    says: Sequence[str] = ()
    code: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Facts of the inspection, as in its JSON."""


def log_normalised(counts: Any) -> Any:
    dense = np.asarray(counts.todense(), dtype=np.float64)
    return sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 10_000).astype(np.float32))


def per_ten_thousand(counts: Any) -> Any:
    dense = np.asarray(counts.todense(), dtype=np.float64)
    return sparse.csr_matrix((dense / dense.sum(axis=1, keepdims=True) * 10_000).astype(np.float32))


def ambient_corrected(counts: Any) -> Any:
    found = counts * 20
    found.data = (found.data - np.linspace(0, 0.4, found.nnz)).astype(np.float32)
    return found


def with_value(files: Files, value: float) -> Any:
    counts = files.counts()
    counts.data[100] = value
    return counts


def replaced(file: h5py.File, name: str, data: Any, **how: Any) -> None:
    attributes = dict(file[name].attrs) if name in file else {}
    if name in file:
        del file[name]
    file.create_dataset(name, data=data, **how).attrs.update(attributes)


def renamed(names: Sequence[str]) -> Callable[[Files], Path]:
    return lambda files: files.write(genes=list(names))


def untidy(file: h5py.File) -> None:
    """Unsorted, with explicit zeros, and one entry split in two."""
    data, indices, indptr = (file[f"X/{part}"][()] for part in ("data", "indices", "indptr"))
    new_data, new_indices, new_indptr = [], [], [0]
    for start, stop in itertools.pairwise(indptr):
        row, columns = data[start:stop][::-1], indices[start:stop][::-1]
        new_data.append(np.concatenate([row, [1.0, 0.0]]))
        new_indices.append(np.concatenate([columns, [columns[0], 0]]))
        new_indptr.append(new_indptr[-1] + len(row) + 2)
    replaced(file, "X/data", np.concatenate(new_data).astype(np.float32))
    replaced(file, "X/indices", np.concatenate(new_indices).astype(np.int32))
    replaced(file, "X/indptr", np.array(new_indptr, dtype=np.int64))


def edit_value(name: str, place: int, value: Any) -> Callable[[Files], Path]:
    def edit(file: h5py.File) -> None:
        values = file[name][()]
        values[place] = value
        replaced(file, name, values)

    return lambda files: files.edited(edit)


def cut_off(files: Files) -> Path:
    path = files.write()
    path.write_bytes(path.read_bytes()[:-2_000])
    return path


def holding(content: bytes) -> Callable[[Files], Path]:
    def make(files: Files) -> Path:
        path = files.folder / "lung.h5ad"
        path.write_bytes(content)
        return path

    return make


def flipped_bit(files: Files) -> Path:
    path = files.write()
    with h5py.File(path) as file:
        place = file["X/data"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[place.byte_offset + place.size // 2] ^= 4
    path.write_bytes(data)
    return path


def unwritten(file: h5py.File) -> None:
    values, attributes = file["X/data"][()], dict(file["X/data"].attrs)
    del file["X/data"]
    stored = file.create_dataset("X/data", values.shape, dtype=values.dtype, chunks=(100,), compression="gzip")
    stored[:300] = values[:300]
    stored.attrs.update(attributes)


def unzipped(files: Files) -> Path:
    path = files.other("zarr2-zip")
    folder = path.with_suffix("")
    (folder / ".zmetadata").unlink(missing_ok=True)
    path.unlink()
    return folder


def zstd(files: Files) -> Path:
    import hdf5plugin

    path = files.write()
    with h5py.File(path, "r+") as file:
        replaced(file, "X/data", file["X/data"][()], chunks=(100,), **hdf5plugin.Zstd())
    return path


def unfiltered(files: Files) -> Path:
    path = files.other("tenx")
    empty = 40_000
    with h5py.File(path, "r+") as file:
        group = file["matrix"]
        indptr = group["indptr"][()]
        replaced(file, "matrix/indptr", np.concatenate([indptr, np.full(empty, indptr[-1])]))
        replaced(file, "matrix/barcodes", np.array([f"B{i}-1" for i in range(len(indptr) - 1 + empty)], dtype="S18"))
        replaced(file, "matrix/shape", np.array([60, len(indptr) - 1 + empty], dtype=np.int32))
    return path


def antibodies(files: Files) -> Path:
    path = files.other("tenx")
    with h5py.File(path, "r+") as file:
        kinds = file["matrix/features/feature_type"][()]
        names = file["matrix/features/id"][()]
        kinds[50:], names[50:] = b"Antibody Captur", b"CD3_TotalSeqB"
        replaced(file, "matrix/features/feature_type", kinds.astype("S20"))
        replaced(file, "matrix/features/id", names)
    return path


MESSY_OBS = {
    "donor_id": [1, 2] * 30,
    "sex": [True, False] * 30,
    "tissue": ["lung", None] * 30,
    **{f"column{i}": [0.5] * N_CELLS for i in range(400)},
}
SPIKED = [*GENES[:50], *(f"ERCC-{i:05d}" for i in range(10))]
PRIMARY = {"is_primary_data": [True] * 40 + [False] * 20}
PASSED = {"filter_pass": [1] * 50 + [0] * 10}

NOT_COUNTS = ("no raw counts found", "give the file that holds them, or name their slot with --counts-slot")
CASES = (
    Case("row01-raw.X", lambda f: f.write(log_normalised(f.counts()), raw=f.counts()), TAKEN,
         ["X: 100 %", "log-normalised", "constant at 10,000"], facts={"counts_slot": "raw.X"}),
    Case("row01-layer", lambda f: f.write(log_normalised(f.counts()), layers={"raw_counts": f.counts()}), TAKEN,
         ["log-normalised"], facts={"counts_slot": "layers/raw_counts"}),
    Case("row02-no-counts", lambda f: f.write(log_normalised(f.counts())), REFUSED,
         [*NOT_COUNTS, "X: 100 % of 1,8", "log-normalised", "for example"], "not_counts"),
    Case("row03-two-slots", lambda f: f.write(f.counts(), layers={"counts": f.counts() * 2}), REFUSED,
         ["layers/counts and X both look like counts but differ in 100 %", "--counts-slot layers/counts"],
         "not_counts"),
    Case("row03-chosen", lambda f: f.write(f.counts(), layers={"counts": f.counts() * 2}), TAKEN,
         ["named by --counts-slot"], config={"counts_slot": "X"}, facts={"counts_slot": "X"}),
    Case("row04-ambient", lambda f: f.write(ambient_corrected(f.counts())), REFUSED,
         ["ambient-corrected", "--allow-fractional", "none is negative"], "not_counts"),
    Case("row04-allowed", lambda f: f.write(ambient_corrected(f.counts())), TAKEN, ["ambient-corrected"],
         config={"allow_fractional": True}, facts={"kept": N_CELLS}),
    Case("row05-tp10k", lambda f: f.write(per_ten_thousand(f.counts())), REFUSED,
         [*NOT_COUNTS, "row sums are constant at 10,000", "normalised, not counts"], "not_counts"),
    Case("row06-total-known", lambda f: f.write(log_normalised(f.counts()), obs={"total_counts": [100.0] * N_CELLS}),
         REFUSED, [*NOT_COUNTS, "log-normalised"], "not_counts"),
    Case("row07-negative", lambda f: f.write(with_value(f, -3)), REFUSED,
         ["are negative", "scaled data", "for example -3"], "not_counts"),
    Case("row07-nan", lambda f: f.write(with_value(f, np.nan)), REFUSED, ["not finite", "nan"], "not_counts"),
    Case("row07-inf", lambda f: f.write(with_value(f, np.inf)), REFUSED, ["not finite", "inf"], "not_counts"),
    Case("row07-named-slot", lambda f: f.write(with_value(f, -3)), REFUSED,
         ["X", "-3", "ENSG", "cell"], "not_counts", config={"counts_slot": "X"}),
    Case("row07-quarantine", lambda f: f.write(with_value(f, -3)), TAKEN, ["quarantine"],
         config={"counts_slot": "X", "bad_values": "quarantine", "max_bad_cells": 0.05},
         facts={"dropped": {"bad_values": 1}, "kept": N_CELLS - 1}),
    Case("row07-too-many", lambda f: f.write(with_value(f, -3)), REFUSED, ["1 of 60 cells", "0.1%"], "not_counts",
         config={"counts_slot": "X", "bad_values": "quarantine"}),
    *(
        Case(f"row08-{kind}", lambda f, kind=kind: f.write(f.counts().astype(kind)), TAKEN, ["whole numbers up to 6"],
             facts={"kept": N_CELLS, "dropped": {}})
        for kind in ("f8", "i1", "u2", "i8")
    ),
    Case("row08-bool", lambda f: f.write(f.counts() > 0), REFUSED, ["true/false", "detection calls"], "not_counts"),
    Case("row08-inexact", lambda f: f.write(with_value(f, 2.0**25)), REFUSED,
         ["exceed 16,777,216", "float32"], "not_counts"),
    Case("row09-float16", lambda f: f.edited(lambda h: replaced(h, "X/data", h["X/data"][()].astype("f2"))), TAKEN,
         facts={"kept": N_CELLS}),
    Case("row09-big-endian", lambda f: f.edited(lambda h: replaced(h, "X/data", h["X/data"][()].astype(">f4"))),
         TAKEN, facts={"kept": N_CELLS}),
    Case("row10-csc", lambda f: f.write(f.counts().tocsc()), TAKEN, ["CSC", "scratch in"],
         facts={"sequential": True, "kept": N_CELLS}),
    Case("row11-dense", lambda f: f.write(f.dense()), TAKEN, facts={"layout": "dense", "kept": N_CELLS}),
    Case("row12-untidy", lambda f: f.edited(untidy), TAKEN,
         facts={"explicit_zeros": N_CELLS, "repeated_entries": N_CELLS, "kept": N_CELLS}),
    Case("row13-index", edit_value("X/indices", 100, 60), REFUSED,
         ["X: 1 gene indices lie outside 0 … 59", "cell 2", "do not belong together"], "atlas"),
    Case("row13-indptr", edit_value("X/indptr", 5, 10**6), REFUSED,
         ["indptr does not rise from 0 to", "write the file again"], "atlas"),
    Case("row13-length", lambda f: f.edited(lambda h: replaced(h, "X/indices", h["X/indices"][:-3])), REFUSED,
         ["values but", "indices", "write the file again"], "atlas"),
    Case("row14-column", lambda f: f.write(genes=[f"g{i}" for i in range(60)], var={"ensembl_id": GENES}), TAKEN,
         facts={"gene_column": "ensembl_id", "genes_mapped": 60}),
    Case("row15-versions", renamed([f"{gene}.7" for gene in GENES]), TAKEN, ["removed the version from 60 ids"],
         facts={"genes_mapped": 60}),
    Case("row15-par-y", renamed([*GENES[:59], f"{GENES[0]}_PAR_Y"]), TAKEN, ["par_y"],
         facts={"genes_mapped": 59, "genes_summed": 0}),
    Case("row16-symbols", renamed([f"GENE{i}" for i in range(1, 61)]), TAKEN, facts={"genes_mapped": 60}),
    Case("row16-unknown-symbols", renamed([f"LOC{i}" for i in range(60)]), REFUSED,
         ["0 of 60 genes", "'LOC0'", "70%", "--gene-table"], "atlas"),
    Case("row17-mouse", renamed([f"ENSMUSG{i:011d}" for i in range(60)]), REFUSED,
         ["ENSMUSG", "NCBITaxon:10090", "the vocabulary is of Homo sapiens", "use a vocabulary of that species"],
         "atlas"),
    Case("row17-declared", lambda f: f.write(uns={"organism_ontology_term_id": "NCBITaxon:10090"}), REFUSED,
         ["NCBITaxon:10090", "--ignore-organism"], "atlas"),
    Case("row18-spike-ins", renamed(SPIKED), TAKEN, ["spike_in"], facts={"genes_mapped": 50}),
    Case("row18-barnyard", renamed([*GENES[:30], *(f"ENSMUSG{i:011d}" for i in range(30))]), TAKEN,
         ["left out 30 genes of Mus musculus", "--where"], facts={"genes_mapped": 30}),
    Case("row18-antibodies", antibodies, TAKEN, ["other_feature"], facts={"genes_mapped": 50}),
    Case("row19-repeated", renamed([*GENES[:59], GENES[0]]), TAKEN, ["2 columns share 1 gene; counts summed"],
         facts={"genes_summed": 1}),
    Case("row20-few-genes", lambda f: f.write(f.counts()[:, :15], genes=GENES[:15]), REFUSED,
         ["only 15 of 60 vocabulary genes are present", "ranks differently", "--min-genes-measured 15"], "atlas"),
    Case("row20-allowed", lambda f: f.write(f.counts()[:, :15], genes=GENES[:15]), TAKEN,
         config={"min_genes_measured": 10}, facts={"genes_mapped": 15}),
    Case("row21-n-counts", lambda f: f.write(obs={"n_counts": [5.0] * N_CELLS}), TAKEN,
         ["n_counts", "sums over all genes"], facts={"kept": N_CELLS, "dropped": {}}),
    Case("row22-some-empty", lambda f: f.write(sparse.vstack([f.counts(), sparse.csr_matrix((20, 60), dtype="f4")])),
         TAKEN, ["empty_cell (20)"], facts={"dropped": {"empty_cell": 20}, "kept": N_CELLS}),
    Case("row22-most-empty", lambda f: f.write(sparse.vstack([f.counts(), sparse.csr_matrix((90, 60), dtype="f4")])),
         REFUSED, ["90 of 150", "90 without any count", "--max-empty-share"], "atlas"),
    Case("row23-primary", lambda f: f.write(obs=PRIMARY), TAKEN, ["not_primary_data (20)", "--all-data"],
         facts={"dropped": {"not_primary_data": 20}}),
    Case("row23-all", lambda f: f.write(obs=PRIMARY), TAKEN, config={"primary_only": False},
         facts={"dropped": {}, "kept": N_CELLS}),
    Case("row23-filter-pass", lambda f: f.write(obs=PASSED), TAKEN, facts={"dropped": {"filter_pass": 10}}),
    Case("row24-barcodes", lambda f: f.edited(
        lambda h: replaced(h, "obs/_index", ["same"] * N_CELLS, dtype=h5py.string_dtype())), TAKEN,
        facts={"kept": N_CELLS}),
    Case("row26-obs", lambda f: f.write(obs=MESSY_OBS), TAKEN, facts={"kept": N_CELLS}),
    Case("row26-unparseable", lambda f: f.write(obs={"is_primary_data": ["maybe"] * 10 + ["True"] * 50}), TAKEN,
         ["is_primary_data", "10", "maybe"], facts={"kept": N_CELLS}),
    Case("row27-wide", lambda f: f.write(obs=MESSY_OBS), TAKEN, ["column399"], facts={"kept": N_CELLS}),
    Case("row29-newer", lambda f: f.edited(lambda h: h["X"].attrs.update({"encoding-version": "9.9.9"})), REFUSED,
         ["X: it uses encoding csr_matrix 9.9.9", "0.1.0", "update Genescale"], "atlas"),
    Case("row29-unknown", lambda f: f.edited(lambda h: h["X"].attrs.update({"encoding-type": "hologram"})), REFUSED,
         ["hologram", "csr_matrix 0.1.0"], "atlas"),
    Case("row29-missing", lambda f: f.edited(lambda h: h["X"].attrs.pop("encoding-type")), REFUSED,
         ["X: it does not say how it is encoded", "Write it again"], "atlas"),
    Case("row30-zarr2-zip", lambda f: f.other("zarr2-zip"), TAKEN, facts={"kind": "zarr", "kept": 120}),
    Case("row30-zarr3-zip", lambda f: f.other("zarr3-zip"), TAKEN, facts={"kind": "zarr", "kept": 120}),
    Case("row30-folder", unzipped, TAKEN, facts={"kind": "zarr", "kept": 120}),
    Case("row31-cut-off", cut_off, REFUSED, ["cut off", "bytes are there", "Download it again"], "atlas"),
    Case("row31-empty", holding(b""), REFUSED, ["empty (0 bytes)", "Download it again"], "atlas"),
    Case("row31-error-page", holding(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), REFUSED,
         ["HTML or XML page", "failed download"], "atlas"),
    Case("row32-flipped-bit", flipped_bit, REFUSED, ["X/data: chunk 0 is damaged", "Download the file again"], "atlas"),
    Case("row33-unwritten", lambda f: f.edited(unwritten), REFUSED,
         ["16 of 19 chunks of /X/data were never written", "interrupted"], "atlas"),
    Case("row34-lzf", lambda f: f.edited(lambda h: replaced(h, "X/data", h["X/data"][()], compression="lzf")), TAKEN,
         facts={"kept": N_CELLS}),
    Case("row34-zstd", zstd, TAKEN, facts={"kept": N_CELLS}),
    Case("row35-loom", lambda f: f.other("loom"), TAKEN, facts={"kind": "loom", "kept": 120, "genes_mapped": 60}),
    Case("row36-10x", lambda f: f.other("tenx"), TAKEN, facts={"kind": "10x-h5", "kept": 120}),
    Case("row37-mtx", lambda f: f.other("mtx"), TAKEN, ["scratch in"], facts={"kind": "mtx", "kept": 120}),
    Case("row37-unfiltered", unfiltered, REFUSED,
         ["40,120 barcodes", "unfiltered matrix", "--allow-unfiltered"], "atlas"),
)  # fmt: skip


def looked(case: Case, files: Files, vocabulary: Vocabulary, store: Store) -> tuple[Inspection, str]:
    path = case.make(files)
    found = inspect_source(str(path), store, vocabulary, IngestConfig(**case.config), full=True)
    facts = json.dumps(found.to_dict(), default=str, ensure_ascii=False)
    return found, found.source.failure.message if found.source.failure else facts


@pytest.fixture
def files(tmp_path: Path, write_atlas: Any, counts_of: Any) -> Files:
    return Files(tmp_path, write_atlas, counts_of)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_policy(case: Case, files: Files, vocabulary: Vocabulary, local_store: Store) -> None:
    found, told = looked(case, files, vocabulary, local_store)
    assert found.outcome == case.outcome, told
    missing = [words for words in case.says if words not in told]
    assert not missing, f"{missing} is not said in: {told}"
    if case.outcome == REFUSED:
        assert found.source.failure is not None
        assert found.source.failure.code == case.code
        assert told.startswith(found.source.uri), "it says where"
        assert told.rstrip(".").count(". ") or told.endswith("."), "it says what and what next"
    facts = found.to_dict()
    assert {name: facts[name] for name in case.facts} == dict(case.facts)


# --- rows that take more than one file, or a run ----------------------------------------------------------------------


def test_row25_same_cells_in_two_files(
    files: Files, tmp_path: Path, vocabulary: Vocabulary, local_store: Store, ray_local: None
) -> None:
    first = files.write()
    second = tmp_path / "again.h5ad"
    shutil.copyfile(first, second)
    report = ingest([str(first), str(second)], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store)
    assert [source.status for source in report.sources] == ["ingested"] * 2
    told = json.dumps(report.sources[1].to_dict())
    assert "60" in json.dumps(report.sources[1].to_dict()["duplicates"]), told
    assert "lung" in json.dumps(report.sources[1].to_dict()["duplicates"]), told
    kept = IngestConfig(duplicates="keep_first")
    report = ingest(
        [str(first), str(second)], str(tmp_path / "other"), vocabulary=vocabulary, store=local_store, config=kept
    )
    assert report.sources[0].tally.kept == 60
    assert report.sources[1].tally.kept == 0 or report.sources[1].status == "refused"


@pytest.mark.shared
@pytest.mark.parametrize("era", ["v0.5.0", "v0.7.0", "v0.7.8", "v0.11.4"])
def test_row28_files_of_every_era(era: str, shared_data: Path, vocabulary: Vocabulary, local_store: Store) -> None:
    """Toy tables of every release of anndata: read as far as their gene names, which are no genes."""
    for path in sorted((shared_data / "odd" / "anndata_archives" / era).glob("adata.*")):
        found = inspect_source(str(path), local_store, vocabulary, IngestConfig(), full=True)
        assert found.source.failure is not None
        assert found.source.failure.code in ("atlas", "not_counts")
        assert str(path) in found.source.failure.message
        assert "unexpected" not in found.source.failure.message
        assert "damaged" not in found.source.failure.message


def test_row38_changed_since_it_was_planned(files: Files, vocabulary: Vocabulary, local_store: Store) -> None:
    path = files.write()
    found = inspect_source(str(path), local_store, vocabulary, IngestConfig(), etag="another tag")
    assert found.source.failure is not None
    for words in (str(path), "changed since it was planned", "Run the command again"):
        assert words in found.source.failure.message


def test_row39_two_files_of_one_name(
    files: Files, tmp_path: Path, vocabulary: Vocabulary, local_store: Store, ray_local: None
) -> None:
    one = files.write(folder=tmp_path / "a")
    two = files.write(files.counts(30), folder=tmp_path / "b")
    report = ingest([str(one), str(two)], str(tmp_path / "corpus"), vocabulary=vocabulary, store=local_store)
    assert [source.status for source in report.sources] == ["ingested", "refused"]
    failure = report.sources[1].failure
    assert failure is not None
    for words in (str(two), str(one), "'lung'", "--dataset-id"):
        assert words in failure.message


def test_row40_doubtful_medians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genes = "".join(f"ENSG{i:011d}\t{i}\t{0.001 if i < 5 else 1.5}\tG{i}\n" for i in range(2, 80))
    (tmp_path / "genes.tsv").write_text(
        f"ensembl_id\ttoken_id\tmedian\tgene_name\n<pad>\t0\t\t\n<mask>\t1\t\t\n{genes}"
    )
    assert vocabulary_command(["import", str(tmp_path / "genes.tsv"), "--output", str(tmp_path / "v.parquet")]) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert any("3 genes have a median below 0.05" in line for line in warned), warned
    assert any("75" in line for line in warned), "so many genes share one median"
