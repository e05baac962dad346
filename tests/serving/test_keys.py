"""Keys: the file, its rotation, rates, and `genescale serve keys`."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.platform.cli import main
from genescale.platform.errors import SettingsError, UnauthorizedError
from genescale.platform.settings import Secret
from genescale.serving.access.callers import caller_of, is_loopback
from genescale.serving.access.keys import ApiKey, digest_of, new_key, read_keys, write_keys
from genescale.serving.access.keys_command import expiry
from genescale.serving.access.rates import Bucket, Rates, charge
from genescale.serving.access.ring import KeyRing
from genescale.serving.access.scopes import SCOPES
from genescale.serving.config import ServingConfig
from genescale.serving.gate import Gate
from genescale.serving.problems import RefusedError

Ask = Callable[..., httpx.Response]
DIGEST = "a" * 64


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def made(key: str, key_id: str = "web", **more: Any) -> ApiKey:
    return ApiKey(id=key_id, sha256=digest_of(key.encode()).hex(), **more)


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {key}"}}


async def fine(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_what_is_written_is_read_and_only_its_owner_may(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"keys{suffix}"
    full = made(new_key(), "web-2026", scopes=SCOPES, requests_per_minute=6, tokens_per_minute=10**12,
                expires="2031-01-01T00:00:00+00:00")  # fmt: skip
    for keys in ((full, made(new_key(), "b")), (full,), ()):
        write_keys(path, keys)
        assert read_keys(path) == keys
        assert path.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[keys]]\nid = 'a'\nsha256 = 'short'", "64 hexadecimal"),
        (f"[[keys]]\nid = 'a b'\nsha256 = '{DIGEST}'", "id"),
        (f"[[keys]]\nid = 'a'\nsha256 = '{DIGEST}'\nscopes = ['embedd']", "embed"),
        (f"[[keys]]\nid = 'a'\nsha256 = '{DIGEST}'\nscopes = []", "no scope"),
        (f"[[keys]]\nid = 'a'\nsha256 = '{DIGEST}'\nscope = ['embed']", "scopes"),
        (f"[[keys]]\nid = 'a'\nsha256 = '{DIGEST}'\nrequests_per_minute = -1", "requests_per_minute"),
        (f"[[keys]]\nid = 'a'\nsha256 = '{DIGEST}'\nexpires = '2031-01-01'", "zone"),
        (f"[[keys]]\nid = 'a'\nsha256 = '{DIGEST}'\nexpires = 2031-01-01T00:00:00", "zone"),
        ("[[keys]]\nid = 'a'", "sha256"),
        (f"[[keys]]\nid='a'\nsha256='{DIGEST}'\n[[keys]]\nid='a'\nsha256='{'b' * 64}'", "'a' stands there 2"),
        (f"[[keys]]\nid='a'\nsha256='{DIGEST}'\n[[keys]]\nid='b'\nsha256='{DIGEST}'", "one key stands there 2"),
        ("keys = 5", "list of keys"),
        ("key = []", "list of keys"),
        ("keys = [5]", "table"),
        ("[[keys", "TOML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_keys(path)
    with pytest.raises(SettingsError, match=said):
        KeyRing(file=str(path))


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Gate(fine, ServingConfig(keys_file=str(tmp_path / "none.toml")))


def test_keys_are_rotated_without_a_restart_and_a_broken_file_changes_nothing(
    tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, path = new_key(), new_key(), tmp_path / "keys.toml"
    write_keys(path, [made(old)])
    app, clock, lines = Gate(fine, ServingConfig(keys_file=str(path))), Clock(), io.StringIO()
    app.ring = KeyRing(file=str(path), clock=clock)
    handler = logging.StreamHandler(lines)
    monkeypatch.setattr(logging.getLogger("genescale"), "handlers", [handler])

    def opens(key: str) -> bool:
        clock.now_s += 5
        return ask(app, "GET", "/v1/info", **bearer(key)).status_code == 200

    assert (opens(old), opens(new)) == (True, False)
    write_keys(path, [made(old), made(new, "web-2")])
    assert (opens(old), opens(new)) == (True, True)
    write_keys(path, [made(new, "web-2")])
    assert (opens(old), opens(new)) == (False, True)
    path.write_text("[[keys")
    assert (opens(old), opens(new)) == (False, True)
    path.unlink()
    assert (opens(old), opens(new)) == (False, True)
    assert lines.getvalue().count("stay in force") == 2
    assert str(tmp_path) not in lines.getvalue()
    write_keys(path, [])
    assert (opens(old), opens(new)) == (False, False)


def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a key that was revoked would stay in force until the next change."""
    key, path, clock = new_key(), tmp_path / "keys.toml", Clock()
    write_keys(path, [made(key)])
    ring = KeyRing(file=str(path), clock=clock)
    write_keys(path, [])
    with monkeypatch.context() as patched:
        patched.setattr("genescale.serving.access.ring.read_keys", failing_read)
        clock.now_s += 5
        assert ring.find(key.encode()) is not None
    clock.now_s += 5
    assert ring.find(key.encode()) is None


