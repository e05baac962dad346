"""Small atlases, good and bad, written by anndata itself, and a vocabulary that fits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from genescale.ingestion.atlas import Atlas, Slot
from genescale.ingestion.corpus import Corpus, NewPart, Source, dataset_folder
from genescale.ingestion.formats.memory_frame import MemoryFrame
from genescale.ingestion.schema import part_schema, rows_table
from genescale.ingestion.table.part_files import write_rows
from genescale.platform.storage import Entry, Store
from genescale.platform.vocabulary import Vocabulary

N_GENES = 60
GENE_IDS = tuple(f"ENSG{i:011d}" for i in range(1, N_GENES + 1))
AtlasWriter = Callable[..., Path]


def random_counts(n_cells: int, *, seed: int = 0, n_genes: int = N_GENES) -> sparse.csr_matrix:
    """Counts of n_cells × n_genes, about a third of them positive, at least eight genes in every cell."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (n_cells, n_genes)).astype(np.float32)
    counts[:, :8] += 1
    return sparse.csr_matrix(counts)


@pytest.fixture
def counts_of() -> Callable[..., sparse.csr_matrix]:
    return random_counts


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """All test genes with different medians, one symbol and one retired id; a window that crops no test cell."""
    return Vocabulary.build(
        GENE_IDS,
        1 + np.arange(N_GENES) / 7,
        symbols=[f"GENE{i}" for i in range(1, N_GENES + 1)],
        window=64,
        name="test",
        aliases={"ENSG90000000001": GENE_IDS[0], "OLDNAME": GENE_IDS[1]},
    )


