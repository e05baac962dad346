"""Delete what no version of a corpus names: parts of writers that died or came late, files of sources, shuffle scratch.

A file is deleted only when no commit from the first to the newest names it, it is of a kind that Genescale writes, and
it is older than a grace period, so that an ingest that is running keeps its parts. Files are listed before the commits
are read: what is committed in between is named, and stays.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from typing import Any
from urllib.parse import unquote

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.table.history import named_files
from genescale.platform.errors import SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Entry

DEFAULT_AGE = "24h"
# What Genescale writes into a corpus, apart from the log and the vocabulary; anything else is somebody's own.
_OURS = re.compile(r"(dataset_id=[^/]+|shuffled)/part-[^/]+\.parquet|_genescale/(sources|shuffle)/.+")
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GcReport:
    """What was deleted, or would be; `young` files are named by no version but are within the grace period."""

    uri: str
    deleted: tuple[Entry, ...]
    young: tuple[Entry, ...]
    named: int
    dry_run: bool

    @property
    def size_bytes(self) -> int:
        """Bytes of the deleted files."""
        return sum(entry.size_bytes for entry in self.deleted)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "uri": self.uri,
            "dry_run": self.dry_run,
            "deleted": [{"uri": entry.uri, "size_bytes": entry.size_bytes} for entry in self.deleted],
            "size_bytes": self.size_bytes,
            "young": [entry.uri for entry in self.young],
            "named": self.named,
        }


def collect_garbage(
    corpus: Corpus, *, older_than: datetime.timedelta, dry_run: bool = False, progress: Progress = SILENT
) -> GcReport:
    """Delete files that no version names and that are older than the grace period; CorpusError for a log with gaps."""
    present = {entry.uri.removeprefix(f"{corpus.uri}/"): entry for entry in corpus.store.list(corpus.uri)}
    named = named_files(corpus.uri, corpus.store)
    # Delta Lake writes paths percent-encoded where they hold special characters.
    named |= {unquote(path) for path in named}
    loose = [path for path in sorted(present) if _OURS.fullmatch(path) and path not in named]
    limit = datetime.datetime.now(tz=datetime.UTC) - older_than
    progress.start(len(loose), "files")
    deleted: list[Entry] = []
    young: list[Entry] = []
    filesystem, root = corpus.store.arrow_filesystem(corpus.uri)
    for path in loose:
        # Asked just before it goes: an ingest may write a part of the same name again at any moment. None is unknown.
        written = filesystem.get_file_info(f"{root}/{path}").mtime
        old = written is not None and written <= limit
        (deleted if old else young).append(present[path])
        if old and not dry_run:
            corpus.store.delete(present[path].uri)
        progress.advance()
    return GcReport(
        uri=corpus.uri, deleted=tuple(deleted), young=tuple(young), named=len(named & present.keys()), dry_run=dry_run
    )


def parse_age(text: str) -> datetime.timedelta:
    """A duration such as `24h`, `30m` or `7d`; SettingsError for anything else."""
    match = _AGE.fullmatch(text.strip())
    if not match:
        raise SettingsError(f"'{text}' is not a duration.", where="--older-than", fix="Write 24h, 30m or 7d.")
    return datetime.timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
