"""Measurements reach the tracker in order, once, and whatever it does in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from genescale.platform import journal as journals
from genescale.platform.errors import SettingsError, TrackingError
from genescale.platform.journal import Journal
from genescale.platform.patience import Patience

PAUSES = Patience(total_s=60, first_pause_s=0.01, longest_pause_s=0.05)


class MoodyRun:
    """A run whose tracker is away until `back` is set."""

    def __init__(self, *, away: bool = False) -> None:
        self.id, self.refusals = "run", 0
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.times: list[int | None] = []
        self.back = threading.Event()
        if not away:
            self.back.set()

    def log_metric_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]], *, time_ms: int | None = None) -> None:
        if not self.back.is_set():
            self.refusals += 1
            raise TrackingError("cannot connect to MLflow.")
        self.rows += rows
        self.times.append(time_ms)


def journal(run: Any, path: Path, **options: Any) -> Journal:
    return Journal(run, path, pauses=PAUSES, **options)


def test_measurements_arrive_in_order_and_the_file_goes(tmp_path: Path) -> None:
    run, path = MoodyRun(), tmp_path / "deep" / "run.jsonl"
    taken = journal(run, path)
    for step in range(50):
        taken.log_metric_rows([(step, {"loss": step / 2}), (step, {"rate": 1.0})])
    assert taken.close(timeout_s=20) is None
    assert run.rows == [(step, values) for step in range(50) for values in ({"loss": step / 2}, {"rate": 1.0})]
    assert not path.exists()


def test_a_tracker_that_is_away_is_waited_for_without_stopping_anyone(tmp_path: Path) -> None:
    run = MoodyRun(away=True)
    taken = journal(run, tmp_path / "run.jsonl")
    began_ms = int(time.time() * 1000)
    began = time.perf_counter()
    for step in range(20):
        taken.log_metric_rows([(step, {"loss": 1.0})])
    assert time.perf_counter() - began < 5
    taken_ms = int(time.time() * 1000)
    while not run.refusals:
        time.sleep(0.01)
    run.back.set()
    assert taken.close(timeout_s=20) is None
    assert [step for step, _ in run.rows] == list(range(20))
    # They carry the time they were made, not the time they arrived.
    assert all(began_ms <= made_ms <= taken_ms for made_ms in run.times if made_ms is not None)
    assert None not in run.times


def test_what_could_not_be_sent_stays_and_is_sent_by_the_next_journal(tmp_path: Path) -> None:
    run, path = MoodyRun(away=True), tmp_path / "run.jsonl"
    taken = journal(run, path)
    for step in range(1, 6):
        taken.log_metric_rows([(step, {"loss": 0.5, "rate": 2.0})])
    unsent = taken.close(timeout_s=0.1)
    assert unsent is not None
    assert (unsent.rows, unsent.path, unsent.dropped) == (5, path, 0)
    with path.open("a", encoding="utf-8") as file:
        file.write("[17000, [[6, {")  # what a kill in mid-write leaves
    later = MoodyRun()
    taken = journal(later, path, known={"loss": 2})
    taken.log_metric_rows([(7, {"loss": 0.1})])
    assert taken.close(timeout_s=20) is None
    assert [step for step, values in later.rows if "loss" in values] == [3, 4, 5, 7]
    assert [step for step, values in later.rows if "rate" in values] == [1, 2, 3, 4, 5]


def test_a_full_journal_gives_up_the_oldest_and_says_how_many(tmp_path: Path) -> None:
    run, path = MoodyRun(away=True), tmp_path / "run.jsonl"
    taken = journal(run, path, limit_rows=10)
    for step in range(4_000):
        taken.log_metric_rows([(step, {"loss": 1.0})])
    assert path.stat().st_size < 100_000
    run.back.set()
    unsent = taken.close(timeout_s=20)
    assert unsent is not None
    assert (unsent.rows, unsent.dropped) == (0, 4_000 - len(run.rows))
    assert [step for step, _ in run.rows[-10:]] == list(range(3_990, 4_000))
    with pytest.raises(SettingsError, match="limit_rows"):
        journal(run, path, limit_rows=0)


def test_a_kill_while_the_file_is_written_anew_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, line, left = tmp_path / "run.jsonl", journals._line, list[bytes]()
    path.write_text("".join(f'[17000, [[{step}, {{"loss": 0.5}}]]]\n' for step in range(5)))

    def seen(batch: Any) -> str:
        left.append(path.read_bytes())  # what a kill at this moment would leave
        return line(batch)

    with monkeypatch.context() as patch:
        patch.setattr(journals, "_line", seen)
        journal(MoodyRun(away=True), path).close(timeout_s=0)
    for number, content in enumerate(left):
        run, path = MoodyRun(), tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        assert journal(run, path).close(timeout_s=20) is None
        assert [step for step, _ in run.rows] == list(range(5))
