"""The supervisor and its board when another one, a stop or storage comes between two steps."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from genescale.platform.errors import ConflictError, NotFoundError, StorageError
from genescale.platform.settings import Settings
from genescale.serving.jobs.records import Attempt, Ticket, next_attempt
from genescale.serving.jobs.supervising import Supervisor
from tests.serving.jobs_scene import DONE, Scene, ScriptedWork, play, ticket_of
from tests.serving.jobs_side import jobs_config


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(jobs_config(tmp_path, max_queued=3, max_unfinished_per_key=3))


@pytest.mark.parametrize(("held", "left"), [("take", "released"), ("running", "released"), ("succeeded", "succeeded")])
def test_what_is_written_while_a_supervisor_stops_is_not_written_over(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, held: str, left: str
) -> None:
    """An attempt that is taken, a sign of life, or the end of a job, on its way while the stop is asked for."""
    reached, go_on, landed, released = (threading.Event() for _ in range(4))
    take, write = scene.board.take, scene.board.write

    def hold() -> None:
        reached.set()
        go_on.wait(10)

    def held_take(ticket: Ticket, attempt: Attempt) -> bool:
        if held == "take":
            hold()
        taken = take(ticket, attempt)
        landed.set()
        return taken

    def held_write(ticket: Ticket, attempt: Attempt) -> None:
        if held == "running" == attempt.state:
            hold()
        write(ticket, attempt)
        if held == "succeeded" == attempt.state:
            hold()
        (released if attempt.state == "released" else landed).set()

    monkeypatch.setattr(scene.board, "take", held_take)
    monkeypatch.setattr(scene.board, "write", held_write)
    if held == "succeeded":
        scene.runner.at_start = lambda work: work.end(DONE)

    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await asyncio.to_thread(reached.wait, 10)
        landed.clear()
        stopping = asyncio.create_task(supervisor.stop())
        # Time for what must not happen.
        await asyncio.to_thread(released.wait, 0.1)
        go_on.set()
        await stopping
        await asyncio.to_thread(landed.wait, 10)
        assert scene.job(ticket).attempt.state == left  # type: ignore[union-attr]

    play(scene, part)


def test_storage_that_hangs_ends_the_work_before_another_may_begin_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.config = replace(scene.config, lease_s=0.3)
    go_on, write = threading.Event(), scene.board.write
    monkeypatch.setattr(scene.board, "write", lambda *record: (go_on.wait(20), write(*record)))

    async def part(supervisor: Supervisor) -> None:
        await supervisor.accept(ticket_of(), b"{}")
        try:
            await scene.until(lambda: scene.runner.works and scene.runner.works[0].killed)
        finally:
            go_on.set()

    play(scene, part)


def test_a_job_that_ended_after_it_was_lost_is_not_over(scene: Scene) -> None:
    """The one who took it may fall silent as well."""
    scene.config = replace(scene.config, lease_s=0.3)

    def taken_at_once(work: ScriptedWork) -> None:
        if len(scene.runner.works) == 1:
            assert scene.board.take(work.ticket, next_attempt(work.attempt, "rival"))
        work.end(DONE)

    scene.runner.at_start = taken_at_once

    async def part(supervisor: Supervisor) -> None:
        ticket = await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: scene.job(ticket).over)
        assert (scene.job(ticket).attempt.number, len(scene.runner.works)) == (3, 2)  # type: ignore[union-attr]

    play(scene, part)


def test_what_is_wrong_with_one_job_or_one_look_keeps_no_other_waiting(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.config = replace(scene.config, lease_s=0.3)
    old, gone, broken = ticket_of(), ticket_of(), ticket_of()
    for ticket in (old, gone, broken):
        scene.board.create(ticket, b"{}")
    scene.board.store.write(f"{scene.board.uri}/records/{broken.owner}/{broken.id}/attempts/000001.json", b"cut o")
    names, read, failures = scene.board.names, scene.board.ticket, [OSError("no more threads")]

    def listed(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return names(*arguments)

    def deleted_meanwhile(owner: str, job_id: str) -> Ticket | None:
        found = read(owner, job_id)
        if job_id == gone.id:
            scene.board.delete(gone)
        return found

    monkeypatch.setattr(scene.board, "names", listed)
    monkeypatch.setattr(scene.board, "ticket", deleted_meanwhile)

    async def part(supervisor: Supervisor) -> None:
        await scene.until(lambda: scene.runner.works)
        assert scene.runner.works[0].ticket == old

    play(scene, part)


def test_a_job_that_storage_does_not_take_is_not_tried_without_a_pause(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.config = replace(scene.config, heartbeat_s=20.0, lease_s=60.0)
    taken, looks, names = [], [], scene.board.names

    def full(ticket: Ticket, attempt: Attempt) -> bool:
        taken.append(attempt)
        raise StorageError("no space left.")

    monkeypatch.setattr(scene.board, "take", full)
    monkeypatch.setattr(scene.board, "names", lambda: (looks.append(1), names())[1])

    async def part(supervisor: Supervisor) -> None:
        await supervisor.accept(ticket_of(), b"{}")
        await scene.until(lambda: taken)
        for _ in range(3):
            supervisor.wake()
            before = len(looks)
            await scene.until(lambda before=before: len(looks) > before)  # type: ignore[misc]
        assert len(taken) == 1

    play(scene, part)


def test_a_deletion_that_was_cut_off_is_gone_on_with(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.config = replace(scene.config, lease_s=0.3)
    ticket = scene.board.create(ticket_of(idempotency="k"), b"{}")
    scene.board.take(ticket, replace(next_attempt(None, "x"), state="succeeded", ended_s=1.0))
    scene.board.store.write(f"{scene.board.results(ticket.id)}/part", b"data")
    delete, failures = scene.board.store.delete_folder, [StorageError("away.")]

    def cut_off(uri: str) -> None:
        if failures:
            raise failures.pop()
        delete(uri)

    monkeypatch.setattr(scene.board.store, "delete_folder", cut_off)

    async def part(supervisor: Supervisor) -> None:
        await scene.until(lambda: not scene.board.store.list(scene.board.results(ticket.id)))
        await scene.until(lambda: scene.board.repeat_of(ticket) is None)

    play(scene, part)


def test_of_two_questions_under_one_key_at_a_time_the_first_is_the_job(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another supervisor writes the key down between our look at it and our own word."""
    first, second = (ticket_of(idempotency="k", digest=digest) for digest in "ab")
    look = scene.board.repeat_of
    monkeypatch.setattr(scene.board, "repeat_of", lambda ticket: (look(ticket), scene.board._first_of(first))[0])

    async def part(supervisor: Supervisor) -> None:
        with pytest.raises(ConflictError, match="another question"):
            await supervisor.accept(second, b"{}")
        monkeypatch.undo()
        assert scene.board.names() == []
        made = await supervisor.accept(first, b'{"first": 1}')
        assert scene.board.body(made) == b'{"first": 1}'

    play(scene, part)


