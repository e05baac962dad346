"""How much one key may ask: a bucket of requests and a bucket of tokens for each, filled evenly over the minute.

A bucket holds one minute's allowance, so a caller may ask in bursts and still gets no more than its rate in the long
run. A request dearer than a whole bucket is allowed when the bucket is full, and leaves a debt that is paid off first.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator

from genescale.platform.errors import RateLimitedError
from genescale.serving.access.keys import ApiKey
from genescale.serving.problems import Problem, RefusedError, retry_headers
from genescale.serving.watching.noted import note_size

Clock = Callable[[], float]
SECONDS_PER_MINUTE = 60.0
_PAY: contextvars.ContextVar[Callable[[int], None] | None] = contextvars.ContextVar("genescale_pay", default=None)


class Bucket:
    """`per_minute` of something, full at first. Safe to take from by several threads."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._filled_s = per_minute, clock()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Take `amount` and return 0, or take nothing and return the seconds until it could be taken."""
        with self._lock:
            now_s = self._clock()
            gained = (now_s - self._filled_s) * self.per_minute / SECONDS_PER_MINUTE
            self._level, self._filled_s = min(self.per_minute, self._level + gained), now_s
            lacking = min(amount, self.per_minute) - self._level
            # Sums of many small gains end a hair below the whole number that they are.
            if lacking <= 1e-9 * self.per_minute:
                self._level -= amount
                return 0.0
            return lacking * SECONDS_PER_MINUTE / self.per_minute


class Rates:
    """The buckets of all keys in this process, of `processes` that share each key's allowance evenly."""

    def __init__(self, processes: int = 1, clock: Clock = time.monotonic) -> None:
        self._processes, self._clock = processes, clock
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._lock = threading.Lock()

    def take_request(self, key: ApiKey) -> None:
        """Count one request; RefusedError with the status 429 when the key has none left."""
        self._take(key, "requests", key.requests_per_minute, 1)

    def take_tokens(self, key: ApiKey, n_tokens: int) -> None:
        """Count tokens that will go through the model; RefusedError with the status 429 when too few are left."""
        self._take(key, "tokens", key.tokens_per_minute, n_tokens)

    def _take(self, key: ApiKey, what: str, per_minute: int, amount: int) -> None:
        if not per_minute:
            return
        wait_s = self._bucket(key.id, what, per_minute / self._processes).take(amount)
        if wait_s:
            raise RefusedError(
                Problem(
                    status=429,
                    code=RateLimitedError.code,
                    message=f"this key may use {per_minute:,} {what} a minute, and has too few left. Wait as told.",
                    details={"where": what},
                    headers=retry_headers(wait_s),
                )
            )

    def _bucket(self, key_id: str, what: str, per_minute: float) -> Bucket:
        with self._lock:
            bucket = self._buckets.get((key_id, what))
            # Another limit in the keys file begins with a full bucket of its own.
            if bucket is None or bucket.per_minute != per_minute:
                bucket = self._buckets[key_id, what] = Bucket(per_minute, self._clock)
            return bucket


@contextlib.contextmanager
def paid_by(rates: Rates, key: ApiKey | None) -> Iterator[None]:
    """`charge` inside the block, in this task and the threads it asks, is on `key`; None pays nothing."""
    token = _PAY.set(None if key is None else lambda n_tokens: rates.take_tokens(key, n_tokens))
    try:
        yield
    finally:
        _PAY.reset(token)


@contextlib.contextmanager
def free_of_charge() -> Iterator[None]:
    """What is planned inside the block goes through the model some other time, and is on nobody."""
    token = _PAY.set(_nothing)
    try:
        yield
    finally:
        _PAY.reset(token)


def charge(n_tokens: int) -> None:
    """Count what the request of this task will cost; RefusedError with the status 429 when its key has too little."""
    pay = _PAY.get()
    if pay is _nothing:
        return
    if pay is not None:
        pay(n_tokens)
    note_size(tokens=n_tokens)


def _nothing(n_tokens: int) -> None:
    """What those pay who pay nothing."""
