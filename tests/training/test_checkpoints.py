"""Checkpoints: written in the background by several workers, whole or not at all, and never trusted unread."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genescale.platform.errors import IntegrityError, StorageError, TrainingError
from genescale.platform.patience import Patience
from genescale.platform.storage import Store, join
from genescale.training.checkpoint_writer import CheckpointWriter
from genescale.training.checkpoints import Checkpoints
from genescale.training.shards import Snapshot, even_range

QUICK = Patience(total_s=5, first_pause_s=0.05, longest_pause_s=0.1)
WORKERS = 2
WEIGHT = torch.arange(10, dtype=torch.float32)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, str]:
    """A store and the address of a checkpoint folder."""
    if request.param == "local":
        return request.getfixturevalue("local_store"), str(tmp_path / "checkpoints")
    store, bucket = request.getfixturevalue("s3_store")
    return store, f"{bucket}/run/checkpoints"


def writers(store: Any, uri: str, *, attempt: str = "a", keep: int = 2, **options: Any) -> list[CheckpointWriter]:
    options = {"patience": QUICK, **options}
    return [
        CheckpointWriter(store, uri, rank=rank, workers=WORKERS, attempt=attempt, keep=keep, **options)
        for rank in range(WORKERS)
    ]


def share(rank: int, steps: int) -> Snapshot:
    start, stop = even_range(len(WEIGHT), rank, WORKERS)
    snapshot = Snapshot(adam_steps=0, shapes={"layer": (2, 5)})
    snapshot.add("weight", "layer", start, WEIGHT[start:stop] + steps)
    return snapshot


def write(group: list[CheckpointWriter], steps: int, loss: float | None = None) -> None:
    state = {"steps": steps, "held_out": None if loss is None else {"loss": loss, "masked_accuracy": 0.5}}
    for rank, writer in enumerate(group):
        writer.write(f"step_{steps:08d}", state, share(rank, steps))
    for writer in group:
        writer.wait()


def kept(store: Store, uri: str) -> list[str]:
    return sorted({entry.uri.removeprefix(f"{uri}/").split("/")[0] for entry in store.list(uri)} - {"ledger.json"})


def damage(store: Store, uri: str, how: str) -> None:
    """Change one stored file."""
    data = store.read(uri)
    if how == "truncated":
        store.write(uri, data[:-7])
    elif how == "flipped":
        place = len(data) - 3
        store.write(uri, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        store.delete(uri)


def file_of(store: Store, uri: str, steps: int, ending: str) -> str:
    return next(e.uri for e in store.list(join(uri, f"step_{steps:08d}")) if e.uri.endswith(ending))


def test_shares_of_all_workers_come_back_as_one_state(place: tuple[Store, str], tmp_path: Path) -> None:
    store, uri = place
    group = writers(store, uri)
    write(group, 4)
    restored = Checkpoints(store, uri, patience=QUICK).newest_whole(tmp_path)
    assert restored is not None
    assert (restored.name, restored.rejected, restored.state["steps"]) == ("step_00000004", (), 4)
    assert torch.equal(restored.saved.tensor("weight", "layer"), (WEIGHT + 4).reshape(2, 5))
    assert group[0].committed is not None
    assert group[0].committed.steps == 4


def test_the_last_and_the_best_are_kept(place: tuple[Store, str]) -> None:
    store, uri = place
    group = writers(store, uri)
    for steps, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        write(group, steps, loss)
    assert kept(store, uri) == ["step_00000002", "step_00000004", "step_00000005"]
    best = Checkpoints(store, uri).best()
    assert best is not None
    assert (best.steps, best.held_out_loss) == (2, 1.0)
    write(group, 6, 0.5)
    assert kept(store, uri) == ["step_00000005", "step_00000006"]


def test_a_checkpoint_whose_writer_died_before_the_ledger_is_noted_and_stays_the_best(
    place: tuple[Store, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, uri = place
    group, checkpoints = writers(store, uri), Checkpoints(store, uri, patience=QUICK)
    write(group, 4, 3.0)
    with monkeypatch.context() as died:
        died.setattr(Checkpoints, "record", lambda *_: [])
        write(group, 8, 1.0)
    restored = checkpoints.newest_whole(tmp_path)
    assert restored is not None
    assert restored.name == "step_00000008"
    checkpoints.note(restored, keep=1)
    again = writers(store, uri, attempt="b", keep=1)
    for steps in (12, 16):
        write(again, steps, 2.0)
    best = checkpoints.best()
    assert best is not None
    assert (best.steps, best.held_out_loss) == (8, 1.0)
    assert kept(store, uri) == ["step_00000008", "step_00000016"]


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("ending", [".safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over_and_told(
    place: tuple[Store, str], tmp_path: Path, how: str, ending: str
) -> None:
    store, uri = place
    group = writers(store, uri)
    write(group, 4)
    write(group, 8)
    damage(store, file_of(store, uri, 8, ending), how)
    restored = Checkpoints(store, uri, patience=QUICK).newest_whole(tmp_path)
    assert restored is not None
    assert restored.name == "step_00000004"
    assert torch.equal(restored.saved.tensor("weight", "layer").reshape(-1), WEIGHT + 4)
    assert len(restored.rejected) == 1
    assert restored.rejected[0].startswith("step_00000008: ")
    # Whoever goes on from there writes step 8 anew.
    write(writers(store, uri, attempt="b"), 8)
    again = Checkpoints(store, uri, patience=QUICK).newest_whole(tmp_path / "again")
    assert again is not None
    assert (again.name, again.rejected) == ("step_00000008", ())


@pytest.mark.parametrize("ending", [".safetensors", "checkpoint.json"])
def test_with_none_whole_nothing_starts_from_zero(place: tuple[Store, str], tmp_path: Path, ending: str) -> None:
    store, uri = place
    group = writers(store, uri)
    for steps in (4, 8):
        write(group, steps)
    for steps in (4, 8):
        damage(store, file_of(store, uri, steps, ending), "gone")
    with pytest.raises(IntegrityError, match=r"none of the 2 checkpoints is whole.*never goes back"):
        Checkpoints(store, uri, patience=QUICK).newest_whole(tmp_path)


def test_a_damaged_ledger_is_replaced_by_what_is_there_or_stops(place: tuple[Store, str], tmp_path: Path) -> None:
    store, uri = place
    write(writers(store, uri), 4)
    damage(store, join(uri, "ledger.json"), "truncated")
    checkpoints = Checkpoints(store, uri, patience=QUICK)
    restored = checkpoints.newest_whole(tmp_path)
    assert restored is not None
    assert restored.name == "step_00000004"
    store.delete_folder(join(uri, "step_00000004"))
    with pytest.raises(IntegrityError, match="ledger"):
        checkpoints.newest_whole(tmp_path)


def test_what_was_never_committed_does_not_count_and_goes_later(place: tuple[Store, str], tmp_path: Path) -> None:
    store, uri = place
    assert Checkpoints(store, uri, patience=QUICK).newest_whole(tmp_path) is None
    # Worker 1 stored its share of step 4; worker 0 was killed before it could commit.
    lonely = writers(store, uri)[1]
    lonely.write("step_00000004", {"steps": 4}, share(1, 4))
    lonely.wait()
    assert Checkpoints(store, uri, patience=QUICK).newest_whole(tmp_path) is None
    write(writers(store, uri, attempt="b"), 6)
    assert kept(store, uri) == ["step_00000006"]


def test_a_share_of_an_earlier_attempt_is_not_taken_for_this_one(place: tuple[Store, str]) -> None:
    store, uri = place
    lonely = writers(store, uri, attempt="a")[1]
    lonely.write("step_00000004", {"steps": 4}, share(1, 4))
    lonely.wait()
    first = writers(store, uri, attempt="b", patience=Patience(total_s=0.3, first_pause_s=0.1, longest_pause_s=0.1))[0]
    first.write("step_00000004", {"steps": 4}, share(0, 4))
    with pytest.raises(StorageError, match="worker 1 has not stored its share"):
        first.wait()
    assert first.committed is None


class FailingStore:
    """A store whose writes fail until `healthy` is set."""

    def __init__(self, store: Store) -> None:
        self._store, self.healthy, self.refused = store, threading.Event(), 0

    def __getattr__(self, name: str) -> Any:
        if name in ("write", "upload") and not self.healthy.is_set():
            return self.refuse
        return getattr(self._store, name)

    def refuse(self, *arguments: Any, **options: Any) -> None:
        self.refused += 1
        raise StorageError("the bucket does not answer.")


def test_storage_that_is_away_for_a_while_does_not_stop_training(local_store: Store, tmp_path: Path) -> None:
    store, uri = FailingStore(local_store), str(tmp_path / "checkpoints")
    group = writers(store, uri)
    for rank, writer in enumerate(group):
        writer.write("step_00000004", {"steps": 4}, share(rank, 4))
    while store.refused < 4:
        time.sleep(0.01)
    assert group[0].committed is None
    store.healthy.set()
    for writer in group:
        writer.wait()
    restored = Checkpoints(local_store, uri, patience=QUICK).newest_whole(tmp_path)
    assert restored is not None
    assert restored.state["steps"] == 4


def test_storage_that_stays_away_stops_training_at_the_next_checkpoint(local_store: Store, tmp_path: Path) -> None:
    store: Any = FailingStore(local_store)
    writer = writers(store, str(tmp_path), patience=Patience(total_s=0.2, first_pause_s=0.1, longest_pause_s=0.1))[1]
    writer.write("step_00000004", {"steps": 4}, share(1, 4))
    with pytest.raises(StorageError, match="does not answer"):
        writer.write("step_00000008", {"steps": 8}, share(1, 8))


def test_weights_that_are_no_numbers_are_not_stored(local_store: Store, tmp_path: Path) -> None:
    group = writers(local_store, str(tmp_path))
    snapshot = share(0, 4)
    next(iter(snapshot.fragments.values()))[0] = torch.nan
    group[0].write("step_00000004", {"steps": 4}, snapshot)
    with pytest.raises(TrainingError, match="no numbers"):
        group[0].wait()
    assert list(tmp_path.iterdir()) == []


def test_weights_of_one_worker_that_are_no_numbers_stop_them_all_at_once(local_store: Store, tmp_path: Path) -> None:
    """The first worker would else wait for that share as long as it is patient, and blame storage."""
    group = writers(local_store, str(tmp_path), patience=Patience(total_s=0.3, first_pause_s=0.1, longest_pause_s=0.1))
    snapshot = share(1, 4)
    next(iter(snapshot.fragments.values()))[0] = torch.nan
    for writer, held in zip(group, (share(0, 4), snapshot), strict=True):
        writer.write("step_00000004", {"steps": 4}, held)
    for writer in group:
        with pytest.raises(TrainingError, match="weights of step_00000004 hold values that are no numbers"):
            writer.wait()
    assert group[0].committed is None


def test_a_snapshot_is_a_copy(local_store: Store, tmp_path: Path) -> None:
    """Training changes weights in place while they are written."""
    weight = torch.zeros(4)
    snapshot = Snapshot(adam_steps=0, shapes={"w": (4,)})
    snapshot.add("weight", "w", 0, weight)
    weight += 1
    assert snapshot.fragments["weight/w@0"].tolist() == [0, 0, 0, 0]
    assert snapshot.size_bytes == 16


def test_manifests_hold_sizes_and_digests_of_every_shard(local_store: Store, tmp_path: Path) -> None:
    write(writers(local_store, str(tmp_path)), 4)
    manifest = json.loads((tmp_path / "step_00000004" / "checkpoint.json").read_text())
    assert len(manifest["files"]) == WORKERS
    for name, record in manifest["files"].items():
        assert (tmp_path / "step_00000004" / name).stat().st_size == record["size_bytes"]
        assert len(record["sha256"]) == 64
