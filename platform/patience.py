"""Patience with storage: an operation that failed for a while is tried again, with growing pauses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from genescale.platform.errors import AlreadyExistsError, ForbiddenPathError, NotFoundError, SettingsError, StorageError
from genescale.platform.log import get_logger

Result = TypeVar("Result")
# What storage answers, rather than fails to answer: trying again changes nothing.
ANSWERS = (NotFoundError, AlreadyExistsError, ForbiddenPathError)
log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long an operation is tried, and how the pauses between attempts grow."""

    total_s: float = 900.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0

    def __post_init__(self) -> None:
        if self.total_s < 0 or not 0 < self.first_pause_s <= self.longest_pause_s:
            raise SettingsError(
                f"patience of {self.total_s} s with pauses of {self.first_pause_s} to {self.longest_pause_s} s.",
                fix="Use a total of 0 or more, and pauses that grow.",
            )

    def pauses_s(self) -> Iterator[float]:
        """The pauses between attempts; they end when the total is used up."""
        waited_s, pause_s = 0.0, self.first_pause_s
        while waited_s < self.total_s:
            pause_s = min(pause_s, self.total_s - waited_s)
            yield pause_s
            waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, self.longest_pause_s)


PATIENT = Patience()
"""A quarter of an hour: longer than a rolling restart of an object store, shorter than a night."""


def patiently(operation: Callable[[], Result], *, patience: Patience, what: str) -> Result:
    """The result of `operation`, tried again while storage fails; `what` names it in the log.

    Raises the last StorageError when patience is used up, and at once what is an answer (nothing there, forbidden).
    """
    for pause_s in patience.pauses_s():
        try:
            return operation()
        except ANSWERS:
            raise
        except StorageError as error:
            log.warning("%s failed and is tried again in %.0f s: %s", what, pause_s, error)
            time.sleep(pause_s)
    return operation()
