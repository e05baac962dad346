"""What a flood, a kill and a new version do to the service: parts of `serve.py` that look for failed requests."""

from __future__ import annotations

import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from harness import Row, at_most, measured
from serve_load import Sending, Sent, send
from serve_processes import MemoryWatch, kill
from serve_stand import MODEL_SHARE, RECIPE, Bodies, Offline, Stand, random_bundle

from genescale.platform.bundle import Bundle

TIMES_CAPACITY = 4.0
REFUSED_MS, GROWTH_MIB = 50.0, 16.0
FLOODED = ("http", "proxy", "replica")
# Killed this long after the load began, which goes on until everything is back for long enough.
CALM_S, STORM_S, QUICK_STORM_S = 5.0, 45.0, 30.0
BACK_WITHIN_S = 90.0
KILLED = {
    "replica": "the model's process",
    "http": "the HTTP side",
    "proxy": "the proxy",
    "controller": "the controller",
}
CALLERS = 3
MODEL = "bench"


# --- a flood ---------------------------------------------------------------------------------------------------------


def flood(here: Stand) -> Iterator[Row]:
    """Open arrivals at four times what can be answered; who sends does not care what becomes of it."""
    bodies = here.bodies(here.cells(16, around=0.5), 1)
    with here.service() as port:
        calm = send(bodies.load(port, clients=8, seconds=5.0 if here.quick else 10.0))
        rate = TIMES_CAPACITY * calm.ok_n.sum() / calm.span_s
        load = bodies.load(port, mode="open", rate=rate, seconds=10.0 if here.quick else 120.0)
        with MemoryWatch(FLOODED) as memory:
            sent = send(load)
        after = send(bodies.load(port, clients=1, requests=16))
    refused_n = sent.status_n == 429
    refused_ms, took_s = 1e3 * sent.took_s[refused_n], sent.took_s[sent.ok_n]
    note = (
        f"{rate:.0f} requests/s for {load.seconds:.0f} s; the generator used {sent.cpu_share:.1%} of a processor and "
        f"sent {sent.late_ms:.1f} ms late"
    )
    yield measured("Flood: requests sent", len(sent.status_n), "requests", note=note)
    yield measured("  answered", int(sent.ok_n.sum()), "requests", note=f"{sent.ok_n.sum() / sent.span_s:.1f} a second")
    yield measured("  refused with 429", int(refused_n.sum()), "requests")
    lost = int((~sent.ok_n & ~refused_n).sum())
    yield at_most("  neither answered nor refused", lost, "requests", 0, note=str(dict(sent.problems) or ""))
    yield at_most("  time to a refusal, p50", float(np.percentile(refused_ms, 50)), "ms", REFUSED_MS)
    yield at_most("  time to a refusal, p99", float(np.percentile(refused_ms, 99)), "ms", REFUSED_MS)
    yield measured("  time to a refusal, longest", float(refused_ms.max()), "ms")
    yield measured("  time to an answer, p99", float(np.percentile(took_s, 99)), "s")
    for role in FLOODED:
        seen = memory.of(role)
        note = f"peak {seen.peak_mib():.0f} MiB; last third of the flood against the middle third"
        yield at_most(f"  memory of {role} grew by", seen.growth_mib(), "MiB", GROWTH_MIB, note=note)
    yield at_most("  failed of 16 requests afterwards", int((~after.ok_n).sum()), "requests", 0)


# --- kills -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Storm:
    """The same load twice at the same time: callers who try once, and callers with the client's own retries."""

    once: Sent
    retrying: Sent
    began_s: float

    def rows(self, what: str) -> Iterator[Row]:
        failed, tries = int((~self.once.ok_n).sum()), len(self.once.status_n)
        outage = (
            f"longest time without an answer {self.longest_gap_s():.1f} s; {dict(self.once.problems) or 'no problem'}"
        )
        yield measured(f"{what}: failed of {tries} without retries", failed, "requests", note=outage)
        failed, tries = int((~self.retrying.ok_n).sum()), len(self.retrying.status_n)
        note = f"longest wait {self.retrying.took_s.max():.1f} s; {dict(self.retrying.problems) or 'no problem'}"
        yield at_most(f"  failed of {tries} with the client's retries", failed, "requests", 0, note=note)
        yield at_most("  wrong answers", self.once.wrong + self.retrying.wrong, "requests", 0)

    def longest_gap_s(self) -> float:
        """Of the callers who try once, from the storm's begin."""
        ended = np.sort(self.once.ended_n[self.once.ok_n])
        return float(np.diff(ended[ended > self.began_s - 1.0]).max(initial=0.0))


