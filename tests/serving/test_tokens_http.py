"""`/v1/tokens`: what the model would take of a cell, without the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.gate import Gate

Ask = Callable[..., httpx.Response]
Build = Callable[..., Gate]
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]


class Absent:
    """A model that must not be asked."""

    async def embed(self, *_: Any) -> Any:
        raise AssertionError("tokens need no model")

    perturb = classify = embed


def tokenise(ask: Ask, app: Gate, cells: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    response = ask(app, "POST", "/v1/tokens", json={"cells": cells, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_genes_come_ranked_with_symbols_and_what_was_not_used_without_a_model(
    ask: Ask, build: Build, vocabulary: Vocabulary, tokens_of: Tokens, draw_cell: DrawCell
) -> None:
    counts = draw_cell(3, 20)
    answer = tokenise(ask, build(model=Absent()), [{"id": "a", "counts": {**counts, "NOSUCH": 4, "GENE118": 2}}])
    cell = answer["cells"][0]
    assert cell["tokens"] == tokens_of(counts).tolist()
    # Highest quotient of count and median first: said by the numbers, not by the function under test.
    quotient = {name: count / vocabulary.medians_t[vocabulary.token(name)] for name, count in counts.items()}
    assert cell["symbols"] == sorted(counts, key=lambda name: (-quotient[name], vocabulary.token(name)))
    assert cell["genes"] == [vocabulary.gene_ids[int(name.removeprefix("GENE"))] for name in cell["symbols"]]
    assert [(one["gene"], one["reason"]) for one in cell["ignored"]["genes"]] == [
        ("NOSUCH", "unknown"),
        ("GENE118", "no_median"),
    ]
    assert (answer["window"], answer["file"], answer["provenance"]["corpus"]["version"]) == (48, None, 7)
    assert answer["timings_ms"]["forward"] == answer["timings_ms"]["queue"] == 0


def test_genes_beyond_the_window_come_when_they_are_asked_for(
    ask: Ask, app: Gate, vocabulary: Vocabulary, draw_cell: DrawCell
) -> None:
    counts = draw_cell(1, 80)
    (short,) = tokenise(ask, app, [{"counts": counts}])["cells"]
    (whole,) = tokenise(ask, app, [{"counts": counts}], beyond_window=True)["cells"]
    ids = vocabulary.map_ids(list(counts))
    expected = rank_value_tokens(ids, list(counts.values()), vocabulary, window=200).input_ids
    assert (len(short["tokens"]), len(short["genes"]), short["cropped"], short["n_genes"]) == (48, 46, True, 80)
    assert whole["tokens"] == expected.tolist()
    assert whole["genes"][:46] == short["genes"]
    assert (len(whole["genes"]), whole["cropped"]) == (80, True)


def test_tokens_ask_for_the_same_cell_again(ask: Ask, app: Gate, draw_cell: DrawCell) -> None:
    counts = draw_cell(5, 30)
    (cell,) = tokenise(ask, app, [{"counts": counts}])["cells"]
    (again,) = tokenise(ask, app, [{"tokens": cell["tokens"]}])["cells"]
    assert (again["tokens"], again["genes"]) == (cell["tokens"], cell["genes"])
    of_counts, of_tokens = (
        ask(app, "POST", "/v1/embeddings", json={"cells": [given]}).json()["cells"][0]["embedding"]
        for given in ({"counts": counts}, {"tokens": cell["tokens"]})
    )
    assert of_counts == of_tokens


@pytest.mark.parametrize("beyond", [False, True])
def test_arrow_says_the_same_as_json(ask: Ask, app: Gate, draw_cell: DrawCell, beyond: bool) -> None:
    cells = [{"id": f"c{seed}", "counts": {**draw_cell(seed, 5 + 30 * seed), "X": 1}} for seed in range(3)]
    asked = {"cells": cells, "beyond_window": beyond}
    expected = ask(app, "POST", "/v1/tokens", json=asked).json()
    response = ask(app, "POST", "/v1/tokens", json=asked, headers={"Accept": ARROW_TYPE})
    assert response.headers["content-type"] == ARROW_TYPE
    table = pa.ipc.open_stream(response.content).read_all()
    facts = json.loads(table.schema.metadata[b"genescale"])
    assert table.to_pylist() == expected.pop("cells")
    assert facts.pop("timings_ms").keys() == expected.pop("timings_ms").keys()
    assert facts == expected


def test_more_tokens_than_a_limit_are_refused(ask: Ask, build: Build, draw_cell: DrawCell) -> None:
    app, cells = build(max_tokens=50), [{"counts": draw_cell(seed, 24)} for seed in range(2)]
    assert ask(app, "POST", "/v1/tokens", json={"cells": cells[:1]}).status_code == 200
    response = ask(app, "POST", "/v1/tokens", json={"cells": cells})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "limit")
    # A cell is longer than its window.
    whole = {"cells": [{"counts": draw_cell(1, 60)}]}
    assert ask(app, "POST", "/v1/tokens", json=whole).status_code == 200
    assert ask(app, "POST", "/v1/tokens", json={**whole, "beyond_window": True}).status_code == 413


@pytest.mark.parametrize("path", ["/v1/tokens", "/v1/embeddings", "/v1/perturbations"])
def test_options_of_a_json_body_stand_in_the_body(ask: Ask, app: Gate, path: str) -> None:
    body = {"cells": [{"counts": {"GENE1": 1}}]}
    response = ask(app, "POST", f"{path}?layer=last", json=body)
    assert response.status_code == 422
    assert response.json()["error"]["details"]["where"] == "layer"
