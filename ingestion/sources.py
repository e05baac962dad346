"""Which files a command means: files, globs and folders become a list of atlas files with their tags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from genescale.platform.address import WILDCARDS
from genescale.platform.errors import AtlasError, NotFoundError
from genescale.platform.log import get_logger
from genescale.platform.storage import Entry, Store

ATLAS_SUFFIX = ".h5ad"
log = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Sources:
    """Atlas files to read, sorted by address, and other files that stood in the folders given."""

    files: tuple[Entry, ...]
    ignored: tuple[str, ...]


def find_sources(sources: Sequence[str], store: Store) -> Sources:
    """Atlas files behind files, globs and folders (local or s3://); AtlasError when one of them leads to nothing.

    A file that is named or matched by a glob is taken whatever its ending; a folder gives its `.h5ad` files.
    """
    files: dict[str, Entry] = {}
    ignored: set[str] = set()
    for source in sources:
        for entry in _expanded(source, store, ignored):
            files[entry.uri] = entry
    if ignored - files.keys():
        log.warning("%d files without the ending %s were passed over", len(ignored - files.keys()), ATLAS_SUFFIX)
    return Sources(tuple(files[uri] for uri in sorted(files)), tuple(sorted(ignored - files.keys())))


def _expanded(source: str, store: Store, ignored: set[str]) -> list[Entry]:
    if WILDCARDS.search(source) and not store.exists(source):
        found = store.glob(source)
    elif store.exists(source):
        return [store.stat(source)]
    else:
        below = _below(source, store)
        found = [entry for entry in below if entry.uri.endswith(ATLAS_SUFFIX)]
        ignored.update(entry.uri for entry in below if not entry.uri.endswith(ATLAS_SUFFIX))
    if not found:
        raise AtlasError(
            f"no {ATLAS_SUFFIX} file is there.",
            where=source,
            fix="Give a file, a glob such as 's3://bucket/*.h5ad', or a folder.",
        )
    return found


def _below(folder: str, store: Store) -> list[Entry]:
    try:
        return store.list(folder)
    except NotFoundError:
        return []
