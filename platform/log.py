"""Logging: one line per event, for people or as JSON, always with the run and the request it belongs to.

Secrets do not reach a line: `Secret` values print as `***`, and every secret that `configure` was given is blanked out
wherever its text appears (a library's own message, an address with a key in it).
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence

from genescale.platform.settings import LogSettings, Secret

_CONTEXT: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("genescale_log_context", default={})  # noqa: B039
ROOT = "genescale"
# Attributes every LogRecord has; what else is on a record came through `extra=` and belongs in the JSON line.
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `get_logger(__name__)`."""
    return logging.getLogger(name if name.startswith(ROOT) else f"{ROOT}.{name}")


@contextlib.contextmanager
def bind(**ids: str) -> Iterator[None]:
    """Add ids such as `run_id=` or `request_id=` to every line logged inside the block, in this task or thread."""
    token = _CONTEXT.set({**_CONTEXT.get(), **ids})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def configure(settings: LogSettings, *, secrets: Sequence[Secret] = ()) -> None:
    """Send Genescale's log lines to standard error in the chosen format; calling it again replaces the last choice."""
    handler = logging.StreamHandler(sys.stderr)
    hidden = tuple(secret.reveal() for secret in secrets if secret)
    handler.setFormatter(_Json(hidden) if settings.format == "json" else _Human(hidden))
    logger = logging.getLogger(ROOT)
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(settings.level.upper())


class _Redacting(logging.Formatter):
    def __init__(self, hidden: tuple[str, ...]) -> None:
        super().__init__()
        self._hidden = hidden

    def format(self, record: logging.LogRecord) -> str:
        line = self.line(record)
        for secret in self._hidden:
            line = line.replace(secret, "***")
        return line

    def line(self, record: logging.LogRecord) -> str:
        raise NotImplementedError

    def trace(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info) if record.exc_info else ""


class _Human(_Redacting):
    def line(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        ids = "".join(f" {key}={value}" for key, value in _CONTEXT.get().items())
        text = f"{clock} {record.levelname.lower():<7} {record.getMessage()}{ids}"
        return f"{text}\n{self.trace(record)}" if record.exc_info else text


class _Json(_Redacting):
    def line(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_CONTEXT.get(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info:
            entry["trace"] = self.trace(record)
        return json.dumps(entry, default=str)
