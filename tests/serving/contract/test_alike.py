"""One answer for one question, however it is asked: in company or alone, as JSON or Arrow, as counts or tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.gate import Gate
from tests.serving.conftest import WIDTH

Ask = Callable[..., httpx.Response]
Cell = dict[str, Any]
EDITS = [
    {"kind": "delete", "genes": ["GENE1", "GENE40"]},
    {"kind": "overexpress", "genes": ["GENE3"]},
    {"kind": "inhibit", "genes": ["GENE7"], "quartiles": 2},
]
QUESTIONS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"layer": "last"},
    "/v1/perturbations": {
        "edits": EDITS,
        "states": [{"name": "well", "vector": [0.5] * WIDTH}],
        "gene_shifts": ["GENE2", "GENE40"],
        "top_gene_shifts": 3,
        "head": "cell_type",
    },
    "/v1/classify": {},
    "/v1/neighbors": {"k": 3},
    "/v1/tokens": {},
}
few = settings(
    max_examples=3,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
drawn = st.lists(st.tuples(st.integers(0, 10_000), st.integers(3, 90)), min_size=2, max_size=4)


@pytest.fixture
def app(complete: Callable[..., Gate]) -> Gate:
    return complete()


@pytest.fixture(params=QUESTIONS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def answered(response: httpx.Response) -> dict[str, Any]:
    """The answer, without what no two answers share."""
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert set(answer.pop("timings_ms")) >= {"parse", "queue", "forward"}
    return answer


@few
@given(drawn=drawn)
def test_cells_get_together_what_each_gets_alone(
    ask: Ask, app: Gate, draw_cell: Callable[[int, int], dict[str, float]], path: str, drawn: list[tuple[int, int]]
) -> None:
    cells = [{"id": str(at), "counts": draw_cell(*one)} for at, one in enumerate(drawn)]
    together = answered(ask(app, "POST", path, json={"cells": cells, **QUESTIONS[path]}))
    alone = [answered(ask(app, "POST", path, json={"cells": [cell], **QUESTIONS[path]})) for cell in cells]
    assert together.pop("cells") == [one.pop("cells")[0] for one in alone]
    assert alone == [together] * len(alone)


@few
@given(drawn=drawn)
def test_forms_of_a_cell_and_of_a_body_ask_the_same(
    ask: Ask, app: Gate, draw_cell: Callable[[int, int], dict[str, float]], path: str, drawn: list[tuple[int, int]]
) -> None:
    given = [draw_cell(*one) for one in drawn]
    as_counts = [{"id": str(at), "counts": cell} for at, cell in enumerate(given)]
    as_arrays = [{"id": str(at), "genes": list(cell), "values": list(cell.values())} for at, cell in enumerate(given)]
    ranked = ask(app, "POST", "/v1/tokens", json={"cells": as_counts, "beyond_window": True}).json()["cells"]
    as_tokens = [{"id": cell["id"], "tokens": cell["tokens"]} for cell in ranked]
    options = QUESTIONS[path]
    expected = answered(ask(app, "POST", path, json={"cells": as_counts, **options}))
    for cells in (as_arrays, as_tokens):
        assert answered(ask(app, "POST", path, json={"cells": cells, **options})) == expected
    for cells in (as_arrays, as_tokens):
        sent = {"content": stream(cells, options), "headers": {"Content-Type": ARROW_TYPE}}
        assert answered(ask(app, "POST", path, **sent)) == expected


def stream(cells: Sequence[Cell], options: Mapping[str, Any]) -> bytes:
    """Cells of one form as an Arrow stream."""
    columns = {"id": pa.array([cell["id"] for cell in cells])}
    if "tokens" in cells[0]:
        columns["tokens"] = pa.array([cell["tokens"] for cell in cells], pa.list_(pa.uint16()))
    else:
        columns["genes"] = pa.array([cell["genes"] for cell in cells])
        columns["counts"] = pa.array([cell["values"] for cell in cells], pa.list_(pa.float64()))
    batch = pa.record_batch(columns).replace_schema_metadata({"genescale": json.dumps(options)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


@few
@given(drawn=drawn)
def test_an_answer_is_the_same_in_json_and_in_arrow(
    ask: Ask, app: Gate, draw_cell: Callable[[int, int], dict[str, float]], path: str, drawn: list[tuple[int, int]]
) -> None:
    cells = [{"id": str(at), "counts": {**draw_cell(*one), "NOGENE": 1}} for at, one in enumerate(drawn)]
    body = {"cells": cells, **QUESTIONS[path]}
    told = answered(ask(app, "POST", path, json=body))
    response = ask(app, "POST", path, json=body, headers={"Accept": ARROW_TYPE})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == ARROW_TYPE
    table = pa.ipc.open_stream(response.content).read_all()
    facts = json.loads(table.schema.metadata[b"genescale"])
    assert set(facts.pop("timings_ms")) >= {"parse", "queue", "forward"}
    for name, value in facts.items():
        if name not in ("cells", "edits", "reasons"):
            assert told[name] == value, name
    numbers = rows_of_edits(told) if path == "/v1/perturbations" else told["cells"]
    assert_same(table.to_pylist(), numbers)


def rows_of_edits(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The flat table of shifts that the JSON answer amounts to."""
    rows = []
    for at, cell in enumerate(told["cells"]):
        for number, edit in enumerate(cell["edits"]):
            found = [("cosine", None, edit["cosine"]), ("shift", None, edit["shift"])]
            found += [("state_shift", name, moved) for name, moved in edit["state_shifts"].items()]
            found += [("class_change", name, moved) for name, moved in edit["class_changes"].items()]
            found += [("gene_shift", one["gene"], one["shift"]) for one in edit["gene_shifts"]]
            found += [("top_gene_shift", one["gene"], one["shift"]) for one in edit["top_gene_shifts"]]
            found += [("found_rank", one["gene"], one["rank"]) for one in edit["found"]]
            found += [("absent", gene, None) for gene in edit["absent"]]
            found += [(name, None, edit[name]) for name in ("n_compared", "n_cut", "n_refilled")]
            rows += [
                {"cell": at, "edit": number, "measure": measure, "of": of, "value": value}
                for measure, of, value in found
            ]
    return rows


def assert_same(of_arrow: Any, of_json: Any, where: str = "") -> None:
    """Every number and text of the Arrow answer is that of the JSON answer; lists by class carry the classes' order."""
    if isinstance(of_arrow, dict) and isinstance(of_json, list):
        of_json = {one["label"]: one for one in of_json}
    if isinstance(of_arrow, dict):
        for name, value in of_arrow.items():
            assert_same(value, of_json[name], f"{where}.{name}")
    elif isinstance(of_arrow, list):
        values = list(of_json.values()) if isinstance(of_json, dict) else of_json
        assert len(of_arrow) == len(values), where
        for at, (one, other) in enumerate(zip(of_arrow, values, strict=True)):
            assert_same(one, other, f"{where}[{at}]")
    else:
        assert of_arrow == of_json, where
