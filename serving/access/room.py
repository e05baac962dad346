"""Places for the requests that are worked on, and bytes for the bodies that wait: what does not fit is refused at once.

Refusing early is what keeps memory flat and answers quick under a flood: the model can do no more than it can do, and
whoever waited for it longer than its deadline would have waited for nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from genescale.platform.errors import DrainingError, OverloadedError
from genescale.serving.problems import Problem, RefusedError, retry_headers

SHORTEST_HINT_S = 0.05
# One request in ten of what the mean remembers: it follows a change within a few dozen requests.
NEWEST_SHARE = 0.1


class Room:
    """`places` requests and `max_bytes` of bodies at a time, in one process.

    A refusal's hint is the mean time that the last requests took, at most `retry_after_s`: after that time most
    of those that are inside now have left.
    """

    def __init__(
        self, places: int, max_bytes: int, *, retry_after_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.places, self.max_bytes = places, max_bytes
        self.admitted, self.held_bytes = 0, 0
        self.draining = False
        self._retry_after_s, self._clock = retry_after_s, clock
        self._mean_s: float | None = None

    def check(self) -> None:
        """Raise DrainingError when the service stops, RefusedError with the status 429 when no place is free."""
        self.check_open()
        if self.admitted >= self.places:
            raise self._overloaded("all places for requests are taken.")

    def check_open(self) -> None:
        """Raise DrainingError when the service stops."""
        if self.draining:
            raise DrainingError("the service is stopping and takes no more requests.", fix="Ask again in a moment.")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """One place for the length of the block; raises as `check` does."""
        self.check()
        self.admitted += 1
        began_s = self._clock()
        try:
            yield
        finally:
            self.admitted -= 1
            took_s = self._clock() - began_s
            self._mean_s = took_s if self._mean_s is None else self._mean_s + NEWEST_SHARE * (took_s - self._mean_s)

    @contextlib.contextmanager
    def bytes_held(self) -> Iterator[Callable[[int], None]]:
        """A function to say how many bytes arrived; they are held until the block ends.

        The function raises RefusedError with the status 429 when all bodies together are too many bytes.
        """
        mine = 0

        def hold(n: int) -> None:
            nonlocal mine
            if self.held_bytes + n > self.max_bytes:
                raise self._overloaded("too many large bodies arrive at a time.")
            mine += n
            self.held_bytes += n

        try:
            yield hold
        finally:
            self.held_bytes -= mine

    def _overloaded(self, what: str) -> RefusedError:
        mean_s = self._retry_after_s if self._mean_s is None else self._mean_s
        wait_s = min(self._retry_after_s, max(SHORTEST_HINT_S, mean_s))
        message = f"{what} Try again as `Retry-After-Ms` says."
        headers = retry_headers(wait_s)
        return RefusedError(Problem(status=429, code=OverloadedError.code, message=message, headers=headers))
