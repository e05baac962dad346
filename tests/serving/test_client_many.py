"""Many cells in many requests through both clients: limits, refusals, both forms of bodies, and progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from genescale.client import GenescaleClient, ProgressBar
from genescale.platform import errors
from genescale.training.embedder import Embedder
from tests.serving.client_wire import ARROW, Wire, call, object_of

BOTH = pytest.mark.parametrize("kind", ["sync", "async"])
WIDTH = 16


@BOTH
def test_requests_keep_every_limit_of_the_service_and_few_are_under_way(
    kind: str, wire: Callable[..., Wire], draw_cell: Callable[..., dict[str, float]], embedder: Embedder, tokens_of: Any
) -> None:
    drawn = [draw_cell(seed, 3 + seed % 50) for seed in range(60)]
    limits = {"max_cells": 9, "max_body_bytes": 16_000, "max_held_bytes": 64_000, "max_tokens": 150}
    line = wire(**limits)
    found = call(kind, line, "embed", drawn, bodies="json", at_once=3)
    expected_nd = embedder.embed_cells(
        [tokens_of(cell) for cell in drawn], layer="second_to_last", pooling="mean_genes"
    )
    assert np.allclose(found.embeddings, expected_nd, atol=1e-5)
    sizes = [len(json.loads(request.content)["cells"]) for request in line.posted]
    assert sum(sizes) == 60
    assert max(sizes) <= 9
    assert len(sizes) > 7
    assert 1 < line.most_inside <= 3
    too_large = wire(max_genes_per_cell=20)
    with pytest.raises(errors.LimitError, match=r"cells\[18\]"):
        call(kind, too_large, "embed", drawn)
    assert too_large.posted == []


@BOTH
def test_a_request_that_is_late_or_too_large_is_asked_in_parts(
    kind: str, wire: Callable[..., Wire], counts_ng: np.ndarray, expected_nd: np.ndarray
) -> None:
    line, refused = wire(), 0

    def mend(request: httpx.Request) -> httpx.Response | None:
        nonlocal refused
        cells = json.loads(request.content)["cells"] if request.content else []
        refused += len(cells) > 3
        return httpx.Response(413 if len(cells) > 12 else 504) if len(cells) > 3 else None

    line.mend = mend
    adata = object_of(counts_ng)
    call(kind, line, "embed_anndata", adata, bodies="json", at_once=1)
    assert np.allclose(adata.obsm["X_genescale"], expected_nd, atol=1e-5)
    # What was learnt from the first refusals holds for all cells that follow.
    assert refused <= 4
    line.mend = lambda request: httpx.Response(504) if request.method == "POST" else None
    with pytest.raises(errors.DeadlineError):
        call(kind, line, "embed_anndata", adata)


def test_a_run_that_ended_asks_for_nothing_more(wire: Callable[..., Wire], counts_ng: np.ndarray) -> None:
    """A thread that waits for its next try sees that nobody wants the answer."""
    line, posted, waits, wakes = wire(max_cells=4), list[int](), threading.Event(), threading.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return line.handle_request(request)
        posted.append(503 if not posted else 400)
        # The second one is refused for good, when the first one waits for its next try.
        assert posted[-1] == 503 or waits.wait(30)
        return httpx.Response(posted[-1])

    def sleep(seconds: float) -> None:
        waits.set()
        assert wakes.wait(30)

    before = threading.enumerate()
    with GenescaleClient("http://service", transport=httpx.MockTransport(answer), sleep=sleep) as client:
        with pytest.raises(errors.InputError, match="answered 400"):
            client.embed_anndata(object_of(counts_ng), at_once=2)
        wakes.set()
        for thread in threading.enumerate():
            if thread not in before:
                thread.join(30)
    assert posted == [503, 400]


@BOTH
def test_a_busy_service_loses_no_cell(
    kind: str, wire: Callable[..., Wire], counts_ng: np.ndarray, expected_nd: np.ndarray
) -> None:
    line, tried = wire(max_cells=4), 0

    def mend(request: httpx.Request) -> httpx.Response | None:
        nonlocal tried
        tried += request.method == "POST"
        if tried % 3 == 1 and request.method == "POST":
            raise httpx.RemoteProtocolError("the replica died")
        return httpx.Response(429, headers={"Retry-After-Ms": "5"}) if tried % 3 == 2 else None

    line.mend = mend
    adata = object_of(counts_ng)
    call(kind, line, "embed_anndata", adata)
    assert np.allclose(adata.obsm["X_genescale"], expected_nd, atol=1e-5)


@BOTH
def test_a_model_that_changes_in_between_is_an_error_and_changes_nothing(
    kind: str, wire: Callable[..., Wire], counts_ng: np.ndarray
) -> None:
    old, new = wire(max_cells=4), wire(max_cells=4)
    old.mend = lambda request: renamed(request, new, asked=len(old.posted))
    adata = object_of(counts_ng)
    with pytest.raises(errors.ServiceError, match=r"changed its model from tiny 3.* to tiny 4"):
        call(kind, old, "embed_anndata", adata, bodies="json", at_once=1)
    assert "X_genescale" not in adata.obsm


def renamed(request: httpx.Request, wire: Wire, *, asked: int) -> httpx.Response | None:
    """From the third question on, an answer of the next version of the model."""
    if request.method != "POST" or asked < 3:
        return None
    n = len(json.loads(request.content)["cells"])
    ignored = {"n": 0, "unknown": 0, "no_median": 0, "zero": 0, "genes": []}
    cell = {"id": None, "n_genes": 1, "n_tokens": 3, "cropped": False, "ignored": ignored, "merged": []}
    provenance = {
        "model": {"name": "tiny", "version": "4", "digest": "d"},
        "vocabulary": {"name": "v", "digest": "v"},
        "corpus": {"version": 7},
    }
    answer = {
        "provenance": provenance,
        "cells": [{**cell, "embedding": [0.5] * WIDTH}] * n,
        "timings_ms": {"parse": 1, "queue": 1, "forward": 1},
    }
    return httpx.Response(200, json=answer)


@pytest.mark.parametrize(
    "cells",
    [
        [{"id": "a", "tokens": [4, 5, 9]}, {"tokens": [7]}],
        [{"counts": {"GENE1": 2.5, "NOGENE": 3, "GENE4": 2**24 + 1}}, {"id": "b", "GENE": 1}],
        [{"genes": ["GENE3", "OLD5"], "values": [1, 0]}, {"tokens": [8]}, {"counts": {"GENE5": 1, "OLD5": 2}}],
    ],
    ids=["tokens", "counts", "mixed"],
)
@BOTH
def test_arrow_and_json_answer_alike(kind: str, cells: list[dict[str, Any]], wire: Callable[..., Wire]) -> None:
    cells = [cell if "GENE" not in cell else {"counts": {"GENE7": 1}, "id": "b"} for cell in cells]
    for method in ("embeddings", "gene_embeddings"):
        line = wire()
        by_arrow = call(kind, line, method, cells, bodies="arrow", layer="last")
        by_json = call(kind, wire(), method, cells, bodies="json", layer="last")
        mixed = len({"tokens" in cell for cell in cells}) > 1
        assert line.posted[0].headers["content-type"] == ("application/json" if mixed else ARROW)
        if method == "embeddings":
            assert (by_arrow.embeddings == by_json.embeddings).all()
            assert by_arrow.cells == by_json.cells
            assert by_arrow.model == by_json.model
        else:
            for one, other in zip(by_arrow.cells, by_json.cells, strict=True):
                assert (one.embeddings == other.embeddings).all()
                assert (one.genes, one.report) == (other.genes, other.report)


def test_counts_travel_exactly_as_arrow_and_in_few_bytes(wire: Callable[..., Wire]) -> None:
    for counts, width in (([1.0, 2.5, 2**24], 32), ([1.0, 2**24 + 1.0, 0.1], 64)):
        line = wire()
        call("sync", line, "embeddings", [dict(zip(("GENE1", "GENE2", "GENE3"), counts, strict=True))], bodies="arrow")
        column = pa.ipc.open_stream(line.posted[0].content).read_all().column("counts")
        assert column.to_pylist() == [counts]
        assert column.type.value_type.bit_width == width


def test_without_pyarrow_the_client_speaks_json() -> None:
    probe = """
