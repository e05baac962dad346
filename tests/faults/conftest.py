"""An S3 endpoint that fails on request, small atlases, and what an undisturbed run makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from scipy import sparse

from genescale.ingestion.corpus import Corpus
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

# `lost` is the cruel one: the request is carried out and its answer never arrives.
Fault = Literal["500", "503", "close", "cut", "delay", "lost"]
FAULTS: tuple[Fault, ...] = ("500", "503", "close", "cut", "delay", "lost")
READ_TIMEOUT_S = 1.0
N_GENES = 60
GENE_IDS = tuple(f"ENSG{i:011d}" for i in range(1, N_GENES + 1))
NOT_FORWARDED = {"host", "connection", "expect", "transfer-encoding"}
ERRORS = {"500": (500, "InternalError"), "503": (503, "SlowDown")}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that came by: its number since the last `reset`, counted from 0."""

    number: int
    method: str
    path: str


class FaultyEndpoint:
    """Stands before an S3 endpoint and fails the requests that a rule chooses; otherwise passes everything on."""

    def __init__(self, upstream: StorageSettings) -> None:
        self._lock = threading.Lock()
        self._rule: Callable[[Request], Fault | None] = lambda _: None
        self.requests: list[Request] = []
        self.failed: list[tuple[Request, Fault]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, urlsplit(upstream.endpoint_url).netloc))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        host, port = self._server.server_address[:2]
        self.settings = dataclasses.replace(
            upstream,
            endpoint_url=f"http://{host!s}:{port}",
            read_timeout_s=READ_TIMEOUT_S,
            connect_timeout_s=READ_TIMEOUT_S,
            attempts=3,
        )

    def reset(self, rule: Callable[[Request], Fault | None] = lambda _: None) -> None:
        """Forget the requests so far and fail the coming ones by this rule."""
        with self._lock:
            self.requests, self.failed, self._rule = [], [], rule

    def fail(self, kind: Fault, first: int, times: int = 1, wanted: Callable[[Request], bool] = lambda _: True) -> None:
        """Fail `times` of the wanted requests, from the wanted request number `first` on."""
        seen = iter(range(10**9))

        def rule(request: Request) -> Fault | None:
            return kind if wanted(request) and first <= next(seen) < first + times else None

        self.reset(rule)

    def judge(self, method: str, path: str) -> Fault | None:
        """What becomes of a request; called once for each."""
        with self._lock:
            request = Request(len(self.requests), method, unquote(path))
            self.requests.append(request)
            fault = self._rule(request)
            if fault:
                self.failed.append((request, fault))
            return fault

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def _handler(endpoint: FaultyEndpoint, upstream: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = endpoint.judge(self.command, self.path)
            if fault in ERRORS:
                self._refuse(*ERRORS[fault])
            elif fault == "close":
                self._hang_up()
            else:
                if fault == "delay":
                    # The request is held back, not carried out: the client has given it up by then.
                    time.sleep(READ_TIMEOUT_S * 1.5)
                    self._hang_up()
                    return
                self._pass_on(body, fault)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        def _pass_on(self, body: bytes, fault: Fault | None) -> None:
            connection = http.client.HTTPConnection(upstream, timeout=30)
            try:
                headers = {key: value for key, value in self.headers.items() if key.lower() not in NOT_FORWARDED}
                connection.request(self.command, self.path, body=body or None, headers=headers)
                answer = connection.getresponse()
                data = answer.read()
            finally:
                connection.close()
            if fault == "lost":
                self._hang_up()
                return
            self.send_response_only(answer.status, answer.reason)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(key, value)
            # The answer to HEAD has the length of a body that does not come.
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self._hang_up()
            elif self.command != "HEAD":
                self.wfile.write(data)

        def _refuse(self, status: int, code: str) -> None:
            data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _hang_up(self) -> None:
            # A reset rather than an orderly end, as from a machine that goes away.
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

    return Handler


@pytest.fixture(scope="session")
def faulty_endpoint(s3_settings: StorageSettings) -> Iterator[FaultyEndpoint]:
    """The session's endpoint behind one that fails when told to; calm until then."""
    endpoint = FaultyEndpoint(s3_settings)
    yield endpoint
    endpoint.close()


@pytest.fixture
def calm(faulty_endpoint: FaultyEndpoint) -> Iterator[FaultyEndpoint]:
    """The faulty endpoint, calm before and after the test."""
    faulty_endpoint.reset()
    yield faulty_endpoint
    faulty_endpoint.reset()


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.build(GENE_IDS, 1 + np.arange(N_GENES) / 7, window=64, name="test")


def counts_of(n_cells: int, seed: int) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (n_cells, N_GENES)).astype(np.float32)
    counts[:, :8] += 1
    return sparse.csr_matrix(counts)


@pytest.fixture(scope="session")
def write_h5ad() -> Callable[[Path, int, int], Path]:
    """Write an h5ad of n cells from a seed: `write_h5ad(path, n_cells, seed)`."""
    import anndata
    import pandas

    def write(path: Path, n_cells: int, seed: int) -> Path:
        obs = pandas.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
        var = pandas.DataFrame(index=list(GENE_IDS))
        path.parent.mkdir(parents=True, exist_ok=True)
        anndata.AnnData(X=counts_of(n_cells, seed), obs=obs, var=var).write_h5ad(path, compression="gzip")
        return path

    return write


Rows = dict[str, dict[int, str]]


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Corpus], Rows]:
    """Tokens of every row by dataset and source row; fails when a row stands there twice."""

    def rows(corpus: Corpus) -> Rows:
        table = corpus.cells(["dataset_id", "source_row"]).to_pylist()
        found: Rows = {}
        for row, tokens in zip(table, corpus.tokens(range(corpus.n_cells)), strict=True):
            rows_of_dataset = found.setdefault(row["dataset_id"], {})
            assert row["source_row"] not in rows_of_dataset, f"doubled: {row}"
            rows_of_dataset[row["source_row"]] = hashlib.sha256(tokens.tobytes()).hexdigest()
        return found

    return rows


@pytest.fixture(scope="session")
def listing_of() -> Callable[[str, Store], dict[str, tuple[Any, ...]]]:
    """Everything below an address with size, tag and, on disk, time of change."""

    def listing(uri: str, store: Store) -> dict[str, tuple[Any, ...]]:
        found: dict[str, tuple[Any, ...]] = {}
        for entry in store.list(uri):
            path = Path(entry.uri)
            time_ns = path.stat().st_mtime_ns if not entry.uri.startswith("s3://") else None
            found[entry.uri] = (entry.size_bytes, entry.etag, time_ns)
        return found

    return listing
