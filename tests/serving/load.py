"""Callers that ask without a pause while a test changes what answers them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from genescale.client import EmbeddingsAnswer, GenescaleClient
from genescale.platform.errors import GenescaleError

WAIT_S = 60.0


@dataclass(kw_only=True)
class Load:
    """Callers that ask for the embedding of one cell again and again, and never try the same question twice."""

    url: str
    cell: Mapping[str, float]
    key: str | None = None
    callers: int = 2
    seen: list[tuple[float, EmbeddingsAnswer]] = field(default_factory=list)
    """Answers in the order in which they came, each with its moment on the monotonic clock."""
    failures: list[GenescaleError] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self.threads = [threading.Thread(target=self._ask) for _ in range(self.callers)]
        for one in self.threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for one in self.threads:
            one.join()

    @property
    def versions(self) -> list[tuple[float, str]]:
        """What gave each answer, with the answer's moment."""
        return [(at_s, answer.model.version) for at_s, answer in list(self.seen)]

    def wait_for(self, n: int) -> None:
        """Until there are `n` more answers."""
        until, before_s = len(self.seen) + n, time.monotonic() + WAIT_S
        while len(self.seen) < until:
            assert time.monotonic() < before_s, self.failures
            time.sleep(0.05)

    def next_versions(self, n: int) -> set[str]:
        """What gave the next `n` answers, without those that were asked for before."""
        seen = len(self.seen)
        self.wait_for(n)
        return {version for _, version in self.versions[seen + self.callers :]}

    def _ask(self) -> None:
        with GenescaleClient(self.url, api_key=self.key, attempts=1) as client:
            while not self.done.is_set():
                try:
                    answer = client.embeddings([self.cell])
                except GenescaleError as error:
                    self.failures.append(error)
                else:
                    self.seen.append((time.monotonic(), answer))
