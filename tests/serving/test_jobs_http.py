"""Jobs over HTTP, in this process: asking, looking, repeating, cancelling, and results."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from genescale.platform.bundle import Bundle
from genescale.platform.memory_tracker import MemoryTracker
from genescale.serving.in_process import InProcessModel
from genescale.training.embedder import Embedder
from tests.serving.conftest import DrawCell
from tests.serving.jobs_side import (
    Side,
    jobs_config,
    key_of,
    local_desk,
    serving_config,
    side_of,
    write_keys_file,
)

SCOPES = {
    "ana": ("embed", "perturb", "jobs"),
    "bo": ("perturb", "jobs"),
    "cy": ("perturb",),
    "root": ("admin",),
}
Make = Callable[..., Side]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("jobs")
    (made / "data").mkdir()
    return made


@pytest.fixture(scope="module")
def side(folder: Path, bundle: Bundle, embedder: Embedder) -> Iterator[Side]:
    """A service with keys, for tests that leave it as it is."""
    config = serving_config(jobs_config(folder), keys_file=write_keys_file(folder, SCOPES), max_tokens=600)
    with local_desk(config, MemoryTracker()) as desk:
        yield side_of(bundle, InProcessModel(embedder), desk, config)


def question(draw_cell: DrawCell, n_cells: int = 3, n_edits: int = 4) -> dict[str, Any]:
    return {
        "cells": [{"id": f"cell {at}", "counts": draw_cell(at, 30)} for at in range(n_cells)],
        "edits": [{"kind": "delete", "genes": [f"GENE{at}"]} for at in range(n_edits)],
        "gene_shifts": ["GENE9"],
    }


def test_a_job_of_perturbations_answers_what_the_route_answers_at_once(
    side: Side, draw_cell: DrawCell, bundle: Bundle, embedder: Embedder, build: Callable[..., Any], ask: Any
) -> None:
    asked = question(draw_cell)
    begun = side.post({"kind": "perturbations", **asked}, key=key_of("ana"))
    assert begun.status_code == 202
    assert begun.headers["location"] == begun.json()["url"]
    job = side.ended(begun.json()["id"], key=key_of("ana"))
    assert (job["state"], job["progress"]) == ("succeeded", {"done": 3, "total": 3, "unit": "cells", "note": ""})
    assert job["model"] == {"name": "tiny", "version": "3", "digest": bundle.digest}
    table = pq.read_table(io.BytesIO(side.ask("GET", job["result"], key=key_of("ana")).content)).to_pylist()
    at_once = ask(build(), "POST", "/v1/perturbations", json=asked).json()
    expected = [
        (at, cell["id"], number, edit["kind"], edit["shift"])
        for at, cell in enumerate(at_once["cells"])
        for number, edit in enumerate(cell["edits"])
    ]
    shifts = [row for row in table if row["measure"] == "shift"]
    assert [(r["cell"], r["cell_id"], r["edit"], r["kind"], r["value"]) for r in shifts] == expected
    genes = [row["value"] for row in table if row["measure"] == "gene_shift"]
    assert genes == [one["shift"] for c in at_once["cells"] for e in c["edits"] for one in e["gene_shifts"]]
    whole = side.ask("GET", f"{job['url']}/result?file=answer.json", key=key_of("ana")).json()
    assert whole["cells"] == at_once["cells"]
    assert set(whole) == set(at_once)


def test_what_is_too_dear_for_one_request_becomes_a_job(side: Side, draw_cell: DrawCell) -> None:
    asked = question(draw_cell, n_cells=4, n_edits=6)
    answer = side.ask("POST", "/v1/perturbations", key=key_of("bo"), json=asked)
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    assert side.ended(answer.json()["id"], key=key_of("bo"))["state"] == "succeeded"


def test_without_the_scope_it_is_refused_as_too_large(side: Side, draw_cell: DrawCell) -> None:
    answer = side.ask("POST", "/v1/perturbations", key=key_of("cy"), json=question(draw_cell, 4, 6))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "limit")


def test_a_job_has_limits_too(side: Side, draw_cell: DrawCell) -> None:
    asked = question(draw_cell, 1, 1)
    asked["edits"] *= 300
    answer = side.ask("POST", "/v1/perturbations", key=key_of("bo"), json=asked)
    assert (answer.status_code, answer.json()["error"]["details"]["where"]) == (413, "edits")


def test_the_same_question_under_the_same_key_is_the_same_job(side: Side, draw_cell: DrawCell) -> None:
    asked = {"kind": "perturbations", **question(draw_cell, 1, 1)}
    first, again = (side.post(asked, key=key_of("ana"), Idempotency_Key="one") for _ in range(2))
    assert (first.status_code, again.status_code, again.json()["id"]) == (202, 202, first.json()["id"])
    others = side.post(asked, key=key_of("bo"), Idempotency_Key="one")
    assert others.json()["id"] != first.json()["id"]
    another = side.post({**asked, "measure": "mean_pooled"}, key=key_of("ana"), Idempotency_Key="one")
    assert (another.status_code, another.json()["error"]["code"]) == (409, "conflict")
    unnamed = side.post(asked, key=key_of("ana"))
    assert unnamed.json()["id"] != first.json()["id"]


def test_a_key_sees_its_own_jobs_and_admin_sees_all(side: Side, draw_cell: DrawCell) -> None:
    asked = {"kind": "perturbations", **question(draw_cell, 1, 1)}
    own, foreign = (side.post(asked, key=key_of(name)).json() for name in ("ana", "bo"))
    for path in (foreign["url"], f"{foreign['url']}/result", f"/v1/jobs/{own['id'][:-1]}", "/v1/jobs/..%2F..%2Fx"):
        answer = side.ask("GET", path, key=key_of("ana"))
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] in ("not_found", "invalid_input")
    assert side.ask("POST", f"{foreign['url']}/cancel", key=key_of("ana")).status_code == 404
    assert side.ask("GET", foreign["url"], key=key_of("root")).json()["id"] == foreign["id"]
    listed = {job["id"] for job in side.ask("GET", "/v1/jobs?limit=100", key=key_of("ana")).json()["jobs"]}
    assert own["id"] in listed
    assert foreign["id"] not in listed
    assert {own["id"], foreign["id"]} <= {
        job["id"] for job in side.ask("GET", "/v1/jobs?limit=100", key=key_of("root")).json()["jobs"]
    }


def test_jobs_are_listed_in_pages_the_newest_first(side: Side, draw_cell: DrawCell) -> None:
    asked = {"kind": "perturbations", **question(draw_cell, 1, 1)}
    for _ in range(3):
        side.ended(side.post(asked, key=key_of("bo")).json()["id"], key=key_of("bo"))
    whole = [job["id"] for job in side.ask("GET", "/v1/jobs?limit=100", key=key_of("bo")).json()["jobs"]]
    assert whole == sorted(whole, reverse=True)
    pages, before = [], ""
    while True:
        page = side.ask("GET", f"/v1/jobs?limit=2{before}", key=key_of("bo")).json()
        pages += [job["id"] for job in page["jobs"]]
        if page["next"] is None:
            break
        before = f"&before={page['next']}"
    assert pages == whole


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "before=x", "after=1"])
def test_a_page_that_cannot_be_is_refused(side: Side, query: str) -> None:
    answer = side.ask("GET", f"/v1/jobs?{query}", key=key_of("ana"))
    assert (answer.status_code, answer.json()["error"]["details"]["where"]) == (422, query.partition("=")[0])


def test_a_result_can_be_had_in_ranges(side: Side, draw_cell: DrawCell) -> None:
    begun = side.post({"kind": "perturbations", **question(draw_cell, 1, 1)}, key=key_of("ana")).json()
    job = side.ended(begun["id"], key=key_of("ana"))
    whole = side.ask("GET", job["result"], key=key_of("ana"))
    assert whole.headers["content-type"] == "application/vnd.apache.parquet"
    assert whole.headers["content-disposition"] == 'attachment; filename="shifts.parquet"'
    size = job["files"][0]["bytes"]
    assert len(whole.content) == size
    rest = side.ask("GET", job["result"], key=key_of("ana"), headers={"Range": "bytes=100-"})
    assert (rest.status_code, rest.headers["content-range"]) == (206, f"bytes 100-{size - 1}/{size}")
    assert rest.content == whole.content[100:]
    middle = side.ask("GET", job["result"], key=key_of("ana"), headers={"Range": "bytes=3-7"})
    assert middle.content == whole.content[3:8]
    beyond = side.ask("GET", job["result"], key=key_of("ana"), headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "invalid_input")
    unknown = side.ask("GET", f"{job['result']}?file=../record.json", key=key_of("ana"))
    assert unknown.status_code == 404


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"kind": "training"}, 422, ""),
    ({"kind": "embed"}, 422, "embed.source"),
    ({"kind": "embed", "source": "/etc/passwd"}, 422, "source"),
    ({"kind": "embed", "source": "DATA/../../../etc/passwd"}, 422, "source"),
    ({"kind": "embed", "source": "file:///etc/passwd"}, 422, "source"),
    ({"kind": "embed", "source": "http://10.0.0.1/x.h5ad"}, 422, "source"),
    ({"kind": "embed", "source": "corpus"}, 422, "source"),
    ({"kind": "embed", "source": "~/corpus"}, 422, "source"),
    ({"kind": "embed", "source": "DATA/link/secret.h5ad"}, 422, "source"),
    ({"kind": "embed", "source": "JOBS/results"}, 422, "source"),
    ({"kind": "embed", "source": "DATA/a", "pooling": "median"}, 422, "embed.pooling"),
    ({"kind": "screen", "corpus": "DATA/c", "edits": {"gens": ["GENE1"]}}, 422, "edits"),
    ({"kind": "screen", "corpus": "DATA/c", "edits": {}}, 422, "edits"),
    ({"kind": "screen", "corpus": "DATA/c", "edits": {"genes": ["NOSUCH"]}}, 422, "edits.genes"),
    ({"kind": "screen", "corpus": "/elsewhere", "edits": {"genes": ["GENE1"]}}, 422, "corpus"),
    ({"kind": "screen", "corpus": "DATA/c", "edits": {"sets": "/etc/hosts"}}, 422, "edits.sets"),
    (
        {"kind": "screen", "corpus": "DATA/c", "edits": {"genes": ["GENE1"]}, "readouts": {"masked_genes": "/etc/x"}},
        422,
        "readouts.masked_genes",
    ),
    (
        {"kind": "screen", "corpus": "DATA/c", "edits": {"genes": ["GENE1"]}, "readouts": {"states": {"file": "/s"}}},
        422,
        "readouts.states.file",
    ),
    (
        {"kind": "screen", "corpus": "DATA/c", "edits": {"genes": ["GENE1"]}, "readouts": {"head": "/models/other"}},
        422,
        "readouts.head",
    ),
    (
        {"kind": "screen", "corpus": "DATA/c", "edits": {"genes": ["GENE1"]}, "compute": {"workers": 99}},
        422,
        "screen.compute",
    ),
]


@pytest.mark.parametrize(("body", "status", "where"), REFUSED, ids=[json.dumps(one[0])[:80] for one in REFUSED])
def test_what_cannot_be_a_job_is_refused_at_once(
    side: Side, folder: Path, body: dict[str, Any], status: int, where: str
) -> None:
    link = folder / "data" / "link"
    if not link.is_symlink():
        (folder / "private").mkdir()
        link.symlink_to(folder / "private")
    text = json.dumps(body).replace("DATA", str(folder / "data")).replace("JOBS", str(folder / "jobs"))
    answer = side.ask("POST", "/v1/jobs", key=key_of("ana"), content=text, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error.get("details", {}).get("where", "")) == (status, where)
    assert str(folder) not in answer.text


@pytest.mark.parametrize("key", ["", " " * 3, "a" * 257, "é"])
def test_an_idempotency_key_that_cannot_be_is_refused(side: Side, draw_cell: DrawCell, key: str) -> None:
    body = json.dumps({"kind": "perturbations", **question(draw_cell, 1, 1)})
    headers = {b"content-type": b"application/json", b"idempotency-key": key.encode()}
    answer = side.ask("POST", "/v1/jobs", key=key_of("ana"), content=body, headers=headers)
    # Headers come without the blanks around them: an empty one is none.
    assert answer.status_code == (202 if not key.strip() else 422)


def test_a_service_without_jobs_says_how_to_get_them(app: Any, ask: Any, draw_cell: DrawCell) -> None:
    for method, path in (
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs"),
        ("GET", "/v1/jobs/x"),
        ("GET", "/v1/jobs/x/result"),
    ):
        answer = ask(app, method, path, **({"json": {}} if method == "POST" else {}))
        assert answer.status_code == 422
        assert "--jobs-uri" in answer.json()["error"]["message"]


def test_bounds_of_jobs_are_public(side: Side, app: Any, ask: Any) -> None:
    told = side.ask("GET", "/v1/info", key=key_of("cy")).json()["limits"]
    assert (told["jobs_max_queued"], told["jobs_max_tokens"]) == (16, 2_000_000_000)
    assert not [name for name in ask(app, "GET", "/v1/info").json()["limits"] if name.startswith("jobs")]


def test_numbers_of_a_job_are_those_of_its_own_cells(side: Side, draw_cell: DrawCell) -> None:
    asked = {"kind": "perturbations", **question(draw_cell, 2, 1)}
    job = side.ended(side.post(asked, key=key_of("ana")).json()["id"], key=key_of("ana"))
    rows = pq.read_table(io.BytesIO(side.ask("GET", job["result"], key=key_of("ana")).content)).to_pylist()
    values = [row["value"] for row in rows if row["measure"] == "cosine" and row["value"] is not None]
    assert np.all(np.abs(values) <= 1.0 + 1e-9)


def test_a_job_that_is_deleted_while_it_is_asked_for_is_not_there(
    side: Side, draw_cell: DrawCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = side.post({"kind": "perturbations", **question(draw_cell, 1, 1)}, key=key_of("ana")).json()
    side.ended(job["id"], key=key_of("ana"))
    board = side.desk.board
    read = board.ticket

    def deleted_meanwhile(owner: str, job_id: str) -> Any:
        found = read(owner, job_id)
        if found is not None and job_id == job["id"]:
            board.delete(found)
        return found

    monkeypatch.setattr(board, "ticket", deleted_meanwhile)
    assert side.ask("GET", job["url"], key=key_of("ana")).status_code == 404
