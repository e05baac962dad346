"""Processes of the Ray that this benchmark started: which they are, what they use, and how they are killed.

Only descendants of this process are ever looked at, so that another Ray on the machine is left alone.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# By the titles that Ray gives its processes.
ROLES = {
    "replica": "ServeReplica:genescale:ModelReplica",
    "http": "ServeReplica:genescale:Ingress",
    "proxy": "ProxyActor",
    "controller": "ServeController",
    "floor": "ServeReplica:floor",
    "gcs": "gcs_server",
    "raylet": "raylet/raylet",
}
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
EVERY_S = 0.5


def processes(role: str) -> list[int]:
    """Ids of the processes of a role, below this one."""
    parent_of = {pid: parent for pid in _pids() if (parent := _parent(pid))}
    return [pid for pid in parent_of if ROLES[role] in _title(pid) and _is_ours(pid, parent_of)]


def kill(role: str) -> int:
    """SIGKILL one process of a role; returns its id."""
    pid = processes(role)[0]
    os.kill(pid, signal.SIGKILL)
    return pid


def cpu_s(roles: tuple[str, ...]) -> dict[str, float]:
    """Processor seconds that the processes of each role have used so far."""
    return {role: sum(_cpu_s(pid) for pid in processes(role)) for role in roles}


@dataclass(frozen=True)
class Memory:
    """Resident bytes of one role over time: `(time, bytes)` per sample."""

    samples: np.ndarray

    def growth_mib(self) -> float:
        """From the middle third to the last third, by medians: the first is warming up."""
        third = len(self.samples) // 3
        middle, last = self.samples[third : 2 * third, 1], self.samples[2 * third :, 1]
        return float(np.median(last) - np.median(middle)) / 2**20

    def peak_mib(self) -> float:
        return float(self.samples[:, 1].max()) / 2**20


class MemoryWatch:
    """Samples the memory of roles on a thread for the length of a `with` block."""

    def __init__(self, roles: tuple[str, ...]) -> None:
        self._pids = {role: processes(role) for role in roles}
        self._samples: dict[str, list[tuple[float, float]]] = {role: [] for role in roles}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def of(self, role: str) -> Memory:
        return Memory(np.array(self._samples[role]))

    def _sample(self) -> None:
        at = 0.0
        while not self._end.wait(EVERY_S):
            at += EVERY_S
            for role, pids in self._pids.items():
                self._samples[role].append((at, float(sum(_rss_bytes(pid) for pid in pids))))


def _pids() -> list[int]:
    return [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()]


def _is_ours(pid: int, parent_of: dict[int, int]) -> bool:
    while pid in parent_of:
        pid = parent_of[pid]
        if pid == os.getpid():
            return True
    return False


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS if fields else 0.0


def _rss_bytes(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) * PAGE_BYTES if fields else 0


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
