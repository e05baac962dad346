"""The Store keeps the same promises on local folders and on S3; the sharp edges of each side have their own tests."""

from __future__ import annotations

import io
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import h5py
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import example, given
from hypothesis import strategies as st

from genescale.platform.address import matches, parse
from genescale.platform.block_reader import BlockReader
from genescale.platform.errors import (
    AlreadyExistsError,
    ForbiddenPathError,
    LimitError,
    NotFoundError,
    SettingsError,
    StorageError,
)
from genescale.platform.settings import Secret, StorageSettings
from genescale.platform.storage import Store, is_remote, join

# Larger than one part, so that multipart transfer is what runs, with a last part that is not full.
LARGE_BYTES = 35 * 1024 * 1024 + 11


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, str]:
    """A store and a fresh root in it: once a local folder, once a bucket."""
    if request.param == "local":
        return request.getfixturevalue("local_store"), str(tmp_path / "root")
    return request.getfixturevalue("s3_store")


@pytest.fixture(scope="module")
def large() -> bytes:
    return np.random.default_rng(0).bytes(LARGE_BYTES)


# --- both sides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain.bin", "with space and +plus.txt", "ünïcode/细胞 τ.bin", "100%/a&b=c?d#e.parquet"]
)
@pytest.mark.parametrize("data", [b"", b"abc"])
def test_what_is_written_is_read_back(place: tuple[Store, str], name: str, data: bytes) -> None:
    store, root = place
    written = store.write(join(root, name), data)
    assert store.read(join(root, name)) == data
    assert written == store.stat(join(root, name))
    assert (written.uri, written.size_bytes) == (join(root, name), len(data))
    assert store.list(root) == [written]
    assert store.exists(join(root, name))


def test_overwriting_changes_content_and_tag(place: tuple[Store, str]) -> None:
    store, root = place
    first = store.write(join(root, "a"), b"one")
    second = store.write(join(root, "a"), b"three")
    assert store.read(join(root, "a")) == b"three"
    assert first.etag != second.etag


def test_ranges_end_where_the_file_ends(place: tuple[Store, str]) -> None:
    store, root = place
    uri = join(root, "a")
    store.write(uri, b"0123456789")
    assert store.read_range(uri, 0, 4) == b"0123"
    assert store.read_range(uri, 8, 10) == b"89"
    assert store.read_range(uri, 10, 5) == b""
    assert store.read_range(uri, 3, 0) == b""
    with pytest.raises(ValueError, match="negative"):
        store.read_range(uri, -1, 2)


def test_a_missing_file_is_named(place: tuple[Store, str]) -> None:
    store, root = place
    uri = join(root, "folder/none.h5ad")
    assert not store.exists(uri)
    for attempt in (store.read, store.stat, store.open, lambda u: store.read_range(u, 0, 1)):
        with pytest.raises(NotFoundError, match=r"folder/none\.h5ad") as raised:
            attempt(uri)
        assert raised.value.fix
    store.delete(uri)


def test_a_folder_is_not_a_file(place: tuple[Store, str]) -> None:
    store, root = place
    store.write(join(root, "folder/a"), b"1")
    assert not store.exists(join(root, "folder"))
    with pytest.raises(NotFoundError):
        store.stat(join(root, "folder"))


def test_conditional_create_keeps_the_first(place: tuple[Store, str]) -> None:
    store, root = place
    uri = join(root, "commit.json")
    store.write(uri, b"first", if_absent=True)
    with pytest.raises(AlreadyExistsError, match=r"commit\.json"):
        store.write(uri, b"second", if_absent=True)
    assert store.read(uri) == b"first"


def test_one_of_many_conditional_creates_wins(place: tuple[Store, str]) -> None:
    store, root = place
    uri, start = join(root, "lock"), threading.Barrier(8)

    def attempt(i: int) -> int | None:
        start.wait()
        try:
            store.write(uri, str(i).encode(), if_absent=True)
        except AlreadyExistsError:
            return None
        return i

    with ThreadPoolExecutor(8) as pool:
        winners = [i for i in pool.map(attempt, range(8)) if i is not None]
    assert len(winners) == 1
    assert store.read(uri) == str(winners[0]).encode()


