"""Units of work on Ray: a pool of actors, each of which holds a model and works off one unit after the other.

An actor writes what comes of a unit itself, so that little travels back. One that dies is started again, on another
node if need be, and its unit with it. The actors are ended with the run, however it ends: what waits for a garbage
collector would keep its processors until then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.exceptions
import torch

from genescale.platform.errors import ClusterError, GenescaleError, SettingsError

Work = Callable[[Any], Any]
"""Works off a unit, which is any value that can be pickled; so must be what it returns."""
# A unit whose actor dies so often (out of memory, say) stops the run instead of being tried for ever.
TRIES_PER_UNIT = 4
# A unit in reserve saves an actor the way to the driver; with few units for each, it would keep others idle.
UNITS_IN_RESERVE, FEWEST_UNITS_EACH = 1, 8


class _Worker:
    """A Ray actor: makes what works off units, and keeps it."""

    def __init__(self, make: Callable[..., Work], freight: Sequence[Any]) -> None:
        self.make, self.freight = make, freight
        self.work: Work | None = None

    def ready(self) -> None:
        """Answer as soon as the cluster has a place for this actor."""

    def run(self, unit: Any) -> Any:
        """Work off a unit."""
        # Not when the actor is made: what goes wrong there arrives without its cause.
        self.work = self.work or self._made()
        return self.work(unit)

    def _made(self) -> Work:
        # An actor has one processor; more threads (an inherited setting) would fight each other for it.
        torch.set_num_threads(1)
        return self.make(*self.freight)


def work_off(
    units: Sequence[Any], make: Callable[..., Work], freight: Sequence[Any], *, size: int, gpus: int, where: str
) -> Iterator[Any]:
    """What came of each unit, as they end, on up to `size` actors, each with a GPU if `gpus`, else with a processor.

    Each actor makes its work by itself, as `make(*freight)`; what is large in `freight` should be a reference into the
    object store, which arrives as one. Raises the GenescaleError that a unit raised, and ClusterError, naming `where`
    the results go, when an actor failed again and again.
    """
    places = {"num_cpus": 0 if gpus else 1, "num_gpus": 1 if gpus else 0}
    actor = ray.remote(**places, max_restarts=-1, max_task_retries=TRIES_PER_UNIT - 1)(_Worker)
    # Within a list, references arrive as such: each actor fetches what is behind them once.
    pool = [actor.remote(make, list(freight)) for _ in range(max(1, min(len(units), size)))]
    try:
        yield from _as_they_end(pool, units)
    except ray.exceptions.RayError as error:
        if isinstance(ours := _original(error), GenescaleError):
            raise ours from error
        raise ClusterError(
            f"a worker failed: {error}.", where=where, fix="Run the same command again: finished units are kept."
        ) from error
    finally:
        for one in pool:
            ray.kill(one)


def _as_they_end(pool: Sequence[Any], units: Sequence[Any]) -> Iterator[Any]:
    """Actors get work when the cluster has a place for them, and then hold one unit in reserve."""
    left = iter(units)
    in_reserve = UNITS_IN_RESERVE if len(units) >= FEWEST_UNITS_EACH * len(pool) else 0
    ready = {one.ready.remote(): one for one in pool}
    running: dict[Any, Any] = {}
    n_left = len(units)
    try:
        while n_left:
            (done,), _ = ray.wait([*ready, *running], num_returns=1)
            one = ready.pop(done, None)
            wanted = 1 + in_reserve
            if one is None:
                one, wanted = running.pop(done), 1
                n_left -= 1
                yield ray.get(done)
            running |= {one.run.remote(unit): one for unit in itertools.islice(left, wanted)}
    finally:
        # Else Ray says of each that it will be tried again.
        for task in running:
            ray.cancel(task)


def gpus_on(device: str) -> int:
    """GPUs of the running cluster that a run on `device` (auto, cpu or cuda) may use.

    Raises SettingsError when it says cuda and there are none.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise SettingsError("this Ray cluster has no GPU.", where="device", fix="Use device 'auto' or 'cpu'.")
    return gpus


def actors_for(wished: int, gpus: int) -> int:
    """How many actors a run has: as many as are wished, else one for each GPU, or for each processor without GPUs."""
    return max(1, wished or gpus or int(ray.cluster_resources().get("CPU", 1)))


def _original(error: BaseException) -> BaseException:
    """The error of ours that an actor raised, from under Ray's wrappers; else `error` itself."""
    seen: BaseException | None = error
    while seen is not None:
        # Ray's wrapper is of both classes, and its text is a trace.
        inner = getattr(seen, "cause", None)
        if isinstance(inner, BaseException):
            seen = inner
        elif isinstance(seen, GenescaleError):
            return seen
        else:
            seen = seen.__cause__
    return error
