"""Which sources a command means: files, globs, folders and lists become atlases with their tags and own options.

A folder gives its h5ad, loom and 10x files, zarr folders and zips, and Matrix Market triples, however deep; what
belongs to a zarr folder or a triple is never a source of its own. A list is a TOML or CSV file, see `source_lists.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from genescale.ingestion.formats.layouts import (
    MATRIX_NAME,
    Triple,
    combined,
    split_uri,
    triple_entry,
    triples,
    zarr_folders,
)
from genescale.ingestion.opening import is_atlas, stat_source
from genescale.ingestion.source_lists import Item, is_list, read_list
from genescale.platform.address import WILDCARDS, parse
from genescale.platform.errors import AtlasError, NotFoundError, SettingsError
from genescale.platform.log import get_logger
from genescale.platform.storage import Entry, Store

# Endings in a folder that are taken as they are, and those whose content is looked at first.
TAKEN = (".h5ad", ".loom", ".zarr.zip")
LOOKED_AT = (".h5", ".hdf5", ".zip")
DIGEST_BLOCK_BYTES = 8 * 1024 * 1024
_NAMES = "h5ad, zarr, loom, 10x HDF5 or matrix.mtx"
_FIX = "Give a file, a folder, a glob such as 's3://bucket/*.h5ad', or a list (.toml, .csv)."
log = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """One atlas to read: what storage says of it, the options that are its own, and its pinned digest if it has one."""

    entry: Entry
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""

    @property
    def uri(self) -> str:
        """Address of the file, or of the folder of several."""
        return self.entry.uri

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        return self.entry.size_bytes

    @property
    def etag(self) -> str:
        """Tag that changes with the content."""
        return self.entry.etag


@dataclasses.dataclass(frozen=True)
class Sources:
    """Atlases to read, in the order given (by address within a folder or glob), and other files that stood there."""

    files: tuple[SourceSpec, ...]
    ignored: tuple[str, ...]


def find_sources(sources: Sequence[str], store: Store) -> Sources:
    """Atlases behind files, globs, folders and lists (local or s3://), each once.

    A file that is named or matched by a glob is taken whatever its ending. Raises AtlasError when one of them leads to
    nothing, SettingsError when a list is wrong or gives options to an atlas that is named twice.
    """
    items = [item for source in sources for item in _items(source, store)]
    found: dict[str, SourceSpec] = {}
    ignored: dict[str, None] = {}
    for item in items:
        entries, others = expanded(item.uri, store)
        ignored |= dict.fromkeys(others)
        _check_single(item, entries)
        for entry in entries:
            spec = SourceSpec(entry, item.options, item.sha256)
            _check_new(spec, found.get(entry.uri), item)
            found[entry.uri] = spec
    passed_over = sorted(uri for uri in ignored if uri not in found)
    if passed_over:
        log.warning("%d files that are no atlases were passed over", len(passed_over))
    return Sources(tuple(found.values()), tuple(passed_over))


def verify_digest(uri: str, sha256: str, store: Store) -> None:
    """AtlasError that names both digests unless the file has this SHA-256 (hexadecimal); reads all of it."""
    if not _is_file(uri, store):
        raise AtlasError(
            "a sha256 is given, but this source is a folder of several files.",
            where=uri,
            fix="Leave the digest out; the files are pinned by their names, sizes and tags.",
        )
    digest = hashlib.sha256()
    with store.open(uri) as file:
        while block := file.read(DIGEST_BLOCK_BYTES):
            digest.update(block)
    if (actual := digest.hexdigest()) != sha256.lower():
        raise AtlasError(
            f"its SHA-256 is {actual}, but {sha256.lower()} was given for it.",
            where=uri,
            fix="Get the right file, or correct the list of sources.",
        )


def _items(source: str, store: Store) -> list[Item]:
    return read_list(source, store) if is_list(source) else [Item(uri=source)]


def _check_single(item: Item, entries: Sequence[Entry]) -> None:
    """Name and digest belong to one source."""
    for name, given in (("dataset_id", "dataset_id" in item.options), ("sha256", bool(item.sha256))):
        if given and len(entries) > 1:
            raise SettingsError(
                f"one {name} for {len(entries)} atlases behind '{item.uri}'.",
                where=item.where,
                fix="Give each its own entry, or leave it out.",
            )


def _check_new(spec: SourceSpec, known: SourceSpec | None, item: Item) -> None:
    """The same file may be named twice, but not with options of its own: which ones would hold?"""
    if known is not None and (item.where or known.options or known.sha256):
        raise SettingsError(
            f"{spec.uri} is named twice.", where=item.where, fix="Name it once, with the options that it needs."
        )


def expanded(source: str, store: Store) -> tuple[list[Entry], list[str]]:
    """The atlases behind a file, a glob or a folder, sorted by address, and other files that stand in the folder."""
    if WILDCARDS.search(source) and not _is_file(source, store):
        entries, others = _matched(source, store)
    elif _is_file(source, store):
        entries, others = [stat_source(source, store)], []
    else:
        entries, others = in_folder(_below(source, store), store)
    if not entries:
        raise AtlasError(f"no atlas is there ({_NAMES}).", where=source, fix=_FIX)
    return entries, others


def _is_file(source: str, store: Store) -> bool:
    return bool(parse(source).key) and store.exists(source)


def _below(folder: str, store: Store) -> list[Entry]:
    try:
        return store.list(folder)
    except NotFoundError:
        return []


def _matched(pattern: str, store: Store) -> tuple[list[Entry], list[str]]:
    """Files that fit a glob, whatever they are called, and the atlases in the folders that fit it."""
    direct = store.glob(pattern)
    last = split_uri(pattern)[1]
    inside: list[Entry] = []
    # A folder fits no glob of a store, only what is in it; names that files have need no look into folders.
    if last != "**" and not last.lower().endswith((*TAKEN, *LOOKED_AT, ".mtx", ".gz")):
        inside = store.glob(f"{pattern.rstrip('/')}/**")
    groups = _grouped([*direct, *inside])
    named = {entry.uri for entry in direct}
    direct_rest = [entry for entry in groups.rest if entry.uri in named]
    single, others = _single_files([entry for entry in groups.rest if entry.uri not in named], store)
    # A glob may fit only some files of a zarr folder or triple; its tag belongs to all of them.
    matrices = [entry for entry in direct_rest if MATRIX_NAME.fullmatch(split_uri(entry.uri)[1])]
    several = [*groups.zarr, *(triple.matrix.uri for found in groups.triples for triple in found)]
    complete = [stat_source(uri, store) for uri in (*several, *(entry.uri for entry in matrices))]
    return _sorted([*complete, *(entry for entry in direct_rest if entry not in matrices), *single]), others


def in_folder(below: Sequence[Entry], store: Store) -> tuple[list[Entry], list[str]]:
    """The atlases among the files below a folder, and the other files."""
    groups = _grouped(below)
    single, others = _single_files(groups.rest, store)
    zarr = [combined(root, files) for root, files in groups.zarr.items()]
    found = [triple_entry(triple, beside) for beside in groups.triples for triple in beside]
    return _sorted([*zarr, *found, *single]), others


@dataclasses.dataclass(frozen=True)
class _Groups:
    """Files by what they belong to: zarr folders, the triples of each folder, and files that stand alone."""

    zarr: Mapping[str, list[Entry]]
    triples: Sequence[list[Triple]]
    rest: Sequence[Entry]


def _grouped(entries: Sequence[Entry]) -> _Groups:
    zarr: dict[str, list[Entry]] = {root: [] for root in zarr_folders(entries)}
    folders: dict[str, list[Entry]] = {}
    for entry in entries:
        root = next((above for above in _folders_of(entry.uri) if above in zarr), None)
        home = zarr[root] if root is not None else folders.setdefault(split_uri(entry.uri)[0], [])
        home.append(entry)
    found = [triples(files) for files in folders.values()]
    taken = {member.uri for beside in found for triple in beside for member in triple.members}
    return _Groups(zarr, found, [entry for files in folders.values() for entry in files if entry.uri not in taken])


def _folders_of(uri: str) -> Iterable[str]:
    while len(folder := split_uri(uri)[0]) < len(uri):
        yield folder
        uri = folder


def _single_files(entries: Sequence[Entry], store: Store) -> tuple[list[Entry], list[str]]:
    taken: list[Entry] = []
    others: list[Entry] = []
    for entry in entries:
        name = entry.uri.lower()
        wanted = name.endswith(TAKEN) or (name.endswith(LOOKED_AT) and is_atlas(entry, store))
        (taken if wanted else others).append(entry)
    return taken, [entry.uri for entry in others]


def _sorted(entries: Iterable[Entry]) -> list[Entry]:
    return sorted({entry.uri: entry for entry in entries}.values(), key=lambda entry: entry.uri)
