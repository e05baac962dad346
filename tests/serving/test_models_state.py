"""Which version answers under which name: the ways it may change, and what is kept for a restarted process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genescale.platform.errors import InputError, LimitError, SettingsError
from genescale.platform.settings import Settings
from genescale.serving.models.named import check_sizes, read_named, resolve_all
from genescale.serving.models.record import Record
from genescale.serving.models.state import MOST_BEFORE, ModelsState, ServedName, initial_state
from genescale.serving.release import Release

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle


def release(version: int, *, name: str = "encoder", registered: bool = True) -> Release:
    address = f"models:/{name}/{version}" if registered else f"{name}-{version}"
    return Release(name=name, version=str(version), digest=f"digest-{version}", address=address, folder="")


V1, V2, V3 = (release(number) for number in (1, 2, 3))
BEGUN = ServedName(name="encoder", current=V1)


def test_a_promotion_can_be_taken_back_and_only_as_often_as_there_were_some() -> None:
    after = BEGUN.promoted(V2).promoted(V3)
    assert (after.current, after.before) == (V3, (V1, V2))
    assert after.back().current == V2
    assert after.back().back() == BEGUN
    with pytest.raises(InputError, match="no version before 1"):
        BEGUN.back()


def test_the_same_version_again_is_no_step_to_go_back_over() -> None:
    assert BEGUN.promoted(V1) == BEGUN
    assert BEGUN.with_candidate(V2, 0.5).promoted(V1) == BEGUN


def test_only_so_many_versions_are_remembered() -> None:
    after = BEGUN
    for number in range(2, MOST_BEFORE + 5):
        after = after.promoted(release(number))
    assert len(after.before) == MOST_BEFORE
    assert after.before[-1].version == str(MOST_BEFORE + 3)


def test_a_candidate_leaves_before_a_version_does() -> None:
    tried = BEGUN.promoted(V2).with_candidate(V3, 0.1)
    assert tried.back() == BEGUN.promoted(V2)
    assert tried.promoted(V3).back().current == V2


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        BEGUN.with_candidate(V2, share)


def test_a_candidate_answers_its_share_and_a_request_id_always_gets_the_same_version() -> None:
    tried = BEGUN.with_candidate(V2, 0.3)
    ids = [f"request-{at}" for at in range(4000)]
    drawn = Counter(tried.chosen(one).version for one in ids)
    # Four standard deviations of a fair draw.
    assert abs(drawn["2"] / len(ids) - 0.3) < 4 * (0.3 * 0.7 / len(ids)) ** 0.5
    # Requests that belong together share what stands before a colon.
    assert [tried.chosen(f"{one}:{at}") for at, one in enumerate(ids)] == [tried.chosen(one) for one in ids]
    # A larger share keeps who was with the candidate already.
    more = BEGUN.with_candidate(V2, 0.6)
    assert all(more.chosen(one) == V2 for one in ids if tried.chosen(one) == V2)
    assert {BEGUN.chosen(one) for one in ids} == {V1}


def test_what_is_kept_reads_back_as_it_was() -> None:
    state = initial_state({"encoder": V1, "types": release(4, name="types")})
    changed = state.changed(BEGUN.promoted(V2).with_candidate(V3, 0.25))
    assert ModelsState.from_json(changed.to_json()) == changed
    assert changed.generation == 1
    assert changed.base == state.base
    assert [one.version for one in changed.releases] == ["2", "3", "4"]


def test_another_deployment_is_another_state() -> None:
    assert initial_state({"a": V1}).base == initial_state({"a": V1}).base
    assert len({initial_state({name: one}).base for name in ("a", "b") for one in (V1, V2)}) == 4


def test_versions_are_looked_up_under_the_registered_name() -> None:
    assert ServedName(name="mine", current=V1).registered_name == "encoder"
    assert ServedName(name="mine", current=release(1, registered=False)).registered_name == "mine"


def test_models_of_a_command_line() -> None:
    assert read_named(["models:/encoder@production"]) == "models:/encoder@production"
    assert read_named(["./a=b"]) == "./a=b"
    several = read_named(["first=models:/a@x", "second=s3://bucket/x=y"])
    assert several == {"first": "models:/a@x", "second": "s3://bucket/x=y"}
    assert list(several) == ["first", "second"]  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="no name"):
        read_named(["first=a", "b"])
    with pytest.raises(SettingsError, match="two models"):
        read_named(["first=a", "first=b"])


def test_a_model_that_no_replica_could_hold_is_refused_by_its_name(bundle: Bundle, tmp_path: Path) -> None:
    releases = resolve_all({"first": bundle, "second": str(bundle.folder)}, Settings(), tmp_path)
    assert [one.digest for one in releases.values()] == [bundle.digest] * 2
    size_bytes = bundle.files["model.safetensors"].size_bytes
    check_sizes(releases, size_bytes)
    with pytest.raises(LimitError, match=f"'first' takes {size_bytes:,} bytes"):
        check_sizes(releases, size_bytes - 1)


def test_a_model_without_a_name_has_that_of_its_folder(bundle: Bundle, tmp_path: Path) -> None:
    assert list(resolve_all(bundle, Settings(), tmp_path)) == ["tiny-encoder"]
    with pytest.raises(SettingsError, match="cannot be the name"):
        resolve_all({"a/b": bundle}, Settings(), tmp_path)
    with pytest.raises(SettingsError, match="no model"):
        resolve_all({}, Settings(), tmp_path)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The store of Ray's control service as a dictionary."""
    from ray.experimental import internal_kv

    kept: dict[str, bytes] = {}

    def put(key: str, value: bytes, *, overwrite: bool, namespace: str) -> None:
        kept[key] = value if overwrite else kept.get(key, value)

    def delete(key: str, *, del_by_prefix: bool, namespace: str) -> None:
        assert del_by_prefix
        for one in [one for one in kept if one.startswith(key)]:
            del kept[one]

    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, *, namespace: kept.get(key))
    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_del", delete)
    return kept


