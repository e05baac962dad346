"""Offline embedding: the same numbers as the embedder, cut off and continued, and back into the atlas file."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
import scipy.sparse

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    AlreadyExistsError,
    CorpusError,
    InputError,
    IntegrityError,
    NotFoundError,
    SettingsError,
)
from genescale.platform.storage import Store, join
from genescale.training.embed import EmbedConfig, embed_corpus, plan_units
from genescale.training.embedder import Embedder
from genescale.training.embeddings import annotate_h5ad, read_embeddings, read_manifest
from genescale.training.fitting.finetune import FinetuneConfig, prepare, row_vectors

# Small units, so that the corpus of some 6,000 tokens in four parts becomes more files than parts.
SMALL = EmbedConfig(device="cpu", actors=1, tokens_per_unit=800)


@pytest.fixture(scope="module")
def embedded(
    tmp_path_factory: pytest.TempPathFactory, ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> str:
    uri = str(tmp_path_factory.mktemp("embedded") / "out")
    report = embed_corpus(tiny_bundle, tiny_corpus, out_uri=uri, store=tiny_corpus.store, config=SMALL)
    assert report.computed_cells == report.cells == tiny_corpus.n_cells
    assert report.computed_tokens == report.tokens == sum(tiny_corpus.cells(["length"])["length"].to_pylist())
    return uri


def modified(uri: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(uri).iterdir()}


def test_units_hold_every_cell_once_and_do_not_cross_parts() -> None:
    lengths_n = np.array([5, 5, 5, 40, 1, 1, 1, 1, 3, 9], dtype=np.int32)
    units = plan_units([4, 0, 6], lengths_n, 10)
    assert [index for unit in units for index in range(unit.first, unit.first + unit.cells)] == list(range(10))
    assert all(unit.stop <= [4, 0, 6][unit.part] for unit in units)
    assert [unit.tokens for unit in units] == [
        int(lengths_n[unit.first : unit.first + unit.cells].sum()) for unit in units
    ]
    assert max(unit.tokens for unit in units if unit.cells > 1) < 10 + 40
    assert [unit.number for unit in units] == list(range(len(units)))


def test_embeddings_equal_the_embedder_in_the_order_of_the_corpus(
    embedded: str, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    table, vectors_nd = read_embeddings(embedded, tiny_corpus.store)
    cells = tiny_corpus.tokens(range(tiny_corpus.n_cells))
    assert vectors_nd.dtype == np.float32
    assert np.allclose(vectors_nd, Embedder.load(tiny_bundle, device="cpu").embed_cells(cells), atol=1e-6)
    names = ["cell_id", "dataset_id", "source_row", "cell_type", "donor_id"]
    assert table.select(names).equals(tiny_corpus.cells(names))
    manifest = read_manifest(embedded, tiny_corpus.store)
    assert len(manifest.files) > len(tiny_corpus.parts)
    assert (manifest.bundle_digest, manifest.corpus_version) == (tiny_bundle.digest, tiny_corpus.version)


def test_files_are_plain_parquet(embedded: str, tiny_corpus: Corpus) -> None:
    """Another reader sees a fixed-size list of float32 without knowing of us."""
    name = read_manifest(embedded, tiny_corpus.store).files[0]
    field = pq.read_schema(Path(embedded) / name).field("embedding").type
    assert (str(field.value_type), field.list_size) == ("float", 32)


def test_a_finished_run_does_nothing(embedded: str, tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    before = {name: time for name, time in modified(embedded).items() if name.endswith(".parquet")}
    report = embed_corpus(tiny_bundle, tiny_corpus, out_uri=embedded, store=tiny_corpus.store, config=SMALL)
    assert (report.computed_cells, report.tokens_per_s) == (0, 0.0)
    assert report.cells == tiny_corpus.n_cells
    after = modified(embedded)
    assert {name: after[name] for name in before} == before


def test_a_run_that_was_cut_off_does_only_what_is_missing(
    embedded: str, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    out, store = str(tmp_path / "out"), tiny_corpus.store
    files = read_manifest(embedded, store).files
    for name in files[1:]:
        store.write(join(out, name), store.read(join(embedded, name)))
    with pytest.raises(NotFoundError, match="no finished embeddings"):
        read_embeddings(out, store)
    before = modified(out)
    report = embed_corpus(tiny_bundle, tiny_corpus, out_uri=out, store=store, config=SMALL)
    first = pq.read_metadata(Path(out) / files[0]).num_rows
    assert report.computed_cells == first
    after = modified(out)
    assert {name: after[name] for name in before} == before
    assert np.array_equal(read_embeddings(out, store)[1], read_embeddings(embedded, store)[1])


def test_embeddings_of_another_setting_are_not_mixed_in(
    embedded: str, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    other = dataclasses.replace(SMALL, layer="last")
    with pytest.raises(AlreadyExistsError, match="second_to_last"):
        embed_corpus(tiny_bundle, tiny_corpus, out_uri=embedded, store=tiny_corpus.store, config=other)


def test_a_run_that_another_overtook_leaves_its_result_alone(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    out, here = str(tmp_path / "out"), dataclasses.replace(SMALL, run_in="process", tokens_per_unit=0)
    other = dataclasses.replace(here, layer="last")

    class Overtaken(Store):
        """Another run of another setting begins and ends while this one writes its first file."""

        def write(self, uri: str, data: bytes, **options: Any) -> Any:
            if not tiny_corpus.store.exists(join(out, "manifest.json")):
                embed_corpus(tiny_bundle, tiny_corpus, out_uri=out, store=tiny_corpus.store, config=other)
            return super().write(uri, data, **options)

    with pytest.raises(AlreadyExistsError, match="last"):
        embed_corpus(tiny_bundle, tiny_corpus, out_uri=out, store=Overtaken(tiny_corpus.store.settings), config=here)
    assert read_manifest(out, tiny_corpus.store).layer == "last"


def test_a_damaged_or_lost_file_is_named(embedded: str, tiny_corpus: Corpus, tmp_path: Path) -> None:
    store, out = tiny_corpus.store, str(tmp_path / "out")
    for name in modified(embedded):
        store.write(join(out, name), store.read(join(embedded, name)))
    name = read_manifest(out, store).files[0]
    data = bytearray(store.read(join(out, name)))
    data[len(data) // 3] ^= 0xFF
    store.write(join(out, name), bytes(data))
    with pytest.raises(IntegrityError, match=name):
        read_embeddings(out, store)
    store.delete(join(out, name))
    with pytest.raises(IntegrityError, match=name):
        read_embeddings(out, store)


def test_corpus_and_output_in_object_storage(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    store.upload_folder(Path(tiny_corpus.uri), f"{bucket}/corpus")
    corpus = Corpus.open(f"{bucket}/corpus", store)
    report = embed_corpus(tiny_bundle, corpus, out_uri=f"{bucket}/embeddings", store=store, config=SMALL)
    table, vectors_nd = read_embeddings(report.uri, store)
    assert table.num_rows == len(vectors_nd) == tiny_corpus.n_cells


def test_what_cannot_be_embedded_is_refused_before_any_work(
    ray_local: None, bare_bundle: Bundle, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(CorpusError, match="vocabulary"):
        embed_corpus(bare_bundle, tiny_corpus, out_uri=out, store=tiny_corpus.store)
    gpu = dataclasses.replace(SMALL, device="cuda")
    with pytest.raises(SettingsError, match="no GPU"):
        embed_corpus(tiny_bundle, tiny_corpus, out_uri=out, store=tiny_corpus.store, config=gpu)
    assert tiny_corpus.store.list(out) == []


def test_a_fault_in_a_worker_comes_back_as_what_it_is(
    ray_local: None, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """A damaged token page is found by the worker that reads it; the driver names the part, not Ray's wrappers."""
    shutil.copytree(tiny_corpus.uri, tmp_path / "corpus")
    corpus = Corpus.open(str(tmp_path / "corpus"), tiny_corpus.store)
    part = Path(corpus.parts[1].uri)
    column = next(
        c for c in map(pq.read_metadata(part).row_group(0).column, range(20)) if "input_ids" in c.path_in_schema
    )
    data = bytearray(part.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    part.write_bytes(bytes(data))
    out = str(tmp_path / "out")
    gc.collect()  # What earlier tests have left to be collected holds processors too.
    gc.disable()  # An error that somebody keeps is as good as one that is never collected.
    try:
        with pytest.raises(IntegrityError) as raised:
            embed_corpus(tiny_bundle, corpus, out_uri=out, store=corpus.store, config=SMALL)
        assert type(raised.value) is IntegrityError
        assert part.name in raised.value.where
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU") != 2:
            assert time.monotonic() < deadline, "the workers that failed keep their processors"
            time.sleep(0.1)
    finally:
        gc.enable()
    with pytest.raises(NotFoundError):
        read_embeddings(out, corpus.store)


def test_finetuning_takes_stored_embeddings(embedded: str, tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    config = FinetuneConfig(device="cpu")
    task = prepare(tiny_bundle, tiny_corpus, config)
    stored_nd = row_vectors(tiny_bundle, tiny_corpus, task, config, embeddings_uri=embedded)
    assert np.allclose(stored_nd, row_vectors(tiny_bundle, tiny_corpus, task, config), atol=1e-6)
    last = dataclasses.replace(config, layer="last")
    with pytest.raises(InputError, match="another layer"):
        row_vectors(tiny_bundle, tiny_corpus, task, last, embeddings_uri=embedded)


@pytest.fixture
def atlas(tmp_path: Path, tiny_corpus: Corpus) -> Path:
    """The file dataset atlas-1 came from: its cells stand in the even rows, the odd rows were dropped."""
    ids = [row for row in tiny_corpus.cells(["cell_id", "dataset_id"]).to_pylist() if row["dataset_id"] == "atlas-1"]
    names = [name for row in ids for name in (row["cell_id"], f"dropped-after-{row['cell_id']}")]
    counts = scipy.sparse.csr_matrix(np.ones((len(names), 3), dtype=np.float32))
    var = pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(3)])
    path = tmp_path / "atlas-1.h5ad"
    anndata.AnnData(counts, obs=pd.DataFrame(index=names), var=var).write_h5ad(path)
    return path