@pytest.fixture
def write_atlas(tmp_path: Path) -> AtlasWriter:
    """Write an h5ad file: `write_atlas("a.h5ad", counts, genes=…, obs=…, raw=…, layers=…)` returns its path."""

    def write(
        name: str,
        counts: Any,
        *,
        genes: Sequence[str] = GENE_IDS,
        obs: Mapping[str, Any] | None = None,
        var: Mapping[str, Any] | None = None,
        raw: Any = None,
        layers: Mapping[str, Any] | None = None,
        uns: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> Path:
        import anndata
        import pandas

        n_cells = counts.shape[0]
        table = pandas.DataFrame(dict(obs or {}), index=[f"cell{i}" for i in range(n_cells)])
        columns = pandas.DataFrame(dict(var or {}), index=list(genes))
        data = anndata.AnnData(X=counts, obs=table, var=columns, layers=dict(layers or {}), uns=dict(uns or {}))
        if raw is not None:
            data.raw = anndata.AnnData(X=raw, obs=table, var=columns)
        path = (folder or tmp_path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_h5ad(path, compression="gzip")
        return path

    return write


class Planted:
    """Made-up cells in real corpora: parts that are named by their content, and what readers should find."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def cells(self, n_cells: int, seed: int) -> list[np.ndarray]:
        """Token arrays of 1 to 29 genes."""
        rng, genes = np.random.default_rng(seed), self.vocabulary.token_ids
        return [
            rng.permutation(genes)[: rng.integers(1, 30)].astype(self.vocabulary.token_dtype) for _ in range(n_cells)
        ]

    def rows(self, cells: Sequence[np.ndarray], name: str, start: int = 0) -> pa.Table:
        """Rows of a part whose first cell is source row `start`; one label, `stim`, on every second cell."""
        lengths = np.array([cell.size for cell in cells], dtype=np.int32)
        columns = {
            "cell_id": [f"{name}-{start + i}" for i in range(len(cells))],
            "source_row": np.arange(start, start + len(cells)),
            "input_ids": [cell.tolist() for cell in cells],
            "length": lengths,
            "total_counts": lengths * 2.0,
            "n_genes": lengths,
            "cell_type": [name] * len(cells),
            "labels": [{"stim": f"dose {i}"} if i % 2 else None for i in range(len(cells))],
        }
        return rows_table(columns, part_schema(self.vocabulary.token_dtype))

    def parts(self, corpus: Corpus, name: str, parts: Sequence[Sequence[np.ndarray]]) -> list[NewPart]:
        """Part files in the corpus's folder, not committed."""
        made, start = [], 0
        for cells in parts:
            table = self.rows(cells, name, start)
            made.append(write_rows(table, start, dataset_folder(name), corpus_uri=corpus.uri, store=corpus.store))
            start += len(cells)
        return made

    def source(self, name: str, **changes: Any) -> Source:
        """The source of a dataset."""
        facts = {"uri": f"/atlas/{name}.h5ad", "size_bytes": 1, "etag": "1", "recipe": {}}
        return Source(**{**facts, "vocabulary_digest": self.vocabulary.digest, **changes})

    def add(self, corpus: Corpus, name: str, parts: Sequence[Sequence[np.ndarray]], **options: Any) -> Corpus:
        """The corpus with one more dataset; options: etag, recipe, files, replace."""
        source = self.source(name, **{key: options.pop(key) for key in ("etag", "recipe", "uri") if key in options})
        details = {"kept": sum(map(len, parts)), "counts_slot": "X"}
        return corpus.commit_source(source, name, self.parts(corpus, name, parts), details, **options)

    def content(self, corpus: Corpus) -> list[tuple[str, int, tuple[int, ...]]]:
        """Dataset, source row and tokens of every cell, sorted: equal for corpora that hold the same cells."""
        table = corpus.cells(["dataset_id", "source_row"])
        tokens = corpus.tokens(range(corpus.n_cells))
        pairs = zip(table["dataset_id"].to_pylist(), table["source_row"].to_pylist(), strict=True)
        return sorted((*pair, tuple(cell.tolist())) for pair, cell in zip(pairs, tokens, strict=True))


@pytest.fixture(scope="session")
def planted(vocabulary: Vocabulary) -> Planted:
    return Planted(vocabulary)


@pytest.fixture
def empty(tmp_path: Path, vocabulary: Vocabulary, local_store: Store) -> Corpus:
    """A corpus without a dataset."""
    return Corpus.create(str(tmp_path / "corpus"), vocabulary, local_store)


@pytest.fixture(params=["local", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, vocabulary: Vocabulary) -> Corpus:
    """A corpus without a dataset: on disk, and in object storage."""
    if request.param == "local":
        return Corpus.create(str(tmp_path / "corpus"), vocabulary, request.getfixturevalue("local_store"))
    store, bucket = request.getfixturevalue("s3_store")
    return Corpus.create(f"{bucket}/corpus", vocabulary, store)


@pytest.fixture(scope="session")
def table_atlas() -> Callable[..., Atlas]:
    """Make an atlas of tables in memory: `table_atlas(genes, var=…, obs=…, cells=4, texts=…)`; it has no counts."""

    def make(
        genes: Sequence[str] = GENE_IDS,
        *,
        var: Mapping[str, Any] | None = None,
        obs: Mapping[str, Any] | None = None,
        cells: int = 4,
        texts: Mapping[str, str] | None = None,
        uri: str = "lung.h5ad",
    ) -> Atlas:
        shape = SimpleNamespace(n_cells=cells, n_genes=len(genes), where=f"{uri}: X")
        return Atlas(
            entry=Entry(uri, 1, "tag"),
            kind="h5ad",
            slot=Slot(name="X", matrix=shape),  # type: ignore[arg-type]
            obs=_frame("obs", [f"cell{i}" for i in range(cells)], obs, uri),
            var=_frame("var", list(genes), var, uri),
            texts=texts,
        )

    return make


def _frame(path: str, index: list[str], columns: Mapping[str, Any] | None, uri: str) -> MemoryFrame:
    arrays = {name: v if isinstance(v, pa.Array) else pa.array(v) for name, v in (columns or {}).items()}
    return MemoryFrame(path, pa.array(index, pa.string()), arrays, rows=len(index), uri=uri)
