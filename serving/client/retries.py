"""When a question is asked again, and after how long: decided here, waited for by the clients.

Every question is a pure function of its input, so asking twice costs time and changes nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import httpx

from genescale.client.failures import asked_wait_s, error_of, worth_another_try
from genescale.platform.errors import DeadlineError, InputError, OverloadedError, ServiceError, SettingsError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
# A key's rate is counted by the minute; who asks for a longer pause is not merely busy, and the caller should know.
LONGEST_ASKED_S = 60.0
Outcome = httpx.Response | httpx.RequestError


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often a question is tried: waits double from 0.25 s to 8 s, each cut by a random part.

    Eight tries outlast the restart of a replica or a proxy (about 18 s together).
    """

    attempts: int = 8

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise SettingsError(f"attempts is {self.attempts}.", where="client", fix="Use 1 or more.")

    def wait_s(self, outcome: Outcome, attempt: int, *, where: str, jitter: random.Random) -> float | None:
        """Seconds until the next try, None when `outcome` is an answer; raises what ends the question.

        `attempt` counts from 1.
        """
        if isinstance(outcome, httpx.RequestError):
            return self._after_no_response(outcome, attempt, where, jitter)
        if outcome.is_success or outcome.has_redirect_location:
            return None
        asked_s = asked_wait_s(outcome)
        if attempt >= self.attempts or not worth_another_try(outcome):
            raise error_of(outcome)
        if asked_s > LONGEST_ASKED_S:
            raise _too_long(outcome, asked_s)
        # On top of what was asked for: callers that were refused together must not come back together.
        return asked_s + _backoff_s(attempt, jitter)

    def _after_no_response(self, error: httpx.RequestError, attempt: int, where: str, jitter: random.Random) -> float:
        if isinstance(error, httpx.UnsupportedProtocol):
            raise InputError(f"the service's address cannot be used: {error}", where="base_url") from error
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            raise DeadlineError(
                "the service did not answer in time.", where=where, fix="Ask for less, or allow a longer timeout_s."
            ) from error
        if attempt >= self.attempts:
            what = f"the service cannot be reached: {error or type(error).__name__}."
            raise ServiceError(what, where=where, fix="Is it running?") from error
        return _backoff_s(attempt, jitter)


def _backoff_s(attempt: int, jitter: random.Random) -> float:
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (attempt - 1)) * jitter.uniform(0.5, 1.0)


def _too_long(response: httpx.Response, asked_s: float) -> OverloadedError | ServiceError:
    error = error_of(response)
    kind = type(error) if isinstance(error, ServiceError) else ServiceError
    return kind(error.what, where=error.where, fix=f"The service asks to wait {asked_s:,.0f} s. {error.fix}")
