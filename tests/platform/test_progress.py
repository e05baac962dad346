from __future__ import annotations

import io

import pytest
from rich.console import Console

from genescale.platform.progress import SILENT, clock, stage


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stage_ends_with_its_counts(terminal: bool) -> None:
    out = io.StringIO()
    with stage("Ingest", console=Console(file=out, force_terminal=terminal, width=120)) as progress:
        progress.start(2000, "cells")
        progress.advance(1500)
        progress.advance(500, "3 dropped")
    last = out.getvalue().rstrip().splitlines()[-1]
    assert "ok" in last
    assert "Ingest" in last
    assert "2,000/2,000 cells" in last
    assert "3 dropped" in last


def test_a_stage_that_fails_says_so() -> None:
    out = io.StringIO()

    def embed() -> None:
        with stage("Embed", console=Console(file=out)) as progress:
            progress.start(None, "cells")
            progress.advance(5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        embed()
    assert "FAILED Embed" in out.getvalue()
    assert "5 cells" in out.getvalue()


def test_silent_takes_everything() -> None:
    SILENT.start(None, "cells")
    SILENT.advance()


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "0:04"), (65, "1:05"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
