"""The numbers of one HTTP process: what it was asked, how it answered, how long that took, and how full it is."""

from __future__ import annotations

import platform
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector
from prometheus_client import Counter as Tally

from genescale.platform.errors import DrainingError
from genescale.serving.access.room import Room
from genescale.serving.watching.latencies import class_of
from genescale.serving.watching.noted import PHASES, STAGES, Noted
from genescale.serving.watching.reports import Report, Totals, families_of, process_name

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CELLS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
UNMATCHED, OTHER = "unmatched", "other"
# nginx's code for a caller who left: no answer was sent, so there is none of HTTP's own.
GONE = "499"
# Keys and models come from files and registries that people write; a label must stay bounded whatever they do.
MOST_KEYS, MOST_VERSIONS = 500, 100
Scope = Mapping[str, Any]


class HttpNumbers:
    """Counts what passes one gate. Every label is one of few: routes by template, never by address.

    expected: how many processes of each kind the service should have.
    """

    def __init__(self, app: object, room: Room, expected: Mapping[str, int]) -> None:
        self.process, self.room, self._expected = process_name("http"), room, dict(expected)
        self.registry = CollectorRegistry()
        self.shares: Callable[[], Mapping[tuple[str, str], float]] = dict
        """Share of requests that each version of each model answers now, by name and version; set by whoever knows."""
        self._routes = list(getattr(app, "routes", ()))
        self._keys, self._models = Few(MOST_KEYS), Few(MOST_VERSIONS)
        self._shown: set[tuple[str, str]] = set()
        self._active: set[Noted] = set()
        self._reporting = threading.Lock()
        self._sums: Counter[str] = Counter()
        self._latencies: Counter[int] = Counter()
        self._make_tallies()
        self._make_histograms()
        self._make_gauges()
        ProcessCollector(registry=self.registry)

    def began(self, noted: Noted) -> None:
        """Count a request among those in progress, until it ended."""
        self._active.add(noted)

    def ended(self, scope: Scope, noted: Noted, status: int, seconds: float, *, question: bool) -> None:
        """Count one request; `status` 0 means that its caller left, `question` that it asked for work."""
        self._active.discard(noted)
        route, code = self.route_of(scope), str(status) if status else GONE
        method = scope["method"] if scope["method"] in METHODS else OTHER
        model, of_version = self._models.one_of((noted.model, noted.version), (OTHER, OTHER))
        self.requests.labels(route, method, code, model, of_version).inc()
        self.seconds.labels(route, outcome_of(status, noted.problem)).observe(seconds)
        for phase, spent_s in noted.phases_s.items():
            self.phases.labels(route, phase).observe(spent_s)
        if noted.problem:
            self.refusals.labels(route, noted.problem).inc()
        self.bytes_in.labels(route).inc(noted.bytes_in)
        self.bytes_out.labels(route).inc(noted.bytes_out)
        if noted.cells:
            self.cells.labels(route).observe(noted.cells)
        if noted.tokens:
            self.tokens.labels(route, model, of_version).inc(noted.tokens)
        self._count_key(scope.get("key_id", ""), noted)
        if question:
            self._add_up(noted, status, seconds)

    def route_of(self, scope: Scope) -> str:
        """The template of the route that a request is for (`/v1/jobs/{id}`), or `unmatched`."""
        matched = getattr(scope.get("route"), "path", None)
        if matched:
            return str(matched)
        # Refused before it was routed: by its path alone, whatever the method.
        path = str(scope["path"])
        for route in self._routes:
            pattern: re.Pattern[str] | None = getattr(route, "path_regex", None)
            if pattern is not None and pattern.match(path):
                return str(route.path)
        return UNMATCHED

    def report(self) -> Report:
        """All numbers now; from any thread."""
        # A scrape and the process's own report may come at once.
        with self._reporting:
            self._show_served()
            self._show_stages()
            return Report(
                process=self.process,
                kind="http",
                families=families_of(self.registry),
                totals=Totals(latencies=Counter(self._latencies), versions=_versions(self.shares()), **self._sums),
                expected=self._expected,
            )

    def _show_served(self) -> None:
        now = {self._models.one_of(pair, (OTHER, OTHER)): share for pair, share in self.shares().items()}
        self._shown.update(now)
        for model, of_version in self._shown:
            self.share.labels(model, of_version).set(now.get((model, of_version), 0.0))

    def _show_stages(self) -> None:
        now = Counter(noted.stage for noted in tuple(self._active))
        for stage in STAGES:
            self.stages.labels(stage).set(now[stage])

    def _count_key(self, key_id: str, noted: Noted) -> None:
        if not key_id:
            return
        key = self._keys.one_of(key_id, OTHER)
        self.key_requests.labels(key).inc()
        self.key_tokens.labels(key).inc(noted.tokens)
        if noted.problem:
            self.key_refusals.labels(key, noted.problem).inc()

    def _add_up(self, noted: Noted, status: int, seconds: float) -> None:
        self._sums.update(requests=1, tokens=noted.tokens, cells=noted.cells)
        outcome = outcome_of(status, noted.problem)
        self._sums[outcome] += 1
        if outcome == "answered":
            self._latencies[class_of(seconds)] += 1

    def _make_tallies(self) -> None:
        def tally(name: str, about: str, *labels: str) -> Tally:
            return Tally(f"genescale_{name}", about, labels, registry=self.registry)

        self.requests = tally(
            "requests", "Requests that ended, by answer (499: the caller left).",
            "route", "method", "code", "model", "version",
        )  # fmt: skip
        self.refusals = tally("refusals", "Requests that ended in an error, by its stable code.", "route", "reason")
        self.bytes_in = tally("request_bytes", "Bytes of bodies that arrived.", "route")
        self.bytes_out = tally("response_bytes", "Bytes of bodies that were sent.", "route")
        self.tokens = tally(
            "tokens", "Tokens that requests were let in for, edits included.", "route", "model", "version"
        )
        self.key_requests = tally("key_requests", "Requests by the id of their key.", "key")
        self.key_tokens = tally("key_tokens", "Tokens by the id of the key that asked.", "key")
        self.key_refusals = tally("key_refusals", "Requests of a key that ended in an error.", "key", "reason")

    def _make_histograms(self) -> None:
        def histogram(name: str, about: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"genescale_{name}", about, labels, registry=self.registry, buckets=buckets)

        self.seconds = histogram(
            "request_seconds", "Seconds from a request's arrival to its end.", ("route", "outcome"), SECONDS
        )
        self.phases = histogram(
            "request_phase_seconds", f"Seconds of a request's phases: {', '.join(PHASES)}.", ("route", "phase"), SECONDS
        )
        self.cells = histogram("request_cells", "Cells in a request.", ("route",), CELLS)

    def _make_gauges(self) -> None:
        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"genescale_{name}", about, labels, registry=self.registry)

        room = self.room
        for name, about, read in (
            ("requests_admitted", "Requests that hold a place now.", lambda: room.admitted),
            ("request_places", "Places for requests.", lambda: room.places),
            ("held_bytes", "Bytes of bodies held now.", lambda: room.held_bytes),
            ("held_bytes_limit", "Bytes of bodies that may be held.", lambda: room.max_bytes),
            ("draining", "1 while the process takes no new work.", lambda: room.draining),
        ):
            gauge(name, about).set_function(read)
        self.stages = gauge("requests_in_stage", f"Requests in progress: {', '.join(STAGES)}.", "stage")
        self.ready = gauge("ready", "1 when the model answered the last probe of this process and it takes work.")
        self.share = gauge("model_share", "Share of a model's requests that a version answers.", "model", "version")
        built = gauge("build_info", "What runs; always 1.", "version", "python")
        built.labels(version("genescale"), platform.python_version()).set(1)


class Few:
    """The first `most` distinct values that come; later ones are replaced."""

    def __init__(self, most: int) -> None:
        self.known: dict[Any, None] = {}
        self._most = most

    def one_of(self, value: Any, otherwise: Any) -> Any:
        """`value` when it is among the first, else `otherwise`."""
        if value in self.known or len(self.known) < self._most:
            self.known.setdefault(value)
            return value
        return otherwise


def _versions(shares: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """What is served under each name, in words: `3`, or `3 + 4` while a candidate is tried."""
    served: dict[str, list[str]] = {}
    for name, of_version in shares:
        served.setdefault(name, []).append(of_version)
    return {name: " + ".join(versions) for name, versions in served.items()}


def outcome_of(status: int, problem: str) -> str:
    """What became of a request: `answered`, `refused` (come again), `mistaken` (the caller's), `failed` or `gone`."""
    if not status:
        return "gone"
    if status < 400:
        return "answered"
    if status == 429 or problem == DrainingError.code:
        return "refused"
    return "mistaken" if status < 500 else "failed"
