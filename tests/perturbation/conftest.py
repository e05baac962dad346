"""A tiny random model, framed or bare, and a corpus of cells tokenised with its vocabulary."""

from __future__ import annotations

from collections.abc import Callable
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
from genescale.training.embedder import Embedder
from genescale.training.model import EncoderConfig, new_model
from genescale.training.weights import to_hf

N_GENES = 60
WINDOW = 48
CELL_TYPES = ("b_cell", "monocyte", None)


def gene_id(number: int) -> str:
    return f"ENSG{number:011d}"


def symbol(number: int) -> str:
    return f"GENE{number}"


def tiny_vocabulary(*, framed: bool) -> Vocabulary:
    """60 genes named GENE0 …, with a window of 48 tokens."""
    return Vocabulary.build(
        [gene_id(i) for i in range(N_GENES)],
        np.linspace(0.5, 3.0, N_GENES),
        symbols=[symbol(i) for i in range(N_GENES)],
        window=WINDOW,
        name="tiny",
        special=SPECIAL_TOKENS if framed else SPECIAL_TOKENS[:2],
    )


def tiny_bundle(folder: Path, *, framed: bool, positions: int = WINDOW) -> Bundle:
    """A random model of two layers whose genes matter to each other (large initial weights)."""
    vocabulary = tiny_vocabulary(framed=framed)
    config = EncoderConfig(
        vocabulary_size=vocabulary.size,
        width=32,
        layers=2,
        heads=2,
        feed_forward=64,
        positions=positions,
        initializer_range=0.5,
    )
    weights = to_hf(new_model(config, seed=0))
    return write_bundle(
        folder, kind="masked_gene_model", config=config.to_hf(), weights=weights, vocabulary=vocabulary, lineage={}
    )


@pytest.fixture(scope="session")
def framed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model with `<cls>` and `<eos>`."""
    return tiny_bundle(tmp_path_factory.mktemp("framed") / "bundle", framed=True)


@pytest.fixture(scope="session")
def bare_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model without `<cls>` and `<eos>`."""
    return tiny_bundle(tmp_path_factory.mktemp("bare") / "bundle", framed=False)


@pytest.fixture(scope="session")
def short_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A framed model that takes 8 tokens, fewer than its vocabulary's window allows."""
    return tiny_bundle(tmp_path_factory.mktemp("short") / "bundle", framed=True, positions=8)


@pytest.fixture(scope="session")
def framed(framed_bundle: Bundle) -> Embedder:
    """Embedder of the tiny model with `<cls>` and `<eos>`."""
    return Embedder.load(framed_bundle, device="cpu")


@pytest.fixture(scope="session")
def bare(bare_bundle: Bundle) -> Embedder:
    """Embedder of the tiny model without `<cls>` and `<eos>`."""
    return Embedder.load(bare_bundle, device="cpu")


@pytest.fixture
def make_cell() -> Callable[[Vocabulary, list[int]], np.ndarray]:
    """Tokens of a cell whose genes, by number, stand in this order."""

    def make(vocabulary: Vocabulary, genes: list[int]) -> np.ndarray:
        tokens = [vocabulary.token(symbol(gene)) for gene in genes]
        if vocabulary.cls is not None and vocabulary.eos is not None:
            tokens = [vocabulary.cls, *tokens, vocabulary.eos]
        return np.array(tokens, dtype=vocabulary.token_dtype)

    return make


def write_corpus(uri: str, vocabulary: Vocabulary, store: Store, cells: list[np.ndarray]) -> Corpus:
    """Commit `cells` as one dataset; cell types take turns, and six donors give each a run of cells."""
    n = len(cells)
    columns = {
        "cell_id": [f"cell-{i}" for i in range(n)],
        "source_row": list(range(n)),
        "input_ids": [cell.tolist() for cell in cells],
        "length": [len(cell) for cell in cells],
        "total_counts": [1000.0] * n,
        "n_genes": [len(cell) - (0 if vocabulary.cls is None else 2) for cell in cells],
        "cell_type": [CELL_TYPES[i % len(CELL_TYPES)] for i in range(n)],
        "donor_id": [f"donor-{i * 6 // n}" for i in range(n)],
    }
    data = part_bytes(rows_table(columns, part_schema(vocabulary.token_dtype)))
    corpus = Corpus.create(uri, vocabulary, store)
    path = f"{dataset_folder('tiny')}/part-0.parquet"
    store.write(join(uri, path), data)
    source = Source(
        uri="tiny.h5ad", size_bytes=1, etag="1", vocabulary_digest=vocabulary.digest, recipe={"made": "for a test"}
    )
    return corpus.commit_source(source, "tiny", [NewPart(path=path, rows=n, size_bytes=len(data))], {})


@pytest.fixture
def corpus(tmp_path: Path, framed_bundle: Bundle, make_cell: Callable[[Vocabulary, list[int]], np.ndarray]) -> Corpus:
    """24 framed cells of 35 to 44 genes; gene 0 stands in the first twelve only, gene 1 in all.

    Below 32 tokens the last bits of an embedding depend on the number of threads, of which workers have one.
    """
    generator = np.random.default_rng(3)
    cells = []
    for i in range(24):
        others = generator.choice(np.arange(2, N_GENES), size=34 + i % 9, replace=False).tolist()
        genes = generator.permutation([*others, 1, *([0] if i < 12 else [])]).tolist()
        cells.append(make_cell(framed_bundle.vocabulary, genes))
    return write_corpus(str(tmp_path / "corpus"), framed_bundle.vocabulary, Store(StorageSettings()), cells)
