"""A tiny random model, and ways to ask the HTTP side in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
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

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

N_GENES, N_WITHOUT_MEDIAN, WINDOW, WIDTH = 120, 3, 48, 16
Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]


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


@pytest.fixture
def http_side() -> Callable[..., Gate]:
    """The HTTP side of a bundle and a model: `http_side(bundle, model, keys=…, max_cells=…)`."""
    from genescale.serving.answers import Answers
    from genescale.serving.facts import describe
    from genescale.serving.routes import http_application

    def make(bundle: Bundle, model: Any, *, keys: Sequence[str] = (), **limits: Any) -> Gate:
        config = ServingConfig(api_keys=tuple(Secret(key) for key in keys), limits=Limits(**limits))
        release = Release(name="tiny", version="3", digest=bundle.digest, address="models:/tiny/3", folder="")
        answers = Answers(model, bundle.vocabulary, describe(release, bundle, config), config.limits)
        return http_application(answers, config)

    return make


@pytest.fixture
def build(bundle: Bundle, embedder: Embedder, http_side: Callable[..., Gate]) -> Callable[..., Gate]:
    """The HTTP side of the tiny model with chosen limits, keys, budget or another model."""
    from genescale.serving.in_process import InProcessModel

    def make(*, budget: int = 8_192, model: Any = None, **more: Any) -> Gate:
        return http_side(bundle, model or InProcessModel(embedder, tokens_per_batch=budget), **more)

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