def failing_read(path: Path) -> None:
    raise SettingsError("the file of keys cannot be read: Too many open files.")


def test_a_link_that_is_turned_to_another_file_is_followed(tmp_path: Path) -> None:
    # As a mounted secret is updated: the file stays, the link to its folder moves.
    old, new, clock = new_key(), new_key(), Clock()
    for name, key in (("v1", old), ("v2", new)):
        (tmp_path / name).mkdir()
        write_keys(tmp_path / name / "keys.toml", [made(key)])
    (tmp_path / "now").symlink_to("v1")
    ring = KeyRing(file=str(tmp_path / "now" / "keys.toml"), clock=clock)
    assert ring.find(old.encode())
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").replace(tmp_path / "now")
    clock.now_s += 5
    assert (ring.find(old.encode()), bool(ring.find(new.encode()))) == (None, True)


def test_an_expired_key_is_told_so(tmp_path: Path) -> None:
    key, path = new_key(), tmp_path / "keys.toml"
    write_keys(path, [made(key, expires="2030-06-01T12:00:00+02:00")])
    ring, ends_s = KeyRing(file=str(path)), datetime(2030, 6, 1, 10, tzinfo=UTC).timestamp()
    scope = {"path": "/v1/info", "headers": [(b"authorization", f"Bearer {key}".encode())]}
    assert caller_of(dict(scope), ring, now=lambda: ends_s - 1)
    with pytest.raises(UnauthorizedError, match="expired"):
        caller_of(dict(scope), ring, now=lambda: ends_s)


def test_requests_beyond_the_rate_are_refused_for_that_key_only_until_the_time_told(tmp_path: Path, ask: Ask) -> None:
    slow, free, path, clock = new_key(), new_key(), tmp_path / "keys.toml", Clock()
    write_keys(path, [made(slow, requests_per_minute=3), made(free, "free")])
    app = Gate(fine, ServingConfig(keys_file=str(path)))
    app.rates = Rates(clock=clock)

    def status(key: str) -> int:
        return ask(app, "POST", "/v1/embeddings", **bearer(key)).status_code

    assert [status(slow) for _ in range(4)] == [200, 200, 200, 429]
    assert [status(free) for _ in range(4)] == [200] * 4
    refused = ask(app, "POST", "/v1/embeddings", **bearer(slow))
    assert refused.json()["error"]["code"] == "rate_limited"
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("20", "20000")
    clock.now_s += 19.9
    assert status(slow) == 429
    clock.now_s += 0.1
    assert [status(slow), status(slow)] == [200, 429]


def test_processes_share_the_rate_of_a_key() -> None:
    clock, key = Clock(), made(new_key(), requests_per_minute=6)
    admitted = 0
    for rates in (Rates(3, clock), Rates(3, clock), Rates(3, clock)):
        for _ in range(6):
            try:
                rates.take_request(key)
                admitted += 1
            except RefusedError as refused:
                assert "6 requests a minute" in str(refused)  # noqa: PT017
    assert admitted == 6


