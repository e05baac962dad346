"""The demo's work folder: what is finished, what the next run may go on from, and whose folder it is.

    genescale-work/
      .genescale-demo     says that this folder belongs to a demo run and may be cleared by --fresh
      state.json          the plan's digest and every finished stage with what it made
      genescale.toml      settings for the commands to go on with
      object-storage/     the bucket: a copy of the embedded endpoint's, or with --local the storage itself
      mlflow.db, mlartifacts/   runs, metrics, registered models
      models/             bundles fetched from the registry
      report/             report.html and its figures
      cache/, tmp/, ray/  scratch of the libraries, removed at the end

A stage is written into state.json after everything it made is safe, so a killed run goes on after its last finished
stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genescale.platform.errors import InputError

MARK = ".genescale-demo"
SCRATCH = ("cache", "tmp", "ray")
# Where libraries would otherwise write into the home folder or the system's temporary folder.
SCRATCH_ENVIRONMENT = {
    "TMPDIR": "tmp",
    "MPLCONFIGDIR": "cache/matplotlib",
    "NUMBA_CACHE_DIR": "cache/numba",
    "TORCH_EXTENSIONS_DIR": "cache/torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
    "TRITON_CACHE_DIR": "cache/triton",
    "XDG_CACHE_HOME": "cache",
}


def plan_digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides what a run makes; two runs with one digest may share a folder."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()


class WorkFolder:
    """One demo's folder; open it with `open_work`."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        state = self._read_state()
        self.digest = digest
        self.stages: dict[str, dict[str, Any]] = state.get("stages", {}) if state.get("digest") == digest else {}

    def folder(self, *parts: str) -> Path:
        """A folder inside the work folder, made when it is not there."""
        path = self.path.joinpath(*parts)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def finished(self, stage: str) -> bool:
        """True when an earlier run finished this stage."""
        return stage in self.stages

    def finish(self, stage: str, made: Mapping[str, Any], elapsed_s: float) -> None:
        """Record a stage and what it made; from now on it is not run again."""
        self.stages[stage] = {"elapsed_s": round(elapsed_s, 2), "made": dict(made)}
        text = json.dumps({"digest": self.digest, "saved_at": time.time(), "stages": self.stages}, indent=1)
        # Renamed into place, so that a kill leaves the old state or the new one.
        draft = self.path / "state.json.new"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.path / "state.json")

    def _read_state(self) -> dict[str, Any]:
        file = self.path / "state.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@contextlib.contextmanager
def open_work(path: Path, digest: str, *, fresh: bool) -> Iterator[WorkFolder]:
    """Take the folder for this run: a new one, one to continue, or with `fresh` an old one cleared first.

    Raises InputError when the folder holds something else, belongs to a run with other choices, or is in use.
    """
    path = path.resolve()
    _claim(path)
    with _lock(path), _scratch(path):
        if fresh:
            _clear(path)
        state = path / "state.json"
        if state.is_file() and json.loads(state.read_text(encoding="utf-8"))["digest"] != digest:
            raise InputError(
                "this folder holds a demo with other choices (atlas, vocabulary, size or version).",
                where=str(path),
                fix="Add --fresh to start over in it, or choose another --work folder.",
            )
        yield WorkFolder(path, digest)


def _claim(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError("is a file, not a folder.", where=str(path), fix="Choose another --work folder.")
    if path.is_dir() and any(path.iterdir()) and not (path / MARK).is_file():
        raise InputError(
            "this folder is not empty and no demo made it, so nothing is written here.",
            where=str(path),
            fix="Choose an empty or new --work folder.",
        )
    path.mkdir(parents=True, exist_ok=True)
    (path / MARK).touch()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    # The system frees the lock when the process ends, however it ends.
    with (path / MARK).open("r+") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                "another demo is running in this folder.", where=str(path), fix="Wait for it, or choose another --work."
            ) from None
        yield


def _clear(path: Path) -> None:
    # First what says that stages are finished: a kill may leave the rest.
    (path / "state.json").unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name not in (MARK, *SCRATCH):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[None]:
    for name in SCRATCH:
        shutil.rmtree(path / name, ignore_errors=True)
    for folder in SCRATCH_ENVIRONMENT.values():
        (path / folder).mkdir(parents=True, exist_ok=True)
    wanted = {name: str(path / folder) for name, folder in SCRATCH_ENVIRONMENT.items()}
    # Without a token in the environment Ray makes one and keeps it in the home folder.
    wanted["RAY_AUTH_TOKEN"] = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    tempfile.tempdir = None
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        for name in SCRATCH:
            shutil.rmtree(path / name, ignore_errors=True)
