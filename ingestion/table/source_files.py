"""Files that are committed with a source: its report, its quarantine, its genes.

Their names carry a digest of their content, so that a later ingest of the same source never changes what an earlier
version names; the commit records path, size and sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from genescale.platform.errors import CorpusError, IntegrityError, NotFoundError
from genescale.platform.storage import Store, join

SOURCES_FOLDER = "_genescale/sources"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def write_source_files(
    corpus_uri: str, identity: str, files: Mapping[str, bytes], store: Store
) -> dict[str, dict[str, Any]]:
    """Store files of the source with this identity; returns what the commit records: name -> path, size, sha256."""
    records: dict[str, dict[str, Any]] = {}
    for name, data in sorted(files.items()):
        if not _NAME.fullmatch(name):
            raise CorpusError(f"'{name}' cannot name a file of a source.", where=corpus_uri)
        digest = hashlib.sha256(data).hexdigest()
        path = f"{SOURCES_FOLDER}/{identity[:16]}/{digest[:12]}-{name}"
        store.write(join(corpus_uri, path), data)
        records[name] = {"path": path, "size_bytes": len(data), "sha256": digest}
    return records


def read_recorded(corpus_uri: str, record: Mapping[str, Any], store: Store) -> bytes:
    """The content of a file as its commit recorded it; IntegrityError when it is gone or has changed."""
    address = join(corpus_uri, str(record["path"]))
    fix = "Restore it from a copy; the tokens of the source do not depend on it."
    try:
        data = store.read(address)
    except NotFoundError:
        raise IntegrityError("a file that a commit names is gone.", where=address, fix=fix) from None
    if len(data) != record["size_bytes"] or hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise IntegrityError("the file is not what its commit recorded.", where=address, fix=fix)
    return data
