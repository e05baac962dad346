"""A service in this process that takes jobs, and what tests of jobs share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from genescale.platform.bundle import Bundle
from genescale.platform.runs import Tracker
from genescale.platform.settings import Settings
from genescale.serving.access.keys import ApiKey, digest_of, write_keys
from genescale.serving.answering.answers import Answers
from genescale.serving.config import Limits, ServingConfig
from genescale.serving.facts import describe
from genescale.serving.gate import Gate
from genescale.serving.jobs.in_process import LocalDesk, ThreadRunner
from genescale.serving.jobs.settings import JobsConfig
from genescale.serving.release import Release
from genescale.serving.routes import http_application
from genescale.serving.services import Services
from tests.serving.conftest import ask_all

ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class Side:
    """A service that takes jobs; `ask` sends a request to it."""

    gate: Gate
    desk: LocalDesk
    config: ServingConfig

    def ask(self, method: str, path: str, *, key: str = "", **more: Any) -> httpx.Response:
        if key:
            more["headers"] = {**more.get("headers", {}), "Authorization": f"Bearer {key}"}
        return ask_all(self.gate, [(method, path, more)])[0]

    def post(self, body: Mapping[str, Any], *, key: str = "", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", "/v1/jobs", key=key, json=body, headers=named)

    def ended(self, job_id: str, *, key: str = "", within_s: float = 30.0) -> dict[str, Any]:
        """The job when it is over."""
        return self.until(lambda job: job["state"] in ENDED, job_id, key=key, within_s=within_s)

    def until(
        self, reached: Callable[[dict[str, Any]], bool], job_id: str, *, key: str = "", within_s: float = 30.0
    ) -> dict[str, Any]:
        """The job as soon as it is so."""
        deadline = time.monotonic() + within_s
        while True:
            job: dict[str, Any] = self.ask("GET", f"/v1/jobs/{job_id}", key=key).json()
            if reached(job):
                return job
            assert time.monotonic() < deadline, f"not reached in {within_s} s: {job}"
            time.sleep(0.02)


def jobs_config(folder: Path, **changes: Any) -> JobsConfig:
    """Jobs below `folder/jobs` that may read `folder/data`, with quick signs of life."""
    # A lease is longer than a busy machine may stall a process: who is late for it gives its job up.
    quick: dict[str, Any] = {"heartbeat_s": 0.05, "lease_s": 20.0, "stop_s": 0.2}
    given = {"uri": str(folder / "jobs"), "allowed_roots": (str(folder / "data"),), **quick, **changes}
    return JobsConfig(**given)


def write_keys_file(folder: Path, scopes: Mapping[str, tuple[str, ...]]) -> str:
    """A file of keys; the key of each id is the id twice."""
    path = folder / "keys.toml"
    write_keys(
        path, [ApiKey(id=name, sha256=digest_of(key_of(name).encode()).hex(), scopes=of) for name, of in scopes.items()]
    )
    return str(path)


def key_of(name: str) -> str:
    return f"{name}-{name}-0123456789"


def side_of(bundle: Bundle, model: Any, desk: LocalDesk, config: ServingConfig) -> Side:
    """The HTTP side of the tiny model in front of a desk."""
    release = release_of(bundle)
    answers = Answers(model, bundle.vocabulary, describe(release, bundle, config), config.limits)
    services = Services(answers=answers, release=release, jobs=desk.jobs)
    return Side(gate=http_application(services, config), desk=desk, config=config)


def release_of(bundle: Bundle) -> Release:
    return Release(name="tiny", version="3", digest=bundle.digest, address="", folder=str(bundle.folder))


def serving_config(jobs: JobsConfig, *, keys_file: str = "", **limits: Any) -> ServingConfig:
    return ServingConfig(jobs=jobs, limits=Limits(**limits), keys_file=keys_file, device="cpu")


def local_desk(config: ServingConfig, tracker: Tracker) -> LocalDesk:
    """Jobs on threads, tracked in memory."""
    settings = Settings()
    return LocalDesk(config, settings, runner=ThreadRunner(config, settings, tracker=lambda _: tracker))
