"""The remote half of the Store: pages, replaced objects, refusals, broken bodies, credentials and endpoints."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from genescale.platform.errors import (
    AlreadyExistsError,
    ForbiddenPathError,
    NotFoundError,
    SettingsError,
    StorageError,
)
from genescale.platform.settings import Secret, StorageSettings
from genescale.platform.storage import Store

# Larger than one part, so that multipart transfer is what runs, with a last part that is not full.
LARGE_BYTES = 35 * 1024 * 1024 + 11


@pytest.fixture(scope="module")
def large() -> bytes:
    return np.random.default_rng(0).bytes(LARGE_BYTES)


def test_listing_goes_over_pages(s3_store: tuple[Store, str]) -> None:
    store, root = s3_store
    names = [f"{root}/many/{i:04d}" for i in range(1_203)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: store.write(uri, b""), names))
    assert [entry.uri for entry in store.list(f"{root}/many")] == names
    store.delete_folder(f"{root}/many")
    assert store.list(root) == []


def test_a_replaced_object_is_not_read_as_a_mixture(s3_store: tuple[Store, str]) -> None:
    store, root = s3_store
    store.write(f"{root}/a", b"1" * 10)
    with store.open(f"{root}/a") as file:
        store.write(f"{root}/a", b"2" * 10)
        with pytest.raises(StorageError, match="replaced while it was being read"):
            file.read()


def test_a_key_that_climbs_is_not_downloaded(s3_store: tuple[Store, str], tmp_path: Path) -> None:
    store, root = s3_store
    store.write(f"{root}/folder/good", b"1")
    keys = store.settings.access_key_id.reveal(), store.settings.secret_access_key.reveal()
    hostile = boto3.client("s3", "us-east-1", None, True, None, store.settings.endpoint_url, *keys)
    hostile.put_object(Bucket=root.removeprefix("s3://"), Key="folder/../../evil", Body=b"2")
    with pytest.raises(ForbiddenPathError):
        store.download_folder(f"{root}/folder", tmp_path / "deep/to")
    assert not list(tmp_path.rglob("evil"))


def test_a_missing_bucket_is_told_from_a_missing_object(s3_store: tuple[Store, str]) -> None:
    store, root = s3_store
    with pytest.raises(NotFoundError, match="no such object"):
        store.stat(f"{root}/none")
    missing = "s3://no-such-bucket-here"
    attempts = [store.stat, store.read, store.list, lambda u: store.write(u, b""), lambda u: store.glob(f"{u}*")]
    for attempt in attempts:
        with pytest.raises(NotFoundError, match=r"no-such-bucket-here.*the bucket does not exist.*create it"):
            attempt(f"{missing}/a")


def test_buckets_are_created_once(s3_store: tuple[Store, str]) -> None:
    store, root = s3_store
    store.write(f"{root}/a", b"1")
    store.create_bucket(root)
    assert store.read(f"{root}/a") == b"1"


def test_an_endpoint_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        settings = StorageSettings(
            endpoint_url=endpoint,
            access_key_id=Secret("planted-key"),
            secret_access_key=Secret("planted-secret"),
        )
        with pytest.raises(StorageError, match=f"s3://bucket/a: cannot connect to {endpoint}") as raised:
            Store(settings).read("s3://bucket/a")
    assert "storage.endpoint_url" in raised.value.fix
    assert "planted" not in f"{raised.value} {raised.value!r} {settings}"


Answer = tuple[int, bytes]


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[str, str], Answer]], Store]]:
    """A Store on an endpoint that answers as the given function of (method, path) says; -1 breaks the body off."""
    servers: list[ThreadingHTTPServer] = []

    def start(script: Callable[[str, str], Answer]) -> Store:
        class Handler(BaseHTTPRequestHandler):
            # The protocol in which a client that asks before it sends a body is answered, not left waiting.
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, body = script(self.command, self.path)
                self.send_response(abs(status) if status != -1 else 200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"tag"')
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(body[:2] if status == -1 else body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{servers[-1].server_address[1]}"
        keys = {"access_key_id": Secret("planted-key"), "secret_access_key": Secret("planted-secret")}
        return Store(StorageSettings(endpoint_url=endpoint, **keys))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Script = Callable[[Callable[[str, str], Answer]], Store]


def _refusal(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>planted-key said {code}</Message></Error>".encode()


def test_a_body_that_breaks_off_is_read_again(scripted: Script) -> None:
    answers = iter([(-1, b"whole"), (-1, b"whole"), (200, b"whole")])
    assert scripted(lambda method, path: next(answers)).read("s3://bucket/a") == b"whole"


def test_a_body_that_always_breaks_off_is_an_error(scripted: Script) -> None:
    with pytest.raises(StorageError, match="s3://bucket/a"):
        scripted(lambda method, path: (-1, b"whole")).read("s3://bucket/a")


def test_conflicting_creates_are_repeated(scripted: Script) -> None:
    conflict = (409, _refusal("ConditionalRequestConflict"))
    answers = iter([conflict, conflict, (200, b"")])
    assert scripted(lambda method, path: next(answers)).write("s3://bucket/a", b"1", if_absent=True).etag == "tag"
    answers = iter([conflict, (412, _refusal("PreconditionFailed"))])
    with pytest.raises(AlreadyExistsError):
        scripted(lambda method, path: next(answers)).write("s3://bucket/a", b"1", if_absent=True)


@pytest.mark.parametrize("listed", [Store.list, Store.glob])
def test_an_object_that_goes_while_it_is_listed_is_no_error(scripted: Script, listed: Callable[..., Any]) -> None:
    heads = iter([200])

    def script(method: str, path: str) -> Answer:
        return (next(heads, 404), b"") if method == "HEAD" else (200, b"<ListBucketResult></ListBucketResult>")

    assert len(listed(scripted(script), "s3://bucket/passing")) <= 1


@pytest.mark.parametrize(
    ("status", "code", "what", "fix"),
    [
        (403, "AccessDenied", "access denied", "what these keys may do"),
        (403, "InvalidAccessKeyId", "not known", "storage.access_key_id"),
        (403, "SignatureDoesNotMatch", "does not fit", "storage.secret_access_key"),
        (400, "ExpiredToken", "expired", "Renew"),
        (400, "AuthorizationHeaderMalformed", "another region", "storage.region"),
        (400, "SomethingElse", "SomethingElse", "http://127.0.0.1"),
    ],
)
def test_refusals_are_explained(scripted: Script, status: int, code: str, what: str, fix: str) -> None:
    store = scripted(lambda method, path: (status, _refusal(code)))
    with pytest.raises(StorageError, match="s3://bucket/a") as raised:
        store.read("s3://bucket/a")
    assert what in raised.value.what
    assert fix in raised.value.fix
    assert "planted" not in str(raised.value)


def test_an_upload_that_fails_leaves_no_parts(scripted: Script, large: bytes) -> None:
    left: list[str] = []

    def script(method: str, path: str) -> Answer:
        if method == "POST":
            left.append("upload")
            return 200, b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"
        if method == "DELETE":
            left.remove("upload")
            return 204, b""
        return 403, _refusal("AccessDenied")

    with pytest.raises(StorageError, match="access denied"):
        scripted(script).write("s3://bucket/a", large)
    assert left == []


def test_missing_credentials_say_what_to_set(s3_settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StorageError, match=r"no credentials were found.*storage\.access_key_id"):
        Store(StorageSettings(endpoint_url=s3_settings.endpoint_url)).read("s3://bucket/a")


def test_named_keys_win_over_the_environment(s3_store: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, root = s3_store
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "foreign")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "foreign")
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    again = Store(store.settings)
    again.write(f"{root}/a", b"1")
    filesystem, path = again.arrow_filesystem(f"{root}/a")
    assert filesystem.open_input_file(path).read() == b"1"
    options = again.table_options(root)
    assert options["aws_access_key_id"] == store.settings.access_key_id.reveal()
    assert options["aws_endpoint_url"] == store.settings.endpoint_url


def test_half_a_pair_of_keys_is_refused() -> None:
    with pytest.raises(SettingsError, match="go together"):
        Store(StorageSettings(access_key_id=Secret("a")))


@pytest.mark.parametrize("endpoint", ["localhost:9000", "http://user:planted-password@host", "https://host/folder"])
def test_other_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"endpoint_url.*Write http://host:port") as raised:
        Store(StorageSettings(endpoint_url=endpoint))
    assert "planted" not in str(raised.value)