def test_a_job_that_is_deleted_while_it_is_looked_at_is_not_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gone = (scene.board.create(ticket_of(), b"{}") for _ in range(2))
    for ticket in (kept, gone):
        scene.board.take(ticket, replace(next_attempt(None, "x"), state="succeeded", ended_s=1.0))
    names, read = scene.board.names(), scene.board.ticket

    def deleted_meanwhile(owner: str, job_id: str) -> Ticket | None:
        found = read(owner, job_id)
        scene.board.delete(gone)
        return found

    monkeypatch.setattr(scene.board, "ticket", deleted_meanwhile)
    assert [job.ticket for job in scene.board.jobs(names)] == [kept]
    with pytest.raises(NotFoundError, match="was deleted"):
        scene.board.job(gone)


def test_a_supervisor_is_found_whatever_another_call_finds_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    from genescale.serving.config import ServingConfig
    from genescale.serving.jobs.on_ray import RayDesk

    class Desk(RayDesk):
        """Whenever the supervisor was looked at, another call finds that it does not answer."""

        @property
        def _actor(self) -> Any:
            found, self._known = self._known, None
            return found

        @_actor.setter
        def _actor(self, actor: Any) -> None:
            self._known = actor

    monkeypatch.setattr("genescale.serving.jobs.on_ray.supervisor", lambda *_: "made")
    desk = Desk(ServingConfig(), Settings())
    assert desk._supervisor() == "made"
    desk._actor = "there"
    assert desk._supervisor() == "there"