def test_a_restarted_process_finds_what_was_rolled_out(kept: dict[str, bytes]) -> None:
    begun = initial_state({"encoder": V1})
    assert Record("one").begin(begun) == begun
    rolled = begun.changed(BEGUN.promoted(V2))
    Record("one").write(rolled)
    # With the same deployment, whichever process it is.
    assert Record("one").begin(begun) == Record("one").current(begun) == rolled
    assert Record("another").current(begun) == begun
    Record("one").clear()
    assert Record("one").current(begun) == begun


@pytest.mark.parametrize("others_began", [False, True])
def test_a_process_that_starts_while_a_rollout_switches_does_not_undo_it(
    kept: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, others_began: bool
) -> None:
    from ray.experimental import internal_kv

    begun, record, get = initial_state({"encoder": V1}), Record("one"), internal_kv._internal_kv_get
    rolled = begun.changed(BEGUN.promoted(V2))
    if others_began:
        record.begin(begun)

    def switched_behind_it(key: str, *, namespace: str) -> bytes | None:
        found = get(key, namespace=namespace)
        record.write(rolled)
        return found

    monkeypatch.setattr(internal_kv, "_internal_kv_get", switched_behind_it)
    record.begin(begun)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", get)
    assert record.current(begun) == rolled


def test_another_deployment_begins_its_own_and_the_first_one_does_not_come_back(kept: dict[str, bytes]) -> None:
    first, second = initial_state({"encoder": V1}), initial_state({"encoder": V3})
    record = Record("one")
    record.begin(first)
    record.write(first.changed(BEGUN.promoted(V2)))
    # A replica of the second deployment only reads; its HTTP side begins.
    assert record.current(second) == second
    record.begin(second)
    # Deployed again on purpose: what had been rolled out then is not what is wanted now.
    assert record.begin(first) == first


def test_how_a_rollout_goes_is_kept_by_name(kept: dict[str, bytes]) -> None:
    record = Record("one")
    assert record.rollout("encoder") is None
    record.tell_rollout("encoder", {"state": "running"})
    assert record.rollout("encoder") == {"state": "running"}
    assert record.rollout("other") is None
