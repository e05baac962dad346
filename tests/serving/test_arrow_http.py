"""Arrow in and out of `/v1/embeddings`: the same cells, the same answer, and no stream that hurts the service."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from genescale.serving.forms.media import ARROW_TYPE
from genescale.serving.gate import Gate

Ask = Callable[..., httpx.Response]
Build = Callable[..., Gate]
DrawCell = Callable[[int, int], dict[str, float]]
Tokens = Callable[[Mapping[str, float]], np.ndarray]

AS_ARROW, TO_ARROW = {"Content-Type": ARROW_TYPE}, {"Accept": ARROW_TYPE}
Columns = dict[str, pa.Array]


def stream(*batches: Columns, options: Any = None, **more: Any) -> bytes:
    tables = [pa.record_batch(columns) for columns in batches]
    schema = tables[0].schema
    if options is not None:
        schema = schema.with_metadata({"genescale": options if isinstance(options, str) else json.dumps(options)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(**more)) as writer:
        for batch in tables:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    body: bytes = sink.getvalue().to_pybytes()
    return body


def by_names(cells: Sequence[Mapping[str, float]], *, genes: Any = None, counts: Any = None) -> Columns:
    names = pa.array([list(cell) for cell in cells], genes or pa.list_(pa.utf8()))
    return {"genes": names, "counts": pa.array([list(c.values()) for c in cells], counts or pa.list_(pa.float32()))}


def dictionary_encoded(cells: Sequence[Mapping[str, float]]) -> Columns:
    columns = by_names(cells)
    lists = columns["genes"]
    return {**columns, "genes": pa.ListArray.from_arrays(lists.offsets, lists.values.dictionary_encode())}


def opened(response: httpx.Response) -> tuple[dict[str, Any], pa.Table]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == ARROW_TYPE
    table = pa.ipc.open_stream(response.content).read_all()
    return json.loads(table.schema.metadata[b"genescale"]), table


def send(ask: Ask, app: Gate, body: bytes, **headers: str) -> httpx.Response:
    return ask(app, "POST", "/v1/embeddings", content=body, headers={**AS_ARROW, **headers})


def answer_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {key: value for key, value in response.json().items() if key != "timings_ms"}


@pytest.fixture
def cells(draw_cell: DrawCell) -> list[dict[str, float]]:
    """Cropped and short cells, with names that are merged, unknown, without a median, and zero."""
    odd = {"NOSUCH": 2.0, "OLD5": 1.0, "GENE5": 3.0, "GENE119": 2.0, "GENE116": 0.0}
    return [draw_cell(0, 90), {**draw_cell(1, 7), **odd}, draw_cell(2, 1)]


FORMS: dict[str, Callable[[Any], Columns]] = {
    "plain": by_names,
    "dictionary": dictionary_encoded,
    "large": lambda cells: by_names(cells, genes=pa.large_list(pa.large_utf8()), counts=pa.large_list(pa.float64())),
    "integers": lambda cells: by_names(cells, counts=pa.list_(pa.int32())),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("output", ["cell", "genes"])
def test_arrow_cells_get_the_answer_of_json_cells(
    ask: Ask, app: Gate, cells: list[dict[str, float]], form: str, output: str
) -> None:
    ids, options = ["a", None, "c"], {"output": output, "layer": "last"}
    asked = [{"id": i, "counts": cell} for i, cell in zip(ids, cells, strict=True)]
    expected = answer_of(ask(app, "POST", "/v1/embeddings", json={"cells": asked, **options}))
    body = stream({"id": pa.array(ids, pa.utf8()), **FORMS[form](cells)}, options=options)
    assert answer_of(send(ask, app, body)) == expected
    facts, table = opened(send(ask, app, body, **TO_ARROW))
    assert facts.keys() == {"provenance", "layer", "output", "pooling", "file", "timings_ms"}
    rows = [{"embedding": None, "genes": None, "gene_embeddings": None, **row} for row in table.to_pylist()]
    del facts["timings_ms"]
    assert {**facts, "cells": rows} == expected


def test_an_arrow_answer_holds_the_numbers_as_the_model_gave_them(
    ask: Ask, app: Gate, cells: list[dict[str, float]], tokens_of: Tokens, embedder: Any
) -> None:
    asked = {"cells": [{"counts": cell} for cell in cells]}
    _, table = opened(ask(app, "POST", "/v1/embeddings", json=asked, headers=TO_ARROW))
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    vectors_nd = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, 16)
    expected_nd = embedder.embed_cells([tokens_of(cells[0])])
    assert np.array_equal(vectors_nd[:1], expected_nd)


@pytest.mark.parametrize("kind", [pa.uint16(), pa.uint32(), pa.int64()])
def test_tokens_come_as_arrow_too(
    ask: Ask, app: Gate, draw_cell: DrawCell, tokens_of: Tokens, kind: pa.DataType
) -> None:
    tokens = [tokens_of(draw_cell(seed, n)).tolist() for seed, n in enumerate((90, 5, 1))]
    expected = answer_of(ask(app, "POST", "/v1/embeddings", json={"cells": [{"tokens": one} for one in tokens]}))
    assert answer_of(send(ask, app, stream({"tokens": pa.array(tokens, pa.list_(kind))}))) == expected


def test_several_batches_and_slices_are_one_request(ask: Ask, app: Gate, cells: list[dict[str, float]]) -> None:
    whole = dictionary_encoded(cells)
    sliced = [{name: column[at : at + 1] for name, column in whole.items()} for at in range(len(cells))]
    assert answer_of(send(ask, app, stream(*sliced))) == answer_of(send(ask, app, stream(whole)))


GOOD = {"GENE1": 2.0, "GENE2": 3.0}


def of_dictionary(names: list[str | None], codes: list[int]) -> pa.Array:
    values = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.utf8()))
    return pa.ListArray.from_arrays(pa.array([0, len(codes)], pa.int32()), values)


def test_what_a_dictionary_holds_beside_the_cells_does_not_matter(ask: Ask, app: Gate) -> None:
    names = ["GENE9", "GENE2", None, "GENE1", "GENE9"]
    body = stream({"genes": of_dictionary(names, [3, 1]), "counts": pa.array([[2.0, 3.0]])})
    expected = answer_of(ask(app, "POST", "/v1/embeddings", json={"cells": [{"counts": GOOD}]}))
    assert answer_of(send(ask, app, body)) == expected


TEXTS, FLOATS = pa.list_(pa.utf8()), pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("columns", "where"),
    [
        ({"genes": pa.array([["GENE1"]], TEXTS)}, "schema"),
        ({**by_names([GOOD]), "tokens": pa.array([[5]], pa.list_(pa.int32()))}, "schema"),
        ({**by_names([GOOD]), "weight": pa.array([1.0])}, "schema"),
        ({"tokens": pa.array([5])}, "schema"),
        ({"tokens": pa.array([[5.0]])}, "schema"),
        ({**by_names([GOOD]), "id": pa.array([7])}, "schema"),
        ({"genes": pa.array([["GENE1"]]), "counts": pa.array([["2"]])}, "schema"),
        ({**by_names([GOOD]), "id": pa.array(["x" * 257])}, "cells[0].id"),
        ({"genes": pa.array([["GENE1"], ["GENE1"]]), "counts": pa.array([[1.0], [1.0, 2.0]])}, "cells[1]"),
        ({"genes": pa.array([["GENE1"], ["GENE1"]]), "counts": pa.array([[1.0], [-1.0]])}, "cells[1].counts[0]"),
        ({"genes": pa.array([["GENE1", "GENE2"]]), "counts": pa.array([[1.0, float("nan")]])}, "cells[0].counts[1]"),
        ({"genes": pa.array([["GENE1"]]), "counts": pa.array([[float("inf")]])}, "cells[0].counts[0]"),
        ({"genes": pa.array([["GENE1"]]), "counts": pa.array([[1e13]])}, "cells[0].counts[0]"),
        ({"genes": pa.array([["GENE1"]]), "counts": pa.array([[None]], FLOATS)}, "counts"),
        ({"genes": pa.array([[None]], TEXTS), "counts": pa.array([[1.0]])}, "genes"),
        ({"genes": pa.array([None], TEXTS), "counts": pa.array([[1.0]])}, "genes"),
        ({"genes": pa.array([["GENE1", "GENE1"]]), "counts": pa.array([[1.0, 2.0]])}, "cells[0].genes"),
        ({"genes": pa.array([["GENE1"], ["NOSUCH"]]), "counts": pa.array([[1.0], [2.0]])}, "cells[1].genes"),
        ({"genes": pa.array([["G" * 65]]), "counts": pa.array([[1.0]])}, "genes"),
        ({"genes": of_dictionary(["GENE1", "GENE1"], [0, 1]), "counts": pa.array([[1.0, 2.0]])}, "genes"),
        ({"genes": of_dictionary([None, "GENE1"], [0, 1]), "counts": pa.array([[1.0, 2.0]])}, "genes"),
        ({"tokens": pa.array([[5], [-1]])}, "cells[1].tokens"),
        ({"tokens": pa.array([[2**64 - 1]], pa.list_(pa.uint64()))}, "tokens"),
        ({"tokens": pa.array([[5], []], pa.list_(pa.int64()))}, "cells[1].tokens"),
        (by_names([]), "cells"),
    ],
)
def test_columns_that_are_no_cells_are_refused_and_named(ask: Ask, app: Gate, columns: Columns, where: str) -> None:
    response = send(ask, app, stream(columns))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "invalid_input")
    assert error["details"]["where"] == where


@pytest.mark.parametrize(
    ("options", "status"),
    [("{", 400), ('{"layer": "last", "layer": "last"}', 400), ({"layer": "first"}, 422), ({"cells": []}, 422)],
)
def test_options_are_read_as_strictly_as_a_body(ask: Ask, app: Gate, options: Any, status: int) -> None:
    response = send(ask, app, stream(by_names([GOOD]), options=options))
    assert (response.status_code, response.json()["error"]["code"]) == (status, "invalid_input")


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("make", [by_names, dictionary_encoded])
def test_compressed_buffers_are_refused_before_they_are_opened(ask: Ask, app: Gate, codec: str, make: Any) -> None:
    many = {f"GENE{at % 100}-{at}": 0.0 for at in range(50_000)}
    body = stream(make([many]), compression=codec)
    response = send(ask, app, body)
    assert response.status_code == 422
    assert "compress" in response.json()["error"]["message"]


def test_limits_hold_for_arrow_as_well(ask: Ask, build: Build) -> None:
    app = build(max_cells=2, max_genes_per_cell=2)
    assert send(ask, app, stream(by_names([GOOD] * 2))).status_code == 200
    assert send(ask, app, stream(by_names([GOOD] * 3))).status_code == 413
    assert send(ask, app, stream(by_names([{**GOOD, "GENE3": 1.0}]))).status_code == 413
    allowed, many = ([by_names([GOOD]), *[by_names([])] * n] for n in (5, 40))
    assert send(ask, app, stream(*allowed)).status_code == 200
    response = send(ask, app, stream(*many))
    assert response.status_code == 413
    assert "messages" in response.json()["error"]["message"]


def test_a_broken_stream_is_an_error_of_the_caller(ask: Ask, app: Gate) -> None:
    body = stream({"id": pa.array(["a"]), **dictionary_encoded([GOOD])}, options={"layer": "last"})
    assert send(ask, app, body).status_code == 200
    for broken in (b"", b"nonsense", body[:40], body + b"more", json.dumps({"cells": []}).encode()):
        response = send(ask, app, broken)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_input"), broken[:20]


def test_no_changed_byte_makes_a_fault_of_the_service(app: Gate, ask_together: Any) -> None:
    body = stream({"id": pa.array(["a"]), **dictionary_encoded([GOOD])}, options={"layer": "last"})
    rng, requests = np.random.default_rng(7), []
    for _ in range(200):
        changed = bytearray(body)
        for at in rng.integers(0, len(body), size=int(rng.integers(1, 4))):
            changed[at] = int(rng.integers(0, 256))
        requests.append(("POST", "/v1/embeddings", {"content": bytes(changed), "headers": AS_ARROW}))
    statuses = [one.status_code for at in range(0, 200, 20) for one in ask_together(app, requests[at : at + 20])]
    assert set(statuses) <= {200, 400, 413, 422}
    assert {200, 400, 422} <= set(statuses)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("application/json", "application/json"),
        (ARROW_TYPE, ARROW_TYPE),
        (f"{ARROW_TYPE}, application/json", ARROW_TYPE),
        (f"application/json, {ARROW_TYPE}", "application/json"),
        (f"{ARROW_TYPE};q=0.5, application/json;q=0.4", ARROW_TYPE),
        (f"{ARROW_TYPE};q=0.5, */*;q=0.8", "application/json"),
        (f"application/json;q=0, {ARROW_TYPE};q=0.1", ARROW_TYPE),
        (f"{ARROW_TYPE.upper()} ; Q=1.0", ARROW_TYPE),
        ("text/html", None),
        ("application/json;q=0", None),
        ("application/json;q=high", None),
    ],
)
def test_accept_chooses_the_form_of_the_answer(ask: Ask, app: Gate, accept: str | None, kind: str | None) -> None:
    headers = {} if accept is None else {"Accept": accept}
    response = ask(app, "POST", "/v1/embeddings", json={"cells": [{"counts": GOOD}]}, headers=headers)
    assert response.status_code == (406 if kind is None else 200)
    if kind is None:
        assert response.json()["error"]["details"]["where"] == "Accept"
    else:
        assert response.headers["content-type"] == kind


def test_errors_stay_json_for_who_wants_arrow(ask: Ask, app: Gate) -> None:
    response = send(ask, app, b"nonsense", **TO_ARROW)
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == "invalid_input"
