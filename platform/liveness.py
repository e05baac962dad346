"""Which process did this, and does it still live?"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


def process_label() -> str:
    """A text that names this process on this machine, different for a later process of the same number."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_gone(label: str) -> bool:
    """True when `label` names a process of this machine that no longer lives; false for other machines and texts."""
    host, _, rest = label.partition(":")
    number, _, started = rest.partition(":")
    return host == socket.gethostname() and number.isdigit() and _started(int(number)) != started


def lives(process: int) -> bool:
    """Whether this machine has a process of this number."""
    return _started(process) is not None


def _started(process: int) -> str | None:
    """When a process started, in clock ticks, where the system tells; None when there is no such process."""
    # A process may end at any moment, also while it is looked at.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        line = (Path("/proc") / str(process) / "stat").read_text()
        # The name of the program, in brackets, may itself hold brackets and spaces; the start is field 22 of the line.
        return line.rpartition(")")[2].split()[19]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
