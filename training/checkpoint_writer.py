"""Writing checkpoints while training goes on.

A worker copies its share of the state to the host (the only moment that training waits) and hands it to a thread, which
writes the shard, digests it, uploads it and leaves a receipt. The first worker's thread waits for the receipts of all
and then commits. Workers do not talk to each other for this: a collective in a thread would mix with those of training.

Storage that fails is tried again for as long as `Patience` says, while training goes on; the next checkpoint waits for
the one before, and raises what finally stopped it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genescale.platform.errors import NotFoundError, StorageError, TrainingError
from genescale.platform.log import get_logger
from genescale.platform.patience import PATIENT, Patience, patiently
from genescale.platform.storage import Store, join
from genescale.training.checkpoints import Checkpoints, Entry, Shard
from genescale.training.shards import Snapshot

RECEIPT_POLL_S = 0.2
# The receipt of a share that is not stored, because its weights are no numbers.
REFUSED = b"null"
log = get_logger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of one worker in the background, one at a time.

    attempt: a text that all workers of one start share, and no other start has: shards of different starts of the same
    run never mix.
    """

    def __init__(
        self,
        store: Store,
        uri: str,
        *,
        rank: int,
        workers: int,
        attempt: str,
        keep: int,
        patience: Patience = PATIENT,
        on_committed: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self._store, self._checkpoints = store, Checkpoints(store, uri, patience=patience)
        self._rank, self._workers, self._attempt, self._keep = rank, workers, attempt, keep
        self._patience, self._on_committed = patience, on_committed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.committed: Entry | None = None
        """The newest checkpoint that this worker committed; only the first worker commits."""

    def write(self, name: str, state: Mapping[str, Any], snapshot: Snapshot) -> None:
        """Store this worker's share of checkpoint `name`; waits for the write before it and raises its error."""
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(name, state, snapshot), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the last write is done; raises what stopped it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self, name: str, state: Mapping[str, Any], snapshot: Snapshot) -> None:
        try:
            if not snapshot.is_finite():
                self._refuse(name)
            self._store_shard(name, snapshot)
            if self._rank == 0:
                entry = self._checkpoints.commit(name, state, self._receipts(name))
                self._checkpoints.record(entry, self._keep)
                self.committed = entry
                log.info("checkpoint %s is committed", name)
                self._on_committed(entry)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread of training
            self._error = error

    def _refuse(self, name: str) -> None:
        """Leave a receipt that says so, unless the first worker refuses: it would else wait for one."""
        if self._rank:
            _, receipt = self._addresses(name, self._rank)
            self._put(receipt, REFUSED)
        raise _no_numbers(name)

    def _store_shard(self, name: str, snapshot: Snapshot) -> None:
        shard, receipt = self._addresses(name, self._rank)
        with tempfile.TemporaryDirectory(prefix="genescale-checkpoint-") as folder:
            path = Path(folder) / "shard"
            snapshot.write(path)
            with path.open("rb") as file:
                record = Shard(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=path.stat().st_size)
            self._patiently(lambda: self._store.upload(path, shard), f"writing {shard}")
        self._put(receipt, json.dumps(dataclasses.asdict(record)).encode())

    def _receipts(self, name: str) -> dict[str, Shard]:
        """The shards of all workers, once all are stored."""
        found: dict[str, Shard] = {}
        deadline = time.monotonic() + self._patience.total_s
        for rank in range(self._workers):
            shard, receipt = self._addresses(name, rank)
            data = self._receipt(receipt, rank, deadline)
            if data == REFUSED:
                raise _no_numbers(name)
            found[shard.rsplit("/", 1)[1]] = Shard(**json.loads(data))
        return found

    def _receipt(self, address: str, rank: int, deadline: float) -> bytes:
        while True:
            try:
                return self._patiently(lambda: self._store.read(address, max_bytes=4096), f"reading {address}")
            except NotFoundError:
                if time.monotonic() > deadline:
                    raise StorageError(
                        f"worker {rank} has not stored its share after {self._patience.total_s:.0f} s.",
                        where=address,
                        fix="All workers must reach the same storage: a shared folder or s3://.",
                    ) from None
            time.sleep(RECEIPT_POLL_S)

    def _addresses(self, name: str, rank: int) -> tuple[str, str]:
        stem = f"shard-{rank:05d}-of-{self._workers:05d}-{self._attempt}"
        folder = self._checkpoints.folder(name)
        return join(folder, f"{stem}.safetensors"), join(folder, f"{stem}.json")

    def _put(self, address: str, data: bytes) -> None:
        self._patiently(lambda: self._store.write(address, data), f"writing {address}")

    def _patiently(self, operation: Callable[[], Any], what: str) -> Any:
        return patiently(operation, patience=self._patience, what=what)


def _no_numbers(name: str) -> TrainingError:
    return TrainingError(f"the weights of {name} hold values that are no numbers; it is not stored.")