import sys
sys.modules["pyarrow"] = None
from genescale.client import GenescaleClient
from genescale.client.arrow_bodies import ARROW_TYPE, arrow_is_best
assert not arrow_is_best("auto", {"choices": {"content_types": [ARROW_TYPE]}})
try:
    GenescaleClient("http://service", bodies="arrow")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("SettingsError bodies='arrow': pyarrow is not installed.")


def test_a_service_without_arrow_gets_json_or_says_so(wire: Callable[..., Wire], counts_ng: np.ndarray) -> None:
    line = wire()
    info = call("sync", line, "info")
    older = {**info, "choices": {}}
    line.mend = lambda request: httpx.Response(200, json=older) if request.url.path == "/v1/info" else None
    call("sync", line, "embed_anndata", object_of(counts_ng))
    assert {request.headers["content-type"] for request in line.posted} == {"application/json"}
    with pytest.raises(errors.InputError, match="no Arrow"):
        call("sync", line, "embed_anndata", object_of(counts_ng), bodies="arrow")


def test_the_bar_ends_full_and_moves_on_a_terminal_only() -> None:
    plain = io.StringIO()
    bar = ProgressBar("embedding", file=plain)
    for done in range(101):
        bar(done, 100)
    lines = plain.getvalue().splitlines()
    assert 2 <= len(lines) <= 3
    assert "100/100" in lines[-1]
    assert "\r" not in plain.getvalue()
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    bar = ProgressBar(file=terminal)
    bar(100, 100)
    assert terminal.getvalue().startswith("\rcells [" + "#" * 30 + "]")
