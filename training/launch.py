"""Starting the workers of a run on Ray Train: on GPUs where the cluster has one for each, else on processors."""

from __future__ import annotations

from typing import Any

from genescale.platform.errors import ClusterError, GenescaleError
from genescale.platform.settings import ClusterSettings
from genescale.training.run_files import RAY
from genescale.training.worker import Job, work

# A rank whose peer died waits this long in a collective; a slow read or a long evaluation must take less.
COLLECTIVE_TIMEOUT_S = 300


def launch(job: Job, board: Any, *, cpus_per_worker: int, max_failures: int, again: str) -> dict[str, Any]:
    """Run the job's workers to the end, starting lost ones again; what the first of them answers. Ray must be running.

    again: what a person does once the cause of a failure is gone. Raises the error that a worker raised on purpose, or
    ClusterError when workers are lost more often than `max_failures`.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    filesystem, path = job.store.arrow_filesystem(job.home)
    use_gpu = gpus_for(job.workers)
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=job.workers, use_gpu=use_gpu, resources_per_worker=_resources(cpus_per_worker, use_gpu)
        ),
        run_config=RunConfig(
            name=RAY,
            storage_path=path,
            storage_filesystem=filesystem,
            # Bounded on both sides: Ray's default is to start a failing controller again without end.
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        return dict(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise _cause(error, job.home, again) from error


def _cause(error: Any, home: str, again: str) -> GenescaleError:
    """The error a worker raised on purpose, else ClusterError with what Ray says."""
    for failure in getattr(error, "worker_failures", {}).values():
        # Ray's wrapper of an error may be of the error's class too, and its text is a trace: it comes last.
        for known in (getattr(failure, "_base_exc", None), getattr(failure, "cause", None), failure):
            if isinstance(known, GenescaleError):
                return known
    return ClusterError(
        f"training failed: {error}",
        where=home,
        fix=f"Once the cause is gone, {again}",
    )


def gpus_for(workers: int) -> bool:
    """Whether the cluster has a GPU for each worker."""
    import ray

    return bool(ray.cluster_resources().get("GPU", 0) >= workers)


def check_room(cluster: ClusterSettings, workers: int, cpus_per_worker: int) -> None:
    """ClusterError when the workers do not fit on a local Ray."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)
    # A cluster may grow; a local Ray will not, and Ray Train would wait for it until its own timeout.
    if not cluster.address and workers * cpus_per_worker > cpus:
        raise ClusterError(
            f"{workers} workers with {cpus_per_worker} processors each do not fit on {cpus:g}.",
            where="local Ray",
            fix="Use fewer workers, or raise cluster.num_cpus.",
        )


def _resources(cpus_per_worker: int, use_gpu: bool) -> dict[str, float]:
    return {"CPU": cpus_per_worker, "GPU": 1} if use_gpu else {"CPU": cpus_per_worker}
