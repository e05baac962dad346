"""The local half of the Store: folders of this machine, with the promises of object storage.

A file appears whole or not at all, folders are made as needed, and a create can be conditional.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from genescale.platform.address import Entries, Entry, Place, matches, split_pattern
from genescale.platform.errors import AlreadyExistsError, ForbiddenPathError, LimitError, NotFoundError, StorageError

# What is being written or removed carries these, and no listing shows it: a kill leaves it there, and it is no content.
_PART_PREFIX, _PART_SUFFIX = ".genescale-", ".part"


class Disk:
    """Files of this machine. Every method takes a Place whose bucket is empty."""

    def read(self, place: Place, max_bytes: int | None) -> bytes:
        """The whole content, at most `max_bytes` of it."""
        with disk_errors(place.uri), place.path.open("rb") as file:
            check_size(place.uri, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()

    def read_range(self, place: Place, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer at the end of the file."""
        with disk_errors(place.uri), place.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self, place: Place) -> BinaryIO:
        """The file, open for reading."""
        with disk_errors(place.uri):
            return place.path.open("rb")

    def write(self, place: Place, data: bytes, if_absent: bool) -> Entry:
        """Store `data`."""
        with disk_errors(place.uri), whole_file(place.path, if_absent=if_absent) as file:
            file.write(data)
            return _written(place.key, file)

    def upload(self, path: Path, place: Place, if_absent: bool) -> Entry:
        """Store a copy of the file `path`."""
        with disk_errors(str(path)), path.open("rb") as source:
            return self._copy(source, place.uri, place.path, if_absent)

    def download(self, place: Place, to: Path, max_bytes: int | None) -> None:
        """Copy the file to `to`."""
        with disk_errors(place.uri), place.path.open("rb") as source:
            check_size(place.uri, os.fstat(source.fileno()).st_size, max_bytes)
            self._copy(source, str(to), to, if_absent=False)

    def stat(self, place: Place) -> Entry:
        """Size and tag of a file; NotFoundError for a folder."""
        with disk_errors(place.uri):
            if place.path.is_dir():
                raise NotFoundError("is a folder, not a file.", where=place.uri, fix="Name a file in it, or list it.")
            return _entry(place.key, place.path.stat())

    def exists(self, place: Place) -> bool:
        """True for a file."""
        with disk_errors(place.uri):
            return place.path.is_file()

    def list(self, place: Place) -> Entries:
        """Every file below a folder, or the one file of that name."""
        with disk_errors(place.uri):
            return _entries([place.key] if place.path.is_file() else _walk(place.key, None))

    def glob(self, place: Place) -> Entries:
        """Every file that fits a pattern."""
        folder, patterns = split_pattern(place.key)
        if not patterns:
            return _entries([place.key]) if self.exists(place) else []
        depth = None if "**" in patterns else len(patterns)
        with disk_errors(place.uri):
            return _entries(p for p in _walk(folder, depth) if matches(os.path.relpath(p, folder), patterns))

    def delete(self, place: Place) -> None:
        """Remove a file if it is there."""
        with disk_errors(place.uri):
            place.path.unlink(missing_ok=True)

    def delete_folder(self, place: Place) -> None:
        """Remove a folder and all it holds."""
        if place.path.resolve() in (Path(place.path.anchor), Path.home().resolve()):
            raise ForbiddenPathError("will not delete this folder as a whole.", where=place.uri, fix="Name one in it.")
        with disk_errors(place.uri), contextlib.suppress(FileNotFoundError):
            # A file that somebody else removes meanwhile stops rmtree in the middle, so: until nothing is there.
            while os.lstat(place.path):
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(place.path)

    def _copy(self, source: BinaryIO, name: str, target: Path, if_absent: bool) -> Entry:
        # Its own translation, so that an error names the side it happened on.
        with disk_errors(name), whole_file(target, if_absent=if_absent) as file:
            shutil.copyfileobj(source, file, 1 << 20)
            return _written(str(target), file)


@contextlib.contextmanager
def whole_file(target: Path, *, if_absent: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the name `target` when the block ends well, and leaves no trace otherwise.

    With `if_absent` the naming is atomic and fails with AlreadyExistsError when the name is taken.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder, because a rename is atomic within one file system only.
    part = target.with_name(f"{_PART_PREFIX}{secrets.token_hex(8)}{_PART_SUFFIX}")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _give_name(part, target, if_absent)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(target.parent)


def take_away(folder: Path) -> None:
    """Remove a folder, if it is there, in one step for all who look: nobody ever finds half of it."""
    aside = folder.with_name(f"{_PART_PREFIX}{secrets.token_hex(8)}{_PART_SUFFIX}")
    with disk_errors(str(folder)), contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _give_name(part: Path, target: Path, if_absent: bool) -> None:
    if not if_absent:
        part.replace(target)
        return
    try:
        # A hard link fails when the name is taken, unlike a rename, and shows the whole file at once.
        os.link(part, target)
    except FileExistsError:
        raise already_exists(str(target)) from None
    except OSError as error:
        raise StorageError(
            f"this file system cannot create a file conditionally ({error.strerror}).",
            where=str(target),
            fix="Choose a folder on a file system with hard links.",
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: str, depth: int | None, above: Sequence[tuple[int, int]] = ()) -> Iterator[str]:
    # Links to folders are followed (atlases are often linked together), but never into a folder we are inside of.
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in entries:
        if entry.name.startswith(_PART_PREFIX) and entry.name.endswith(_PART_SUFFIX):
            continue
        if entry.is_dir():
            if depth is None or depth > 1:
                yield from _walk(entry.path, depth and depth - 1, (*above, identity))
        elif entry.is_file():
            yield entry.path


def _entries(paths: Iterable[str]) -> Entries:
    # A file may go while its folder is listed, as a writer's temporary ones do: then it is no part of the listing.
    entries = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            entries.append(_entry(path, os.stat(path)))
    return entries


def _entry(path: str, status: os.stat_result) -> Entry:
    return Entry(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _written(path: str, file: BinaryIO) -> Entry:
    # Of the open file, because its name may be another writer's a moment later.
    file.flush()
    return _entry(path, os.fstat(file.fileno()))


def check_size(uri: str, size_bytes: int, max_bytes: int | None) -> None:
    """LimitError when a file is larger than `max_bytes`."""
    if max_bytes is not None and size_bytes > max_bytes:
        raise LimitError(
            f"holds {size_bytes:,} bytes, more than the {max_bytes:,} allowed here.",
            where=uri,
            fix="Check that it is the right file.",
        )


def already_exists(uri: str) -> AlreadyExistsError:
    """The error of a conditional create that came second."""
    return AlreadyExistsError("is already there.", where=uri, fix="Choose another name, or read what is there.")


@contextlib.contextmanager
def disk_errors(uri: str) -> Iterator[None]:
    """Turn the OSErrors of the block into the StorageError family, naming `uri`."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError("no such file.", where=uri, fix="Check the path.") from error
    except PermissionError as error:
        raise StorageError("access denied.", where=uri, fix="Check the owner and permissions of this path.") from error
    except IsADirectoryError as error:
        raise NotFoundError("is a folder, not a file.", where=uri, fix="Name a file in it, or list it.") from error
    except OSError as error:
        raise StorageError(f"{error.strerror or error}.", where=uri, fix=_REMEDIES.get(error.errno or 0, "")) from error


_REMEDIES = {
    errno.ENOSPC: "Free some space or choose another folder.",
    errno.EDQUOT: "Free some space or choose another folder.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.ENOTDIR: "One of its parents is a file.",
    errno.EEXIST: "One of its parents is a file.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}
