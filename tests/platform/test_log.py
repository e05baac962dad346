from __future__ import annotations

import json

import pytest

from genescale.platform import log
from genescale.platform.settings import LogSettings, Secret


def test_json_lines_carry_ids_extras_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(LogSettings(format="json"), secrets=(Secret("hunter2"),))
    with log.bind(run_id="r1"), log.bind(request_id="q7"):
        log.get_logger("test").warning("key is %s", "hunter2", extra={"cells": 12})
    log.get_logger("test").info("outside")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["message"] == "key is ***"
    assert (first["run_id"], first["request_id"], first["cells"], first["level"]) == ("r1", "q7", 12, "warning")
    assert "run_id" not in second


def test_human_lines_and_levels(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(LogSettings(level="WARNING"))
    log.get_logger("test").info("quiet")
    try:
        raise ValueError("broken")
    except ValueError:
        log.get_logger("test").exception("loud")
    text = capsys.readouterr().err
    assert "quiet" not in text
    assert "error   loud" in text
    assert "ValueError: broken" in text
