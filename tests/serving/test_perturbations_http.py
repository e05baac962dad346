"""`/v1/perturbations` beyond deletions: every kind of edit, states by name, the furthest genes, class changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.client import GenescaleClient
from genescale.perturbation.editing.requests import KINDS
from genescale.perturbation.perturb import EditAnswer, EditRequest, Readouts, perturb_cell
from genescale.perturbation.readouts.states import States
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.gate import Gate

if TYPE_CHECKING:
    from genescale.training.embedder import Embedder
    from genescale.training.heads.head import LinearHead

Ask = Callable[..., httpx.Response]
Build = Callable[..., Gate]
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]
ServeHeads = Callable[..., tuple[Gate, "list[LinearHead]", "Embedder"]]

GENE = ["GENE1"]
EVERY_EDIT: list[dict[str, Any]] = [
    {"kind": "delete", "genes": GENE},
    {"kind": "delete", "genes": GENE, "refill": True},
    {"kind": "overexpress", "genes": ["GENE2", "GENE118"]},
    {"kind": "inhibit", "genes": ["GENE3", "GENE4"]},
    {"kind": "inhibit", "genes": ["GENE3"], "quartiles": 2},
    {"kind": "inhibit", "genes": ["GENE3"], "rank": 40},
    {"kind": "activate", "genes": ["GENE3"], "quartiles": 3},
    {"kind": "activate", "genes": ["GENE3"], "rank": 2},
    {"kind": "replace", "genes": ["GENE3", "GENE4"], "ranks": [30, 2]},
]
TYPE = {"label": "cell_type", "classes": ("b", "nk", "t")}
AGE = {"label": "age", "kind": "number"}


def cell_with_genes(draw_cell: DrawCell) -> dict[str, float]:
    """A cell longer than the window that has the genes of the edits inside it, at different ranks."""
    return {**draw_cell(1, 80), "GENE1": 900, "GENE2": 700, "GENE3": 150, "GENE4": 60}


def request_of(edit: Mapping[str, Any], vocabulary: Vocabulary) -> EditRequest:
    genes = tuple(vocabulary.token(gene) for gene in edit["genes"])
    return EditRequest(**{**edit, "genes": genes, "ranks": tuple(edit.get("ranks", ()))})


def perturb(ask: Ask, app: Gate, counts: Mapping[str, float], edits: Any, **more: Any) -> list[dict[str, Any]]:
    asked = {"cells": [{"counts": counts}], "edits": edits, **more}
    response = ask(app, "POST", "/v1/perturbations", json=asked)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["cells"][0]["edits"]
    return found


def test_every_kind_of_edit_is_tried_here() -> None:
    assert {edit["kind"] for edit in EVERY_EDIT} == set(KINDS)


@pytest.mark.parametrize("budget", [40, 8_192])
def test_every_edit_is_answered_as_perturb_cell_answers_it(
    ask: Ask, build: Build, embedder: Embedder, vocabulary: Vocabulary, draw_cell: DrawCell, budget: int
) -> None:
    from genescale.platform.rank_value import rank_value_tokens

    counts = cell_with_genes(draw_cell)
    ids = vocabulary.map_ids(list(counts))
    tokens = rank_value_tokens(ids, list(counts.values()), vocabulary).input_ids
    whole = rank_value_tokens(ids, list(counts.values()), vocabulary, window=200).input_ids
    requests = [request_of(edit, vocabulary) for edit in EVERY_EDIT]
    direct = perturb_cell(embedder, tokens, requests, uncropped=whole)
    # Each edit does something of its own, else this test could not tell them apart.
    assert len({one.cosine for one in direct}) == len(EVERY_EDIT)
    assert all(one.cosine is not None and one.cosine < 1 for one in direct)
    for answer, one in zip(perturb(ask, build(budget=budget), counts, EVERY_EDIT), direct, strict=True):
        assert (answer["cosine"], answer["shift"]) == (one.cosine, one.shift)
        assert (answer["n_compared"], answer["n_cut"], answer["n_refilled"]) == (
            one.n_compared,
            one.n_cut,
            one.n_refilled,
        )
        assert answer["state_shifts"] == {}
        assert answer["class_changes"] is answer["goal_shift"] is None
        assert answer["gene_shifts"] == answer["top_gene_shifts"] == []


@pytest.mark.parametrize("measure", ["remaining_genes", "cls"])
def test_movements_toward_several_states_come_by_name_and_beside_the_goal(
    ask: Ask,
    app: Gate,
    embedder: Embedder,
    vocabulary: Vocabulary,
    draw_cell: DrawCell,
    tokens_of: Tokens,
    measure: Any,
) -> None:
    counts, edits = cell_with_genes(draw_cell), [EVERY_EDIT[0], {"kind": "delete", "genes": ["GENE117"]}]
    vectors_sd = np.random.default_rng(2).normal(size=(3, embedder.width))
    names = ("healthy", "goal", "0")
    given = [{"name": name, "vector": vector.tolist()} for name, vector in zip(names, vectors_sd, strict=True)]
    moved, unmoved = perturb(ask, app, counts, edits, measure=measure, states=given, goal=vectors_sd[1].tolist())
    pooling = Readouts(measure=measure).pooling
    states = States(names=names, vectors_sd=vectors_sd, pooling=pooling)
    request = request_of(edits[0], vocabulary)
    (direct,) = perturb_cell(embedder, tokens_of(counts), [request], readouts=Readouts(measure=measure, states=states))
    assert list(moved["state_shifts"].items()) == list(zip(names, direct.state_shifts, strict=True))
    assert len(set(direct.state_shifts)) == 3
    assert moved["goal_shift"] == direct.state_shifts[1]
    assert unmoved["state_shifts"] == dict.fromkeys(names, 0.0)
    (only,) = perturb(ask, app, counts, edits[:1], measure=measure, goal=vectors_sd[0].tolist())
    assert (only["goal_shift"], only["state_shifts"]) == (direct.state_shifts[0], {})


def test_states_of_an_edit_that_leaves_nothing_are_null(ask: Ask, app: Gate) -> None:
    state = {"name": "a", "vector": [1.0] * 16}
    (edit,) = perturb(ask, app, {"GENE1": 1}, [{"kind": "delete", "genes": GENE}], states=[state], goal=[1.0] * 16)
    assert (edit["state_shifts"], edit["goal_shift"]) == ({"a": None}, None)
    assert edit["reason"]


def furthest(direct: EditAnswer, vocabulary: Vocabulary, n: int) -> list[tuple[str, float]]:
    ordered = sorted(direct.gene_cosines.items(), key=lambda pair: (pair[1], pair[0]))
    return [(vocabulary.gene_of_token(token), cosine) for token, cosine in ordered[:n]]


@pytest.mark.parametrize("budget", [40, 8_192])
def test_the_furthest_genes_come_first_and_beside_those_that_were_named(
    ask: Ask,
    build: Build,
    embedder: Embedder,
    vocabulary: Vocabulary,
    draw_cell: DrawCell,
    tokens_of: Tokens,
    budget: int,
) -> None:
    counts, edits, named = cell_with_genes(draw_cell), EVERY_EDIT[:1] + EVERY_EDIT[5:6], ["GENE4", "GENE119"]
    more = {"top_gene_shifts": 5, "gene_shifts": named}
    requests = [request_of(edit, vocabulary) for edit in edits]
    direct = perturb_cell(embedder, tokens_of(counts), requests, readouts=Readouts(gene_shifts_of="all"))
    for answer, one in zip(perturb(ask, build(budget=budget), counts, edits, **more), direct, strict=True):
        found = [(gene["gene"], gene["cosine"]) for gene in answer["top_gene_shifts"]]
        assert found == furthest(one, vocabulary, 5)
        assert [gene["symbol"] for gene in answer["top_gene_shifts"]] == [f"GENE{int(gene[4:])}" for gene, _ in found]
        assert [gene["shift"] for gene in answer["top_gene_shifts"]] == [1 - cosine for _, cosine in found]
        by_name = {gene["gene"]: gene["cosine"] for gene in answer["gene_shifts"]}
        assert by_name == {"GENE4": one.gene_cosines[vocabulary.token("GENE4")], "GENE119": None}
    unwatched = perturb(ask, build(), counts, edits, top_gene_shifts=200)
    assert len(unwatched[0]["top_gene_shifts"]) == unwatched[0]["n_compared"]


@pytest.mark.parametrize("budget", [40, 8_192])
def test_a_head_says_how_its_classes_change(
    ask: Ask, serve_heads: ServeHeads, vocabulary: Vocabulary, draw_cell: DrawCell, tokens_of: Tokens, budget: int
) -> None:
    from genescale.perturbation.editing.edits import apply

    app, heads, embedder = serve_heads(TYPE, AGE, budget=budget)
    counts, edits = cell_with_genes(draw_cell), [EVERY_EDIT[0], EVERY_EDIT[4], {"kind": "delete", "genes": ["GENE117"]}]
    tokens = tokens_of(counts)
    edited = [apply(request_of(edit, vocabulary), tokens, vocabulary).tokens for edit in edits]
    before, *after = [
        heads[0].answer(embedder.embed_cells([cell], layer="last", pooling="mean_genes"))[0]
        for cell in (tokens, *edited)
    ]
    answers = perturb(ask, app, counts, edits, head="cell_type")
    for answer, now in zip(answers, after, strict=True):
        assert list(answer["class_changes"]) == list(TYPE["classes"])
        expected = now.astype(np.float64) - before.astype(np.float64)
        assert list(answer["class_changes"].values()) == pytest.approx(expected, abs=1e-6)
        assert sum(answer["class_changes"].values()) == pytest.approx(0, abs=1e-6)
    assert max(map(abs, answers[0]["class_changes"].values())) > 1e-4
    assert set(answers[2]["class_changes"].values()) == {0.0}
    # Without being asked, a service computes no more than before.
    assert perturb(ask, app, counts, edits[:1])[0]["class_changes"] is None


@pytest.mark.parametrize(
    ("change", "where", "said"),
    [
        ({"head": "cell_typ"}, "head", "cell_type"),
        ({"head": "age"}, "head", "cell_type"),
        ({"states": [{"name": "a", "vector": [1.0]}]}, "states[0].vector", "16"),
        ({"states": [{"name": "a", "vector": [0.0] * 16}]}, "states[0].vector", "not 0"),
        ({"states": [{"name": "a", "vector": [1.0] * 16}] * 2}, "states[1].name", "'a'"),
        ({"edits": [{"kind": "delete", "genes": GENE, "quartiles": 1}]}, "edits[0]", "takes no quartiles"),
        ({"edits": [{"kind": "delete", "genes": GENE, "ranks": [1]}]}, "edits[0]", "takes no ranks"),
        ({"edits": [{"kind": "activate", "genes": GENE, "rank": 1, "quartiles": 1}]}, "edits[0]", "not both"),
        ({"edits": [{"kind": "replace", "genes": GENE, "ranks": [1, 2]}]}, "edits[0]", "2 ranks"),
        ({"edits": [{"kind": "replace", "genes": GENE}]}, "edits[0]", "0 ranks"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_named(
    ask: Ask, serve_heads: ServeHeads, change: dict[str, Any], where: str, said: str
) -> None:
    app, _, _ = serve_heads(TYPE, AGE)
    asked = {"cells": [{"counts": {"GENE1": 1}}], "edits": EVERY_EDIT[:1], **change}
    response = ask(app, "POST", "/v1/perturbations", json=asked)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "invalid_input")
    assert error["details"]["where"] == where
    assert said in error["message"]


def test_a_head_is_refused_where_there_is_none(ask: Ask, app: Gate) -> None:
    asked = {"cells": [{"counts": {"GENE1": 1}}], "edits": EVERY_EDIT[:1], "head": "cell_type"}
    response = ask(app, "POST", "/v1/perturbations", json=asked)
    assert response.status_code == 422
    assert "none" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("limits", "fits", "exceeds"),
    [
        ({"max_states": 2}, {"states": 2}, {"states": 3}),
        ({"max_gene_shifts": 2}, {"top": 2}, {"top": 3}),
    ],
)
def test_states_and_furthest_genes_have_limits(
    ask: Ask, build: Build, limits: dict[str, int], fits: dict[str, int], exceeds: dict[str, int]
) -> None:
    def status(*, states: int = 0, top: int = 0) -> int:
        given = [{"name": str(at), "vector": [1.0] * 16} for at in range(states)]
        asked = {"cells": [{"counts": {"GENE1": 1, "GENE2": 1}}], "edits": EVERY_EDIT[:1], "states": given}
        return ask(app, "POST", "/v1/perturbations", json={**asked, "top_gene_shifts": top}).status_code

    app = build(**limits)
    assert (status(**fits), status(**exceeds)) == (200, 413)


def test_the_client_asks_and_gives_back_all_of_it(ask: Ask, serve_heads: ServeHeads, draw_cell: DrawCell) -> None:
    app, _, _ = serve_heads(TYPE)

    def forward(request: httpx.Request) -> httpx.Response:
        answer = ask(app, request.method, request.url.path, content=request.content, headers=request.headers)
        return httpx.Response(answer.status_code, content=answer.content)

    counts, state = cell_with_genes(draw_cell), np.ones(16, dtype=np.float32)
    edit = {"kind": "replace", "genes": ("GENE3", "GENE4"), "ranks": np.array([30, 2])}
    with GenescaleClient("http://service", transport=httpx.MockTransport(forward)) as client:
        asked = client.perturbations([counts], [edit], states={"a": state}, head="cell_type", top_gene_shifts=3)
    more = {"states": [{"name": "a", "vector": [1.0] * 16}], "head": "cell_type", "top_gene_shifts": 3}
    (expected,) = perturb(ask, app, counts, [{**EVERY_EDIT[8]}], **more)
    (found,) = asked.cells[0].edits
    assert (found.state_shifts, found.class_changes) == (expected["state_shifts"], expected["class_changes"])
    assert [vars(gene) for gene in found.top_gene_shifts] == expected["top_gene_shifts"]
    assert found.shift == expected["shift"] != 0
