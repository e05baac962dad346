"""The folder that a local Ray keeps its session files in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from genescale.platform.cluster import _short_temp_dir
from genescale.platform.settings import ClusterSettings


def test_a_second_command_keeps_its_folder_when_the_first_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tmp_path / ("a path too long for a socket " * 2)
    settings = ClusterSettings(temp_dir=str(chosen))
    with _short_temp_dir(settings) as first:
        monkeypatch.setattr(os, "getpid", os.getppid)
        with _short_temp_dir(settings) as second:
            monkeypatch.undo()
            assert len(second) < len(str(chosen))
        Path(first, "session").touch()
    assert os.listdir(chosen) == ["session"]
    assert not any(os.path.lexists(link) for link in (first, second))


def test_a_link_that_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    settings = ClusterSettings(temp_dir=str(tmp_path / ("a path too long for a socket " * 2)))
    ended = subprocess.Popen(["true"])
    ended.wait()
    with _short_temp_dir(settings) as link:
        left = Path(f"{link.rpartition('-')[0]}-{ended.pid}")
    left.symlink_to(tmp_path)
    with _short_temp_dir(settings):
        assert not left.is_symlink()
