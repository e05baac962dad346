"""The guides are run as written: every bash block of the first two, in order, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("data-engineer.md", "ml-team.md")


def blocks(guide: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / guide).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_guides_work_as_written(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GENESCALE_CLUSTER__NUM_CPUS": "2",
    }
    for guide in GUIDES:
        assert blocks(guide), f"{guide} shows no command"
        for block in blocks(guide):
            run = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert run.returncode == 0, f"{guide}\n{block}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
