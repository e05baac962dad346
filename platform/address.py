"""Addresses of stored things: how they are written, joined safely, matched and kept within the allowed roots.

An address is `s3://bucket/key`, a path of this machine, or `file:///path`. Everything here is a pure function of texts,
except `parse` and `within`, which ask the disk what a path's symbolic links lead to.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from genescale.platform.errors import ForbiddenPathError, StorageError

REMOTE_PREFIX = "s3://"
# What `fnmatch` treats as special; a part of a pattern without any of these is an ordinary name.
WILDCARDS = re.compile(r"[*?\[]")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored file: its full address, its size in bytes, and a tag that changes when its content does."""

    uri: str
    size_bytes: int
    etag: str


# A name of its own, because a class with a method `list` cannot write the builtin type below it.
Entries = list[Entry]


@dataclasses.dataclass(frozen=True)
class Place:
    """A parsed address: `bucket` and `key` in object storage, or an empty bucket and an absolute path."""

    bucket: str
    key: str

    @property
    def uri(self) -> str:
        """The address in its one canonical spelling."""
        return f"{REMOTE_PREFIX}{self.bucket}/{self.key}".rstrip("/") if self.bucket else self.key

    @property
    def path(self) -> Path:
        """The path of a place on this machine's disk."""
        return Path(self.key)

    def inside(self, key: str) -> Place:
        """Another place of the same bucket or disk."""
        return dataclasses.replace(self, key=key)


def is_remote(uri: str) -> bool:
    """True for an address in object storage, false for a path."""
    return uri.startswith(REMOTE_PREFIX)


def parse(uri: str | os.PathLike[str]) -> Place:
    """Read an address; relative paths and `~/` become absolute, a trailing slash is dropped.

    Raises StorageError for a scheme that is not supported or an empty address, and ForbiddenPathError for a key
    with `.`, `..` or empty parts.
    """
    text = os.fspath(uri)
    if _CONTROL.search(text):
        raise ForbiddenPathError("the address holds a control character.", where=repr(text), fix="Rename the file.")
    if is_remote(text):
        return _parse_remote(text)
    if text.startswith("file://"):
        text = _path_of_file_uri(text)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise StorageError(
            f"'{text.partition('://')[0]}://' is not a supported kind of address.",
            where=shown(text),
            fix="Use s3://bucket/key, a path, or file:///path.",
        )
    if not text:
        raise StorageError("the address is empty.", fix="Give s3://bucket/key or a path.")
    return Place("", _absolute(text))


def _parse_remote(text: str) -> Place:
    bucket, _, key = text.removeprefix(REMOTE_PREFIX).partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise StorageError(f"'{bucket}' is not a bucket name.", where=shown(text), fix="Write s3://bucket/key.")
    key = key.removesuffix("/")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise ForbiddenPathError("the key has an empty, '.' or '..' part.", where=text, fix="Write the key without it.")
    return Place(bucket, key)


def _path_of_file_uri(text: str) -> str:
    split = urlsplit(text)
    if split.netloc not in ("", "localhost"):
        raise StorageError("the address names another machine.", where=text, fix="Write file:///path.")
    return unquote(text.removeprefix("file://").removeprefix(split.netloc))


def _absolute(text: str) -> str:
    # `a/link/..` is the parent of what the link leads to, so a path with `..` can only be read by resolving it. Other
    # paths keep their links: the name of a link (`atlas.h5ad`) says more than the name of the blob behind it.
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    return str(path.resolve() if ".." in path.parts else path.absolute())


def within(place: Place, roots: Sequence[Place]) -> bool:
    """True when `place` is one of `roots` or below one of them, with every symbolic link followed."""
    if place.bucket:
        return any(
            place.bucket == root.bucket and (not root.key or f"{place.key}/".startswith(f"{root.key}/"))
            for root in roots
        )
    actual = place.path.resolve()
    return any(not root.bucket and actual.is_relative_to(root.path.resolve()) for root in roots)


def join(root: str, *parts: str) -> str:
    """Append relative `parts` to `root` so that the result is always below `root`.

    Raises ForbiddenPathError for a part that is empty or absolute, or that holds `.`, `..`, a backslash or a control
    character, in plain writing or percent-encoded any number of times.
    """
    if not root:
        raise ForbiddenPathError("the root to join to is empty.", fix="Give s3://bucket/folder or a folder.")
    for part in parts:
        reason = _why_unsafe(part)
        if reason:
            raise ForbiddenPathError(
                f"{part!r} {reason}, so it may not be joined to an address.",
                where=root,
                fix="Use a plain relative name.",
            )
    head = root if not root.strip("/") else root.rstrip("/") + "/"
    return head + "/".join(part.removesuffix("/") for part in parts) if parts else root


def _why_unsafe(part: str) -> str:
    if "" in part.removesuffix("/").split("/"):
        return "is absolute" if part.startswith("/") else "has an empty part"
    text, decoded = part, unquote(part)
    while True:
        if text.startswith("/"):
            return "is absolute"
        if "\\" in text:
            return "holds a backslash"
        if _CONTROL.search(text):
            return "holds a control character"
        if any(name in (".", "..") for name in text.split("/")):
            return "holds '.' or '..'"
        if decoded == text:
            return ""
        text, decoded = decoded, unquote(decoded)


def split_pattern(key: str) -> tuple[str, tuple[str, ...]]:
    """Cut a pattern into its longest folder without wildcards, and the parts to match below that folder."""
    parts = key.split("/")
    first = next((i for i, part in enumerate(parts) if WILDCARDS.search(part)), len(parts))
    return "/".join(parts[:first]) or ("/" if key.startswith("/") else ""), tuple(parts[first:])


def matches(name: str, patterns: Sequence[str]) -> bool:
    """True when the relative `name` fits: `*`, `?` and `[…]` within one part, `**` for any number of parts."""
    parts = name.split("/")

    @functools.cache
    def fits(i: int, j: int) -> bool:
        if j == len(patterns):
            return i == len(parts)
        if patterns[j] == "**":
            return fits(i, j + 1) or (i < len(parts) and fits(i + 1, j))
        return i < len(parts) and fnmatch.fnmatchcase(parts[i], patterns[j]) and fits(i + 1, j + 1)

    return fits(0, 0)


def shown(uri: str) -> str:
    """The address as it may be printed: without a user name and password."""
    return re.sub(r"://[^/@]*@", "://", uri)
