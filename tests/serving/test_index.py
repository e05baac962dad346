"""`genescale index`: which cells, labels and vectors an index holds, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genescale.platform.cli import main
from genescale.platform.errors import (
    AlreadyExistsError,
    CorpusError,
    InputError,
    IntegrityError,
    NotFoundError,
    SettingsError,
)
from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.neighbours import index_folder
from genescale.serving.neighbours.building import IndexConfig, build_index
from genescale.serving.neighbours.index_folder import FILES, MANIFEST
from genescale.serving.neighbours.reference import Reference, resolve_index
from genescale.serving.release import Release

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

CPU = IndexConfig(device="cpu", sampled=20, map_cells=0)
Built = Callable[..., str]


@pytest.fixture
def built(bundle: Bundle, reference_corpus: Corpus, local_store: Store, tmp_path: Path) -> Built:
    """Build an index of the corpus: `built(where=…, embeddings_uri=…)` gives its folder."""

    def make(*, model: Bundle = bundle, embeddings_uri: str = "", **config: Any) -> str:
        build_index(
            model,
            reference_corpus,
            out_uri=str(tmp_path / "index"),
            store=local_store,
            config=replace(CPU, **config),
            embeddings_uri=embeddings_uri,
        )
        return str(tmp_path / "index")

    return make


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[str], Reference]:
    return lambda uri: Reference.open(uri, Settings(), tmp_path / "cache")


@pytest.fixture
def release(bundle: Bundle) -> Release:
    return Release(name="tiny", version="3", digest=bundle.digest, address="models:/tiny/3", folder=str(bundle.folder))


def ids(reference: Reference) -> list[str]:
    return [cell["cell_id"] for cell in reference.cells(np.arange(reference.manifest.cells))]


def test_a_condition_chooses_the_cells(
    built: Built, opened: Callable[[str], Reference], reference_corpus: Corpus
) -> None:
    reference = opened(built(where="tissue = 'lung' AND labels.age = '21'", columns=("donor_id",)))
    known = reference_corpus.cells(["cell_id", "tissue", "labels.age", "donor_id"]).to_pylist()
    chosen = [one for one in known if one["tissue"] == "lung" and one["labels.age"] == "21"]
    assert 2 < len(chosen) < 30
    assert ids(reference) == [one["cell_id"] for one in chosen]
    donors = [cell["donor_id"] for cell in reference.cells(np.arange(len(chosen)))]
    assert donors == [one["donor_id"] for one in chosen]


def test_drawn_cells_are_those_of_the_seed(built: Built, opened: Callable[[str], Reference], tmp_path: Path) -> None:
    drawn = []
    for seed in (1, 1, 2):
        uri = built(max_cells=30, seed=seed)
        drawn.append(ids(opened(uri)))
        Path(uri).rename(tmp_path / f"before-{len(drawn)}")
    assert len(drawn[0]) == len(set(drawn[0])) == 30
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture
def stored(
    bundle: Bundle, reference_corpus: Corpus, embedder: Embedder, local_store: Store, tmp_path: Path
) -> Callable[..., str]:
    """A folder as `genescale embed` leaves it, with any part of its manifest changed."""
    from genescale.training.embeddings import EMBEDDING_COLUMN, Manifest

    def make(*, factor: float = 1.0, **changed: Any) -> str:
        vectors_nd = factor * embedder.embed_cells(reference_corpus.tokens(range(reference_corpus.n_cells)))
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_nd.reshape(-1)), vectors_nd.shape[1])
        table = reference_corpus.cells(["cell_id", "dataset_id"]).append_column(EMBEDDING_COLUMN, column)
        manifest = Manifest(
            key="k",
            bundle_digest=bundle.digest,
            vocabulary_digest=bundle.vocabulary.digest,
            corpus_uri=reference_corpus.uri,
            corpus_version=reference_corpus.version,
            layer="second_to_last",
            pooling="mean_genes",
            precision="float32",
            width=vectors_nd.shape[1],
            cells=reference_corpus.n_cells,
            tokens=1,
            files=("part-0.parquet",),
        )
        folder = tmp_path / "embeddings"
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / "part-0.parquet", write_page_checksum=True)
        (folder / "manifest.json").write_text(json.dumps({**asdict(manifest), **changed}), encoding="utf-8")
        return str(folder)

    return make


def test_stored_embeddings_are_taken_as_they_are(
    built: Built,
    opened: Callable[[str], Reference],
    stored: Callable[..., str],
    embedder: Embedder,
    reference_corpus: Corpus,
) -> None:
    lung_n = np.flatnonzero(np.array(reference_corpus.cells(["tissue"]).column(0).to_pylist()) == "lung")
    asked_qd = embedder.embed_cells(reference_corpus.tokens(lung_n.tolist()))
    # Only stored vectors are the opposite of what the model gives.
    reference = opened(built(where="tissue = 'lung'", embeddings_uri=stored(factor=-1.0)))
    found = reference.nearest(-asked_qd, 1)
    assert found.rows_qk[:, 0].tolist() == list(range(len(lung_n)))
    assert found.distances_qk.max() < 1e-12


@pytest.mark.parametrize(
    "changed",
    [{"bundle_digest": "0" * 64}, {"corpus_version": 99}, {"layer": "last"}, {"pooling": "cls"}],
    ids=lambda changed: next(iter(changed)),
)
def test_stored_embeddings_of_something_else_are_refused(
    built: Built, stored: Callable[..., str], changed: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=next(iter(changed))):
        built(embeddings_uri=stored(**changed))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"columns": ("cell_typ",)}, CorpusError, "Did you mean 'cell_type'"),
        ({"apart": "donor"}, CorpusError, "Did you mean 'donor_id'"),
        ({"where": "tissue = 'brain'"}, CorpusError, "none of the 90 cells"),
        ({"max_cells": 1}, CorpusError, "no reference"),
        ({"apart": "organism"}, CorpusError, "differ from the others in 'organism'"),
        ({"layer": "third"}, SettingsError, "not a layer"),
    ],
)
def test_what_cannot_be_indexed_is_refused(
    built: Built, config: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        built(**config)
    assert not (tmp_path / "index" / MANIFEST).exists()


@pytest.mark.parametrize(
    "wrong", [{"search": "quick"}, {"sampled": 0}, {"max_cells": -1}, {"columns": ("cell_id",)}, {"seed": -1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        IndexConfig(**wrong)


def test_a_corpus_of_another_vocabulary_is_refused(built: Built, bundle: Bundle) -> None:
    other = Vocabulary.build(["ENSG00000000001"], np.ones(1), symbols=["GENE1"], window=48, name="other")
    with pytest.raises(CorpusError, match="vocabulary"):
        built(model=replace(bundle, vocabulary=other))


def test_an_index_is_never_written_over(built: Built) -> None:
    uri = built()
    before = {path.name: path.read_bytes() for path in Path(uri).iterdir()}
    with pytest.raises(AlreadyExistsError, match="another output folder"):
        built(columns=())
    assert {path.name: path.read_bytes() for path in Path(uri).iterdir()} == before


def test_only_its_own_model_can_be_served_with_it(
    built: Built, release: Release, write_bundle_at: Callable[..., Bundle], tmp_path: Path
) -> None:
    uri = built()
    assert resolve_index(uri, release, Settings(), tmp_path).address == uri
    other = write_bundle_at(tmp_path / "other", 77)
    with pytest.raises(SettingsError, match=f"made with model {release.digest[:12]}"):
        resolve_index(uri, replace(release, digest=other.digest), Settings(), tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_lost_file_is_refused(built: Built, opened: Callable[[str], Reference], name: str) -> None:
    path = Path(built()) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=name):
        opened(str(path.parent))
    path.unlink()
    with pytest.raises(IntegrityError, match=name):
        opened(str(path.parent))


def test_a_manifest_of_another_index_is_refused(built: Built, opened: Callable[[str], Reference]) -> None:
    uri = built()
    path = Path(uri) / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    for changed in ({"cells": 89}, {"width": 17}, {"max_neighbors": 12}, {"search": "graph"}):
        path.write_text(json.dumps({**content, **changed}), encoding="utf-8")
        with pytest.raises(IntegrityError):
            opened(uri)
    path.write_text(json.dumps({**content, "schema_version": 2}), encoding="utf-8")
    with pytest.raises(IntegrityError, match="this release reads 1"):
        opened(uri)
    path.unlink()
    with pytest.raises(NotFoundError, match="genescale index"):
        opened(uri)


def test_an_index_that_was_replaced_after_deployment_is_refused(built: Built, release: Release, tmp_path: Path) -> None:
    uri = built()
    deployed = resolve_index(uri, release, Settings(), tmp_path)
    assert deployed.open(Settings(), tmp_path).manifest.digest == deployed.digest
    Path(uri).rename(tmp_path / "before")
    built(columns=())
    with pytest.raises(IntegrityError, match="was deployed"):
        deployed.open(Settings(), tmp_path)


def test_an_index_in_object_storage_is_copied_once_and_again_when_damaged(
    bundle: Bundle,
    reference_corpus: Corpus,
    release: Release,
    s3_store: tuple[Store, str],
    tmp_path: Path,
) -> None:
    store, bucket = s3_store
    settings = Settings(storage=store.settings)
    build_index(bundle, reference_corpus, out_uri=f"{bucket}/index", store=store, config=CPU)
    deployed = resolve_index(f"{bucket}/index", release, settings, tmp_path / "cache")
    folder = Path(deployed.folder)
    assert folder.parent == tmp_path / "cache"
    whole = {name: (folder / name).read_bytes() for name in FILES}
    (folder / FILES[0]).write_bytes(b"cut off")
    again = Reference.open(f"{bucket}/index", settings, tmp_path / "cache")
    assert again.manifest.cells == reference_corpus.n_cells
    assert {name: (folder / name).read_bytes() for name in FILES} == whole
    # A service opens the copy, also one that starts again while the object storage is away.
    away = Settings(storage=replace(store.settings, endpoint_url="http://127.0.0.1:9", attempts=1))
    assert deployed.open(away, tmp_path / "cache").manifest == again.manifest
    # On another node the folder is not there, and the address is.
    elsewhere = replace(deployed, folder=str(tmp_path / "nowhere")).open(settings, tmp_path / "other-cache")
    assert elsewhere.manifest == again.manifest
    for name in FILES:
        store.delete(f"{bucket}/index/{name}")
    assert Reference.open(f"{bucket}/index", settings, tmp_path / "cache").manifest == again.manifest


def test_a_damaged_copy_that_another_process_takes_away_first_is_fetched_again(
    built: Built, local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, verify = built(), index_folder._verify
    monkeypatch.setattr(index_folder, "is_remote", lambda address: True)
    folder, manifest = index_folder.opened_folder(uri, local_store.settings, tmp_path / "cache")
    (folder / FILES[0]).write_bytes(b"cut off")

    def another_is_faster(checked: Path, files: Mapping[str, str]) -> None:
        try:
            verify(checked, files)
        except IntegrityError:
            folder.rename(tmp_path / "taken away")
            raise

    monkeypatch.setattr(index_folder, "_verify", another_is_faster)
    again, _ = index_folder.opened_folder(uri, local_store.settings, tmp_path / "cache")
    verify(again, manifest.files)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]


@pytest.fixture
def log_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sends log lines to the standard error of its test, which is closed afterwards."""
    logger = logging.getLogger("genescale")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "propagate", logger.propagate)