def test_listing_keeps_to_its_folder(place: tuple[Store, str]) -> None:
    store, root = place
    for name in ("a/1", "a/b/2", "a/b/c/3", "ab/4", "a.txt"):
        store.write(join(root, name), name.encode())

    def names(prefix: str) -> list[str]:
        return [entry.uri.removeprefix(root + "/") for entry in store.list(prefix)]

    assert names(root) == ["a.txt", "a/1", "a/b/2", "a/b/c/3", "ab/4"]
    assert names(join(root, "a")) == names(join(root, "a") + "/") == ["a/1", "a/b/2", "a/b/c/3"]
    assert names(join(root, "a.txt")) == ["a.txt"]
    assert names(join(root, "none")) == []


def test_glob(place: tuple[Store, str]) -> None:
    store, root = place
    for name in ("one.h5ad", "two.h5ad", "two.txt", "sub/three.h5ad", "sub/deep/four.h5ad"):
        store.write(join(root, name), b"")

    def names(pattern: str) -> list[str]:
        return [entry.uri.removeprefix(root + "/") for entry in store.glob(f"{root}/{pattern}")]

    assert names("*.h5ad") == ["one.h5ad", "two.h5ad"]
    assert names("t*.[ht]*") == ["two.h5ad", "two.txt"]
    assert names("**/*.h5ad") == ["one.h5ad", "sub/deep/four.h5ad", "sub/three.h5ad", "two.h5ad"]
    assert names("*/*.h5ad") == ["sub/three.h5ad"]
    assert names("s?b/**") == ["sub/deep/four.h5ad", "sub/three.h5ad"]
    assert names("one.h5ad") == ["one.h5ad"]
    assert names("none*") == names("none.h5ad") == []


def test_folders_travel_whole(place: tuple[Store, str], tmp_path: Path) -> None:
    store, root = place
    files = {"config.json": b"{}", "deep/er/weights.bin": b"\0" * 1000, "empty": b""}
    for name, data in files.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(data)
    entries = store.upload_folder(tmp_path / "from", join(root, "bundle"))
    assert [e.uri for e in store.list(join(root, "bundle"))] == sorted(e.uri for e in entries)
    store.write(join(root, "bundle2/other"), b"")
    to = store.download_folder(join(root, "bundle"), tmp_path / "to")
    assert {p.relative_to(to).as_posix(): p.read_bytes() for p in to.rglob("*") if p.is_file()} == files
    store.delete_folder(join(root, "bundle"))
    assert [e.uri for e in store.list(root)] == [join(root, "bundle2/other")]
    store.delete_folder(join(root, "bundle"))
    with pytest.raises(NotFoundError, match="bundle"):
        store.download_folder(join(root, "bundle"), tmp_path / "again")


def test_large_files_travel_in_parts(place: tuple[Store, str], tmp_path: Path, large: bytes) -> None:
    store, root = place
    (tmp_path / "large").write_bytes(large)
    uploaded = store.upload(tmp_path / "large", join(root, "uploaded"), if_absent=True)
    assert uploaded == store.stat(join(root, "uploaded"))
    assert store.read(join(root, "uploaded")) == large
    assert store.download(join(root, "uploaded"), tmp_path / "back").read_bytes() == large
    with pytest.raises(AlreadyExistsError):
        store.upload(tmp_path / "large", join(root, "uploaded"), if_absent=True)
    store.write(join(root, "written"), large)
    assert store.stat(join(root, "written")).size_bytes == len(large)
    assert store.read_range(join(root, "written"), LARGE_BYTES - 100, 200) == large[-100:]


