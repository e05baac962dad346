"""Every error Genescale raises on purpose, in one tree.

    GenescaleError                 internal            a fault of ours: please report it
    ├── InputError                 invalid_input       something you gave cannot be used
    │   ├── SettingsError          settings            a settings file, recipe or option
    │   ├── VocabularyError        vocabulary          a vocabulary file or dictionary
    │   │   └── UnknownGeneError   unknown_gene        a gene the vocabulary does not hold
    │   ├── AtlasError             atlas               an atlas file that cannot be ingested
    │   │   └── NotCountsError     not_counts          its matrix does not hold raw counts
    │   ├── CorpusError            corpus              a corpus that is absent or does not fit
    │   ├── LimitError             limit               more than a stated limit allows
    │   └── ConflictError          conflict            two things that cannot both be meant
    ├── StorageError               storage             object storage or a disk refused
    │   ├── NotFoundError          not_found           nothing is stored there
    │   ├── AlreadyExistsError     already_exists      a conditional create found something
    │   └── ForbiddenPathError     forbidden_path      a path outside the allowed roots
    ├── IntegrityError             integrity           bytes differ from their recorded digest
    ├── TrackingError              tracking            MLflow refused, or a model is not registered
    ├── ClusterError               cluster             Ray could not start, join or finish
    ├── TrainingError              training            a training that cannot go on, such as a loss that is no number
    └── ServiceError               service             the HTTP service could not answer
        ├── UnauthorizedError      unauthorized        no key, or a wrong one
        ├── ForbiddenError         forbidden           a key that may not ask this
        ├── OverloadedError        overloaded          the queue is full: try again later
        │   └── RateLimitedError   rate_limited        this key has asked for more than it may a minute
        ├── DrainingError          draining            the service is stopping: ask another one, or later
        └── DeadlineError          deadline            the answer took longer than allowed

Callers may catch at any level. `code` is stable: programs may depend on it, message texts may change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class GenescaleError(Exception):
    """Base of all errors raised on purpose: says what happened, where, and what to do next."""

    code: ClassVar[str] = "internal"

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} {self.fix}" if self.fix else text

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive a Ray worker boundary without this.
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(kind: type[GenescaleError], what: str, where: str, fix: str) -> GenescaleError:
    return kind(what, where=where, fix=fix)


class InputError(GenescaleError):
    """Something the caller gave cannot be used."""

    code = "invalid_input"


class SettingsError(InputError):
    """A settings file, a recipe or a command-line option is wrong."""

    code = "settings"


class VocabularyError(InputError):
    """A vocabulary file or dictionary cannot be read, or two vocabularies do not fit."""

    code = "vocabulary"


class UnknownGeneError(VocabularyError):
    """A gene that the vocabulary does not hold under any id, symbol or alias."""

    code = "unknown_gene"


class AtlasError(InputError):
    """An atlas file that cannot be ingested."""

    code = "atlas"


class NotCountsError(AtlasError):
    """The matrix of an atlas file does not hold raw counts."""

    code = "not_counts"


class CorpusError(InputError):
    """A corpus is absent, or does not fit what is asked of it."""

    code = "corpus"


class LimitError(InputError):
    """More than a stated limit allows."""

    code = "limit"


class ConflictError(InputError):
    """Two things that cannot both be meant, such as one idempotency key for two questions."""

    code = "conflict"


class StorageError(GenescaleError):
    """Object storage or a disk refused."""

    code = "storage"


class NotFoundError(StorageError):
    """Nothing is stored under that address."""

    code = "not_found"


class AlreadyExistsError(StorageError):
    """A conditional create found something already there."""

    code = "already_exists"


class ForbiddenPathError(StorageError):
    """A path that leaves the allowed roots."""

    code = "forbidden_path"


class IntegrityError(GenescaleError):
    """Bytes differ from the digest that was recorded for them."""

    code = "integrity"


class TrackingError(GenescaleError):
    """MLflow refused, or a model is not registered."""

    code = "tracking"


class ClusterError(GenescaleError):
    """Ray could not start, join or finish."""

    code = "cluster"


class TrainingError(GenescaleError):
    """A training that cannot go on, such as one whose loss is no number."""

    code = "training"


class ServiceError(GenescaleError):
    """The HTTP service could not answer."""

    code = "service"


class UnauthorizedError(ServiceError):
    """No key, or a wrong one."""

    code = "unauthorized"


class ForbiddenError(ServiceError):
    """An accepted key without the scope that the question needs."""

    code = "forbidden"


class OverloadedError(ServiceError):
    """The queue is full: try again later."""

    code = "overloaded"


class RateLimitedError(OverloadedError):
    """One key asked for more than it may a minute; other keys are not affected."""

    code = "rate_limited"


class DrainingError(ServiceError):
    """The service is stopping: it finishes what it began and takes nothing new."""

    code = "draining"


class DeadlineError(ServiceError):
    """The answer took longer than allowed."""

    code = "deadline"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as `Did you mean 'width'?`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else ""
