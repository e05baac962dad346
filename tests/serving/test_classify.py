"""`/v1/classify`: what the heads of a fine-tuned model say of cells and of genes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.client import GenescaleClient
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.gate import Gate

if TYPE_CHECKING:
    from genescale.training.embedder import Embedder
    from genescale.training.heads.head import LinearHead

Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]
WIDTH = 16
Serve = Callable[..., tuple[Gate, "list[LinearHead]", "Embedder"]]


TYPE = {"label": "cell_type", "classes": ("b", "nk", "t")}
AGE = {"label": "age", "kind": "number"}
DOSAGE = {"label": "dosage", "kind": "gene_classes", "classes": ("sensitive", "insensitive")}


def asked(ask: Ask, app: Gate, body: dict[str, Any]) -> dict[str, Any]:
    response = ask(app, "POST", "/v1/classify", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_cells_get_the_answers_of_every_head(
    ask: Ask, serve_heads: Serve, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    app, heads, embedder = serve_heads(TYPE, AGE)
    cells = [draw_cell(seed, n) for seed, n in enumerate((40, 5, 70))]
    answer = asked(ask, app, {"cells": [{"counts": cell} for cell in cells]})
    rows_nd = embedder.embed_cells([tokens_of(cell) for cell in cells], layer="last", pooling="mean_genes")
    types_nc, ages_n = heads[0].answer(rows_nd), heads[1].answer(rows_nd)[:, 0]
    assert [head["label"] for head in answer["heads"]] == ["cell_type", "age"]
    assert answer["genes"] == []
    for at, cell in enumerate(answer["cells"]):
        named, aged = cell["heads"]
        assert list(named["probabilities"]) == list(TYPE["classes"])
        assert list(named["probabilities"].values()) == pytest.approx(types_nc[at], rel=1e-5)
        assert named["predicted"] == TYPE["classes"][int(types_nc[at].argmax())]
        assert (aged["predicted"], aged["probabilities"]) == (None, {})
        assert aged["number"] == pytest.approx(ages_n[at], rel=1e-4)
    info = ask(app, "GET", "/v1/info").json()
    assert info["heads"] == answer["heads"]


def test_a_batch_answers_as_its_cells_do_alone(ask: Ask, serve_heads: Serve, draw_cell: DrawCell) -> None:
    app, _, _ = serve_heads(TYPE)
    cells = [{"counts": draw_cell(seed, 30 + seed)} for seed in range(4)]
    together = asked(ask, app, {"cells": cells})["cells"]
    assert together == [asked(ask, app, {"cells": [cell]})["cells"][0] for cell in cells]


def test_genes_get_the_mean_over_the_cells_that_have_them(
    ask: Ask, serve_heads: Serve, draw_cell: DrawCell, tokens_of: Tokens, vocabulary: Vocabulary
) -> None:
    app, heads, embedder = serve_heads(DOSAGE)
    cells = [draw_cell(1, 40), draw_cell(2, 40)]
    tokens = [tokens_of(cell) for cell in cells]
    shared = sorted(set(cells[0]) & set(cells[1]))[0]
    single = sorted(set(cells[0]) - set(cells[1]))[0]
    absent = sorted({f"GENE{i}" for i in range(110)} - set(cells[0]) - set(cells[1]))[0]
    answer = asked(ask, app, {"cells": [{"counts": cell} for cell in cells], "genes": [shared, single, absent]})
    rows = embedder.embed_genes(tokens, layer="last")
    of_shared = [
        heads[0].answer(rows_td[cell == vocabulary.token(shared)])[0]
        for cell, rows_td in zip(tokens, rows, strict=True)
    ]
    both, one, none = answer["genes"]
    assert (both["gene"], both["n_cells"]) == (shared, 2)
    assert list(both["probabilities"].values()) == pytest.approx(np.mean(of_shared, axis=0), rel=1e-6)
    assert list(both["spread"].values()) == pytest.approx(np.std(of_shared, axis=0), rel=1e-4)
    assert (one["n_cells"], list(one["spread"].values())) == (1, [0.0, 0.0])
    assert none == {"gene": absent, "n_cells": 0, "predicted": None, "probabilities": {}, "spread": {}}
    assert answer["cells"][0]["heads"] == []
    everything = asked(ask, app, {"cells": [{"counts": cell} for cell in cells]})["genes"]
    assert {gene["gene"] for gene in everything} == {
        vocabulary.gene_of_token(vocabulary.token(name)) for cell in cells for name in cell
    }


@pytest.mark.parametrize(
    ("specs", "genes", "message"),
    [((TYPE,), ["GENE1"], "reads cells, not genes"), ((DOSAGE,), ["NOGENE"], "NOGENE"), ((), [], "has no head")],
)
def test_what_the_head_cannot_answer_is_refused(
    ask: Ask,
    app: Gate,
    serve_heads: Serve,
    draw_cell: DrawCell,
    specs: tuple[dict[str, Any], ...],
    genes: list[str],
    message: str,
) -> None:
    service = serve_heads(*specs)[0] if specs else app
    response = ask(service, "POST", "/v1/classify", json={"cells": [{"counts": draw_cell(1, 9)}], "genes": genes})
    assert response.status_code == 422
    assert message in response.json()["error"]["message"]


def test_more_genes_than_the_limit_are_refused(ask: Ask, serve_heads: Serve, draw_cell: DrawCell) -> None:
    app, _, _ = serve_heads(DOSAGE, max_classified_genes=3)
    body = {"cells": [{"counts": draw_cell(1, 9)}]}
    assert ask(app, "POST", "/v1/classify", json=body).status_code == 413
    assert len(asked(ask, app, {**body, "genes": ["GENE1", "GENE2", "GENE3"]})["genes"]) == 3


def test_the_client_gives_back_what_the_service_says(ask: Ask, serve_heads: Serve, draw_cell: DrawCell) -> None:
    app, _, _ = serve_heads(TYPE, AGE)

    def forward(request: httpx.Request) -> httpx.Response:
        answer = ask(app, request.method, request.url.path, content=request.content, headers=request.headers)
        return httpx.Response(answer.status_code, content=answer.content)

    cell = draw_cell(4, 20)
    with GenescaleClient("http://service", transport=httpx.MockTransport(forward)) as client:
        answer = client.classify([cell])
    expected = asked(ask, app, {"cells": [{"counts": cell}]})["cells"][0]["heads"]
    assert [head.label for head in answer.cells[0].heads] == ["cell_type", "age"]
    assert answer.cells[0].heads[0].probabilities == expected[0]["probabilities"]
    assert answer.cells[0].heads[1].number == expected[1]["number"]
    assert answer.cells[0].report.n_genes == 20
