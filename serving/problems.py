"""Our errors as HTTP answers: one table of status codes, one shape of body.

    {"error": {"code": "unknown_gene", "message": "…", "request_id": "…", "details": {"where": "edits[0].genes[1]"}}}

`code` is stable and comes from the tree in `platform/errors.py`. A message says what is wrong with the request; errors
that are not the caller's carry the request id only, so that no path, bucket or trace leaves the house.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from genescale.platform.errors import (
    ConflictError,
    DeadlineError,
    ForbiddenError,
    GenescaleError,
    InputError,
    LimitError,
    OverloadedError,
    ServiceError,
    UnauthorizedError,
)

# From the most special class to the most general: the first that fits decides.
STATUS_OF: tuple[tuple[type[GenescaleError], int], ...] = (
    (LimitError, 413),
    (ConflictError, 409),
    (UnauthorizedError, 401),
    (ForbiddenError, 403),
    (OverloadedError, 429),
    (DeadlineError, 504),
    (ServiceError, 503),
    (InputError, 422),
)
OUR_FAULT = "the service failed to answer; this is a fault of the service, not of the request."
JSON_TYPE = "application/json"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An answer that is an error."""

    status: int
    code: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self, request_id: str) -> bytes:
        """The JSON body; pure ASCII, so that any text of the caller's can be quoted in it."""
        error: dict[str, Any] = {"code": self.code, "message": self.message, "request_id": request_id}
        if self.details:
            error["details"] = dict(self.details)
        return json.dumps({"error": error}).encode("ascii")


class RefusedError(Exception):
    """A request that is refused with a given Problem, where no class of our tree has that status."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refused(status: int, message: str, **details: Any) -> RefusedError:
    """A refusal of a request that is not what this service understands (400, 404, 405, 415, 422)."""
    return RefusedError(Problem(status=status, code=InputError.code, message=message, details=details))


def problem_of(error: BaseException, *, retry_after_s: float = 1.0) -> Problem:
    """The answer to a request that ended in `error`."""
    if isinstance(error, RefusedError):
        return error.problem
    for kind, status in STATUS_OF:
        if isinstance(error, kind):
            message = f"{error.what} {error.fix}".strip()
            details = {"where": error.where} if error.where else {}
            return Problem(
                status=status,
                code=error.code,
                message=message,
                details=details,
                headers=_headers(status, retry_after_s),
            )
    code = error.code if isinstance(error, GenescaleError) else GenescaleError.code
    return Problem(status=500, code=code, message=OUR_FAULT)


def retry_headers(wait_s: float) -> dict[str, str]:
    """When to ask again: in whole seconds, as HTTP has it, and in milliseconds for clients that can wait so shortly."""
    return {"Retry-After": str(math.ceil(wait_s)), "Retry-After-Ms": str(math.ceil(1000 * wait_s))}


def _headers(status: int, retry_after_s: float) -> dict[str, str]:
    if status == 401:
        return {"WWW-Authenticate": 'Bearer realm="genescale"'}
    return retry_headers(retry_after_s) if status in (429, 503) else {}
