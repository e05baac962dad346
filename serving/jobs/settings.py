"""How a service runs jobs: where they are kept, what they may read, and how many run at a time."""

from __future__ import annotations

from dataclasses import dataclass

from genescale.platform.address import Place, is_remote, parse, within
from genescale.platform.errors import SettingsError

_LEAST: dict[str, float] = {
    "workers": 1,
    "max_queued": 1,
    "max_unfinished_per_key": 1,
    "num_gpus": 0,
    "spread": 0,
    "max_cells": 1,
    "max_tokens": 1,
    "link_s": 1,
    "tries": 1,
    "stop_s": 0,
}
_PUBLIC = ("workers", "max_queued", "max_unfinished_per_key", "max_cells", "max_tokens", "max_hours", "keep_days")
BEATS_PER_LEASE = 3


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """Jobs of one service. Without `uri` it takes none."""

    uri: str = ""
    """Folder or s3:// address for records and results, the same for every node and every start of the service."""
    allowed_roots: tuple[str, ...] = ()
    """Folders and s3:// prefixes that a job may read; without any, only what a request itself carries."""
    workers: int = 1
    """Jobs that run at a time; others wait in turn."""
    max_queued: int = 16
    """Jobs that may wait; beyond them the answer is 429 with `Retry-After`."""
    max_unfinished_per_key: int = 8
    """Waiting and running jobs that one key may have."""
    num_cpus: float = 0.5
    """Processors that Ray sets aside for each running job; below 1, so that a small machine has room beside a model."""
    num_gpus: float = 0.0
    """GPUs for each running job."""
    spread: int = 0
    """Workers of the cluster, with a processor or a GPU each, over which one screen or embedding is spread; 0 computes
    it in the job's own process."""
    max_cells: int = 16_384
    """Cells that a job of perturbations may carry."""
    max_tokens: int = 2_000_000_000
    """Tokens that a job of perturbations may put through the model."""
    keep_days: float = 30.0
    """Days after its end at which a job and its results are deleted."""
    links: bool = True
    """Results in object storage are handed out as presigned links; false lets them pass through the service."""
    link_s: int = 900
    """Seconds that such a link works."""
    heartbeat_s: float = 2.0
    """Seconds between two signs of life of a running job, with its progress."""
    lease_s: float = 20.0
    """Seconds without one after which another supervisor goes on with the job."""
    max_hours: float = 168.0
    """Hours since it first began after which a job is ended, as failed."""
    tries: int = 3
    """Times that a job's worker may die without getting further before the job has failed."""
    stop_s: float = 10.0
    """Seconds that a cancelled job has to end by itself."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)}.", where="jobs", fix=f"Use {least} or more.")
        for name in ("num_cpus", "keep_days", "max_hours", "heartbeat_s"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} is {getattr(self, name)}.", where="jobs", fix="Use a number above 0.")
        if self.lease_s < BEATS_PER_LEASE * self.heartbeat_s:
            raise SettingsError(
                f"lease_s is {self.lease_s}, too short for a sign of life every {self.heartbeat_s} s.",
                where="jobs",
                fix=f"Use {BEATS_PER_LEASE} times heartbeat_s or more: a running job must not look dead.",
            )
        for address in (self.uri, *self.allowed_roots):
            _check_address(address)
        self._check_apart()

    @property
    def on(self) -> bool:
        """Whether the service takes jobs."""
        return bool(self.uri)

    @property
    def cpus(self) -> float:
        """Processors that all running jobs hold together."""
        return self.workers * (self.num_cpus + self.spread * (not self.num_gpus)) if self.on else 0.0

    @property
    def gpus(self) -> float:
        """GPUs that all running jobs hold together."""
        return self.workers * self.num_gpus if self.on else 0.0

    @property
    def limits(self) -> dict[str, float]:
        """What `/v1/info` says of the bounds of jobs; empty where the service takes none."""
        return {f"jobs_{name}": getattr(self, name) for name in _PUBLIC} if self.on else {}

    @property
    def roots(self) -> tuple[Place, ...]:
        """What a job may read."""
        return tuple(parse(root) for root in self.allowed_roots)

    def _check_apart(self) -> None:
        if not self.on and self.allowed_roots:
            raise SettingsError("allowed_roots without uri.", where="jobs", fix="Say where jobs are kept: --jobs-uri.")
        if self.on and within(parse(self.uri), self.roots):
            # One key could read what another one's jobs made.
            raise SettingsError(
                "uri lies within allowed_roots, so that jobs could read each other's results.",
                where="jobs",
                fix="Keep jobs in a folder of their own.",
            )


def _check_address(address: str) -> None:
    if address and not is_remote(address) and not address.startswith("/"):
        raise SettingsError(
            f"'{address}' is no absolute address.", where="jobs", fix="Write s3://bucket/folder or a path from / on."
        )


NO_JOBS = JobsConfig()