def test_max_bytes_is_a_limit(place: tuple[Store, str], tmp_path: Path) -> None:
    store, root = place
    uri = join(root, "a")
    store.write(uri, b"12345")
    assert store.read(uri, max_bytes=5) == b"12345"
    with pytest.raises(LimitError, match=r"5 bytes.*4 allowed"):
        store.read(uri, max_bytes=4)
    with pytest.raises(LimitError):
        store.download(uri, tmp_path / "to", max_bytes=4)
    assert not (tmp_path / "to").exists()


def test_opened_files_seek(place: tuple[Store, str]) -> None:
    store, root = place
    data = np.random.default_rng(1).bytes(3_000_000)
    store.write(join(root, "a"), data)
    with store.open(join(root, "a")) as file:
        assert file.seek(-10, io.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(1_000_000)
        assert file.read(10) == data[1_000_000:1_000_010]
        file.seek(0)
        assert file.read() == data
        assert file.read() == b""


def test_hdf5_and_parquet_read_from_opened_files(place: tuple[Store, str], tmp_path: Path) -> None:
    store, root = place
    values = np.arange(500_000)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=(10_000,), compression="gzip")
    pq.write_table(pa.table({"x": values}), tmp_path / "a.parquet")
    store.upload_folder(tmp_path, join(root, "files"))
    with store.open(join(root, "files/a.h5")) as opened, h5py.File(opened, "r") as file:
        assert file["x"][123_456:123_460].tolist() == [123_456, 123_457, 123_458, 123_459]
        assert np.array_equal(file["x"][:], values)
    with store.open(join(root, "files/a.parquet")) as opened:
        assert pq.read_table(opened).column("x").to_numpy().sum() == values.sum()


