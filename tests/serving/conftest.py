"""A tiny random model, and ways to ask the HTTP side in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.platform.settings import Secret
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.config import Limits, ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.release import Release
from tests.serving.client_wire import Wire

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder
    from genescale.training.heads.head import LinearHead

N_GENES, N_WITHOUT_MEDIAN, WINDOW, WIDTH = 120, 3, 48, 16
Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]
ServeHeads = Callable[..., tuple[Gate, "list[LinearHead]", "Embedder"]]


def gene_id(number: int) -> str:
    return f"ENSG{number:011d}"


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """120 genes with symbols GENE0 …; the last three have no median; OLD5 is an alias of gene 5."""
    medians = np.random.default_rng(5).gamma(2.0, 1.0, N_GENES) + 0.1
    medians[-N_WITHOUT_MEDIAN:] = np.nan
    return Vocabulary.build(
        [gene_id(i) for i in range(N_GENES)],
        medians,
        symbols=[f"GENE{i}" for i in range(N_GENES)],
        window=WINDOW,
        name="tiny",
        aliases={"OLD5": gene_id(5)},
    )


@pytest.fixture(scope="session")
def bundle(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A random two-layer encoder as a bundle."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny-encoder", vocabulary, seed=11)


def write_tiny_bundle(folder: Path, vocabulary: Vocabulary, *, seed: int, positions: int = WINDOW) -> Bundle:
    from genescale.platform.bundle import write_bundle
    from genescale.training.model import EncoderConfig, new_model
    from genescale.training.weights import to_hf

    config = EncoderConfig(
        vocabulary_size=vocabulary.size,
        width=WIDTH,
        layers=2,
        heads=2,
        feed_forward=32,
        positions=positions,
        # Published initial weights are so small that all embeddings look alike; larger ones make tests sharp.
        initializer_range=0.3,
    )
    return write_bundle(
        folder,
        kind="masked_gene_model",
        config=config.to_hf(),
        weights=to_hf(new_model(config, seed=seed)),
        vocabulary=vocabulary,
        lineage={"corpus_uri": "s3://private-bucket/corpus", "corpus_version": 7, "git_commit": "abc123"},
    )


@pytest.fixture(scope="session")
def write_bundle_at(vocabulary: Vocabulary) -> Callable[..., Bundle]:
    return lambda folder, seed, **more: write_tiny_bundle(folder, vocabulary, seed=seed, **more)


@pytest.fixture(scope="session")
def embedder(bundle: Bundle) -> Embedder:
    from genescale.training.embedder import Embedder

    return Embedder.load(bundle, device="cpu")


@pytest.fixture(scope="session")
def draw_cell() -> DrawCell:
    """Counts of a random cell: `draw_cell(seed, n_genes)`, genes by symbol."""

    def draw(seed: int, n_genes: int) -> dict[str, float]:
        rng = np.random.default_rng(seed)
        genes = rng.choice(N_GENES - N_WITHOUT_MEDIAN, size=n_genes, replace=False)
        return {f"GENE{gene}": int(count) for gene, count in zip(genes, rng.integers(1, 40, n_genes), strict=True)}

    return draw


@pytest.fixture(scope="session")
def tokens_of(vocabulary: Vocabulary) -> Callable[[Mapping[str, float]], np.ndarray]:
    """Tokens of a cell of counts, by the function that ingestion uses."""
    from genescale.platform.rank_value import rank_value_tokens

    def tokens(counts: Mapping[str, float]) -> np.ndarray:
        ids = vocabulary.map_ids(list(counts))
        return rank_value_tokens(ids, list(counts.values()), vocabulary).input_ids

    return tokens


@pytest.fixture(scope="session")
def reference_corpus(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """90 tokenised cells of three types in two datasets; every ninth has no type, and the third type has no tissue."""
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.settings import StorageSettings
    from genescale.platform.storage import Store

    corpus = Corpus.create(str(tmp_path_factory.mktemp("reference") / "corpus"), vocabulary, Store(StorageSettings()))
    rng = np.random.default_rng(23)
    for dataset, n in (("atlas-a", 40), ("atlas-b", 50)):
        types = rng.integers(0, 3, n).tolist()
        corpus = _commit(corpus, dataset, [_typed_cell(vocabulary, kind, rng) for kind in types], types)
    return corpus


def _typed_cell(vocabulary: Vocabulary, kind: int, rng: np.random.Generator) -> np.ndarray:
    """A cell that begins with the genes of its type, in any order, before others of all genes."""
    own = rng.permutation(vocabulary.token_ids[12 * kind : 12 * kind + 12])
    others = rng.choice(vocabulary.token_ids[36:], size=int(rng.integers(5, 30)), replace=False)
    return np.array([vocabulary.cls, *own, *others, vocabulary.eos]).astype(vocabulary.token_dtype)


def _commit(corpus: Corpus, dataset_id: str, cells: Sequence[np.ndarray], types: Sequence[int]) -> Corpus:
    from genescale.ingestion.corpus import NewPart, Source, dataset_folder
    from genescale.ingestion.schema import part_schema, rows_table
    from genescale.ingestion.table.parts import part_bytes
    from genescale.platform.storage import join

    n = len(cells)
    columns = {
        "cell_id": [f"{dataset_id}-{at}" for at in range(n)],
        "source_row": list(range(n)),
        "input_ids": [cell.tolist() for cell in cells],
        "length": [len(cell) for cell in cells],
        "total_counts": [1000.0] * n,
        "n_genes": [len(cell) for cell in cells],
        "cell_type": [None if at % 9 == 0 else ("b", "nk", "t")[kind] for at, kind in enumerate(types)],
        "tissue": [("blood", "lung", None)[kind] for kind in types],
        "donor_id": [f"{dataset_id}-donor-{at % 3}" for at in range(n)],
        "labels": [[("age", str(20 + at % 5))] for at in range(n)],
    }
    data = part_bytes(rows_table(columns, part_schema(corpus.vocabulary.token_dtype)))
    path = f"{dataset_folder(dataset_id)}/part-0.parquet"
    corpus.store.write(join(corpus.uri, path), data)
    source = Source(
        uri=f"{dataset_id}.h5ad",
        size_bytes=1,
        etag="1",
        vocabulary_digest=corpus.vocabulary.digest,
        recipe={"made": "for a test"},
    )
    return corpus.commit_source(source, dataset_id, [NewPart(path=path, rows=n, size_bytes=len(data))], {})


@pytest.fixture
def http_side() -> Callable[..., Gate]:
    """The HTTP side of a bundle and a model: `http_side(bundle, model, keys=…, max_cells=…)`."""
    from genescale.serving.answering.answers import Answers
    from genescale.serving.facts import describe
    from genescale.serving.neighbours.answering import NeighborAnswers
    from genescale.serving.routes import http_application
    from genescale.serving.services import Services

    def make(bundle: Bundle, model: Any, *, keys: Sequence[str] = (), reference: Any = None, **limits: Any) -> Gate:
        config = ServingConfig(api_keys=tuple(Secret(key) for key in keys), limits=Limits(**limits))
        release = Release(name="tiny", version="3", digest=bundle.digest, address="models:/tiny/3", folder="")
        info = describe(release, bundle, config, reference=reference.facts if reference else None)
        answers = Answers(model, bundle.vocabulary, info, config.limits)
        neighbors = NeighborAnswers(answers, reference) if reference else None
        return http_application(Services(answers=answers, neighbors=neighbors), config)

    return make


@pytest.fixture
def build(bundle: Bundle, embedder: Embedder, http_side: Callable[..., Gate]) -> Callable[..., Gate]:
    """The HTTP side of the tiny model with chosen limits, keys, budget or another model."""
    from genescale.serving.in_process import InProcessModel

    def make(*, budget: int = 8_192, model: Any = None, **more: Any) -> Gate:
        return http_side(bundle, model or InProcessModel(embedder, tokens_per_batch=budget), **more)

    return make


@pytest.fixture
def serve_heads(bundle: Bundle, vocabulary: Vocabulary, http_side: Callable[..., Gate], tmp_path: Path) -> ServeHeads:
    """The HTTP side of the tiny encoder with random heads of these specs."""

    def make(*specs: dict[str, Any], budget: int = 8_192, **limits: Any) -> tuple[Gate, list[LinearHead], Embedder]:
        import torch

        from genescale.platform.bundle import write_bundle
        from genescale.serving.classifier import heads_on
        from genescale.serving.in_process import InProcessModel
        from genescale.training.embedder import Embedder
        from genescale.training.heads.head import LinearHead
        from genescale.training.heads.head_files import head_files
        from genescale.training.heads.spec import HeadSpec, bundle_kind

        shared = {"width": WIDTH, "layer": "last", "pooling": "mean_genes"}
        chosen = [HeadSpec(**shared, **spec) for spec in specs]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            heads = [LinearHead(spec).eval() for spec in chosen]
        fitted = write_bundle(
            tmp_path / "fitted",
            kind=bundle_kind(chosen),
            config=bundle.config,
            weights=bundle.weights(),
            vocabulary=vocabulary,
            lineage={},
            extra=head_files(heads),
        )
        embedder = Embedder.load(fitted, device="cpu")
        model = InProcessModel(embedder, heads_on(embedder, fitted), tokens_per_batch=budget)
        return http_side(fitted, model, **limits), heads, embedder

    return make


@pytest.fixture
def app(build: Callable[..., Gate]) -> Gate:
    """The HTTP side of the tiny model as it comes."""
    return build()


@pytest.fixture
def ask() -> Ask:
    """Send one request to an ASGI application: `ask(app, "POST", "/v1/embeddings", json=…)`."""

    def send(app: Any, method: str, path: str, **more: Any) -> httpx.Response:
        return ask_all(app, [(method, path, more)])[0]

    return send


@pytest.fixture
def ask_together() -> Callable[..., list[httpx.Response]]:
    """Send several requests at once."""
    return ask_all


def ask_all(app: Any, requests: Sequence[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
    async def send_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await asyncio.gather(*(client.request(m, path, **more) for m, path, more in requests))

    return asyncio.run(send_all())


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    loop.close()


@pytest.fixture
def wire(build: Callable[..., Gate], loop: asyncio.AbstractEventLoop) -> Callable[..., Wire]:
    """A transport for clients into the HTTP side of the tiny model: `wire(max_cells=…)`."""
    return lambda **more: Wire(build(**more), loop)


@pytest.fixture
def counts_ng() -> np.ndarray:
    """Counts of 23 cells of 5 to 60 genes."""
    rng = np.random.default_rng(8)
    counts_ng = np.zeros((23, N_GENES - N_WITHOUT_MEDIAN), dtype=np.int64)
    for row_g in counts_ng:
        genes = rng.choice(len(row_g), size=rng.integers(5, 60), replace=False)
        row_g[genes] = rng.integers(1, 2_000, len(genes))
    return counts_ng


@pytest.fixture
def expected_nd(counts_ng: np.ndarray, embedder: Embedder, tokens_of: Callable[..., np.ndarray]) -> np.ndarray:
    """What the model itself says of those cells."""
    cells = [{f"GENE{gene}": int(row_g[gene]) for gene in np.flatnonzero(row_g)} for row_g in counts_ng]
    return embedder.embed_cells([tokens_of(cell) for cell in cells], layer="second_to_last", pooling="mean_genes")
