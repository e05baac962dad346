"""Addresses: joins never leave their root, patterns, allowed roots and links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from genescale.platform.address import matches, parse
from genescale.platform.errors import (
    ForbiddenPathError,
    StorageError,
)
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store, is_remote, join


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
