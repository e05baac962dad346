"""From files to work units: each file is opened once, judged, and cut into row ranges of bounded size."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.h5ad import AUTO, Atlas, open_atlas
from genescale.platform.errors import GenescaleError, SettingsError
from genescale.platform.log import get_logger
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Entry, Store

MAX_UNIT_CELLS = 65_536
BLOCK_NONZEROS = 1_000_000
log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How atlas files are read."""

    counts_slot: str = AUTO
    """Where raw counts stand: `auto` (raw.X if it holds counts, else X), `X`, `raw.X` or `layers/NAME`."""
    unit_nonzeros: int = 8_000_000
    """Stored counts that one task turns into one part file; it reads a million of them at a time."""

    def __post_init__(self) -> None:
        if self.unit_nonzeros < 1:
            raise SettingsError(f"unit_nonzeros is {self.unit_nonzeros}.", fix="Use a million or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One task: rows start … stop-1 of a file whose content is pinned by its tag."""

    uri: str
    etag: str
    slot: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a file or unit was refused: the error's stable code and its text."""

    code: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspected:
    """What one file looked like: its units, or why it cannot be read; `facts` are what the stage wanted to know."""

    uri: str
    units: tuple[Unit, ...] = ()
    failure: Failure | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def n_cells(self) -> int:
        """Cells of the file."""
        return sum(unit.stop - unit.start for unit in self.units)


Judge = Callable[[Atlas], dict[str, Any]]
"""Looks at an open atlas, raises GenescaleError to refuse it, and returns facts (JSON) for the driver."""


def inspect_files(
    files: Sequence[Entry], judge: Judge, *, store: Store, config: ReadConfig, progress: Progress = SILENT
) -> list[Inspected]:
    """Open every file in a Ray task and cut the good ones into units; a bad file is reported, never raised."""
    progress.start(len(files), "files")
    work = functools.partial(_inspect, judge=judge, store=store, config=config)
    found = []
    for answer, _ in fan_out([{"uri": file.uri, "etag": file.etag} for file in files], work):
        found.append(_inspected(answer))
        progress.advance()
    return sorted(found, key=lambda file: file.uri)


def _inspect(item: dict[str, Any], *, judge: Judge, store: Store, config: ReadConfig) -> tuple[dict[str, Any], bytes]:
    def look() -> dict[str, Any]:
        with open_atlas(item["uri"], store, counts_slot=config.counts_slot, etag=item["etag"]) as atlas:
            ranges = list(cut(atlas.indptr, config.unit_nonzeros, MAX_UNIT_CELLS))
            return {"slot": atlas.slot, "ranges": ranges, "facts": judge(atlas)}

    return {**item, **guarded(look, where=item["uri"])}, b""


def _inspected(answer: dict[str, Any]) -> Inspected:
    if "failure" in answer:
        return Inspected(uri=answer["uri"], failure=Failure(**answer["failure"]))
    pinned = {"uri": answer["uri"], "etag": answer["etag"], "slot": answer["slot"]}
    units = tuple(Unit(**pinned, start=start, stop=stop) for start, stop in answer["ranges"])
    return Inspected(uri=answer["uri"], units=units, facts=answer["facts"])


def cut(indptr: npt.NDArray[np.int64], max_nonzeros: int, max_cells: int) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges with at most `max_nonzeros` stored values (but at least one row) and `max_cells` rows."""
    start, n_cells = 0, len(indptr) - 1
    while start < n_cells:
        fitting = int(np.searchsorted(indptr, indptr[start] + max_nonzeros, side="right")) - 1
        stop = min(max(fitting, start + 1), start + max_cells, n_cells)
        yield start, stop
        start = stop


def blocks(atlas: Atlas, unit: Unit) -> Iterator[tuple[int, int]]:
    """Row ranges of a unit that are read at once, so that memory is bounded by a block, not by a unit."""
    inside = atlas.indptr[unit.start : unit.stop + 1]
    return ((unit.start + a, unit.start + b) for a, b in cut(inside, BLOCK_NONZEROS, MAX_UNIT_CELLS))


def guarded(work: Callable[[], dict[str, Any]], *, where: str) -> dict[str, Any]:
    """The work's answer with its duration, or its failure as data: one bad file must not end the run of the others."""
    began = time.perf_counter()
    try:
        answer = work()
    except GenescaleError as error:
        answer = {"failure": {"code": error.code, "message": str(error)}}
    except Exception as error:
        log.exception("unexpected error in %s", where)
        text = f"{where}: unexpected {type(error).__name__}: {error}. Please report it."
        answer = {"failure": {"code": GenescaleError.code, "message": text}}
    return {**answer, "seconds": time.perf_counter() - began}
