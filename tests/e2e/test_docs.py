"""The guides are run as written, block by block: two of them one after the other in one folder, four alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("data-engineer.md", "ml-team.md")
# Guides that start in an empty folder of their own.
ALONE = ("biologist.md",)
# Those that also start a service, in the background, and ask it in shell and in Python.
SERVED = ("application.md", "models.md", "jobs.md")


def blocks(guide: str, *languages: str) -> list[str]:
    """Commands of a guide in order, Python as a command too; those in `real` fences need public atlases."""
    text, fences = (ROOT / "docs" / guide).read_text(encoding="utf-8"), "|".join(languages)
    found = re.findall(rf"^```({fences})\n(.*?)^```", text, re.M | re.S)
    return [f"python - <<'PY'\n{block}PY\n" if language == "python" else block for language, block in found]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_guides_work_as_written(tmp_path: Path) -> None:
    for guide in GUIDES:
        run_blocks(blocks(guide, "bash"), guide, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("guide", ALONE)
def test_a_guide_works_alone(guide: str, tmp_path: Path) -> None:
    run_blocks(blocks(guide, "bash"), guide, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("guide", SERVED)
def test_a_guide_of_the_service_works_as_written(guide: str, tmp_path: Path) -> None:
    try:
        run_blocks(blocks(guide, "bash", "python"), guide, tmp_path)
    finally:
        # A block that failed leaves the service of an earlier one; nobody else has its folder.
        end_processes_in(tmp_path)
    assert not (tmp_path / "serve.pid").exists() or not alive(int((tmp_path / "serve.pid").read_text()))


def end_processes_in(folder: Path) -> None:
    """End every process that works in `folder`, Ray's included."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                os.kill(int(entry.name), signal.SIGKILL)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return False


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.timeout(600)
def test_the_real_case_works_as_written(tmp_path: Path, shared_data: Path) -> None:
    for name in ("atlases", "vocabularies"):
        (tmp_path / name).symlink_to(shared_data / name)
    said = run_blocks(blocks("data-engineer.md", "real"), "data-engineer.md", tmp_path)
    for expected in ("only 737 of 20,271 vocabulary genes", "only 1,271 of 20,271 vocabulary genes"):
        assert expected in said[0]
    assert "6 of 6 sources ingested" in said[1]
    assert "duplicate_cell: 2,638" in said[2]


def run_blocks(texts: list[str], guide: str, folder: Path) -> list[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GENESCALE_CLUSTER__NUM_CPUS": "2",
    }
    assert texts, f"{guide} shows no command"
    said = []
    for block in texts:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{guide}\n{block}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        said.append(run.stdout + run.stderr)
    return said


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
