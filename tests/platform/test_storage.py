"""The Store keeps the same promises on local folders and on S3; the sharp edges of each side have their own tests."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from genescale.platform.block_reader import BlockReader
from genescale.platform.disk import take_away
from genescale.platform.errors import (
    AlreadyExistsError,
    ForbiddenPathError,
    LimitError,
    NotFoundError,
    StorageError,
)
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store, join

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


def test_every_call_keeps_to_the_allowed_roots(place: tuple[Store, str], tmp_path: Path) -> None:
    store, root = place
    for name in ("in/a", "out/a", "inner/a"):
        store.write(join(root, name), b"1")
    kept = Store(
        dataclasses.replace(store.settings, allowed_roots=(join(root, "in"),)),
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


def test_a_file_that_goes_while_it_is_listed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers of a table put temporary files into its log and take them away while others list it."""
    store, listed = Store(StorageSettings()), os.scandir
    for name in ("kept", "passing"):
        store.write(str(tmp_path / name), b"1")

    def scan(folder: str) -> list[os.DirEntry[str]]:
        entries = list(listed(folder))
        (tmp_path / "passing").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(os, "scandir", scan)
    assert [e.uri for e in store.list(str(tmp_path))] == [str(tmp_path / "kept")]
    store.write(str(tmp_path / "passing"), b"1")
    assert [e.uri for e in store.glob(str(tmp_path / "*"))] == [str(tmp_path / "kept")]


def test_a_write_tells_of_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another writer replaces or removes it at the same moment."""
    store, renamed, after = Store(StorageSettings()), Path.replace, list[Callable[[Path], object]]()
    (source := tmp_path / "source").write_bytes(b"mine")

    def replace(path: Path, target: Path) -> None:
        renamed(path, target)
        after.pop()(target)

    monkeypatch.setattr(Path, "replace", replace)
    uri = str(tmp_path / "a")
    for put in (lambda: store.write(uri, b"mine"), lambda: store.upload(source, uri)):
        for other in (lambda path: path.unlink(), lambda path: path.write_bytes(b"another's")):
            after.append(other)
            assert put().size_bytes == len(b"mine")


def test_a_folder_that_others_delete_too_goes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, unlink = Store(StorageSettings()), os.unlink
    for name in ("a", "b", "deep/c", "deep/d"):
        store.write(str(tmp_path / "folder" / name), b"1")
    gone: list[str] = []

    def raced(path: str, **options: int | None) -> None:
        unlink(path, **options)
        if not gone:
            gone.append(path)
            raise FileNotFoundError(path)

    monkeypatch.setattr(os, "unlink", raced)
    store.delete_folder(str(tmp_path / "folder"))
    assert (bool(gone), (tmp_path / "folder").exists()) == (True, False)


def test_of_a_folder_that_is_taken_away_nobody_finds_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, folder = Store(StorageSettings()), tmp_path / "bundle"
    store.write(str(folder / "a"), b"1")

    def killed(path: Path, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        take_away(folder)
    assert not folder.exists()
    assert store.list(str(tmp_path)) == []


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
