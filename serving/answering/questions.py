"""A question in any form that it may come in: what it asks, and the cells that it asks of.

    JSON           options and cells in one object
    Arrow          one row a cell, the options as JSON in the schema's metadata (`arrow_cells`)
    h5ad           a file of cells, the options as query parameters (`h5ad_cells`)

Options are read and checked before the cells are: a question that asks for the impossible costs no tokenising.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from genescale.serving.answering.cells import PreparedCell
from genescale.serving.answering.intake import Intake
from genescale.serving.forms.arrow_cells import open_request, read_cells
from genescale.serving.forms.h5ad_cells import FileOptions, read_file
from genescale.serving.forms.media import ARROW_TYPE, H5AD_TYPE
from genescale.serving.forms.parameters import Parameters, check_none, read_parameters, split
from genescale.serving.problems import JSON_TYPE
from genescale.serving.schemas import Asked, CellAsked, FileFacts

Options = TypeVar("Options", bound=BaseModel)
Plan = TypeVar("Plan")
# A cell or some are read and rendered in about a millisecond, where they came in: to change threads and back takes
# longer. The worst that a small body asks for, 256 cells of one gene, takes 14 ms of the event loop.
SMALL_BODY_BYTES, SMALL_ANSWER_VALUES = 32 * 1024, 2_048
_FILES = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genescale-files")


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a caller sent."""

    body: bytes
    form: str = JSON_TYPE
    """The media type that the body is declared as."""
    parameters: Parameters = ()
    """Of the query, in order; a name may repeat. They are options of a form that has no place for options."""


@dataclass(frozen=True, eq=False)
class ReadCells:
    """The cells of a question, tokenised, and the file that they came in."""

    cells: list[PreparedCell]
    file: FileFacts | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all cells, as the model takes them."""
        return sum(len(cell.tokens) for cell in self.cells)


@dataclass(frozen=True, kw_only=True, eq=False)
class Question(Generic[Options]):
    """What is asked, and a way to the cells."""

    options: Options
    read_cells: Callable[[], ReadCells]
    """Raises InputError and LimitError, which name the cell."""


def read_question(intake: Intake, sent: Sent, whole: type[Asked], options: type[Options]) -> Question[Options]:
    """The question in what was sent; `whole` is `options` with cells. Raises InputError, LimitError, RefusedError."""
    if sent.form == H5AD_TYPE:
        of_question, of_file = split(sent.parameters, options, FileOptions)
        which = read_parameters(FileOptions, of_file)
        return Question(
            options=read_parameters(options, of_question),
            read_cells=lambda: ReadCells(*read_file(sent.body, which, intake)),
        )
    check_none(sent.parameters)
    if sent.form == ARROW_TYPE:
        request = open_request(sent.body, intake)
        asked = intake.read(options, request.options)
        return Question(options=asked, read_cells=lambda: ReadCells(read_cells(request, intake)))
    both = intake.read(whole, sent.body)
    cells: list[CellAsked] = both.cells  # type: ignore[attr-defined]
    return Question(options=both, read_cells=lambda: ReadCells(intake.cells(cells)))  # type: ignore[arg-type]


async def planned(plan: Callable[[Sent], Plan], sent: Sent) -> Plan:
    """What `plan` makes of what was sent, on a thread unless it is small: reading and ranking are work for a processor.

    Files wait for each other: the HDF5 library does one thing at a time, and each file in memory may unpack to a lot.
    """
    if sent.form != H5AD_TYPE:
        return plan(sent) if len(sent.body) <= SMALL_BODY_BYTES else await asyncio.to_thread(plan, sent)
    # The thread acts for this request: its tokens go on its key.
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_FILES, context.run, plan, sent)


async def rendered(render: Callable[[], bytes], n_values: int) -> bytes:
    """An answer of so many numbers, rendered on a thread unless it is small."""
    return render() if n_values <= SMALL_ANSWER_VALUES else await asyncio.to_thread(render)
