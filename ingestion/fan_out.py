"""Many small jobs on Ray Data: descriptions go out, answers come back as they finish.

Ray repeats a job whose worker process dies (a crash in a native library, the machine's memory) without end. Here it is
repeated a bounded number of times, the last time with nothing else running, and then answered as a failure, so that
one poisonous file never ends the run of the others, or keeps it from ending.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from genescale.platform.errors import ClusterError
from genescale.platform.log import get_logger

Work = Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]
"""One job: takes its description (JSON) and returns an answer (JSON) and a payload of bytes; must not raise."""
# A worker may die for what another one did (memory), so after two deaths an item is judged by a run of its own.
DEATHS_TOGETHER = 2
DEATHS_ALONE = 1
# So many items that die alone, and none that was ever answered, are a fault of the installation and not of the files.
HOPELESS_ITEMS = 8
log = get_logger(__name__)


def fan_out(items: Sequence[dict[str, Any]], work: Work) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Run `work` on every item in its own Ray task and yield the answers in the order in which they come.

    A task is repeated when its worker or machine died, so `work` must give the same result when it is done twice. An
    item on which three workers died, the last one alone, is answered with `{**item, "failure": {"code", "message"},
    "seconds": 0.0}`. At most one task runs on each processor, and Ray holds tasks back while answers wait to be taken.
    Raises ClusterError when Ray as a whole cannot go on.
    """
    suspects = []
    for number, answer, payload in _run(dict(enumerate(items)), work, deaths=DEATHS_TOGETHER):
        if answer is None:
            suspects.append(number)
        else:
            yield answer, payload
    if suspects:
        log.warning("the workers of %d tasks died twice; these tasks run again, one by one", len(suspects))
    all_died = len(suspects) == len(items)
    yield from _one_by_one([items[number] for number in sorted(suspects)], work, all_died=all_died)


def _one_by_one(
    suspects: Sequence[dict[str, Any]], work: Work, *, all_died: bool
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Run each item with nothing beside it; one on which the worker dies again is answered as a failure."""
    poisonous: dict[str, ClusterError] = {}
    for item in suspects:
        uri = str(_first(item, "uri"))
        if uri in poisonous:
            # The file is refused already, so its other units need not kill another worker each.
            yield _failed(item, poisonous[uri]), b""
            continue
        ((_, answer, payload),) = _run({0: item}, work, deaths=DEATHS_ALONE)
        if answer is not None:
            all_died = False
            yield answer, payload
            continue
        poisonous[uri] = _poison(item)
        if all_died and len(poisonous) >= HOPELESS_ITEMS:
            raise ClusterError(
                f"the worker process died on each of {len(poisonous)} files.",
                fix="The installation or the machine is at fault, not a file: see the logs of Ray's workers.",
            )
        yield _failed(item, poisonous[uri]), b""


def _run(
    items: Mapping[int, dict[str, Any]], work: Work, *, deaths: int
) -> Iterator[tuple[int, dict[str, Any] | None, bytes]]:
    """One pass over the items by number; an item on which so many workers died has None for an answer."""
    if not items:
        return
    import ray.data
    from ray.exceptions import RayError

    described = [{"number": number, "item": json.dumps(item)} for number, item in items.items()]
    dataset = ray.data.from_items(described, override_num_blocks=len(described)).map_batches(
        functools.partial(_answered, work=work, deaths=deaths), batch_size=1, batch_format="pyarrow"
    )
    try:
        for row in dataset.iter_rows():
            yield row["number"], json.loads(row["answer"]), row["payload"]
    except RayError as error:
        # Around the error of a task Ray puts its own remarks and traces.
        cause = getattr(error, "cause", None) or error
        text = next(iter(str(cause).strip().splitlines()), "no message").rstrip(".")
        raise ClusterError(
            f"Ray could not finish the tasks ({type(cause).__name__}: {text}).", fix="See the logs of Ray's workers."
        ) from error


def _answered(batch: pa.Table, *, work: Work, deaths: int) -> pa.Table:
    if _earlier_attempts() < deaths:
        answers: list[tuple[Any, bytes]] = [work(json.loads(text)) for text in batch.column("item").to_pylist()]
    else:
        answers = [(None, b"")] * batch.num_rows
    return pa.table(
        {
            "number": batch.column("number"),
            "answer": pa.array([json.dumps(answer) for answer, _ in answers], pa.string()),
            "payload": pa.array([payload for _, payload in answers], pa.large_binary()),
        }
    )


def _earlier_attempts() -> int:
    """How often Ray has started this task before, on workers that are gone."""
    import ray

    # Ray offers this number to tasks by no public name, and its own limit (`max_retries`) does not hold for workers
    # that were ended for their memory, nor has it a place in Ray Data from 2.64 on.
    return int(ray.get_runtime_context().worker.core_worker.get_current_task_attempt_number())


def _poison(item: dict[str, Any]) -> ClusterError:
    start, stop = _first(item, "start"), _first(item, "stop")
    rows = f" on cells {start:,} to {stop - 1:,}" if isinstance(start, int) and isinstance(stop, int) else ""
    return ClusterError(
        f"the worker process died {DEATHS_TOGETHER + DEATHS_ALONE} times{rows}, the last time with nothing else "
        "running: most often the machine's memory ran out, or damaged content crashed a library that decodes it.",
        where=str(_first(item, "uri") or ""),
        fix="Look for the OOM killer in the machine's log and give it more memory or smaller units (--unit-nonzeros); "
        "if memory is not the reason, download the file again, or write it anew with anndata.",
    )


def _failed(item: dict[str, Any], error: ClusterError) -> dict[str, Any]:
    return {**item, "failure": {"code": error.code, "message": str(error)}, "seconds": 0.0}


def _first(value: Any, key: str) -> Any:
    """The first value under `key` in nested JSON, or None: items of several stages name their file alike."""
    if isinstance(value, Mapping):
        if key in value:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for part in value if (found := _first(part, key)) is not None), None)
    return None
