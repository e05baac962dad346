"""A model that can answer every question: the tiny encoder with heads, and a reference made with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genescale.platform.settings import Settings
from tests.serving.conftest import WIDTH

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.platform.vocabulary import Vocabulary
    from genescale.serving.gate import Gate
    from genescale.serving.neighbours.reference import Reference


@pytest.fixture(scope="session")
def complete_bundle(bundle: Bundle, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny encoder with two heads that read cells."""
    return with_heads(bundle, vocabulary, tmp_path_factory.mktemp("complete") / "tiny-complete")


@pytest.fixture(scope="session")
def other_bundle(
    write_bundle_at: Callable[..., Bundle], vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """Another encoder with the same heads: the next version."""
    folder = tmp_path_factory.mktemp("other")
    return with_heads(write_bundle_at(folder / "encoder", 12), vocabulary, folder / "tiny-other")


def with_heads(bundle: Bundle, vocabulary: Vocabulary, folder: Path) -> Bundle:
    import torch

    from genescale.platform.bundle import write_bundle
    from genescale.training.heads.head import LinearHead
    from genescale.training.heads.head_files import head_files
    from genescale.training.heads.spec import HeadSpec, bundle_kind

    shared = {"width": WIDTH, "layer": "last", "pooling": "mean_genes"}
    specs = [
        HeadSpec(kind="cell_classes", label="cell_type", classes=("b", "nk", "t"), **shared),
        HeadSpec(kind="cell_classes", label="tissue", classes=("blood", "lung"), **shared),
    ]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        heads = [LinearHead(spec).eval() for spec in specs]
    return write_bundle(
        folder,
        kind=bundle_kind(specs),
        config=bundle.config,
        weights=bundle.weights(),
        vocabulary=vocabulary,
        lineage={"corpus_version": 7},
        extra=head_files(heads),
    )


@pytest.fixture(scope="session")
def reference_uri(complete_bundle: Bundle, reference_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An index of the reference cells, made with the complete model."""
    from genescale.serving.neighbours.building import IndexConfig, build_index

    uri = str(tmp_path_factory.mktemp("references") / "index")
    config = IndexConfig(device="cpu", columns=("cell_type", "tissue"), map_cells=0)
    build_index(complete_bundle, reference_corpus, out_uri=uri, store=reference_corpus.store, config=config)
    return uri


@pytest.fixture(scope="session")
def reference(reference_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    from genescale.serving.neighbours.reference import Reference

    return Reference.open(reference_uri, Settings(), tmp_path_factory.mktemp("reference-cache"))


@pytest.fixture
def complete(http_side: Callable[..., Gate], complete_bundle: Bundle, reference: Reference) -> Callable[..., Gate]:
    """The HTTP side of that model in this process, with chosen limits: `complete(max_cells=3)`."""
    from genescale.serving.classifier import heads_on
    from genescale.serving.in_process import InProcessModel
    from genescale.training.embedder import Embedder

    embedder = Embedder.load(complete_bundle, device="cpu")
    model = InProcessModel(embedder, heads_on(embedder, complete_bundle))
    return lambda **more: http_side(complete_bundle, model, reference=reference, **more)
