"""The job that answers a question for perturbations which is too large for one request.

It is answered by the code of `/v1/perturbations`, some cells at a time; each part is kept when it is done. The result
is the whole answer as JSON, and as a flat table with one row for each number.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from genescale.platform.storage import join
from genescale.serving.answering.questions import Sent
from genescale.serving.config import Limits
from genescale.serving.jobs.records import File
from genescale.serving.jobs.settings import JobsConfig
from genescale.serving.jobs.work import Desk

if TYPE_CHECKING:
    import pyarrow as pa

    from genescale.serving.answering.answers import Answers
    from genescale.serving.answering.perturbations import PerturbationPlan
    from genescale.serving.schemas_perturb import PerturbationsAnswered

SHIFTS, ANSWER, PARTS = "shifts.parquet", "answer.json", "parts"
# Cells times edits that are answered before they are kept: what an attempt that is cut off loses at most.
PAIRS_PER_PART = 2_048


def perturb(desk: Desk) -> tuple[File, ...]:
    """Answer every cell; parts that an earlier attempt kept are not computed again."""
    answers = _answers(desk)
    cells, edits = desk.asked["cells"], desk.asked["edits"]
    step = max(1, PAIRS_PER_PART // len(edits))
    desk.run.log_params({"cells": len(cells), "edits": len(edits)})
    desk.pace.start(len(cells), "cells")
    there = {entry.uri.rpartition("/")[2] for entry in desk.store.list(join(desk.results, PARTS))}
    names = []
    for start in range(0, len(cells), step):
        name = f"cells-{start:09d}.json"
        some = cells[start : start + step]
        if name not in there:
            body = json.dumps({**desk.asked, "cells": some}).encode()
            desk.store.write(join(desk.results, PARTS, name), asyncio.run(answers.perturbations(Sent(body=body))))
        names.append(join(desk.results, PARTS, name))
        desk.pace.advance(len(some))
    return _result(desk, names)


def job_limits(limits: Limits, config: JobsConfig) -> Limits:
    """The limits of a service as they hold for a question that is a job."""
    return replace(limits, max_cells=config.max_cells, max_tokens=config.max_tokens)


def written(plan: PerturbationPlan) -> dict[str, Any]:
    """A question as JSON that can be answered at any later time: published states are vectors in it, files cells."""
    content: dict[str, Any] = plan.asked.model_dump(exclude_unset=True)
    if plan.asked.states:
        vectors = plan.comparison.states_sd
        assert vectors is not None
        pairs = zip(plan.asked.states, vectors, strict=False)
        content["states"] = [{"name": state.name, "vector": vector.tolist()} for state, vector in pairs]
    if "cells" not in content:
        content["cells"] = [
            {"tokens": cell.uncropped.tolist(), **({"id": cell.facts.id} if cell.facts.id is not None else {})}
            for cell in plan.cells
        ]
    return content


def _answers(desk: Desk) -> Answers:
    from genescale.serving.answering.answers import Answers
    from genescale.serving.classifier import heads_on
    from genescale.serving.facts import describe
    from genescale.serving.in_process import InProcessModel
    from genescale.training.embedder import Embedder

    config, bundle = desk.config, desk.bundle
    embedder = Embedder.load(
        bundle, device=config.device, tokens_per_batch=config.tokens_per_batch, attention=config.attention
    )
    model = InProcessModel(embedder, heads_on(embedder, bundle), tokens_per_batch=config.tokens_per_batch)
    info = describe(desk.ticket.model, bundle, config)
    return Answers(model, bundle.vocabulary, info, job_limits(config.limits, config.jobs))


def _result(desk: Desk, names: Sequence[str]) -> tuple[File, ...]:
    """The parts as one table and as one JSON text, written part by part, so that memory stays small."""
    import pyarrow.parquet as pq

    from genescale.serving.schemas_perturb import PerturbationsAnswered

    table_path, answer_path = desk.scratch / SHIFTS, desk.scratch / ANSWER
    first, timings = 0, dict.fromkeys(("parse", "queue", "forward"), 0.0)
    with (
        pq.ParquetWriter(table_path, shifts_schema(), compression="zstd", write_page_checksum=True) as writer,
        answer_path.open("w", encoding="utf-8") as out,
    ):
        for name in names:
            desk.pace.check()
            data = desk.store.read(name)
            part = json.loads(data)
            writer.write_table(shifts_table(PerturbationsAnswered.model_validate_json(data), first=first))
            if not first:
                facts = {key: value for key, value in part.items() if key not in ("cells", "timings_ms")}
                out.write(json.dumps(facts)[:-1] + ', "cells": [')
            out.write(("," if first else "") + json.dumps(part["cells"])[1:-1])
            timings = {key: value + part["timings_ms"][key] for key, value in timings.items()}
            first += len(part["cells"])
        out.write('], "timings_ms": ' + json.dumps(timings) + "}")
    return (desk.keep(table_path), desk.keep(answer_path))


def shifts_schema() -> pa.Schema:
    """Columns of the flat table: one row for each number that an edit of a cell was answered with."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("cell", pa.int32(), nullable=False),
            pa.field("cell_id", pa.string()),
            pa.field("edit", pa.int32(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("genes", pa.list_(pa.string()), nullable=False),
            pa.field("measure", pa.string(), nullable=False),
            pa.field("of", pa.string()),
            pa.field("value", pa.float64()),
            pa.field("reason", pa.string(), nullable=False),
        ]
    )


def shifts_table(answered: PerturbationsAnswered, *, first: int = 0) -> pa.Table:
    """The flat table of some cells; `first` is the place of the first of them in the question.

    `measure` and `of` are those of the Arrow form of `/v1/perturbations`.
    """
    import pyarrow as pa

    from genescale.serving.forms.arrow_shifts import rows_of

    rows = [
        {
            "cell": first + at,
            "cell_id": cell.id,
            "edit": number,
            "kind": edit.kind,
            "genes": edit.genes,
            "measure": what,
            "of": of,
            "value": value,
            "reason": edit.reason,
        }
        for at, cell in enumerate(answered.cells)
        for number, edit in enumerate(cell.edits)
        for what, of, value in rows_of(edit)
    ]
    return pa.Table.from_pylist(rows, schema=shifts_schema())
