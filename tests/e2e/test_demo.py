"""The demo as a user runs it: a process of its own, killed and started again, leaving nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "genescale.platform.cli", "demo", "--quick", "--workers", "1"]


def environment(home: Path) -> dict[str, str]:
    """An empty home and temporary folder, so that anything written outside the work folder is seen."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GENESCALE_", "RAY_"))}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "GENESCALE_CLUSTER__NUM_CPUS": "2"}


def processes_of(work: Path) -> list[str]:
    """Command lines of living processes that name the work folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(work) in line and "pytest" not in line:
                found.append(line)
    return found


def wait_until_gone(work: Path, limit_s: float = 60.0) -> list[str]:
    """What is left of a killed run's processes after Ray's own watchdogs had time to end them."""
    ends = time.monotonic() + limit_s
    while (left := processes_of(work)) and time.monotonic() < ends:
        time.sleep(0.5)
    return left


def stages(work: Path) -> dict[str, object]:
    return json.loads((work / "state.json").read_text(encoding="utf-8"))["stages"]


@pytest.mark.timeout(600)
def test_the_demo_runs_to_the_end_and_leaves_nothing_behind(tmp_path: Path) -> None:
    work, home = tmp_path / "w", tmp_path / "home"
    run = subprocess.run(
        [*COMMAND, "--work", str(work)], env=environment(home), cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(stages(work)) == [
        "atlas", "vocabulary", "ingest", "pretrain", "embed", "head", "screen", "ask", "report",
    ]  # fmt: skip
    asked = stages(work)["ask"]["made"]  # type: ignore[index]
    assert asked["embedding_difference"] == 0.0
    assert asked["shift"] == asked["screen_shift"]
    page = (work / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5
    assert "What of the planted truth was found" in page
    assert str(work / "report" / "report.html") in run.stdout
    assert processes_of(work) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["home", "w"]
    assert list(home.rglob("*")) == []
    # The corpus of the run is a plain folder afterwards, readable by the command that the summary names.
    shown = subprocess.run(
        [*COMMAND[:3], "corpus", "show", str(work / "object-storage" / "corpus")], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "600" in shown.stdout

    again = subprocess.run([*COMMAND, "--work", str(work)], env=environment(home), capture_output=True, text=True)
    assert again.returncode == 0
    assert "already finished" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", [[], ["--local"]], ids=["s3", "local"])
def test_killed_at_any_stage_it_goes_on_and_finishes(tmp_path: Path, mode: list[str]) -> None:
    work, home = tmp_path / "w", tmp_path / "home"
    command = [*COMMAND, "--work", str(work), *mode]
    log, done = tmp_path / "log.txt", 0
    for _ in range(20):
        with log.open("a") as output:
            run = subprocess.Popen(command, env=environment(home), stdout=output, stderr=subprocess.STDOUT)
        # Kill a little after the next stage was recorded, so that the one after it is under way.
        while run.poll() is None and (not (work / "state.json").is_file() or len(stages(work)) <= done):
            time.sleep(0.2)
        if run.poll() is not None:
            break
        done = len(stages(work))
        time.sleep(2.0)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert wait_until_gone(work) == []
    assert run.returncode == 0, log.read_text()
    assert len(stages(work)) == 9
    assert stages(work)["ask"]["made"]["embedding_difference"] == 0.0  # type: ignore[index]


def test_a_pattern_without_files_is_said_before_anything_runs(tmp_path: Path) -> None:
    run = subprocess.run(
        [*COMMAND, "--work", str(tmp_path / "w"), "--atlas", str(tmp_path / "*.h5ad")], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "no file fits this pattern" in run.stderr
    assert not (tmp_path / "w").exists()
