"""The real command in a session of its own: started, asked, stopped, and everything it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND = (sys.executable, "-m", "genescale.platform.cli")
STOP_S = 90.0


@dataclass
class RealService:
    """`genescale serve` as an operator starts it."""

    process: subprocess.Popen[str]
    url: str
    said: str
    errors: Path
    sessions: Path
    """Folder of Ray's sessions, with the logs of every process of the service."""

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it as an orchestrator does, and return what it printed meanwhile."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=STOP_S)
        self.said += out
        return out

    def pids_of(self, name: str) -> list[int]:
        """Processes of the service whose title holds `name`."""
        found = []
        for pid in session_members(self.process.pid):
            with contextlib.suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"):
                    found.append(pid)
        return found


@contextlib.contextmanager
def real_service(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, *, cpus: int = 2
) -> Iterator[RealService]:
    """The service of these arguments, ready to be asked; whatever is left of it afterwards is ended.

    Ray's session lies below `folder`, whose path must be short: the names of Ray's sockets begin with it.
    """
    sessions, errors = folder / "ray", folder / "stderr.txt"
    cluster = {"GENESCALE_CLUSTER__NUM_CPUS": str(cpus), "GENESCALE_CLUSTER__TEMP_DIR": str(sessions)}
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*COMMAND, "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder,
            env={**os.environ, **cluster, **environment},
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        said = ""
        while (line := process.stdout.readline()) and "Ctrl-C" not in line:
            said += line
        found = set(re.findall(r"http://127\.0\.0\.1:\d+", said))
        assert len(found) == 1, f"{said}\n{errors.read_text()}"
        yield RealService(process=process, url=found.pop(), said=said, errors=errors, sessions=sessions)
    finally:
        # Ray's processes share the session of the command; whatever a failure left of it is ours to end.
        for pid in session_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def command(*arguments: str, environment: Mapping[str, str], folder: Path, code: int = 0) -> str:
    """Run another command of the product beside the service; what it printed."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def session_members(session: int) -> list[int]:
    """Running processes of a session, by the fields of /proc that are there without any library."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, *_, member_of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(member_of) == session and state != "Z":
                found.append(int(entry.name))
    return found
