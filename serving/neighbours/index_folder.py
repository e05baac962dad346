"""An index as a folder of files: what its manifest says, how it is written whole, and how it is opened and checked.

manifest.json           what the index is of, and the digest of every other file; written last
vectors.faiss           centred unit vectors, row by row
cells.parquet           cell_id, dataset_id and label columns, in the same order
geometry.safetensors    the mean that was taken off, and distances between reference cells
map.safetensors         if there is one: a place in two dimensions for each cell
examples.parquet        if there are any: tokens of a few cells
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from genescale.platform.address import is_remote, join, parse
from genescale.platform.disk import disk_errors, take_away
from genescale.platform.errors import AlreadyExistsError, IntegrityError, NotFoundError
from genescale.platform.log import get_logger
from genescale.platform.settings import StorageSettings, build
from genescale.platform.storage import Store
from genescale.serving.neighbours.vectors import Search
from genescale.serving.schemas import Layer, Pooling

MANIFEST = "manifest.json"
VECTORS, CELLS, GEOMETRY = "vectors.faiss", "cells.parquet", "geometry.safetensors"
FILES = (VECTORS, CELLS, GEOMETRY)
MAP, EXAMPLES = "map.safetensors", "examples.parquet"
OPTIONAL_FILES = (MAP, EXAMPLES)
SCHEMA_VERSION = 1
LARGEST_MANIFEST_BYTES = 1024 * 1024
READ_AT_ONCE = 8 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """What an index is of, and what its files must be."""

    bundle_digest: str
    """The one model whose embeddings can be compared with it."""
    vocabulary_digest: str
    corpus_uri: str
    corpus_version: int
    where: str
    """Which cells of the corpus; empty means all."""
    layer: Layer
    pooling: Pooling
    precision: str
    width: int
    cells: int
    columns: tuple[str, ...]
    search: Search
    max_neighbors: int
    apart: str
    """Column in which compared reference cells differ; empty where every other cell was compared."""
    sampled: int
    """Reference cells whose distances were measured."""
    files: dict[str, str]
    """SHA-256 by file name."""
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """Digest of everything that the index is."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def refuse_finished(uri: str, store: Store) -> None:
    """AlreadyExistsError when the folder holds an index already."""
    if store.exists(join(uri, MANIFEST)):
        raise AlreadyExistsError(
            "the folder holds an index.", where=uri, fix="Choose another output folder, or delete this one."
        )


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of an index in a local folder, by name; IntegrityError when one is not there."""
    return {name: _digest(folder / name) for name in (*FILES, *_optional(folder))}


def publish(folder: Path, manifest: IndexManifest, uri: str, store: Store) -> None:
    """Copy the files of a local folder to `uri`, and the manifest last: without it there is no index."""
    refuse_finished(uri, store)
    for name in manifest.files:
        store.upload(folder / name, join(uri, name))
    store.write(join(uri, MANIFEST), _rendered(manifest), if_absent=True)


def read_index_manifest(uri: str, store: Store) -> IndexManifest:
    """The manifest of an index; NotFoundError where there is none, IntegrityError for one that cannot be read."""
    address = join(uri, MANIFEST)
    try:
        data = store.read(address, max_bytes=LARGEST_MANIFEST_BYTES)
    except NotFoundError:
        raise NotFoundError(
            "there is no index here.", where=uri, fix="Make one with `genescale index`, or check the address."
        ) from None
    return _parsed(data, address)


def opened_folder(uri: str, storage: StorageSettings, cache: Path) -> tuple[Path, IndexManifest]:
    """A local folder with the checked files of the index at `uri`, and its manifest.

    A local index stays where it is; one in object storage is copied into `cache` once. Raises NotFoundError without an
    index and IntegrityError when a file is not what the manifest says.
    """
    store = Store(storage)
    manifest = read_index_manifest(uri, store)
    if not is_remote(uri):
        folder = parse(uri).path
        _verify(folder, manifest.files)
        return folder, manifest
    folder = cache.absolute() / f"index-{manifest.digest}"
    if not _is_kept(folder, manifest):
        _fetch(uri, store, folder, manifest)
    return folder, manifest


def _rendered(manifest: IndexManifest) -> bytes:
    return json.dumps(asdict(manifest), indent=1).encode()


def _parsed(data: bytes, address: str) -> IndexManifest:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise IntegrityError("the manifest is not JSON.", where=address) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise IntegrityError(
            f"the index has format {version!r}, this release reads {SCHEMA_VERSION}.",
            where=address,
            fix="Make it again with `genescale index`, or serve it with the release that made it.",
        )
    manifest = build(IndexManifest, content, where=address)
    if not set(FILES) <= set(manifest.files) <= {*FILES, *OPTIONAL_FILES}:
        raise IntegrityError(
            f"the manifest does not name {', '.join(FILES)}, and at most {', '.join(OPTIONAL_FILES)} beside them.",
            where=address,
        )
    return manifest


def _is_kept(folder: Path, manifest: IndexManifest) -> bool:
    if not folder.is_dir():
        return False
    try:
        _verify(folder, {**manifest.files, MANIFEST: hashlib.sha256(_rendered(manifest)).hexdigest()})
    except IntegrityError as error:
        get_logger(__name__).warning("a cached index is damaged and will be fetched again: %s", error)
        take_away(folder)
        return False
    return True


def _fetch(uri: str, store: Store, folder: Path, manifest: IndexManifest) -> None:
    part = folder.parent / f".{secrets.token_hex(8)}.part"
    with disk_errors(str(folder.parent)):
        part.mkdir(parents=True)
    try:
        for name in manifest.files:
            store.download(join(uri, name), part / name)
        _verify(part, manifest.files)
        # With it the copy is an index of its own: a replica that starts again needs no object storage.
        with disk_errors(str(part)):
            (part / MANIFEST).write_bytes(_rendered(manifest))
        _take_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _optional(folder: Path) -> list[str]:
    return [name for name in OPTIONAL_FILES if (folder / name).exists()]


def _take_place(part: Path, folder: Path) -> None:
    try:
        with disk_errors(str(folder)):
            part.rename(folder)
    except Exception:
        # Another process may have fetched the same index and come first.
        if not folder.is_dir():
            raise


def _verify(folder: Path, files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        if _digest(folder / name) != digest:
            raise IntegrityError(
                "the file is not the one that the index was made with.",
                where=str(folder / name),
                fix="Copy the index again, or make it again with `genescale index`.",
            )


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(READ_AT_ONCE):
                found.update(block)
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}.", where=str(path)) from error
    return found.hexdigest()
