"""Many small jobs on Ray Data: descriptions go out, answers come back as they finish."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from genescale.platform.errors import ClusterError

Work = Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]
"""One job: takes its description (JSON) and returns an answer (JSON) and a payload of bytes; must not raise."""


def fan_out(items: Sequence[dict[str, Any]], work: Work) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Run `work` on every item in its own Ray task and yield the answers in the order in which they come.

    Ray repeats a task whose worker died, so `work` must give the same result when it is done twice.
    """
    if not items:
        return
    import ray.data
    from ray.exceptions import RayError

    described = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(described, override_num_blocks=len(described)).map_batches(
        functools.partial(_answered, work=work), batch_size=1, batch_format="pyarrow"
    )
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["answer"]), row["payload"]
    except RayError as error:
        raise ClusterError(
            f"Ray could not finish the tasks: {str(error).strip().splitlines()[-1]}.",
            fix="See the logs of Ray's workers.",
        ) from error


def _answered(batch: pa.Table, *, work: Work) -> pa.Table:
    answers = [work(json.loads(text)) for text in batch.column("item").to_pylist()]
    return pa.table(
        {
            "answer": pa.array([json.dumps(answer) for answer, _ in answers], pa.string()),
            "payload": pa.array([payload for _, payload in answers], pa.large_binary()),
        }
    )
