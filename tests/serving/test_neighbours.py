"""`/v1/neighbors`: nearest cells of a published reference, their labels, and how unlike all of them a cell is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.platform.settings import Settings
from genescale.platform.storage import Store
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.neighbours.building import IndexConfig, build_index
from genescale.serving.neighbours.reference import Reference

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

Ask = Callable[..., httpx.Response]
N_CELLS, K = 90, 7


@pytest.fixture(scope="module")
def reference(bundle: Bundle, reference_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """An index of every cell of the corpus, opened."""
    uri = str(tmp_path_factory.mktemp("index") / "index")
    config = IndexConfig(device="cpu", map_cells=0, columns=("cell_type", "tissue", "labels.age"))
    build_index(bundle, reference_corpus, out_uri=uri, store=reference_corpus.store, config=config)
    return Reference.open(uri, Settings(), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def app(http_side: Callable[..., Gate], bundle: Bundle, embedder: Embedder, reference: Reference) -> Gate:
    return http_side(bundle, InProcessModel(embedder), reference=reference)


@pytest.fixture(scope="module")
def vectors_nd(embedder: Embedder, reference_corpus: Corpus) -> np.ndarray:
    """Embeddings of the reference cells, (n, d)."""
    return embedder.embed_cells(reference_corpus.tokens(range(N_CELLS)), layer="second_to_last", pooling="mean_genes")


def asked(ask: Ask, app: Gate, cells: list[Any], **more: Any) -> dict[str, Any]:
    response = ask(app, "POST", "/v1/neighbors", json={"cells": [{"tokens": c} for c in cells], "k": K, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_neighbours_are_those_of_a_plain_computation(
    ask: Ask, app: Gate, reference_corpus: Corpus, vectors_nd: np.ndarray, embedder: Embedder
) -> None:
    strangers = [cell[:-4] for cell in reference_corpus.tokens([3, 50])]
    answer = asked(ask, app, [cell[1:].tolist() for cell in strangers])
    framed = [np.append(cell, embedder.vocabulary.eos).astype(cell.dtype) for cell in strangers]
    asked_qd = embedder.embed_cells(framed, layer="second_to_last", pooling="mean_genes").astype(np.float64)
    units_nd = vectors_nd / np.linalg.norm(vectors_nd.astype(np.float64), axis=1, keepdims=True)
    true_qn = 1 - asked_qd / np.linalg.norm(asked_qd, axis=1, keepdims=True) @ units_nd.T
    known = reference_corpus.cells(["cell_id", "dataset_id", "cell_type", "tissue", "labels.age"]).to_pylist()
    for at, cell in enumerate(answer["cells"]):
        nearest = np.argsort(true_qn[at], kind="stable")[:K].tolist()
        assert [one["id"] for one in cell["neighbors"]] == [known[row]["cell_id"] for row in nearest]
        assert [one["dataset"] for one in cell["neighbors"]] == [known[row]["dataset_id"] for row in nearest]
        for one, row in zip(cell["neighbors"], nearest, strict=True):
            assert one["distance"] == pytest.approx(true_qn[at, row], rel=1e-4)
            assert one["labels"] == {name: known[row][name] for name in ("cell_type", "tissue", "labels.age")}


def test_a_cell_of_the_reference_finds_itself_and_its_type(ask: Ask, app: Gate, reference_corpus: Corpus) -> None:
    known = reference_corpus.cells(["cell_id", "cell_type"]).to_pylist()
    chosen = [0, 20, 44, 70]
    answer = asked(ask, app, [cell.tolist() for cell in reference_corpus.tokens(chosen)], columns=["cell_type"])
    for row, cell in zip(chosen, answer["cells"], strict=True):
        first = cell["neighbors"][0]
        assert first["id"] == known[row]["cell_id"]
        assert first["distance"] == pytest.approx(0, abs=1e-12)
        labels = [one["labels"]["cell_type"] for one in cell["neighbors"]]
        assert set(cell["votes"]) == {"cell_type"}
        told = {vote["label"]: (vote["n"], vote["share"]) for vote in cell["votes"]["cell_type"]}
        assert told == {label: (labels.count(label), labels.count(label) / K) for label in set(labels)}
        numbers = [vote["n"] for vote in cell["votes"]["cell_type"]]
        assert numbers == sorted(numbers, reverse=True)


@pytest.mark.parametrize("k", [1, K, 40])
def test_out_of_distribution_is_the_quantile_among_reference_cells(
    ask: Ask, app: Gate, reference_corpus: Corpus, vectors_nd: np.ndarray, k: int
) -> None:
    units_nd = vectors_nd / np.linalg.norm(vectors_nd.astype(np.float64), axis=1, keepdims=True)
    apart_nn = 1 - units_nd @ units_nd.T
    np.fill_diagonal(apart_nn, np.inf)
    to_kth_n = np.sort(apart_nn, axis=1)[:, k - 1]
    # One gene has no average of genes around it, so its vector is longer than those of cells, and elsewhere.
    strangers = [[token] for token in reference_corpus.vocabulary.token_ids[80:83].tolist()]
    cells = [cell.tolist() for cell in reference_corpus.tokens(range(0, N_CELLS, 3))]
    found = asked(ask, app, [*cells, *strangers], k=k)["cells"]
    for cell in found:
        expected = float((to_kth_n < cell["neighbors"][-1]["distance"]).mean())
        # Two reference cells that are each other's k-th are as near as the last bits say.
        assert cell["out_of_distribution"] == pytest.approx(expected, abs=1.5 / N_CELLS)
    scores = [cell["out_of_distribution"] for cell in found]
    assert min(scores[-3:]) > 0.99
    assert np.median(scores[:-3]) < 0.75


def test_a_batch_equals_singles(ask: Ask, app: Gate, reference_corpus: Corpus) -> None:
    cells = [cell[:-3].tolist() for cell in reference_corpus.tokens([1, 2, 30, 31, 32, 60, 61, 62, 63, 64])]
    together = asked(ask, app, cells)["cells"]
    assert together == [asked(ask, app, [cell])["cells"][0] for cell in cells]


def test_an_answer_says_what_it_compared_with_and_no_address(
    ask: Ask, app: Gate, reference: Reference, reference_corpus: Corpus, bundle: Bundle
) -> None:
    response = ask(app, "POST", "/v1/neighbors", json={"cells": [{"counts": {"GENE1": 3, "NOBODY": 1}}], "k": 2})
    answer = response.json()
    assert answer["provenance"]["model"]["digest"] == bundle.digest
    assert answer["reference"] == {
        "digest": reference.manifest.digest,
        "corpus": {"version": reference_corpus.version},
        "cells": N_CELLS,
        "columns": ["cell_type", "tissue", "labels.age"],
        "layer": "second_to_last",
        "pooling": "mean_genes",
        "search": "exact",
        "max_neighbors": N_CELLS - 1,
        "apart": None,
    }
    assert answer["cells"][0]["ignored"]["unknown"] == 1
    assert set(answer["timings_ms"]) == {"parse", "queue", "forward", "search"}
    info = ask(app, "GET", "/v1/info")
    assert info.json()["reference"] == answer["reference"]
    for text in (response.text, info.text):
        assert reference_corpus.uri not in text


@pytest.mark.parametrize(
    ("more", "status", "where"),
    [
        ({"k": 0}, 422, "k"),
        ({"k": N_CELLS}, 413, "k"),
        ({"k": 2.5}, 422, "k"),
        ({"columns": ["cell_typ"]}, 422, "columns[0]"),
        ({"columns": ["cell_type", ""]}, 422, "columns[1]"),
        ({"layer": "last"}, 422, "layer"),
    ],
)
def test_what_cannot_be_answered_is_refused(ask: Ask, app: Gate, more: dict[str, Any], status: int, where: str) -> None:
    response = ask(app, "POST", "/v1/neighbors", json={"cells": [{"counts": {"GENE1": 3}}], **more})
    assert response.status_code == status, response.text
    assert response.json()["error"]["details"]["where"] == where


def test_a_misspelt_column_gets_a_hint(ask: Ask, app: Gate) -> None:
    body = {"cells": [{"counts": {"GENE1": 3}}], "columns": ["cell_typ"]}
    assert "Did you mean 'cell_type'?" in ask(app, "POST", "/v1/neighbors", json=body).json()["error"]["message"]


def test_no_columns_are_no_labels(ask: Ask, app: Gate) -> None:
    body = {"cells": [{"counts": {"GENE1": 3}}], "columns": [], "k": 1}
    cell = ask(app, "POST", "/v1/neighbors", json=body).json()["cells"][0]
    assert cell["votes"] == {}
    assert cell["neighbors"][0]["labels"] == {}


def test_a_service_without_a_reference_says_so(ask: Ask, build: Callable[..., Gate]) -> None:
    response = ask(build(), "POST", "/v1/neighbors", json={"cells": [{"counts": {"GENE1": 3}}]})
    assert response.status_code == 422
    assert "--index" in response.json()["error"]["message"]
    assert ask(build(), "GET", "/v1/info").json()["reference"] is None


def test_a_model_that_gives_no_numbers_is_a_fault(
    ask: Ask, http_side: Callable[..., Gate], bundle: Bundle, embedder: Embedder, reference: Reference
) -> None:
    class Diverged:
        vocabulary, width = embedder.vocabulary, embedder.width

        def embed_cells(self, cells: list[Any], **_: Any) -> np.ndarray:
            return np.full((len(cells), self.width), np.nan, dtype=np.float32)

    app = http_side(bundle, InProcessModel(Diverged()), reference=reference)  # type: ignore[arg-type]
    response = ask(app, "POST", "/v1/neighbors", json={"cells": [{"counts": {"GENE1": 3}}]})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"


def test_a_graph_answers_like_an_exact_search(
    ask: Ask,
    app: Gate,
    http_side: Callable[..., Gate],
    bundle: Bundle,
    embedder: Embedder,
    reference_corpus: Corpus,
    local_store: Store,
    tmp_path: Any,
) -> None:
    config = IndexConfig(device="cpu", map_cells=0, search="graph")
    build_index(bundle, reference_corpus, out_uri=str(tmp_path / "graph"), store=local_store, config=config)
    graph = Reference.open(str(tmp_path / "graph"), Settings(), tmp_path)
    other = http_side(bundle, InProcessModel(embedder), reference=graph)
    cells = [cell[:-3].tolist() for cell in reference_corpus.tokens([1, 30, 60])]
    exact, found = (asked(ask, side, cells, columns=["cell_type"]) for side in (app, other))
    assert found["reference"]["search"] == "graph"
    assert found["cells"] == exact["cells"]
