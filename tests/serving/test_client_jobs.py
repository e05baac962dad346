"""Jobs by both clients: begun, waited for, cancelled, and their results brought home."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from genescale.client import AsyncGenescaleClient, GenescaleClient, Job
from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    ConflictError,
    DeadlineError,
    InputError,
    NotFoundError,
    ServiceError,
)
from genescale.platform.memory_tracker import MemoryTracker
from genescale.serving.in_process import InProcessModel
from genescale.training.embedder import Embedder
from tests.serving.client_wire import AsyncWire, Wire
from tests.serving.conftest import DrawCell
from tests.serving.jobs_side import Side, jobs_config, local_desk, serving_config, side_of

EDITS = [{"kind": "delete", "genes": [f"GENE{at}"]} for at in range(5)]


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle, embedder: Embedder) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp("client-jobs")
    (folder / "data").mkdir()
    config = serving_config(jobs_config(folder), max_tokens=400)
    with local_desk(config, MemoryTracker()) as desk:
        yield side_of(bundle, InProcessModel(embedder), desk, config)


@pytest.fixture
def line(side: Side, loop: asyncio.AbstractEventLoop) -> Wire:
    return Wire(side.gate, loop)


@pytest.fixture
def client(line: Wire) -> Iterator[GenescaleClient]:
    with GenescaleClient("http://service", transport=line) as made:
        yield made


@pytest.fixture
def cells(draw_cell: DrawCell) -> list[dict[str, Any]]:
    return [{"id": f"cell {at}", "counts": draw_cell(at, 25)} for at in range(4)]


@pytest.fixture
def begin(client: GenescaleClient, cells: list[dict[str, Any]]) -> Callable[..., Job]:
    """Begin a job of a few perturbations."""
    return lambda **more: client.submit_job({"kind": "perturbations", "cells": cells, "edits": EDITS}, **more)


def test_a_large_question_is_answered_as_a_small_one_is(
    client: GenescaleClient, line: Wire, cells: list[dict[str, Any]]
) -> None:
    seen: list[tuple[int, int]] = []
    whole = client.perturbations(cells, EDITS, progress=lambda done, total: seen.append((done, total)))
    assert len(line.posted) == 1
    singles = [client.perturbations([cell], EDITS[:1]) for cell in cells]
    assert [cell.report.id for cell in whole.cells] == [f"cell {at}" for at in range(4)]
    got = [cell.edits[0].shift for cell in whole.cells]
    np.testing.assert_allclose(got, [one.cells[0].edits[0].shift for one in singles], rtol=1e-5)
    assert whole.model == singles[0].model


def test_the_asynchronous_client_does_the_same(line: Wire, cells: list[dict[str, Any]], tmp_path: Path) -> None:
    async def asked() -> tuple[Any, Path, Job]:
        async with AsyncGenescaleClient("http://service", transport=AsyncWire(line)) as client:
            whole = await client.perturbations(cells, EDITS)
            newest = (await client.jobs(limit=1)).jobs[0]
            return whole, await client.job_result(newest.id, tmp_path / "shifts.parquet"), newest

    whole, path, job = asyncio.run(asked())
    assert len(whole.cells) == 4
    assert path.stat().st_size == job.files["shifts.parquet"]
    assert pq.read_table(path).num_rows > 0


def test_a_job_is_waited_for_and_its_result_is_a_file(
    client: GenescaleClient, begin: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genescale.client.jobs.PIECE_BYTES", 1_000)
    job = client.wait_for_job(begin().id)
    assert (job.state, job.done, job.total, job.unit) == ("succeeded", 4, 4, "cells")
    for name, size in job.files.items():
        path = client.job_result(job.id, tmp_path / name, file=name)
        assert path.stat().st_size == size > 1_000
    assert len(json.loads((tmp_path / "answer.json").read_bytes())["cells"]) == 4
    assert sorted(one.name for one in tmp_path.iterdir()) == ["answer.json", "shifts.parquet"]


def test_a_download_survives_a_connection_that_breaks(
    client: GenescaleClient, line: Wire, begin: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genescale.client.jobs.PIECE_BYTES", 1_000)
    job, broken = client.wait_for_job(begin().id), []

    def breaks(request: httpx.Request) -> None:
        if request.url.path.endswith("/result") and len(line.requests) % 3 == 0:
            broken.append(request)
            raise httpx.ReadError("reset", request=request)

    line.mend = breaks  # type: ignore[assignment]
    client._sleep = lambda seconds: None
    path = client.job_result(job.id, tmp_path / "answer.json", file="answer.json")
    assert broken
    assert len(json.loads(path.read_bytes())["cells"]) == 4


def test_a_link_to_storage_is_followed_without_the_key(
    line: Wire, side: Side, begin: Callable[..., Job], client: GenescaleClient, tmp_path: Path
) -> None:
    job = client.wait_for_job(begin().id)
    content = b"0123456789" * 100

    def storage(request: httpx.Request) -> httpx.Response | None:
        if request.url.host == "storage":
            assert "authorization" not in request.headers
            start, stop = map(int, request.headers["range"][6:].split("-"))
            told = {"content-range": f"bytes {start}-{min(stop, 999)}/1000"}
            return httpx.Response(206, headers=told, content=content[start : stop + 1])
        if request.url.path.endswith("/result"):
            return httpx.Response(307, headers={"location": "http://storage/result?signature=s"}, json={})
        return None

    line.mend = storage
    with GenescaleClient("http://service", "a-key-of-many-characters", transport=line) as other:
        assert other.job_result(job.id, tmp_path / "r").read_bytes() == content


def test_a_result_that_is_not_there_leaves_no_file(client: GenescaleClient, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        client.job_result("20260101t000000000-0123456789abcdef", tmp_path / "r")
    with pytest.raises(InputError, match="no id of a job"):
        client.job_result("../keys", tmp_path / "r")
    assert not list(tmp_path.iterdir())


def test_a_repeat_is_the_same_job_and_another_question_is_not(
    client: GenescaleClient, begin: Callable[..., Job], cells: list[dict[str, Any]]
) -> None:
    first, again, other = begin(idempotency_key="k"), begin(idempotency_key="k"), begin()
    assert first.id == again.id != other.id
    with pytest.raises(ConflictError):
        client.submit_job({"kind": "perturbations", "cells": cells, "edits": EDITS[:1]}, idempotency_key="k")


def test_a_lost_answer_does_not_make_two_jobs(client: GenescaleClient, line: Wire, begin: Callable[..., Job]) -> None:
    before = {job.id for job in client.jobs(limit=100).jobs}
    real, lost = line.answer, []

    async def loses(request: httpx.Request) -> httpx.Response:
        response = await real(request)
        if request.method == "POST" and not lost:
            lost.append(response)
            raise httpx.ReadError("reset", request=request)
        return response

    line.answer = loses  # type: ignore[method-assign]
    client._sleep = lambda seconds: None
    job = begin()
    assert {one.id for one in client.jobs(limit=100).jobs} - before == {job.id}
    assert lost[0].json()["id"] == job.id


def test_patience_ends_and_the_job_goes_on(client: GenescaleClient, begin: Callable[..., Job]) -> None:
    job = begin()
    if not job.over:
        with pytest.raises(DeadlineError, match="it goes on"):
            client.wait_for_job(job.id, timeout_s=0.0)
    assert client.wait_for_job(job.id).state == "succeeded"


def test_a_failed_job_raises_what_it_failed_with(client: GenescaleClient, side: Side) -> None:
    data = side.config.jobs.allowed_roots[0]
    job = client.submit_job({"kind": "embed", "source": f"{data}/absent"})
    with pytest.raises(InputError, match="nothing that can be read is stored"):
        client.wait_for_job(job.id)


def test_the_end_of_a_job_that_is_over_changes_nothing_and_a_cancelled_one_raises(
    client: GenescaleClient, begin: Callable[..., Job]
) -> None:
    ended = client.cancel_job(client.wait_for_job(begin().id).id)
    assert ended.state == "succeeded"
    with pytest.raises(ServiceError, match="was cancelled"):
        replace(ended, state="cancelled").check()
