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

from genescale.ingestion.table.records import CommitRecord
from genescale.platform.errors import CorpusError
from genescale.platform.storage import Entry, Store, join

COMMIT_KEY = "genescale"
MAX_COMMIT_BYTES = 256 * 1024 * 1024
READERS_AT_ONCE = 8
_COMMIT_FILE = re.compile(r"([0-9]{20})\.json")


def read_history(uri: str, store: Store, version: int, *, after: int = -1) -> list[CommitRecord]:
    """Every commit after version `after` up to `version`, newest first.

    Raises CorpusError when one of them cannot be understood.
    """
    commits = [(number, entry) for number, entry in _commits(uri, store) if after < number <= version]
    with ThreadPoolExecutor(READERS_AT_ONCE) as pool:
        records = list(pool.map(lambda commit: _record(commit[0], commit[1].uri, store), commits))
    return sorted(records, key=lambda record: record.version, reverse=True)


def named_files(uri: str, store: Store) -> set[str]:
    """Paths within the corpus of every file that any commit ever added or recorded.

    Raises CorpusError when a commit is missing or cannot be read: what it named would look like garbage.
    """
    commits = _commits(uri, store)
    numbers = [number for number, _ in commits]
    if not numbers or numbers != list(range(len(numbers))):
        raise CorpusError(
            "its log does not hold every commit from the first on, so nobody can say which files are named.",
            where=join(uri, "_delta_log"),
            fix="Restore the missing commits; nothing was deleted.",
        )
    with ThreadPoolExecutor(READERS_AT_ONCE) as pool:
        return set().union(*pool.map(lambda commit: _named_by(commit[1].uri, store), commits))


def _commits(uri: str, store: Store) -> list[tuple[int, Entry]]:
    found = []
    for entry in store.list(join(uri, "_delta_log")):
        if match := _COMMIT_FILE.fullmatch(entry.uri.rpartition("/")[2]):
            found.append((int(match[1]), entry))
    return sorted(found, key=lambda commit: commit[0])


def _named_by(uri: str, store: Store) -> set[str]:
    try:
        lines = _lines(uri, store)
        paths = {line[action]["path"] for line in lines for action in ("add", "remove") if action in line}
        details = json.loads(_info(lines).get(COMMIT_KEY, "{}"))
        return paths | {facts["path"] for facts in details.get("files", {}).values()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorpusError(f"this commit cannot be read: {error}.", where=uri, fix="Restore the file.") from error


def _record(version: int, uri: str, store: Store) -> CommitRecord:
    try:
        entry = _info(_lines(uri, store))
        details = json.loads(entry.get(COMMIT_KEY, "{}"))
        time = datetime.datetime.fromtimestamp(entry.get("timestamp", 0) / 1000, tz=datetime.UTC)
    except (ValueError, TypeError) as error:
        raise CorpusError(f"this commit cannot be read: {error}.", where=uri, fix="Restore the file.") from error
    return CommitRecord(
        version=version,
        time=time,
        operation=details.pop("operation", str(entry.get("operation", "")).lower()),
        dataset_id=details.pop("dataset_id", ""),
        details=details,
    )


def _lines(uri: str, store: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read(uri, max_bytes=MAX_COMMIT_BYTES).splitlines() if line.strip()]


def _info(lines: list[dict[str, Any]]) -> Mapping[str, Any]:
    return next((line["commitInfo"] for line in lines if "commitInfo" in line), {})