def test_embeddings_go_into_the_atlas_file_row_by_row(
    embedded: str, tiny_corpus: Corpus, atlas: Path, tmp_path: Path
) -> None:
    out = tmp_path / "embedded.h5ad"
    report = annotate_h5ad(str(atlas), embedded, out, store=tiny_corpus.store)
    table, vectors_nd = read_embeddings(embedded, tiny_corpus.store)
    by_id = dict(zip(table["cell_id"].to_pylist(), vectors_nd, strict=True))
    written = anndata.read_h5ad(out)
    embedding_nd = written.obsm["X_genescale"]
    known = [name in by_id for name in written.obs_names]
    assert report.dataset_id == "atlas-1"
    assert (report.cells, report.embedded, report.missing) == (written.n_obs, sum(known), written.n_obs - sum(known))
    assert report.missing > 0
    assert np.isnan(embedding_nd[~np.array(known)]).all()
    ours_nd = np.stack([by_id[name] for name in written.obs_names[known]])
    assert np.array_equal(embedding_nd[np.array(known)], ours_nd)


def test_a_file_of_other_cells_is_refused(embedded: str, tiny_corpus: Corpus, atlas: Path, tmp_path: Path) -> None:
    store, out = tiny_corpus.store, tmp_path / "out.h5ad"
    with pytest.raises(InputError, match="should be the cell 'atlas-0-cell-0'"):
        annotate_h5ad(str(atlas), embedded, out, store=store, dataset_id="atlas-0")
    renamed = atlas.rename(atlas.with_name("unknown.h5ad"))
    with pytest.raises(InputError, match="atlas-0, atlas-1"):
        annotate_h5ad(str(renamed), embedded, out, store=store)
    assert not out.exists()
