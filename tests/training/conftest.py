"""A tiny random model, cells of its vocabulary, and a labelled corpus whose cell types can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus, NewPart, Source, dataset_folder
from genescale.ingestion.schema import part_schema, rows_table
from genescale.ingestion.table.parts import part_bytes
from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store, join
from genescale.platform.vocabulary import SPECIAL_TOKENS, Vocabulary
from genescale.training.cells import CorpusCells
from genescale.training.engine import TorchEngine
from genescale.training.loop import Row, RunPlan, train_loop
from genescale.training.model import EncoderConfig, new_model
from genescale.training.weights import to_hf
from tests.training.disturbed_runs import CONFIG, Reference

N_GENES, WINDOW, WIDTH, LAYERS = 200, 128, 32, 2
CELL_TYPES = ("b_cell", "monocyte", "t_cell")
N_DONORS = 8


def make_vocabulary(*, framed: bool = True) -> Vocabulary:
    return Vocabulary.build(
        [f"ENSG{number:011d}" for number in range(N_GENES)],
        np.linspace(0.5, 3.0, N_GENES),
        symbols=[f"GENE{number}" for number in range(N_GENES)],
        window=WINDOW,
        name="tiny" if framed else "tiny bare",
        special=SPECIAL_TOKENS if framed else SPECIAL_TOKENS[:2],
    )


def make_bundle(folder: Path, vocabulary: Vocabulary, *, seed: int = 0) -> Bundle:
    config = EncoderConfig(
        vocabulary_size=vocabulary.size,
        width=WIDTH,
        layers=LAYERS,
        heads=2,
        feed_forward=64,
        positions=WINDOW,
        initializer_range=0.2,
    )
    model = new_model(config, seed=seed)
    return write_bundle(
        folder, kind="masked_gene_model", config=config.to_hf(), weights=to_hf(model), vocabulary=vocabulary, lineage={}
    )


def framed_cell(vocabulary: Vocabulary, genes: Sequence[int]) -> np.ndarray:
    """Tokens of a cell whose genes, by number, stand in this order; framed when the vocabulary frames cells."""
    tokens = [vocabulary.token(f"GENE{gene}") for gene in genes]
    if vocabulary.cls is not None and vocabulary.eos is not None:
        tokens = [vocabulary.cls, *tokens, vocabulary.eos]
    return np.array(tokens, dtype=vocabulary.token_dtype)


@pytest.fixture(scope="session")
def tiny_vocabulary() -> Vocabulary:
    """200 genes GENE0 … GENE199 and four special tokens, window 128."""
    return make_vocabulary()


@pytest.fixture(scope="session")
def bare_vocabulary() -> Vocabulary:
    """The same genes without `<cls>` and `<eos>`."""
    return make_vocabulary(framed=False)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_vocabulary: Vocabulary) -> Bundle:
    """A random model of two layers, width 32."""
    return make_bundle(tmp_path_factory.mktemp("tiny") / "bundle", tiny_vocabulary)


@pytest.fixture(scope="session")
def bare_bundle(tmp_path_factory: pytest.TempPathFactory, bare_vocabulary: Vocabulary) -> Bundle:
    """A random model whose vocabulary has no `<cls>`."""
    return make_bundle(tmp_path_factory.mktemp("bare") / "bundle", bare_vocabulary)


@pytest.fixture(scope="session")
def tiny_cells(tiny_vocabulary: Vocabulary) -> list[np.ndarray]:
    """Twelve cells of 1 to 126 genes in no order of length, two of them equally long."""
    generator = np.random.default_rng(5)
    sizes = [3, 126, 40, 40, 1, 77, 9, 100, 17, 60, 2, 31]
    return [framed_cell(tiny_vocabulary, generator.choice(N_GENES, size, replace=False).tolist()) for size in sizes]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory, tiny_vocabulary: Vocabulary) -> Corpus:
    """360 cells of three types and eight donors in two datasets; every tenth cell has no cell type.

    A type shows in its eight marker genes, which stand before 3 to 8 others drawn at random.
    """
    store = Store(StorageSettings())
    corpus = Corpus.create(str(tmp_path_factory.mktemp("corpus") / "corpus"), tiny_vocabulary, store)
    generator = np.random.default_rng(11)
    for dataset in range(2):
        types = generator.choice(len(CELL_TYPES), size=180, p=[0.5, 0.3, 0.2])
        cells = []
        for kind in types:
            markers = generator.permutation(np.arange(8 * kind, 8 * kind + 8))
            others = generator.choice(np.arange(30, N_GENES), size=int(generator.integers(3, 9)), replace=False)
            cells.append(framed_cell(tiny_vocabulary, [*markers.tolist(), *others.tolist()]))
        labels = [None if i % 10 == 0 else CELL_TYPES[kind] for i, kind in enumerate(types)]
        donors = [f"donor-{dataset * 4 + int(d)}" for d in generator.integers(4, size=180)]
        corpus = commit_cells(corpus, f"atlas-{dataset}", cells, {"cell_type": labels, "donor_id": donors})
    return corpus


def commit_cells(
    corpus: Corpus, dataset_id: str, cells: Sequence[np.ndarray], metadata: dict[str, list[str | None]]
) -> Corpus:
    """Commit cells as a dataset of two parts; source rows are their positions times two (as if half were dropped)."""
    n = len(cells)
    columns = {
        "cell_id": [f"{dataset_id}-cell-{i}" for i in range(n)],
        "source_row": [2 * i for i in range(n)],
        "input_ids": [cell.tolist() for cell in cells],
        "length": [len(cell) for cell in cells],
        "total_counts": [1000.0] * n,
        "n_genes": [len(cell) for cell in cells],
        **metadata,
    }
    table = rows_table(columns, part_schema(corpus.vocabulary.token_dtype))
    parts = []
    for number, (start, stop) in enumerate(((0, n // 3), (n // 3, n))):
        data = part_bytes(table.slice(start, stop - start))
        path = f"{dataset_folder(dataset_id)}/part-{number}.parquet"
        corpus.store.write(join(corpus.uri, path), data)
        parts.append(NewPart(path=path, rows=stop - start, size_bytes=len(data)))
    source = Source(
        uri=f"{dataset_id}.h5ad",
        size_bytes=1,
        etag="1",
        vocabulary_digest=corpus.vocabulary.digest,
        recipe={"made": "for a test"},
    )
    return corpus.commit_source(source, dataset_id, parts, {})


@pytest.fixture(scope="session")
def undisturbed(tiny_corpus: Corpus) -> Reference:
    """The config of `disturbed_runs` on plain torch, in this process: its end, measurements by step, and weights."""
    source = CorpusCells(tiny_corpus)
    plan = RunPlan.of(CONFIG, source)
    model = new_model(CONFIG.encoder.for_vocabulary(source.vocabulary), seed=CONFIG.seed)
    engine = TorchEngine(model, CONFIG.optimizer, total_steps=plan.total_steps)
    rows: dict[int, dict[str, float]] = {}

    def on_rows(new: list[Row]) -> None:
        for step, values in new:
            rows.setdefault(step, {}).update(values)

    return train_loop(engine, source, plan, CONFIG, on_rows=on_rows), rows, engine.weights()
