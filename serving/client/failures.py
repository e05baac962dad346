"""What a response that is no answer means: its error class, and whether the same question may do better in a moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from genescale.platform.errors import (
    DeadlineError,
    ForbiddenError,
    GenescaleError,
    InputError,
    LimitError,
    OverloadedError,
    ServiceError,
    UnauthorizedError,
)

# Busy, restarting, or cut off: the same question may be answered in a moment. A late answer (504) would be late again.
TRY_AGAIN = frozenset({429, 502, 503})
# Of answers that are not ours: a proxy's, or those of a replica that died.
STATUS_CLASSES: dict[int, type[GenescaleError]] = {
    401: UnauthorizedError,
    403: ForbiddenError,
    408: DeadlineError,
    413: LimitError,
    429: OverloadedError,
    503: OverloadedError,
    504: DeadlineError,
}
MOST_DIGITS = 8


def error_of(response: httpx.Response) -> GenescaleError:
    """The error that a response stands for, as the class its code names."""
    facts = _error_facts(response)
    if facts is None:
        kind = STATUS_CLASSES.get(response.status_code, ServiceError if response.status_code >= 500 else InputError)
        return kind(f"the service answered {response.status_code}.", where=response.url.path)
    kind = error_classes().get(str(facts.get("code")), ServiceError)
    details = facts.get("details")
    where = details.get("where", "") if isinstance(details, dict) else ""
    return kind(str(facts.get("message")), where=str(where), fix=f"(request {facts.get('request_id')})")


def worth_another_try(response: httpx.Response) -> bool:
    """Whether the same question may be answered in a moment."""
    # A 500 without our shape comes from a proxy whose replica died in mid answer; ours would be a fault again.
    died = response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and _error_facts(response) is None
    return response.status_code in TRY_AGAIN or died


def asked_wait_s(response: httpx.Response) -> float:
    """Seconds that a refusal asks to wait: to the millisecond where it says so, 0 where it says nothing readable."""
    milliseconds = _whole(response.headers.get("retry-after-ms", ""))
    return milliseconds / 1000 if milliseconds else float(_whole(response.headers.get("retry-after", "")))


def error_classes() -> dict[str, type[GenescaleError]]:
    """Class of each stable code."""
    found: dict[str, type[GenescaleError]] = {}
    waiting: list[type[GenescaleError]] = [GenescaleError]
    while waiting:
        kind = waiting.pop()
        found[kind.code] = kind
        waiting += kind.__subclasses__()
    return found


def _error_facts(response: httpx.Response) -> Mapping[str, Any] | None:
    """The typed body of an error; None for answers of a proxy or of a replica that died."""
    try:
        facts = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else 0
