"""A rollout step by step: what is asked of whom in which order, and that nothing changes when a step fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from genescale.platform.errors import ServiceError, TrackingError
from genescale.platform.settings import Settings
from genescale.serving.config import ServingConfig
from genescale.serving.models.fleet import begin_rollout, begun
from genescale.serving.models.record import Record
from genescale.serving.models.rollout import Rollout, Wanted
from genescale.serving.models.state import ModelsState, initial_state
from genescale.serving.models.versions import Versions
from genescale.serving.release import Release


def release(version: int, digest: str = "") -> Release:
    address, digest = f"models:/encoder/{version}", digest or f"digest-{version}"
    return Release(name="encoder", version=str(version), digest=digest, address=address, folder="")


V1, V2, V3 = (release(number) for number in (1, 2, 3))


class PretendFleet:
    """A fleet that remembers what it was asked, finds versions by alias, and fails where it is told to."""

    def __init__(self, state: ModelsState) -> None:
        self.state = state
        self.asked: list[tuple[Any, ...]] = []
        self.told: list[dict[str, Any]] = []
        self.registry = {
            "models:/encoder@production": V2,
            "models:/encoder/3": V3,
            "models:/encoder/1": V1,
            "models:/encoder@copy": release(9, V1.digest),
        }
        self.able: dict[str, frozenset[str]] = {}
        self.working = 0
        self.failing = ""

    def current(self) -> ModelsState:
        return self.state

    def resolve(self, address: str) -> Release:
        if address not in self.registry:
            raise TrackingError("there is no such version.", where=address)
        return self.registry[address]

    def hold(self, release: Release, beside: Sequence[str]) -> None:
        self._did("hold", release.version, tuple(beside))

    def prepare(self, release: Release) -> frozenset[str]:
        self._did("prepare", release.version)
        return self.able.get(release.version, frozenset())

    def commit(self, state: ModelsState) -> None:
        self._did("commit")
        self.state = state

    def in_work(self, release: Release) -> int:
        self.working -= self.working > 0
        return self.working

    def leave(self, release: Release, *, unload: bool) -> None:
        self._did("leave", release.version, unload)

    def tell(self, facts: dict[str, Any]) -> None:
        self.told.append(facts)

    def _did(self, what: str, *more: Any) -> None:
        self.asked.append((what, *more))
        if what == self.failing:
            raise ServiceError(f"{what} failed.", where="/private/cache", fix="Mend it.")


def roll(fleet: PretendFleet, **wanted: Any) -> dict[str, Any]:
    asked = Wanted(name="encoder", **wanted)
    Rollout(asked, fleet, begun("an-id", asked), patience_s=0.5, sleep=lambda _: None).run()
    last = fleet.told[-1]
    assert last["id"] == "an-id"
    assert last["finished_at"] >= last["started_at"]
    return last


@pytest.fixture
def fleet() -> PretendFleet:
    return PretendFleet(initial_state({"encoder": V1, "other": release(7)}))


def test_a_version_is_loaded_beside_the_old_one_which_leaves_when_its_work_is_done(fleet: PretendFleet) -> None:
    fleet.working = 3
    last = roll(fleet, alias="production")
    assert (last["state"], last["step"], last["version"]) == ("succeeded", "done", "2")
    assert fleet.asked == [
        ("hold", "2", (V1.digest,)),
        ("prepare", "2"),
        ("prepare", "1"),
        ("commit",),
        ("leave", "1", True),
    ]
    assert fleet.working == 0
    assert [one.current for one in fleet.state.names] == [V2, release(7)]
    assert [one["step"] for one in fleet.told] == ["resolve", "load", "prepare", "switch", "finish", "done"]


@pytest.mark.parametrize("step", ["hold", "prepare", "commit"])
def test_a_step_that_fails_before_the_switch_leaves_everything_as_it_was(fleet: PretendFleet, step: str) -> None:
    before, fleet.failing = fleet.state, step
    last = roll(fleet, alias="production")
    assert (last["state"], last["message"]) == ("failed", f"{step} failed. Mend it.")
    assert fleet.state is before
    assert fleet.asked[-1] == ("leave", "2", True)
    assert "private" not in str(fleet.told)


def test_a_switch_that_was_written_down_counts_whatever_failed_then(
    fleet: PretendFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_and_failed(state: ModelsState) -> None:
        fleet.state = state
        raise RuntimeError("the connection was lost.")

    monkeypatch.setattr(fleet, "commit", written_and_failed)
    last = roll(fleet, alias="production")
    assert (last["state"], last["message"]) == ("succeeded", "version 2 answers every request.")
    assert [one for one in fleet.asked if one[0] == "leave"] == [("leave", "1", True)]


def test_a_rollout_that_could_not_be_begun_leaves_no_process_in_the_way(
    fleet: PretendFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []

    def away(record: Record, name: str, facts: dict[str, Any]) -> None:
        raise ServiceError("away.")

    monkeypatch.setattr("genescale.serving.models.fleet._new_process", lambda *_: "the process")
    monkeypatch.setattr("genescale.serving.models.fleet.ray.kill", killed.append)
    monkeypatch.setattr(Record, "tell_rollout", away)
    with pytest.raises(ServiceError, match="away"):
        begin_rollout(Wanted(name="encoder", version="2"), fleet.state, ServingConfig(), Settings())
    assert killed == ["the process"]


def test_an_http_side_that_makes_a_version_ready_goes_on_answering_while_another_leaves(
    fleet: PretendFleet,
) -> None:
    from genescale.serving.app import Ingress

    making, made = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def make(release: Release) -> Any:
        if release == V2:
            making.set()
            in_time.append(made.wait(10))
        return SimpleNamespace(able=frozenset())

    ingress = Ingress.func_or_class  # type: ignore[attr-defined]
    side = SimpleNamespace(_models=SimpleNamespace(versions=Versions(fleet.state, make)))

    async def both() -> None:
        preparing = asyncio.create_task(ingress.prepare_version(side, V2))
        await asyncio.to_thread(making.wait, 10)
        forgetting = asyncio.create_task(ingress.forget(side, V3))
        await asyncio.sleep(0)
        made.set()
        await asyncio.gather(preparing, forgetting)

    asyncio.run(both())
    assert in_time == [True]


def test_a_version_that_the_registry_does_not_have_costs_nothing(fleet: PretendFleet) -> None:
    last = roll(fleet, alias="nowhere")
    assert (last["state"], last["step"]) == ("failed", "resolve")
    assert "no such version" in last["message"]
    assert fleet.asked == []


def test_a_canary_is_tried_promoted_and_taken_back(fleet: PretendFleet) -> None:
    assert "10.00%" in roll(fleet, alias="production", share=0.1)["message"]
    assert fleet.state.default.releases == (V1, V2)
    assert all(what != "leave" for what, *_ in fleet.asked)
    fleet.asked.clear()
    assert roll(fleet, back=True)["state"] == "succeeded"
    assert fleet.asked == [("commit",), ("leave", "2", True)]
    assert fleet.state.default.releases == (V1,)
    roll(fleet, alias="production", share=0.1)
    fleet.asked.clear()
    assert "every request" in roll(fleet, alias="production")["message"]
    # It is there already: nothing is loaded again.
    assert fleet.asked == [("commit",), ("leave", "1", True)]
    assert fleet.state.default.releases == (V2,)


def test_another_candidate_takes_the_place_of_the_first(fleet: PretendFleet) -> None:
    roll(fleet, alias="production", share=0.1)
    roll(fleet, version="3", share=0.2)
    assert fleet.state.default.releases == (V1, V3)
    assert fleet.asked[-1] == ("leave", "2", True)


def test_the_way_back_loads_the_version_before(fleet: PretendFleet) -> None:
    roll(fleet, alias="production")
    fleet.asked.clear()
    assert roll(fleet, back=True)["message"] == "version 1 answers every request."
    assert fleet.asked[0] == ("hold", "1", (V2.digest,))
    assert fleet.asked[-1] == ("leave", "2", True)
    assert (fleet.state.default.current, fleet.state.default.before) == (V1, ())
    assert "no version before" in roll(fleet, back=True)["message"]


def test_what_answers_already_is_not_rolled_out_again(fleet: PretendFleet) -> None:
    last = roll(fleet, version="1")
    assert (last["state"], last["message"]) == ("succeeded", "version 1 answers already.")
    assert fleet.asked == []
    assert "already" in roll(fleet, version="1", share=0.5)["message"]
    assert fleet.told[-1]["state"] == "failed"


def test_the_same_bytes_under_another_version_stay_loaded(fleet: PretendFleet) -> None:
    roll(fleet, alias="copy")
    assert fleet.state.default.current.version == "9"
    assert fleet.asked[-1] == ("leave", "1", False)


def test_a_version_that_can_do_less_needs_to_be_wanted(fleet: PretendFleet) -> None:
    fleet.able = {"1": frozenset({"the head 'cell_type'", "neighbours in the reference"}), "2": frozenset()}
    last = roll(fleet, alias="production")
    assert last["state"] == "failed"
    assert "neighbours in the reference, the head 'cell_type'; version 2 cannot" in last["message"]
    assert fleet.asked[-1] == ("leave", "2", True)
    assert roll(fleet, alias="production", accept_losses=True)["state"] == "succeeded"


def test_a_fault_is_told_by_its_kind_alone(fleet: PretendFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no space left on /private/disk")

    monkeypatch.setattr(fleet, "hold", broken)
    last = roll(fleet, alias="production")
    assert last["state"] == "failed"
    assert "RuntimeError" in last["message"]
    assert "private" not in last["message"]
