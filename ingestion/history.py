"""The history of a corpus, read from the commits of its Delta log.

The commits are read here, as files, rather than by the Delta library: its own `history` blocks every Python thread of
the process while it waits for the network.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from genescale.ingestion.records import CommitRecord
from genescale.platform.errors import CorpusError
from genescale.platform.storage import Entry, Store, join

COMMIT_KEY = "genescale"
MAX_COMMIT_BYTES = 256 * 1024 * 1024
READERS_AT_ONCE = 8
_COMMIT_FILE = re.compile(r"([0-9]{20})\.json")


def read_history(uri: str, store: Store, version: int) -> list[CommitRecord]:
    """Every commit up to `version`, newest first; CorpusError when one of them cannot be understood."""
    commits: list[tuple[int, Entry]] = []
    for entry in store.list(join(uri, "_delta_log")):
        match = _COMMIT_FILE.fullmatch(entry.uri.rpartition("/")[2])
        if match and int(match[1]) <= version:
            commits.append((int(match[1]), entry))
    with ThreadPoolExecutor(READERS_AT_ONCE) as pool:
        records = list(pool.map(lambda commit: _record(commit[0], commit[1].uri, store), commits))
    return sorted(records, key=lambda record: record.version, reverse=True)


def _record(version: int, uri: str, store: Store) -> CommitRecord:
    try:
        lines = [json.loads(line) for line in store.read(uri, max_bytes=MAX_COMMIT_BYTES).splitlines() if line.strip()]
        entry: Mapping[str, Any] = next((line["commitInfo"] for line in lines if "commitInfo" in line), {})
        details = json.loads(entry.get(COMMIT_KEY, "{}"))
        time = datetime.datetime.fromtimestamp(entry.get("timestamp", 0) / 1000, tz=datetime.UTC)
    except (ValueError, TypeError) as error:
        raise CorpusError(f"this commit cannot be read: {error}.", where=uri) from error
    return CommitRecord(
        version=version,
        time=time,
        operation=details.pop("operation", str(entry.get("operation", "")).lower()),
        dataset_id=details.pop("dataset_id", ""),
        details=details,
    )
