"""Checkpoints of a run: what stands in storage, which of them is whole, and which stay.

    checkpoints/ledger.json                       the committed checkpoints that are kept, and what each measured
    checkpoints/step_00000500/checkpoint.json     state of the run, size and sha256 of every shard; written last
                              shard-…safetensors  one file of each worker (`shards.py`)
                              shard-…json         its receipt: this shard is stored

A checkpoint without `checkpoint.json` was never committed and does not count. One that the ledger names must be whole:
when it is not, the one before it is taken and the reason is told; when none is whole, the run stops.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from genescale.platform.address import parse
from genescale.platform.errors import IntegrityError, NotFoundError
from genescale.platform.log import get_logger
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.storage import Store, is_remote, join
from genescale.training.shards import SavedState

SCHEMA_VERSION = 1
LEDGER, MANIFEST = "ledger.json", "checkpoint.json"
MANIFEST_MAX_BYTES = 64 * 1024 * 1024
Result = TypeVar("Result")
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One stored file of a checkpoint."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the ledger."""

    name: str
    steps: int
    held_out_loss: float | None = None
    """Of exactly these weights; None when they were not measured."""
    order: tuple[float, ...] = ()
    """What the run compares its checkpoints by, the lowest is the best; empty means by the held-out loss."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A checkpoint that was found whole."""

    name: str
    state: Mapping[str, Any]
    """Of the run, as it was given to the writer."""
    saved: SavedState
    rejected: tuple[str, ...]
    """Newer checkpoints that were not whole, with the reason."""


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, store: Store, uri: str, *, patience: Patience = PATIENT) -> None:
        self.uri, self._store, self._patience = parse(uri).uri, store, patience

    def folder(self, name: str) -> str:
        """Address of one checkpoint."""
        return join(self.uri, name)

    def names(self) -> list[str]:
        """Every checkpoint that was committed, oldest first: those of the ledger and those with a manifest."""
        with_manifest = {folder for folder, name in self._files() if name == MANIFEST}
        ledger = self._ledger(tolerant=bool(with_manifest))
        return sorted(with_manifest | {entry.name for entry in ledger})

    def newest_whole(self, scratch: Path) -> Restored | None:
        """The newest checkpoint whose every byte is as recorded; None when none was ever committed.

        scratch: local folder for files from object storage. Raises IntegrityError when none is whole.
        """
        names = self.names()
        rejected: list[str] = []
        for name in reversed(names):
            try:
                return dataclasses.replace(self.fetch(name, scratch), rejected=tuple(rejected))
            except (IntegrityError, NotFoundError) as error:
                log.warning("checkpoint %s cannot be used, the one before it is tried: %s", name, error)
                rejected.append(f"{name}: {error}")
        if not names:
            return None
        raise IntegrityError(
            f"none of the {len(names)} checkpoints is whole. " + " ".join(rejected),
            where=self.uri,
            fix="Restore one of them from a copy, or start a new run under another --name: this one never goes back "
            "to step 0.",
        )

    def fetch(self, name: str, scratch: Path) -> Restored:
        """One checkpoint, checked; IntegrityError or NotFoundError says what is wrong with it."""
        data = self._read(join(self.folder(name), MANIFEST))
        manifest = _parsed(data, where=join(self.folder(name), MANIFEST))
        paths = [self._shard(name, file, Shard(**record), scratch) for file, record in manifest["files"].items()]
        return Restored(name=name, state=manifest["state"], saved=SavedState(sorted(paths)), rejected=())

    def commit(self, entry_name: str, state: Mapping[str, Any], files: Mapping[str, Shard]) -> Entry:
        """Write the manifest that makes a checkpoint count; the entry for the ledger."""
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "state": dict(state),
            "files": {name: dataclasses.asdict(record) for name, record in sorted(files.items())},
        }
        data = json.dumps({**manifest, "seal": _seal(manifest)}, indent=1, sort_keys=True).encode()
        self._write(join(self.folder(entry_name), MANIFEST), data)
        return _entry(entry_name, state)

    def note(self, restored: Restored, keep: int) -> None:
        """Put the checkpoint that a run goes on from into the ledger: whoever committed it may have died before that.

        A damaged ledger stays as it is until the next checkpoint.
        """
        with contextlib.suppress(IntegrityError):
            if restored.name not in {entry.name for entry in self._ledger(tolerant=False)}:
                self.record(_entry(restored.name, restored.state), keep)

    def record(self, entry: Entry, keep: int) -> list[Entry]:
        """Put a checkpoint into the ledger, and remove those that are neither the last `keep` nor the best."""
        # Later entries are of an attempt that went on from a checkpoint which turned out not to be whole.
        entries = [e for e in self._ledger(tolerant=True) if e.steps < entry.steps] + [entry]
        measured = [e for e in entries if e.held_out_loss is not None]
        best = min(measured, key=_rank) if measured else None
        kept = [e for e in entries if e in entries[-keep:] or e is best]
        self._write(join(self.uri, LEDGER), json.dumps([dataclasses.asdict(e) for e in kept], indent=1).encode())
        self._clear(before=entry.name, kept={e.name for e in kept})
        return kept

    def best(self) -> Entry | None:
        """The kept checkpoint with the lowest held-out loss; None when none was measured."""
        measured = [entry for entry in self._ledger(tolerant=False) if entry.held_out_loss is not None]
        return min(measured, key=_rank) if measured else None

    def _clear(self, *, before: str, kept: set[str]) -> None:
        """Remove older checkpoints that are not kept, those that a lost worker left half-written among them."""
        for name in sorted({folder for folder, _ in self._files()} - kept):
            if name < before:
                self._patiently(functools.partial(self._remove, self.folder(name)), f"removing {name}")

    def _remove(self, folder: str) -> None:
        # The manifest first: a checkpoint that is half removed must not look committed.
        self._store.delete(join(folder, MANIFEST))
        self._store.delete_folder(folder)

    def _files(self) -> list[tuple[str, str]]:
        """(checkpoint, file) of everything that is stored."""
        entries = self._patiently(lambda: self._store.list(self.uri), "listing checkpoints")
        parts = [entry.uri.removeprefix(f"{self.uri}/").split("/") for entry in entries]
        return [(part[0], part[1]) for part in parts if len(part) == 2]

    def _ledger(self, *, tolerant: bool) -> list[Entry]:
        """The ledger; when it is damaged, empty if `tolerant` (manifests tell what there is), else IntegrityError."""
        try:
            data = self._read(join(self.uri, LEDGER))
        except NotFoundError:
            return []
        try:
            return sorted((Entry(**entry) for entry in json.loads(data)), key=lambda entry: entry.steps)
        except (ValueError, TypeError) as error:
            if tolerant:
                log.warning("the ledger of checkpoints is damaged and not used: %s", error)
                return []
            raise IntegrityError(
                f"the ledger of checkpoints is damaged: {error}.",
                where=join(self.uri, LEDGER),
                fix="Restore it from a copy, or start a new run under another --name.",
            ) from error

    def _shard(self, checkpoint: str, file: str, record: Shard, scratch: Path) -> Path:
        address = join(self.folder(checkpoint), file)
        path = parse(address).path if not is_remote(address) else scratch / checkpoint / file
        if is_remote(address):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._patiently(lambda: self._store.download(address, path), f"reading {file}")
        elif not path.is_file():
            raise NotFoundError("the shard is gone.", where=address)
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            raise IntegrityError(f"has {size_bytes:,} bytes, {record.size_bytes:,} were written.", where=address)
        with path.open("rb") as source:
            if hashlib.file_digest(source, "sha256").hexdigest() != record.sha256:
                raise IntegrityError("differs from its recorded digest.", where=address)
        return path

    def _read(self, address: str) -> bytes:
        return self._patiently(lambda: self._store.read(address, max_bytes=MANIFEST_MAX_BYTES), f"reading {address}")

    def _write(self, address: str, data: bytes) -> None:
        self._patiently(lambda: self._store.write(address, data), f"writing {address}")

    def _patiently(self, operation: Callable[[], Result], what: str) -> Result:
        return patiently(operation, patience=self._patience, what=what)


def _entry(name: str, state: Mapping[str, Any]) -> Entry:
    measured = state.get("held_out") or {}
    return Entry(
        name=name,
        steps=int(state["steps"]),
        held_out_loss=measured.get("loss"),
        order=tuple(state.get("order") or ()),
    )


def _rank(entry: Entry) -> tuple[tuple[float, ...], int]:
    """Lowest first, of equal ones the newest."""
    loss = float("inf") if entry.held_out_loss is None else entry.held_out_loss
    return tuple(entry.order) or (loss,), -entry.steps


def _seal(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parsed(data: bytes, *, where: str) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
        whole = manifest["seal"] == _seal(manifest) and manifest["schema_version"] == SCHEMA_VERSION
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"is no manifest of a checkpoint: {error}.", where=where) from error
    if not whole:
        raise IntegrityError("its seal is broken, or another release wrote it.", where=where)
    return dict(manifest)
