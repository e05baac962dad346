"""Start a local Ray for one command, or join a running cluster: the same code runs on both.

The rest of Genescale calls `ray_cluster(settings)` once, at the top of a command, and then uses Ray as usual.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genescale.platform.errors import ClusterError
from genescale.platform.liveness import lives
from genescale.platform.settings import ClusterSettings, Settings

# Read by Ray and the libraries under it when they are imported or when a worker starts; workers inherit them.
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    # Serve's controller ends its own shutdown call by being killed, which Ray would print as a failed task.
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"ServeController\.graceful_shutdown",
    # Ray's C++ side would write its remarks on actors onto the user's terminal; errors reach us as exceptions.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
# pyarrow's allocator would give a unit's memory back to the system and fault it in again for the next one: the larger
# part of what a second worker on one machine costs. A worker keeps it instead, about 45 MB at ingestion.
KEEPING_MEMORY = {"MIMALLOC_PURGE_DELAY": "-1"}
# Ray Serve replaces a dead proxy after three failed checks: 20 to 30 s at its own period, and callers give up before.
SOON_BACK = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}
# A Unix socket path takes 107 bytes; Ray adds `/session_<date>_<pid>/sockets/plasma_store` (63) to the folder.
LONGEST_TEMP_DIR = 42


def quiet_environment() -> None:
    """Set what Ray and pyarrow read when they are loaded; values that are set stay. Commands call it first."""
    for name, value in (QUIET_ENVIRONMENT | KEEPING_MEMORY | SOON_BACK).items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def ray_cluster(settings: Settings) -> Iterator[None]:
    """Ray for the length of the block: joined when an address is set, else started here and stopped at the end.

    Raises ClusterError when Ray cannot be joined or started. When Ray is already connected in this process, the block
    uses that connection and leaves it as it is.
    """
    quiet_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    with _short_temp_dir(settings.cluster) as temp_dir:
        with _no_remarks():
            _connect(ray, settings.cluster, temp_dir)
        _quiet_ray_data()
        try:
            yield
        finally:
            ray.shutdown()


def _connect(ray: Any, cluster: ClusterSettings, temp_dir: str) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if cluster.address:
            ray.init(address=cluster.address, **common)
        else:
            ray.init(
                address="local",
                num_cpus=cluster.num_cpus or None,
                num_gpus=None if cluster.num_gpus < 0 else cluster.num_gpus,
                object_store_memory=cluster.object_store_bytes,
                include_dashboard=False,
                _temp_dir=temp_dir or None,
                **common,
            )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        if cluster.address:
            fix = "Check that the cluster runs and that cluster.address is right."
        else:
            fix = "Check free memory, /dev/shm and the folder cluster.temp_dir."
        raise ClusterError(f"Ray did not start: {error}.", where=cluster.address or "local Ray", fix=fix) from error


@contextlib.contextmanager
def _no_remarks() -> Iterator[None]:
    """Keep off the terminal what Ray's C++ side says while it starts; what goes wrong arrives as an exception."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet_ray_data() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Else what a worker raised on purpose reaches the caller as a bare RayTaskError.
    context.raise_original_map_exception = True
    for name in ("ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray Data would print the whole trace of a task that fails; what matters of it reaches the caller.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _short_temp_dir(cluster: ClusterSettings) -> Iterator[str]:
    """The folder for Ray's session files: the chosen one, reached through a short link when its path is too long."""
    if cluster.address or not cluster.temp_dir:
        yield ""
        return
    chosen = Path(cluster.temp_dir).resolve()
    chosen.mkdir(parents=True, exist_ok=True)
    if len(str(chosen)) <= LONGEST_TEMP_DIR:
        yield str(chosen)
        return
    link = _short_link(chosen)
    try:
        yield str(link)
    finally:
        link.unlink(missing_ok=True)


def _short_link(chosen: Path) -> Path:
    """A link to the folder, short enough for the sockets that Ray keeps below it.

    It is this process's own, because others that use the folder keep theirs; those that killed runs left are removed,
    and somebody else's is never followed.
    """
    name = f"genescale-{hashlib.sha256(str(chosen).encode()).hexdigest()[:6]}-"
    link = Path("/tmp") / f"{name}{os.getpid()}"
    for left in Path("/tmp").glob(f"{name}*"):
        with contextlib.suppress(FileNotFoundError):
            number = left.name.removeprefix(name)
            stale = left == link or (number.isdigit() and not lives(int(number)))
            if stale and left.is_symlink() and left.lstat().st_uid == os.getuid():
                left.unlink()
    try:
        link.symlink_to(chosen, target_is_directory=True)
    except OSError as error:
        raise ClusterError(
            f"its path is too long for Ray's sockets, and no short link to it can be made: {error.strerror}.",
            where=str(chosen),
            fix=f"Choose a folder whose path has at most {LONGEST_TEMP_DIR} characters.",
        ) from error
    return link