def test_the_tokens_of_a_request_are_charged_to_its_key_before_the_model_works(
    tmp_path: Path, ask: Ask, build: Callable[..., Gate]
) -> None:
    key, path, clock = new_key(), tmp_path / "keys.toml", Clock()
    write_keys(path, [made(key, tokens_per_minute=30)])
    app = Gate(build().app, ServingConfig(keys_file=str(path)))
    app.rates = Rates(clock=clock)
    cell = {"counts": {f"GENE{i}": 1 + i for i in range(8)}}

    def embed(n_cells: int) -> httpx.Response:
        return ask(app, "POST", "/v1/embeddings", json={"cells": [cell] * n_cells}, **bearer(key))

    # Eight genes and two special tokens a cell.
    assert [embed(2).status_code, embed(1).status_code] == [200, 200]
    refused = embed(1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    assert refused.headers["retry-after"] == "20"
    edits = [{"kind": "delete", "genes": ["GENE1"]}]
    perturbed = ask(app, "POST", "/v1/perturbations", json={"cells": [cell], "edits": edits}, **bearer(key))
    assert perturbed.headers["retry-after"] == "40"
    clock.now_s += 20
    assert embed(1).status_code == 200


def test_what_no_key_pays_is_free() -> None:
    charge(10**9)


@settings(max_examples=60, deadline=None)
@given(
    per_minute=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 80)), min_size=1, max_size=40),
)
def test_a_bucket_gives_no_more_than_its_rate_and_says_when_it_will(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket, began_s, spent, dearest = Bucket(per_minute, clock), clock.now_s, 0, 0
    for pause_s, amount in steps:
        clock.now_s += pause_s
        wait_s = bucket.take(amount)
        if wait_s:
            clock.now_s += wait_s * 1.000001
            assert bucket.take(amount) == 0
        spent, dearest = spent + amount, max(dearest, amount)
        # One bucket in advance, or the debt of one dear request.
        allowed = per_minute * (clock.now_s - began_s) / 60 + max(per_minute, dearest)
        assert spent <= allowed * 1.0001 + 1e-6


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.1", False),
     ("example.org", False), ("127.0.0.1.example.org", False)],
)  # fmt: skip
def test_without_keys_the_service_listens_on_this_machine_only(host: str, local: bool) -> None:
    assert is_loopback(host) is local
    if local:
        assert not ServingConfig(host=host).has_keys
    else:
        with pytest.raises(SettingsError, match="without keys"):
            ServingConfig(host=host)
    assert ServingConfig(host=host, keys_file="keys.toml").has_keys
    assert ServingConfig(host=host, api_keys=(Secret("k" * 20),)).has_keys


@pytest.mark.parametrize(("peer", "status"), [("127.0.0.1", 200), ("::1", 200), ("10.1.2.3", 401), ("testclient", 401)])
def test_without_keys_a_caller_from_elsewhere_is_refused_whatever_was_configured(peer: str, status: int) -> None:
    # Behind a proxy of Ray Serve's own, the address in our config is not the one that is listened on.
    async def ask_from(host: str) -> tuple[int, int]:
        transport = httpx.ASGITransport(app=Gate(fine, ServingConfig()), client=(host, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return (await client.get("/v1/info")).status_code, (await client.get("/healthz")).status_code

    assert asyncio.run(ask_from(peer)) == (status, 200)


def test_a_key_is_made_listed_and_revoked_and_is_written_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "keys.toml"

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["serve", "keys", *words, "--file", str(path)])
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, err = run("new", "web", "--scopes", "embed,perturb", "--requests-per-minute", "9", "--expires", "30d")
    key = out.strip()
    assert (code, len(key) > 40, key in err) == (0, True, False)
    (entry,) = read_keys(path)
    assert (entry.id, entry.scopes, entry.requests_per_minute) == ("web", ("embed", "perturb"), 9)
    assert KeyRing(file=str(path)).find(key.encode()) == entry
    assert key not in path.read_text()
    code, out, err = run("new", "web", "--scopes", "embed")
    assert (code, out) == (2, "")
    assert "already" in err
    assert run("new", "ops", "--scopes", "admin")[0] == 0
    listed = run("list")[1] + run("list", "--json")[1]
    assert key not in listed
    assert entry.sha256 not in listed
    assert [one["state"] for one in json.loads(run("list", "--json")[1])] == ["accepted", "accepted"]
    assert "'web'" in run("revoke", "wbe")[2]
    assert run("revoke", "web")[0] == 0
    assert [one.id for one in read_keys(path)] == ["ops"]
    assert KeyRing(file=str(path)).find(key.encode()) is None
    assert list(tmp_path.iterdir()) == [path]


def test_when_a_key_ends_is_said_in_days_dates_or_times() -> None:
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert expiry("", now) == ""
    assert expiry("30d", now) == "2026-03-02T12:00:00+00:00"
    assert expiry("2026-02-01", now) == "2026-02-01T00:00:00+00:00"
    assert expiry("2026-02-01T08:00:00+02:00", now) == "2026-02-01T08:00:00+02:00"
    for bad in ("2026-01-30", "tomorrow", "0d", "2026-02-01T08:00:00", "-3d"):
        with pytest.raises(SettingsError, match="expires"):
            expiry(bad, now)


def test_a_key_shows_its_digest_nowhere() -> None:
    key = made(new_key())
    assert key.sha256 not in repr(key)
    assert dataclasses.replace(key, id="other").digest == key.digest