@pytest.mark.usefixtures("log_as_before")
def test_the_command_says_what_it_made(
    bundle: Bundle, reference_corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", str(bundle.folder), "--corpus", reference_corpus.uri, "--output", str(tmp_path / "index")]
    more = ["--columns", "cell_type,labels.age", "--apart", "donor_id", "--device", "cpu", "--map-cells", "0"]
    assert main([*words, *more]) == 0
    out = capsys.readouterr().out
    typed = 90 - reference_corpus.cells(["cell_type"]).column(0).null_count
    assert f"label    cell_type: {typed} cells have one" in out
    assert "label    labels.age: 90 cells have one" in out
    known = Reference.open(str(tmp_path / "index"), Settings(), tmp_path).facts
    assert (known.columns, known.apart, known.search) == (["cell_type", "labels.age"], "donor_id", "exact")
    assert main([*words, *more]) == 2
    assert "already_exists" in capsys.readouterr().err


def test_a_service_takes_the_index_it_is_told() -> None:
    from genescale.serving.commands import _parser, serving_config

    arguments = _parser().parse_args(["models:/encoder@newest", "--index", "s3://lake/reference"])
    assert serving_config(arguments, {}).index == "s3://lake/reference"
    assert serving_config(_parser().parse_args(["models:/encoder@newest"]), {}).index == ""
