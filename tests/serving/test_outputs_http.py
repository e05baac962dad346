"""What `/v1/embeddings` can give: a vector per cell, the vector of `<cls>`, or a vector per gene."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import httpx
import numpy as np
import pytest

from genescale.client import GenescaleClient
from genescale.platform.vocabulary import Vocabulary
from genescale.serving import schemas
from genescale.serving.gate import Gate

if TYPE_CHECKING:
    from genescale.training.embedder import Embedder

Ask = Callable[..., httpx.Response]
Build = Callable[..., Gate]
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]


def embed(ask: Ask, app: Gate, cells: Any, **more: Any) -> dict[str, Any]:
    response = ask(app, "POST", "/v1/embeddings", json={"cells": cells, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("layer", get_args(schemas.Layer))
@pytest.mark.parametrize("budget", [60, 8_192])
def test_every_gene_gets_its_embedding_in_rank_order(
    ask: Ask,
    build: Build,
    embedder: Embedder,
    vocabulary: Vocabulary,
    draw_cell: DrawCell,
    tokens_of: Tokens,
    layer: Any,
    budget: int,
) -> None:
    cells = [draw_cell(seed, n) for seed, n in enumerate((20, 1, 100, 30))]
    answer = embed(ask, build(budget=budget), [{"counts": cell} for cell in cells], layer=layer, output="genes")
    assert (answer["output"], answer["pooling"], answer["layer"]) == ("genes", None, layer)
    for cell, counts in zip(answer["cells"], cells, strict=True):
        tokens = tokens_of(counts)
        (expected_td,) = embedder.embed_genes([tokens], layer=layer)
        assert cell["genes"] == [vocabulary.gene_of_token(int(token)) for token in tokens[1:-1]]
        assert np.array_equal(np.array(cell["gene_embeddings"]), expected_td[1:-1].astype(np.float64))
        assert cell["embedding"] is None


def test_the_mean_of_the_genes_is_the_embedding_of_the_cell(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    cells = [{"counts": draw_cell(3, 30)}]
    (genes,), (cell,) = (embed(ask, app, cells, output=output)["cells"] for output in ("genes", "cell"))
    assert np.mean(genes["gene_embeddings"], axis=0) == pytest.approx(cell["embedding"], abs=1e-5)
    assert cell["genes"] is cell["gene_embeddings"] is None


def test_the_output_cls_is_the_pooling_cls(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    cells = [{"counts": draw_cell(3, 30)}]
    by_output = embed(ask, app, cells, output="cls")
    by_pooling = embed(ask, app, cells, pooling="cls")
    assert (by_output["output"], by_output["pooling"], by_pooling["output"]) == ("cls", "cls", "cell")
    assert by_output["cells"] == by_pooling["cells"]
    assert by_output["cells"] == embed(ask, app, cells, output="cls", pooling="cls")["cells"]
    assert by_output["cells"] != embed(ask, app, cells)["cells"]


@pytest.mark.parametrize("asked", [{"output": "cls", "pooling": "mean_genes"}, {"output": "genes", "pooling": "cls"}])
def test_a_pooling_that_contradicts_the_output_is_refused(ask: Ask, app: Gate, asked: dict[str, str]) -> None:
    response = ask(app, "POST", "/v1/embeddings", json={"cells": [{"counts": {"GENE1": 1}}], **asked})
    error = response.json()["error"]
    assert (response.status_code, error["details"]["where"]) == (422, "pooling")


def test_embeddings_of_genes_have_a_limit_of_their_own(ask: Ask, build: Build, draw_cell: DrawCell) -> None:
    app = build(max_gene_values=16 * 50)
    assert embed(ask, app, [{"counts": draw_cell(1, 25)}] * 2, output="genes")["cells"]
    asked = {"cells": [{"counts": draw_cell(1, 25)}, {"counts": draw_cell(1, 26)}], "output": "genes"}
    response = ask(app, "POST", "/v1/embeddings", json=asked)
    assert (response.status_code, response.json()["error"]["details"]["where"]) == (413, "output")
    # Cells as such are not bound by it.
    assert ask(app, "POST", "/v1/embeddings", json={**asked, "output": "cell"}).status_code == 200


def test_info_names_the_outputs(ask: Ask, app: Gate) -> None:
    assert ask(app, "GET", "/v1/info").json()["choices"]["output"] == list(get_args(schemas.Output))


def test_the_client_gives_back_embeddings_of_genes_from_parallel_arrays(
    ask: Ask, app: Gate, embedder: Embedder, vocabulary: Vocabulary, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    def forward(request: httpx.Request) -> httpx.Response:
        answer = ask(app, request.method, request.url.path, content=request.content, headers=request.headers)
        return httpx.Response(answer.status_code, content=answer.content)

    counts = draw_cell(4, 20)
    cell = {"id": "a", "genes": np.array(list(counts)), "values": np.array(list(counts.values()), dtype=np.float32)}
    with GenescaleClient("http://service", transport=httpx.MockTransport(forward)) as client:
        (found,) = client.gene_embeddings([cell], layer="last").cells
    tokens = tokens_of(counts)
    assert found.genes == tuple(vocabulary.gene_of_token(int(token)) for token in tokens[1:-1])
    assert found.embeddings.dtype == np.float32
    assert np.array_equal(found.embeddings, embedder.embed_genes([tokens], layer="last")[0][1:-1])
    assert (found.report.id, found.report.n_genes) == ("a", 20)
