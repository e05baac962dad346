"""Jobs kept in object storage, links to their results, and what settings of jobs may be."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from genescale.client import GenescaleClient
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, NotFoundError, SettingsError
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.settings import Settings, StorageSettings
from genescale.platform.storage import Store, join
from genescale.serving.in_process import InProcessModel
from genescale.serving.jobs.board import Board, confined_store
from genescale.serving.jobs.in_process import LocalDesk, ThreadRunner
from genescale.serving.jobs.records import new_ticket, next_attempt, owner_of
from genescale.serving.jobs.settings import JobsConfig
from genescale.serving.jobs.sources import check_source
from genescale.serving.jobs.telling import error_of_job
from genescale.training.embedder import Embedder
from tests.serving.jobs_side import Side, serving_config, side_of

QUESTION = {
    "kind": "perturbations",
    "cells": [{"counts": {"GENE1": 3, "GENE2": 2, "GENE3": 1}}],
    "edits": [{"kind": "delete", "genes": ["GENE2"]}],
}


@pytest.mark.parametrize("links", [True, False])
def test_jobs_live_in_object_storage_and_results_are_links(
    s3_store: tuple[Store, str], bundle: Bundle, embedder: Embedder, links: bool
) -> None:
    store, base = s3_store
    jobs = JobsConfig(uri=join(base, f"jobs-{links}"), links=links, heartbeat_s=0.2)
    config, settings = serving_config(jobs), Settings(storage=store.settings)
    tracker = MemoryTracker()
    runner = ThreadRunner(config, settings, tracker=lambda _: tracker)
    with LocalDesk(config, settings, runner=runner) as desk:
        side = side_of(bundle, InProcessModel(embedder), desk, config)
        job = side.ended(side.post(QUESTION).json()["id"])
        assert job["state"] == "succeeded", job
        answer = side.ask("GET", job["result"])
    if links:
        assert answer.status_code == 307
        assert answer.headers["location"] == answer.json()["url"]
        secret = store.settings.secret_access_key.reveal()
        assert secret not in answer.text
        # Nothing but the link is sent along.
        answer = httpx.get(answer.headers["location"])
        assert answer.headers["content-disposition"] == 'attachment; filename="shifts.parquet"'
    assert answer.status_code == 200
    assert len(answer.content) == job["files"][0]["bytes"]
    assert pq.read_table(io.BytesIO(answer.content)).num_rows > 0


def test_a_link_is_to_one_object_and_a_file_has_none(s3_store: tuple[Store, str], tmp_path: Any) -> None:
    store, base = s3_store
    store.write(join(base, "one.txt"), b"one")
    link = store.presigned(join(base, "one.txt"), valid_s=60)
    assert httpx.get(link).content == b"one"
    assert "X-Amz-Expires=60" in link or "Expires=" in link
    assert store.presigned(str(tmp_path / "one.txt"), valid_s=60) == ""


def test_of_two_supervisors_that_take_a_job_in_object_storage_one_wins(s3_store: tuple[Store, str]) -> None:
    store, base = s3_store
    board = Board(join(base, "race"), store)
    release = {"name": "m", "version": "1", "digest": "d", "address": "", "folder": ""}
    ticket = board.create(new_ticket(kind="embed", owner="anyone", release=release, digest="d"), b"{}")
    taken = [board.take(ticket, next_attempt(None, holder)) for holder in ("one", "two", "one")]
    # The third is the first again, whose answer was lost.
    assert taken == [True, False, True]
    assert board.newest(ticket).holder == "one"  # type: ignore[union-attr]


def test_what_storage_allows_bounds_what_jobs_may_be_told_to_read() -> None:
    settings = Settings(storage=StorageSettings(allowed_roots=("s3://lake/corpus",)))
    with pytest.raises(SettingsError, match=r"outside storage\.allowed_roots"):
        confined_store(settings, JobsConfig(uri="s3://lake/jobs", allowed_roots=("s3://lake/corpus",)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"uri": "jobs"}, "no absolute address"),
        ({"allowed_roots": ("corpus",)}, "no absolute address"),
        ({"uri": "s3://lake/a/jobs", "allowed_roots": ("s3://lake/a",)}, "uri lies within allowed_roots"),
        ({"uri": "", "allowed_roots": ("s3://lake/a",)}, "allowed_roots without uri"),
        ({"workers": 0}, "workers is 0"),
        ({"num_cpus": 0.0}, "num_cpus is 0"),
        ({"heartbeat_s": 10.0, "lease_s": 20.0}, "lease_s is 20"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        JobsConfig(**{"uri": "s3://lake/jobs", **changes})


def test_an_address_keeps_one_spelling_and_its_version() -> None:
    config = JobsConfig(uri="s3://jobs", allowed_roots=("s3://lake/corpora", "/data"))
    assert check_source("s3://lake/corpora/heart/@12", config, where="x") == "s3://lake/corpora/heart@12"
    assert check_source("s3://lake/corpora", config, where="x") == "s3://lake/corpora"
    assert check_source("/data//heart.h5ad", config, where="x") == "/data/heart.h5ad"


@pytest.mark.parametrize(
    "address",
    [
        "s3://lake/corpora-private/x",
        "s3://lake/corpora/../private",
        "s3://lake/corpora/%2e%2e/private",
        "s3://lake/corpora/%252e%252e/private",
        "s3://lake/corpora/..\\..\\private",
        "S3://lake/corpora/x",
        "s3://user:secret@lake/corpora/x",
        "https://lake.s3.amazonaws.com/corpora/x",
        "file:///data/x",
        "/data/../etc/passwd",
        "/data\0/x",
        "/etc/passwd",
        "data/x",
        "",
        "/data/" + "x" * 2_000,
        "s3://jobs/results",
    ],
)
def test_no_address_leads_out_of_the_roots(address: str) -> None:
    config = JobsConfig(uri="s3://jobs", allowed_roots=("s3://lake/corpora", "/data"))
    with pytest.raises(InputError) as caught:
        check_source(address, config, where="source")
    assert "corpora'" not in str(caught.value)
    assert caught.value.where == "source"


def test_owners_cannot_be_mistaken_for_each_other() -> None:
    assert len({owner_of(""), owner_of("anyone"), owner_of("key-anyone"), owner_of("x")}) == 4


def test_an_error_names_no_place_but_those_that_its_caller_named() -> None:
    error = InputError(
        "cannot read /srv/jobs/results/x and s3://lake/corpus/part-0 of /data/a.", where="/tmp/genescale-1"
    )
    told = error_of_job(error, given=("s3://lake/corpus@3",))
    assert told["message"] == "cannot read … and s3://lake/corpus/part-0 of …."
    assert told["details"] == {"where": "…"}
    lost = error_of_job(NotFoundError("nothing is stored there.", where="s3://secret/x"), given=("s3://lake/a",))
    assert lost["code"] == "invalid_input"
    assert "secret" not in str(lost)
    ours = error_of_job(RuntimeError("/srv/secret"))
    assert (ours["code"], "secret" in str(ours)) == ("internal", False)


@pytest.mark.slow
def test_the_client_follows_a_real_link(
    s3_store: tuple[Store, str], bundle: Bundle, embedder: Embedder, tmp_path: Any, loop: Any
) -> None:
    from tests.serving.client_wire import Wire

    store, base = s3_store
    config = serving_config(JobsConfig(uri=join(base, "jobs-client"), heartbeat_s=0.2))
    settings, tracker = Settings(storage=store.settings), MemoryTracker()
    runner = ThreadRunner(config, settings, tracker=lambda _: tracker)
    with LocalDesk(config, settings, runner=runner) as desk:
        side: Side = side_of(bundle, InProcessModel(embedder), desk, config)
        with GenescaleClient("http://service", transport=Wire(side.gate, loop)) as client:
            client._storage = httpx.Client()
            job = client.wait_for_job(client.submit_job(QUESTION).id)
            path = client.job_result(job.id, tmp_path / "shifts.parquet")
    assert path.stat().st_size == job.files["shifts.parquet"]
    assert replace(job, state="succeeded").check() == job
