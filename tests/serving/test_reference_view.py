"""The map and the examples of a reference: what an index holds of them, what is answered, and where a cell lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.platform.errors import IntegrityError
from genescale.platform.settings import Settings
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.neighbours.building import IndexConfig, build_index
from genescale.serving.neighbours.index_folder import EXAMPLES, MAP, file_digests, publish
from genescale.serving.neighbours.layout import PLACED_BY, laid_out, placed
from genescale.serving.neighbours.reference import Reference
from genescale.serving.neighbours.vectors import VectorIndex
from tests.serving.mapped_index import with_map

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

Ask = Callable[..., httpx.Response]
N_CELLS = 90


@pytest.fixture(scope="module")
def folder(bundle: Bundle, reference_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of every cell, without a map."""
    uri = str(tmp_path_factory.mktemp("index") / "plain")
    config = IndexConfig(device="cpu", columns=("cell_type", "tissue"), map_cells=0, sampled=20)
    build_index(bundle, reference_corpus, out_uri=uri, store=reference_corpus.store, config=config)
    return Path(uri)


@pytest.fixture(scope="module")
def places_n2() -> np.ndarray:
    return np.random.default_rng(3).normal(scale=5, size=(N_CELLS, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def mapped(
    folder: Path, places_n2: np.ndarray, reference_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same index with a map whose places are known."""
    return with_map(folder, places_n2, reference_corpus.store, tmp_path_factory.mktemp("mapped"))


@pytest.fixture
def serve(http_side: Callable[..., Gate], bundle: Bundle, embedder: Embedder, tmp_path: Path) -> Callable[[Path], Gate]:
    def make(uri: Path) -> Gate:
        reference = Reference.open(str(uri), Settings(), tmp_path)
        return http_side(bundle, InProcessModel(embedder), reference=reference)

    return make


def got(ask: Ask, app: Gate, path: str, **query: Any) -> dict[str, Any]:
    response = ask(app, "GET", path, params=query)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_map_shows_every_cell_with_its_labels(
    ask: Ask, serve: Callable[[Path], Gate], mapped: Path, places_n2: np.ndarray, reference_corpus: Corpus
) -> None:
    answer = got(ask, serve(mapped), "/v1/reference/map")
    known = reference_corpus.cells(["cell_id", "cell_type", "tissue"]).to_pylist()
    assert (answer["method"], answer["cells"]) == ("umap", N_CELLS)
    assert answer["ids"] == [one["cell_id"] for one in known]
    np.testing.assert_allclose(np.stack([answer["x"], answer["y"]], axis=1), places_n2, atol=6e-4)
    for column in ("cell_type", "tissue"):
        values, codes = answer["labels"][column]["values"], answer["labels"][column]["codes"]
        assert [None if code < 0 else values[code] for code in codes] == [one[column] for one in known]
        counts = [codes.count(code) for code in range(len(values))]
        assert counts == sorted(counts, reverse=True)


def test_a_part_of_the_map_is_always_the_same_part(ask: Ask, serve: Callable[[Path], Gate], mapped: Path) -> None:
    app = serve(mapped)
    whole, part, again = (got(ask, app, "/v1/reference/map", limit=n) for n in (20_000, 25, 25))
    assert part == again
    assert part["cells"] == len(set(part["ids"])) == 25
    at = {cell: row for row, cell in enumerate(whole["ids"])}
    assert [whole["x"][at[cell]] for cell in part["ids"]] == part["x"]


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "x", "20001", "", "10&limit=10"])
def test_a_limit_that_is_no_allowed_number_is_refused(
    ask: Ask, serve: Callable[[Path], Gate], mapped: Path, limit: str
) -> None:
    response = ask(serve(mapped), "GET", f"/v1/reference/map?limit={limit}")
    assert response.status_code == 422
    assert response.json()["error"]["details"] == {"where": "limit"}


def test_examples_are_cells_of_each_label_that_any_question_takes(
    ask: Ask, serve: Callable[[Path], Gate], mapped: Path, places_n2: np.ndarray, reference_corpus: Corpus
) -> None:
    app = serve(mapped)
    examples = got(ask, app, "/v1/reference/examples")["examples"]
    labels = [one["labels"]["cell_type"] for one in examples]
    assert {label: labels.count(label) for label in set(labels)} == {"b": 3, "nk": 3, "t": 3}
    ids = reference_corpus.cells(["cell_id"]).column(0).to_pylist()
    rows = [ids.index(one["id"]) for one in examples]
    assert [one["tokens"] for one in examples] == [tokens.tolist() for tokens in reference_corpus.tokens(rows)]
    np.testing.assert_allclose([one["place"] for one in examples], places_n2[rows], atol=6e-4)
    body = {"cells": [{"tokens": one["tokens"]} for one in examples], "k": 1}
    found = ask(app, "POST", "/v1/neighbors", json=body).json()["cells"]
    assert [cell["neighbors"][0]["id"] for cell in found] == [one["id"] for one in examples]


def test_a_cell_lies_where_its_neighbours_say_whatever_number_is_asked_for(
    ask: Ask, serve: Callable[[Path], Gate], mapped: Path, places_n2: np.ndarray, reference_corpus: Corpus
) -> None:
    app = serve(mapped)
    cell = {"tokens": reference_corpus.tokens([7])[0][:-6].tolist()}
    answers = [ask(app, "POST", "/v1/neighbors", json={"cells": [cell], "k": k}).json() for k in (1, PLACED_BY, 30)]
    near = answers[1]["cells"][0]["neighbors"]
    weights = np.array([one["distance"] for one in near]) ** -2.0
    expected = weights @ np.array([one["place"] for one in near]) / weights.sum()
    for answer in answers:
        np.testing.assert_allclose(answer["cells"][0]["place"], expected, atol=2e-3)
    ids = reference_corpus.cells(["cell_id"]).column(0).to_pylist()
    for one in answers[2]["cells"][0]["neighbors"]:
        np.testing.assert_allclose(one["place"], places_n2[ids.index(one["id"])], atol=6e-4)


def test_a_known_cell_lies_on_itself() -> None:
    places = np.array([[[3.0, 4.0], [9.0, 9.0]], [[1.0, 1.0], [5.0, 5.0]]])
    found = placed(places, np.array([[0.0, 0.1], [0.2, 0.2]]))
    np.testing.assert_allclose(found, [[3.0, 4.0], [3.0, 3.0]])


def test_an_index_without_a_map_says_so_and_answers(
    ask: Ask, serve: Callable[[Path], Gate], folder: Path, reference_corpus: Corpus
) -> None:
    app = serve(folder)
    answer = got(ask, app, "/v1/reference/map")
    assert (answer["method"], answer["cells"], answer["x"]) == (None, 0, [])
    body = {"cells": [{"tokens": reference_corpus.tokens([2])[0].tolist()}], "k": 3}
    found = ask(app, "POST", "/v1/neighbors", json=body).json()["cells"][0]
    assert found["place"] is None
    assert [one["place"] for one in found["neighbors"]] == [None] * 3


def test_an_index_of_before_still_opens(folder: Path, reference_corpus: Corpus, tmp_path: Path) -> None:
    import shutil

    old = tmp_path / "parts"
    shutil.copytree(folder, old)
    manifest = Reference.open(str(folder), Settings(), tmp_path).manifest
    for name in ("manifest.json", EXAMPLES):
        (old / name).unlink()
    publish(old, replace(manifest, files=file_digests(old)), str(tmp_path / "old"), reference_corpus.store)
    reference = Reference.open(str(tmp_path / "old"), Settings(), tmp_path)
    assert (reference.places_n2, reference.examples) == (None, None)
    assert reference.cells(np.arange(1))[0]["cell_id"] == "atlas-a-0"


@pytest.mark.parametrize("name", [MAP, EXAMPLES])
def test_a_changed_map_or_example_is_refused(mapped: Path, tmp_path: Path, name: str) -> None:
    import shutil

    copy = tmp_path / "index"
    shutil.copytree(mapped, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=name):
        Reference.open(str(copy), Settings(), tmp_path)


def test_a_service_without_a_reference_says_what_would_have_one(ask: Ask, app: Gate) -> None:
    for path in ("/v1/reference/map", "/v1/reference/examples"):
        response = ask(app, "GET", path)
        assert response.status_code == 422
        assert "--index" in response.json()["error"]["message"]


@pytest.mark.slow
def test_cells_that_are_not_laid_out_lie_among_their_like() -> None:
    rng = np.random.default_rng(4)
    kinds_n = rng.integers(0, 3, 240)
    vectors_nd = np.eye(3, 12)[kinds_n] + rng.normal(scale=0.05, size=(240, 12))
    index = VectorIndex.empty(12, "exact")
    index.add(vectors_nd - vectors_nd.mean(axis=0))
    again = [laid_out(index, 90, seed) for seed in (1, 1)]
    assert again[0] is not None
    assert again[1] is not None
    np.testing.assert_array_equal(again[0], again[1])
    middles = np.stack([np.median(again[0][kinds_n == kind], axis=0) for kind in range(3)])
    nearest_n = np.linalg.norm(again[0][:, None] - middles, axis=2).argmin(axis=1)
    assert (nearest_n == kinds_n).mean() > 0.95
    assert laid_out(index, 0, 1) is None