def chaos(here: Stand) -> Iterator[Row]:
    """One process of each kind is killed under load; Ray Serve has to bring it back."""
    bodies, expected = _checked_bodies(here, here.bundle)
    seconds = QUICK_STORM_S if here.quick else STORM_S
    with here.service() as port:
        for role, what in KILLED.items():
            storm = _storm(bodies, port, expected, lambda role=role: kill(role), seconds)
            yield from storm.rows(f"SIGKILL of {what}")
            _wait_until_ready(port)
    if here.quick:
        return
    with here.service(replicas=2, num_cpus=MODEL_SHARE) as port:
        storm = _storm(bodies, port, expected, lambda: kill("replica"), seconds)
        yield from storm.rows("SIGKILL of one of two processes of the model")


def _checked_bodies(here: Stand, *bundles: Bundle) -> tuple[Bodies, str]:
    """Short cells, one a request, and the file with what is right by each of some models."""
    cells = [cell[:128] for cell in here.cells(16)]
    bodies = here.bodies(cells, 1)
    right = []
    for bundle in bundles:
        offline = Offline(bundle, 1)
        right.append(np.stack(offline.vectors(bodies.cells)))
        offline.close()
    expected = str(here.scratch / "expected.npy")
    np.save(expected, np.stack(right))
    return bodies, expected


def _storm(bodies: Bodies, port: int, expected: str, strike: Callable[[], object], seconds: float) -> Storm:
    load = bodies.load(port, mode="retrying", clients=CALLERS, seconds=seconds, expected=expected)
    once, retrying = (Sending(dataclasses.replace(load, attempts=attempts)) for attempts in (1, 8))
    # The generators import the client first.
    time.sleep(CALM_S)
    began_s = time.monotonic()
    strike()
    return Storm(once.result(), retrying.result(), began_s)


def _wait_until_ready(port: int) -> None:
    until = time.monotonic() + BACK_WITHIN_S
    while time.monotonic() < until:
        try:
            if _ask(port, "/readyz")["status"] == "ready":
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the service was not back {BACK_WITHIN_S:.0f} s after a kill.")


# --- a rollout -------------------------------------------------------------------------------------------------------


def rollout(here: Stand) -> Iterator[Row]:
    """Under load another version of the model is rolled out, and then taken back; an answer is right when it is one of
    the two versions' own."""
    from genescale.platform.tracking import open_tracker

    tracker, versions = open_tracker(here.settings), []
    bundles = [random_bundle(RECIPE, here.pool, here.scratch / f"version-{seed}", seed=seed) for seed in (1, 2)]
    for number, bundle in enumerate(bundles, start=1):
        with tracker.run(f"version {number}") as run:
            run.log_folder(bundle.folder, MODEL)
            versions.append(tracker.register(run, MODEL, MODEL))
    bodies, expected = _checked_bodies(here, *bundles)
    took: dict[str, float] = {}

    def there_and_back() -> None:
        for name, asked in (("out", {"version": versions[1].version}), ("back", {"back": True})):
            began = time.monotonic()
            _ask(port, f"/v1/models/{MODEL}/rollout", asked)
            _wait_until_done(port)
            took[name] = time.monotonic() - began

    with here.service(model=f"models:/{MODEL}/{versions[0].version}") as port:
        storm = _storm(bodies, port, expected, there_and_back, QUICK_STORM_S if here.quick else STORM_S)
        answering = _ask(port, f"/v1/models/{MODEL}")["version"]
    yield from storm.rows("Rollout of another version, and back")
    yield measured("  the rollout took", took["out"], "s", note=f"the way back {took['back']:.1f} s")
    yield at_most("  versions away from the first in the end", int(answering) - int(versions[0].version), "", 0)


def _wait_until_done(port: int) -> None:
    until = time.monotonic() + BACK_WITHIN_S
    while time.monotonic() < until:
        facts = _ask(port, f"/v1/models/{MODEL}")["rollout"]
        if facts["state"] == "succeeded":
            return
        if facts["state"] == "failed":
            raise RuntimeError(f"the rollout failed: {facts['message']}")
        time.sleep(0.2)
    raise RuntimeError(f"the rollout took longer than {BACK_WITHIN_S:.0f} s.")


def _ask(port: int, path: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise OSError(f"{path} answered {error.code}: {error.read().decode(errors='replace')}") from error
