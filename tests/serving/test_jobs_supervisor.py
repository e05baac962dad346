"""The supervisor: turns, signs of life, what happens when a worker, a supervisor or storage goes away."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from genescale.platform.errors import ConflictError, OverloadedError, StorageError
from genescale.serving.jobs.records import Outcome, Progress, next_attempt
from genescale.serving.jobs.supervising import Supervisor
from tests.serving.jobs_scene import DONE, Scene, ScriptedRunner, ScriptedWork, play, ticket_of
from tests.serving.jobs_side import jobs_config


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(jobs_config(tmp_path, max_queued=3, max_unfinished_per_key=3))


def test_one_job_runs_at_a_time_and_owners_take_turns(scene: Scene) -> None:
    async def part(supervisor: Supervisor) -> None:
        first, second, other = ticket_of(), ticket_of(), ticket_of("key-bo")
        for ticket in (first, second, other):
            await supervisor.accept(ticket, b"{}")
        await scene.until(lambda: len(scene.runner.works) == 1)
        assert [scene.job(one).state for one in (first, second, other)] == ["running", "queued", "queued"]
        scene.runner.works[0].end(DONE)
        await scene.until(lambda: len(scene.runner.works) == 2)
        scene.runner.works[1].end(DONE)
        await scene.until(lambda: len(scene.runner.works) == 3)
        scene.runner.works[2].end(DONE)
        await scene.until(lambda: all(scene.job(one).state == "succeeded" for one in (first, second, other)))
        assert scene.job(first).attempt.files == DONE.files  # type: ignore[union-attr]

    play(scene, part)


def test_owners_share_the_workers(scene: Scene) -> None:
    scene.config = replace(scene.config, workers=2)
    for ticket in (ticket_of(), ticket_of(), ticket_of("key-bo")):
        scene.board.create(ticket, b"{}")

    async def part(supervisor: Supervisor) -> None:
        await scene.until(lambda: len(scene.runner.works) == 2)
        assert {work.ticket.owner for work in scene.runner.works} == {"key-ana", "key-bo"}

    play(scene, part)


def test_too_many_jobs_are_refused(scene: Scene) -> None:
    async def part(supervisor: Supervisor) -> None:
        kept = [ticket_of() for _ in range(3)]
        for ticket in kept:
            await supervisor.accept(ticket, b"{}")
        with pytest.raises(OverloadedError, match="this key has 3 unfinished jobs"):
            await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: len(scene.runner.works) == 1)
        await supervisor.accept(ticket_of("key-bo"), b"{}")
        with pytest.raises(OverloadedError, match="3 jobs are waiting"):
            await supervisor.accept(ticket_of("key-cy"), b"{}")
        assert len(scene.board.names("key-ana")) == 3

    play(scene, part)


def test_a_repeat_needs_no_room_and_another_question_is_a_conflict(scene: Scene) -> None:
    async def part(supervisor: Supervisor) -> None:
        first = await supervisor.accept(ticket_of(idempotency="k", digest="a"), b"{}")
        for _ in range(2):
            await supervisor.accept(ticket_of(), b"{}")
        assert await supervisor.accept(ticket_of(idempotency="k", digest="a"), b"{}") == first
        with pytest.raises(ConflictError, match="another question"):
            await supervisor.accept(ticket_of(idempotency="k", digest="b"), b"{}")

    play(scene, part)


def test_a_repeat_makes_the_job_whose_ticket_was_never_written(scene: Scene) -> None:
    lost = ticket_of(idempotency="k", digest="a")
    scene.board._first_of(lost)

    async def part(supervisor: Supervisor) -> None:
        made = await supervisor.accept(ticket_of(idempotency="k", digest="a"), b"{}")
        assert made.id == lost.id
        await scene.until(lambda: len(scene.runner.works) == 1)

    play(scene, part)


def test_progress_is_written_down_while_it_runs(scene: Scene) -> None:
    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.runner.works)
        scene.runner.works[0].progress = Progress(done=3, total=9, unit="cells", note="soon")
        await scene.until(lambda: scene.job(ticket).attempt.progress.done == 3)  # type: ignore[union-attr]
        attempt = scene.job(ticket).attempt
        assert attempt is not None
        assert (attempt.progress.total, attempt.run_id, attempt.number) == (9, "run-1", 1)

    play(scene, part)


def test_a_worker_that_dies_is_replaced_and_given_up_in_the_end(scene: Scene) -> None:
    scene.runner.at_start = lambda work: work.end(Outcome(state="broken"))

    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.job(ticket).over)
        attempt = scene.job(ticket).attempt
        assert attempt is not None
        assert (attempt.state, len(scene.runner.works)) == ("failed", scene.config.tries)
        assert "died 3 times" in attempt.error["message"]  # type: ignore[index]

    play(scene, part)


def test_a_job_that_gets_further_each_time_is_not_given_up(scene: Scene) -> None:
    def further(work: ScriptedWork) -> None:
        work.progress = Progress(done=len(scene.runner.works), total=9, unit="cells")
        work.end(DONE if len(scene.runner.works) == 6 else Outcome(state="broken"))

    scene.runner.at_start = further

    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.job(ticket).over)
        assert scene.job(ticket).state == "succeeded"

    play(scene, part)


def test_a_job_that_waits_can_be_cancelled(scene: Scene) -> None:
    async def part(supervisor: Supervisor) -> None:
        running, waiting = [await supervisor.accept(ticket_of(), b"{}") for _ in range(2)]
        await scene.until(lambda: scene.runner.works)
        scene.board.ask_to_cancel(waiting)
        assert scene.job(waiting).state == "cancelled"
        supervisor.wake()
        await scene.until(lambda: scene.job(waiting).attempt is not None)
        scene.runner.works[0].end(DONE)
        await scene.until(lambda: scene.job(running).over)
        assert (scene.job(waiting).state, len(scene.runner.works)) == ("cancelled", 1)

    play(scene, part)


@pytest.mark.parametrize("obeys", [True, False])
def test_a_job_that_runs_is_cancelled_by_force_if_need_be(scene: Scene, obeys: bool) -> None:
    scene.runner.at_start = lambda work: setattr(work, "obeys", obeys)

    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.runner.works)
        scene.board.ask_to_cancel(ticket)
        await scene.until(lambda: scene.job(ticket).over)
        assert (scene.job(ticket).state, scene.runner.works[0].cancelled) == ("cancelled", True)

    play(scene, part)


def test_a_job_that_takes_too_long_has_failed(scene: Scene) -> None:
    scene.config = replace(scene.config, max_hours=0.2 / 3_600)

    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.job(ticket).over)
        attempt = scene.job(ticket).attempt
        assert attempt is not None
        assert (attempt.state, attempt.error["code"]) == ("failed", "limit")  # type: ignore[index]

    play(scene, part)


def test_what_a_stopping_supervisor_runs_goes_on_in_the_next_one_at_once(scene: Scene) -> None:
    scene.config = replace(scene.config, lease_s=60.0)
    ticket = ticket_of()

    async def first(supervisor: Supervisor) -> None:
        await supervisor.accept(ticket, b"{}")
        await scene.until(lambda: scene.runner.works)
        scene.runner.works[0].progress = Progress(done=5, total=9)
        await scene.until(lambda: scene.job(ticket).attempt.progress.done == 5)  # type: ignore[union-attr]

    async def second(supervisor: Supervisor) -> None:
        await scene.until(lambda: len(scene.runner.works) == 2)
        attempt = scene.runner.works[1].attempt
        assert (attempt.number, attempt.breaks, attempt.run_id) == (2, 0, "run-1")
        scene.runner.works[1].end(DONE)
        await scene.until(lambda: scene.job(ticket).state == "succeeded")

    play(scene, first)
    assert scene.job(ticket).state == "queued"
    play(scene, second)


def test_a_job_whose_supervisor_fell_silent_goes_on_and_never_twice(scene: Scene) -> None:
    # Longer than a busy machine may stall this process: who stalls for a lease has lost its job, and rightly.
    scene.config = replace(scene.config, lease_s=1.5)
    ticket, others = ticket_of(), ScriptedRunner()
    scene.board.create(ticket, b"{}")
    silent = next_attempt(None, "silent")
    assert scene.board.take(ticket, silent)

    async def part(supervisor: Supervisor) -> None:
        rival = scene.supervisor("two", others)
        running = asyncio.create_task(rival.run())
        for beat in range(1, 8):  # signs of life for longer than a lease
            scene.board.write(ticket, replace(silent, beat=beat))
            await asyncio.sleep(0.25)
        assert not scene.runner.works + others.works
        await scene.until(lambda: scene.runner.works + others.works)
        await asyncio.sleep(scene.config.lease_s)
        assert len(scene.runner.works + others.works) == 1
        assert scene.job(ticket).attempt.number == 2  # type: ignore[union-attr]
        await rival.stop()
        await running

    play(scene, part)


def test_a_job_that_another_took_while_it_waited_is_left_to_it(scene: Scene) -> None:
    scene.config = replace(scene.config, lease_s=60.0)

    async def part(supervisor: Supervisor) -> None:
        first = await supervisor.accept(ticket_of(), b"{}")
        waiting = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.runner.works)
        rivals = next_attempt(None, "rival")
        assert scene.board.take(waiting, rivals)
        scene.runner.works[0].end(DONE)
        await scene.until(lambda: scene.job(first).over)
        await asyncio.sleep(4 * scene.config.heartbeat_s)
        assert [work.ticket.id for work in scene.runner.works] == [first.id]
        assert scene.job(waiting).attempt == rivals
        assert supervisor.numbers.registry.get_sample_value("genescale_jobs_waiting") == 0

    play(scene, part)


def test_a_supervisor_that_lost_its_job_stops_the_work(scene: Scene) -> None:
    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.runner.works)
        taken = replace(next_attempt(scene.board.newest(ticket), "two"), state="succeeded", ended_s=time.time())
        assert scene.board.take(ticket, taken)
        await scene.until(lambda: scene.runner.works[0].killed)
        await asyncio.sleep(4 * scene.config.heartbeat_s)
        assert scene.job(ticket).attempt == taken

    play(scene, part)


def test_storage_that_is_away_for_long_ends_the_work(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.config = replace(scene.config, lease_s=0.3)

    def away(*arguments: Any, **more: Any) -> Any:
        raise StorageError("away.")

    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.runner.works)
        with monkeypatch.context() as patched:
            for name in ("write", "exists", "list"):
                patched.setattr(type(scene.board.store), name, away)
            await scene.until(lambda: scene.runner.works[0].killed)
            scene.runner.at_start = lambda work: work.end(DONE)
        await scene.until(lambda: scene.job(ticket).state == "succeeded")

    play(scene, part)


def test_a_job_that_ended_long_ago_is_deleted_with_its_result(scene: Scene) -> None:
    old, recent = ticket_of(idempotency="k"), ticket_of()
    for ticket, days in ((old, 31), (recent, 29)):
        scene.board.create(ticket, b"{}")
        ended = replace(next_attempt(None, "x"), state="succeeded", ended_s=time.time() - days * 86_400)
        scene.board.take(ticket, ended)
        scene.board.store.write(f"{scene.board.results(ticket.id)}/part", b"data")

    async def part(supervisor: Supervisor) -> None:
        await scene.until(lambda: scene.board.ticket(old.owner, old.id) is None)
        await scene.until(lambda: not scene.board.store.list(scene.board.results(old.id)))

    play(scene, part)
    assert scene.board.names() == [(recent.owner, recent.id)]
    assert scene.board.store.list(scene.board.results(recent.id))
    assert scene.board.repeat_of(old) is None
