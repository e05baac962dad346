"""The whole HTTP side in this process, with a real tiny model behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import httpx
import numpy as np
import pytest

from genescale.perturbation.perturb import EditRequest, Readouts, perturb_cell
from genescale.perturbation.readouts.states import States
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.vocabulary import Vocabulary
from genescale.serving import schemas
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

KEY = "the-only-key-0123456789abcdef"
Ask = Callable[..., httpx.Response]
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]
Build = Callable[..., Gate]


def embed(ask: Ask, app: Gate, cells: Sequence[Any], **more: Any) -> dict[str, Any]:
    response = ask(app, "POST", "/v1/embeddings", json={"cells": cells, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def vectors(answer: Mapping[str, Any]) -> np.ndarray:
    return np.asarray([cell["embedding"] for cell in answer["cells"]], dtype=np.float64)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) <= {"code", "message", "request_id", "details"}
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.mark.parametrize("layer", get_args(schemas.Layer))
@pytest.mark.parametrize("pooling", get_args(schemas.Pooling))
def test_embeddings_are_those_of_the_embedder_bit_for_bit(
    ask: Ask, app: Gate, embedder: Embedder, draw_cell: DrawCell, tokens_of: Tokens, layer: Any, pooling: Any
) -> None:
    cells = [draw_cell(seed, n) for seed, n in enumerate((60, 3, 110, 20))]
    expected_nd = embedder.embed_cells([tokens_of(cell) for cell in cells], layer=layer, pooling=pooling)
    answer = embed(ask, app, [{"counts": cell} for cell in cells], layer=layer, pooling=pooling)
    assert np.array_equal(vectors(answer), expected_nd.astype(np.float64))
    assert (answer["layer"], answer["pooling"]) == (layer, pooling)


def test_order_is_kept_and_a_batch_equals_its_singles(ask: Ask, build: Build, draw_cell: DrawCell) -> None:
    cells = [{"id": f"c{seed}", "counts": draw_cell(seed, 1 + (37 * seed) % 100)} for seed in range(24)]
    together = embed(ask, build(budget=100), cells)
    assert [cell["id"] for cell in together["cells"]] == [cell["id"] for cell in cells]
    app = build()
    singles = np.concatenate([vectors(embed(ask, app, [cell])) for cell in cells])
    assert np.array_equal(vectors(together), singles)
    assert len(np.unique(singles, axis=0)) == len(cells)


def test_a_model_with_fewer_positions_than_the_vocabulary_has_ranks_crops_to_them(
    ask: Ask, http_side: Build, write_bundle_at: Callable[..., Bundle], draw_cell: DrawCell, tmp_path: Path
) -> None:
    from genescale.training.embedder import Embedder

    short = write_bundle_at(tmp_path / "short", 3, positions=30)
    embedder = Embedder.load(short, device="cpu")
    app = http_side(short, InProcessModel(embedder))
    counts = draw_cell(1, 100)
    ids = short.vocabulary.map_ids(list(counts))
    tokens = rank_value_tokens(ids, list(counts.values()), short.vocabulary, window=30).input_ids
    answer = embed(ask, app, [{"counts": counts}])
    assert np.array_equal(vectors(answer), embedder.embed_cells([tokens]).astype(np.float64))
    assert (answer["cells"][0]["n_tokens"], answer["cells"][0]["cropped"]) == (30, True)
    assert ask(app, "GET", "/v1/info").json()["encoder"]["window"] == 30
    edits = [{"kind": "overexpress", "genes": ["GENE1", "GENE2"]}]
    asked = {"cells": [{"counts": counts}], "edits": edits}
    assert ask(app, "POST", "/v1/perturbations", json=asked).status_code == 200


def test_counts_and_their_tokens_get_the_same_answer(
    ask: Ask, app: Gate, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    counts = draw_cell(3, 40)
    by_counts, by_tokens = embed(ask, app, [{"counts": counts}, {"tokens": tokens_of(counts).tolist()}])["cells"]
    assert by_counts["embedding"] == by_tokens["embedding"]


def test_every_answer_says_where_it_comes_from(ask: Ask, app: Gate, bundle: Bundle, draw_cell: DrawCell) -> None:
    expected = {
        "model": {"name": "tiny", "version": "3", "digest": bundle.digest},
        "vocabulary": {"name": "tiny", "digest": bundle.vocabulary.digest},
        "corpus": {"version": 7},
    }
    cells = [{"counts": draw_cell(1, 5)}]
    edits = [{"kind": "delete", "genes": ["GENE1"]}]
    perturbed = ask(app, "POST", "/v1/perturbations", json={"cells": cells, "edits": edits}).json()
    info = ask(app, "GET", "/v1/info").json()
    for answer in (embed(ask, app, cells), perturbed, info):
        assert answer["provenance"] == expected
        if answer is not info:
            assert set(answer["timings_ms"]) == {"parse", "queue", "forward"}
            assert all(value >= 0 for value in answer["timings_ms"].values())


def test_what_was_ignored_or_cropped_is_said(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    short, long = embed(
        ask,
        app,
        [{"counts": {"GENE1": 2, "OLD5": 1, "GENE5": 4, "NOSUCH": 3, "GENE9": 0}}, {"counts": draw_cell(1, 100)}],
    )["cells"]
    assert (short["n_genes"], short["n_tokens"], short["cropped"]) == (2, 4, False)
    assert short["ignored"]["unknown"] == short["ignored"]["zero"] == 1
    assert short["merged"] == [{"gene": "ENSG00000000005", "names": ["OLD5", "GENE5"]}]
    assert (long["n_genes"], long["n_tokens"], long["cropped"]) == (100, 48, True)


@pytest.mark.parametrize("measure", get_args(schemas.Measure))
@pytest.mark.parametrize("budget", [40, 8_192])
def test_perturbations_are_those_of_perturb_cell_bit_for_bit(
    ask: Ask,
    build: Build,
    embedder: Embedder,
    vocabulary: Vocabulary,
    draw_cell: DrawCell,
    tokens_of: Tokens,
    measure: Any,
    budget: int,
) -> None:
    cells = [draw_cell(0, 30), draw_cell(1, 100)]
    names, watched = ["GENE1", "GENE2", "GENE3", "GENE4"], ["GENE4", "GENE50", "GENE7"]
    edits = [{"kind": kind, "genes": genes} for kind in ("delete", "overexpress") for genes in ([names[0]], names)]
    goal = np.random.default_rng(1).normal(size=embedder.width)
    asked = {"cells": [{"counts": cell} for cell in cells], "edits": edits, "measure": measure, "goal": goal.tolist()}
    response = ask(build(budget=budget), "POST", "/v1/perturbations", json={**asked, "gene_shifts": watched})
    assert response.status_code == 200, response.text
    requests = [
        EditRequest(kind=edit["kind"], genes=tuple(vocabulary.token(gene) for gene in edit["genes"])) for edit in edits
    ]
    watched_tokens = [vocabulary.token(gene) for gene in watched]
    pooling = Readouts(measure=measure).pooling
    states = States(names=("goal",), vectors_sd=goal[None], goal="goal", pooling=pooling)
    readouts = Readouts(measure=measure, states=states, gene_shifts_of=watched_tokens)
    for cell, counts in zip(response.json()["cells"], cells, strict=True):
        direct = perturb_cell(embedder, tokens_of(counts), requests, readouts=readouts)
        assert len(cell["edits"]) == len(edits)
        for answer, one, edit in zip(cell["edits"], direct, edits, strict=True):
            assert (answer["kind"], answer["genes"]) == (edit["kind"], edit["genes"])
            assert (answer["cosine"], answer["shift"], answer["goal_shift"]) == (one.cosine, one.shift, one.goal_shift)
            found = {vocabulary.token(gene["gene"]): gene["rank"] for gene in answer["found"]}
            assert found == one.found
            assert [vocabulary.token(gene) for gene in answer["absent"]] == list(one.absent)
            assert (answer["n_compared"], answer["n_cut"], answer["reason"]) == (one.n_compared, one.n_cut, one.reason)
            assert [gene["gene"] for gene in answer["gene_shifts"]] == watched
            assert [gene["cosine"] for gene in answer["gene_shifts"]] == [
                one.gene_cosines.get(t) for t in watched_tokens
            ]


def test_deleting_a_gene_the_cell_lacks_is_an_answer(ask: Ask, app: Gate) -> None:
    asked = {"cells": [{"counts": {"GENE1": 2, "GENE2": 3}}], "edits": [{"kind": "delete", "genes": ["gene9"]}]}
    (edit,) = ask(app, "POST", "/v1/perturbations", json=asked).json()["cells"][0]["edits"]
    assert (edit["found"], edit["absent"], edit["cosine"], edit["shift"]) == ([], ["gene9"], 1.0, 0.0)


def test_deleting_everything_says_why_there_is_no_cosine(ask: Ask, app: Gate) -> None:
    asked = {"cells": [{"counts": {"GENE1": 2}}], "edits": [{"kind": "delete", "genes": ["GENE1"]}]}
    (edit,) = ask(app, "POST", "/v1/perturbations", json=asked).json()["cells"][0]["edits"]
    assert (edit["cosine"], edit["shift"]) == (None, None)
    assert edit["reason"]


def test_refill_lets_genes_beyond_the_window_move_up(
    ask: Ask, app: Gate, draw_cell: DrawCell, tokens_of: Tokens
) -> None:
    counts = draw_cell(2, 100)
    first = int(tokens_of(counts)[1])
    gene = f"ENSG{first - 4:011d}"
    edits = [{"kind": "delete", "genes": [gene], "refill": refill} for refill in (False, True)]
    asked = {"cells": [{"counts": counts}], "edits": edits}
    plain, refilled = ask(app, "POST", "/v1/perturbations", json=asked).json()["cells"][0]["edits"]
    assert (plain["n_refilled"], refilled["n_refilled"]) == (0, 1)
    assert plain["found"] == refilled["found"] == [{"gene": gene, "rank": 0}]
    assert plain["cosine"] != refilled["cosine"]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"edits": [{"kind": "delete", "genes": ["GENE1", "GENE44X"]}]}, "unknown_gene", "GENE44"),
        ({"gene_shifts": ["NOSUCH"]}, "unknown_gene", "NOSUCH"),
        ({"edits": [{"kind": "delete", "genes": ["GENE5", "OLD5"]}]}, "invalid_input", "same gene"),
        ({"edits": [{"kind": "overexpress", "genes": ["GENE5"], "refill": True}]}, "invalid_input", "refill"),
        ({"goal": [1.0, 2.0]}, "invalid_input", "16"),
        ({"goal": [0.0] * 16}, "invalid_input", "not 0"),
    ],
)
def test_an_impossible_perturbation_is_refused_with_the_reason(
    ask: Ask, app: Gate, change: dict[str, Any], code: str, said: str
) -> None:
    asked = {"cells": [{"counts": {"GENE1": 2}}], "edits": [{"kind": "delete", "genes": ["GENE1"]}], **change}
    response = ask(app, "POST", "/v1/perturbations", json=asked)
    assert response.status_code == 422
    assert error_of(response)["code"] == code
    assert said in error_of(response)["message"]
    assert error_of(response)["details"]["where"].split("[")[0] == next(iter(change))


def test_one_bad_cell_refuses_the_request_and_is_named(ask: Ask, app: Gate) -> None:
    cells = [{"counts": {"GENE1": 1}}, {"counts": {"NOSUCH": 1}}]
    response = ask(app, "POST", "/v1/embeddings", json={"cells": cells})
    assert response.status_code == 422
    assert error_of(response)["details"]["where"] == "cells[1].counts"


@pytest.mark.parametrize(
    ("limits", "path", "fits", "exceeds"),
    [
        ({"max_cells": 2}, "/v1/embeddings", {"cells": 2}, {"cells": 3}),
        ({"max_genes_per_cell": 9}, "/v1/embeddings", {"genes": 9}, {"genes": 10}),
        ({"max_tokens": 22}, "/v1/embeddings", {"genes": 9, "cells": 2}, {"genes": 10, "cells": 2}),
        ({"max_edits": 2}, "/v1/perturbations", {"edits": 2}, {"edits": 3}),
        ({"max_genes_per_edit": 2}, "/v1/perturbations", {"per_edit": 2}, {"per_edit": 3}),
        ({"max_gene_shifts": 1}, "/v1/perturbations", {"shifts": 1}, {"shifts": 2}),
        ({"max_tokens": 21}, "/v1/perturbations", {"edits": 2}, {"edits": 3}),
    ],
)
def test_each_limit_allows_what_it_says_and_no_more(
    ask: Ask, build: Build, limits: dict[str, int], path: str, fits: dict[str, int], exceeds: dict[str, int]
) -> None:
    def request(*, cells: int = 1, genes: int = 5, edits: int = 0, per_edit: int = 1, shifts: int = 0) -> Any:
        asked: dict[str, Any] = {"cells": [{"counts": {f"GENE{i}": 1 + i for i in range(genes)}}] * cells}
        if path.endswith("perturbations"):
            edit = {"kind": "delete", "genes": [f"GENE{i}" for i in range(per_edit)]}
            asked.update(edits=[edit] * max(1, edits), gene_shifts=[f"GENE{i}" for i in range(shifts)])
        return asked

    app = build(**limits)
    assert ask(app, "POST", path, json=request(**fits)).status_code == 200
    response = ask(app, "POST", path, json=request(**exceeds))
    assert response.status_code == 413
    assert error_of(response)["code"] == "limit"