def test_a_pickled_store_works(place: tuple[Store, str]) -> None:
    store, root = place
    store.write(join(root, "a"), b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.read(join(root, "a")) == b"1"
    assert again.settings == store.settings


def test_arrow_file_system(place: tuple[Store, str]) -> None:
    store, root = place
    filesystem, path = store.arrow_filesystem(join(root, "data"))
    filesystem.create_dir(path)
    pq.write_table(pa.table({"x": [1, 2, 3]}), f"{path}/part.parquet", filesystem=filesystem)
    # The empty object by which Arrow marks a folder is no file.
    assert [e.uri for e in store.list(join(root, "data"))] == [join(root, "data/part.parquet")]
    assert pq.read_table(path, filesystem=pickle.loads(pickle.dumps(filesystem))).num_rows == 3


def test_delta_tables_and_polars_use_the_options(place: tuple[Store, str]) -> None:
    store, root = place
    uri = join(root, "corpus")
    store.create_bucket(root)
    for i in range(2):
        write_deltalake(uri, pa.table({"x": [i]}), mode="append", storage_options=store.table_options(uri))
    assert DeltaTable(uri, storage_options=store.table_options(uri)).version() == 1
    found = pl.scan_parquet(f"{uri}/*.parquet", storage_options=store.table_options(uri)).collect()
    assert sorted(found["x"]) == [0, 1]


# --- allowed roots and safe joins -------------------------------------------------------------------------------------


def test_every_call_keeps_to_the_allowed_roots(place: tuple[Store, str], tmp_path: Path) -> None:
    store, root = place
    for name in ("in/a", "out/a", "inner/a"):
        store.write(join(root, name), b"1")
    kept = Store(
        StorageSettings(**{**_fields(store.settings), "allowed_roots": (join(root, "in"),)}),
    )
    assert kept.read(join(root, "in/a")) == b"1"
    assert len(kept.list(join(root, "in/"))) == 1
    forbidden = (join(root, "out/a"), join(root, "inner/a"), root, f"{root}/in/../out/a")
    (tmp_path / "file").write_bytes(b"2")
    calls = [
        kept.read, kept.stat, kept.exists, kept.list, kept.glob, kept.open, kept.delete, kept.delete_folder,
        kept.create_bucket, kept.arrow_filesystem, kept.table_options, lambda u: kept.read_range(u, 0, 1),
        lambda u: kept.write(u, b"2"), lambda u: kept.upload(tmp_path / "file", u),
        lambda u: kept.download(u, tmp_path / "to"), lambda u: kept.download_folder(u, tmp_path / "to"),
        lambda u: kept.upload_folder(tmp_path, u),
    ]  # fmt: skip
    for uri in forbidden:
        for call in calls:
            with pytest.raises(StorageError) as raised:
                call(uri)
            # A bucket is refused as a file before it is refused as a place.
            assert isinstance(raised.value, ForbiddenPathError) or uri == root
    assert store.read(join(root, "out/a")) == b"1"
    assert not (tmp_path / "to").exists()


def test_links_do_not_lead_out_of_the_roots(tmp_path: Path) -> None:
    secret, root = tmp_path / "secret", tmp_path / "root"
    secret.mkdir()
    root.mkdir()
    (secret / "key").write_bytes(b"s")
    (root / "link").symlink_to(secret)
    (root / "key").symlink_to(secret / "key")
    store = Store(StorageSettings(allowed_roots=(str(root),)))
    for uri in (root / "link/key", root / "key", root / "link/../secret/key"):
        with pytest.raises(ForbiddenPathError):
            store.read(str(uri))
    with pytest.raises(ForbiddenPathError, match=r"key"):
        store.list(str(root))


def test_links_are_followed_within_reach(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0a1b").write_bytes(b"atlas")
    (tmp_path / "atlases").mkdir()
    (tmp_path / "atlases/one.h5ad").symlink_to(tmp_path / "blobs/0a1b")
    (tmp_path / "atlases/more").symlink_to(tmp_path / "atlases")
    found = Store(StorageSettings()).glob(f"{tmp_path}/atlases/**/*.h5ad")
    assert [entry.uri for entry in found] == [f"{tmp_path}/atlases/one.h5ad"]


@pytest.mark.parametrize(
    "part",
    ["..", ".", "a/../b", "../a", "/etc", "", "a//b", "a\\b", "a\0b", "a\nb", "%2e%2e", "%2E%2e/x", "a/%252e%252e",
     "%2fetc", "a%5cb", "%00", "..%2f..%2fetc"],
)  # fmt: skip
def test_unsafe_parts_are_refused(part: str) -> None:
    for root in ("s3://bucket/folder", "/data"):
        with pytest.raises(ForbiddenPathError):
            join(root, part)


def test_joined_addresses() -> None:
    assert join("s3://bucket/", "a", "b/c", "d/") == "s3://bucket/a/b/c/d"
    assert join("/data", "dataset_id=a b%20c", "part-0.parquet") == "/data/dataset_id=a b%20c/part-0.parquet"
    assert join("/", "etc") == "/etc"
    assert join("s3://bucket/x") == "s3://bucket/x"
    assert [is_remote(uri) for uri in ("s3://bucket/x", "/s3://x", "file:///x", "x")] == [True, False, False, False]
    with pytest.raises(ForbiddenPathError):
        join("", "a")


_PIECES = st.sampled_from(
    ["..", ".", "/", "\\", "%2e", "%2E", "%2f", "%5c", "%25", "%252e", "\0", "a", "é", " ", "~", ":"]
)
_PARTS = st.one_of(st.text(max_size=12), st.lists(_PIECES, max_size=8).map("".join))


@given(parts=st.lists(_PARTS, min_size=1, max_size=4), remote=st.booleans())
@example(parts=["a", "b%2e"], remote=False)
def test_a_join_never_leaves_its_root(parts: list[str], remote: bool) -> None:
    root = "s3://bucket/root" if remote else "/data/root"
    try:
        joined = join(root, *parts)
    except ForbiddenPathError:
        return
    assert joined.startswith(root + "/")
    text = joined
    for _ in range(4):
        # However often somebody decodes it on the way, it stays below its root.
        inside = text.removeprefix("s3:/")
        assert os.path.normpath(inside).startswith(os.path.normpath(root.removeprefix("s3:/")) + "/")
        text = _decoded(text)
    assert parse(joined).uri == joined.rstrip("/")


def _decoded(text: str) -> str:
    from urllib.parse import unquote

    return unquote(text).replace("\\", "/")


_NAMES = st.lists(st.text("ab.*", min_size=1, max_size=3).filter(lambda s: s.strip(".")), min_size=1, max_size=4)


@given(parts=_NAMES)
def test_patterns_fit_themselves_and_every_depth(parts: list[str]) -> None:
    name = "/".join(parts)
    assert matches(name, ["**"])
    assert matches(name, ["*"] * len(parts))
    assert not matches(name, ["*"] * (len(parts) + 1))
    assert matches(name, ["**", parts[-1].replace("*", "[*]")])


# --- addresses --------------------------------------------------------------------------------------------------------


def test_file_addresses_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(StorageSettings())
    written = store.write("sub/a b.txt", b"1")
    assert written.uri == str(tmp_path / "sub/a b.txt")
    assert store.read(f"file://{tmp_path}/sub/a%20b.txt") == b"1"
    assert store.read(f"file://localhost{tmp_path}/sub/a%20b.txt") == b"1"
    assert store.list("sub") == [written]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.read("~/sub/a b.txt") == b"1"
    assert [e.uri for e in store.glob("*/*.txt")] == [written.uri]


@pytest.mark.parametrize(
    "uri", ["gs://bucket/a", "https://host/a", "s3://", "s3:///a", "s3://bucket", "", "file://host/a"]
)
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(StorageError) as raised:
        Store(StorageSettings()).read(uri)
    assert raised.value.fix


# --- the local side ---------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    store = Store(StorageSettings())
    store.write(str(tmp_path / "a"), b"old")
    with pytest.raises(TypeError):
        store.write(str(tmp_path / "a"), "not bytes")  # type: ignore[arg-type]
    assert store.read(str(tmp_path / "a")) == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_readers_see_whole_files_only(tmp_path: Path) -> None:
    store, uri = Store(StorageSettings()), str(tmp_path / "a")
    contents = {bytes([i]) * 300_000 for i in range(8)}
    store.write(uri, next(iter(contents)))

    def write(data: bytes) -> None:
        store.write(uri, data)

    with ThreadPoolExecutor(2) as pool:
        written = [pool.submit(write, data) for data in sorted(contents) * 4]
        while not all(future.done() for future in written):
            assert store.read(uri) in contents
            assert [e.uri for e in store.list(str(tmp_path))] == [uri]


def test_a_file_in_the_way_is_explained(tmp_path: Path) -> None:
    store = Store(StorageSettings())
    store.write(str(tmp_path / "a"), b"1")
    with pytest.raises(StorageError, match="parents is a file"):
        store.write(str(tmp_path / "a/b"), b"1")


def test_whole_disks_are_not_deleted() -> None:
    for folder in ("/", "~", "s3://bucket", "s3://bucket/"):
        with pytest.raises(ForbiddenPathError):
            Store(StorageSettings()).delete_folder(os.path.expanduser(folder))


def test_local_files_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    Store(StorageSettings()).write(str(tmp_path / "stored"), b"")
    assert (tmp_path / "stored").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- the remote side --------------------------------------------------------------------------------------------------


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


# --- blocks -----------------------------------------------------------------------------------------------------------


@given(data=st.data(), size=st.integers(0, 60), block=st.integers(1, 20), kept=st.integers(1, 4))
def test_blocks_read_what_the_file_holds(data: st.DataObject, size: int, block: int, kept: int) -> None:
    content = bytes(range(size))

    def fetch(start: int, length: int) -> bytes:
        assert length > 0
        assert start + length <= size
        return content[start : start + length]

    reader = BlockReader(size, fetch, block_bytes=block, kept_blocks=kept)
    expected = io.BytesIO(content)
    for _ in range(data.draw(st.integers(1, 6))):
        offset, length = data.draw(st.integers(0, 70)), data.draw(st.integers(-1, 70))
        assert reader.seek(offset) == expected.seek(offset) == reader.tell()
        assert reader.read(length) == expected.read(length)


def _fields(settings: StorageSettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}
