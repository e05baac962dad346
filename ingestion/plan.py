"""From files to work units: each file is opened once, judged, and cut into row ranges of bounded size."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.sources import SourceSpec, verify_digest
from genescale.platform.errors import GenescaleError, SettingsError
from genescale.platform.log import get_logger
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store

AUTO = "auto"
MAX_UNIT_CELLS = 65_536
BLOCK_NONZEROS = 4_000_000
log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How atlas files are read."""

    counts_slot: str = AUTO
    """Where raw counts stand: `X`, `raw.X`, `layers/NAME`, or `auto` for the first of these that holds counts."""
    allow_fractional: bool = False
    """Take counts that are not whole numbers, such as those corrected for ambient RNA."""
    allow_unfiltered: bool = False
    """Take 10x matrices that hold every barcode, empty droplets too."""
    unit_nonzeros: int = 16_000_000
    """Stored counts that one task turns into one part file; it reads a few million of them at a time."""

    def __post_init__(self) -> None:
        if self.unit_nonzeros < 1:
            raise SettingsError(f"unit_nonzeros is {self.unit_nonzeros}.", fix="Use a million or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """Rows start … stop-1 of a file whose content is pinned by its tag; they become one part."""

    uri: str
    etag: str
    slot: str
    start: int
    stop: int
    whole: bool = False
    """True when this is the whole of a file that can only be read from its beginning to its end: see `pieces`."""


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
    payload: bytes = b""

    @property
    def n_cells(self) -> int:
        """Cells of the file."""
        return sum(unit.stop - unit.start for unit in self.units)


Judge = Callable[[Atlas, Any], tuple[dict[str, Any], bytes]]


def inspect_files(
    specs: Sequence[SourceSpec],
    judge: Judge,
    *,
    store: Store,
    configs: Mapping[str, ReadConfig],
    progress: Progress = SILENT,
) -> list[Inspected]:
    """Open every file in a Ray task and cut the good ones into units; a bad file is reported, never raised.

    configs: how to read each file, by address; judge: takes the open atlas and that config, raises GenescaleError to
    refuse the file, and returns facts (JSON) and a payload for the driver. The answers come in the order of `specs`.
    """
    progress.start(len(specs), "files")
    work = functools.partial(_inspect, judge=judge, store=store, configs=dict(configs))
    found = {}
    items = [{"uri": spec.uri, "etag": spec.etag, "sha256": spec.sha256} for spec in specs]
    for answer, payload in fan_out(items, work):
        found[answer["uri"]] = _inspected(answer, payload)
        progress.advance()
    return [found[spec.uri] for spec in specs]


def _inspect(
    item: dict[str, Any], *, judge: Judge, store: Store, configs: Mapping[str, ReadConfig]
) -> tuple[dict[str, Any], bytes]:
    config, payload = configs[item["uri"]], b""

    def look() -> dict[str, Any]:
        nonlocal payload
        if item["sha256"]:
            verify_digest(item["uri"], item["sha256"], store)
        with opened(item["uri"], item["etag"], config.counts_slot, config, store) as atlas:
            facts, payload = judge(atlas, config)
            return {"slot": atlas.slot, "facts": facts, **planned(atlas, config)}

    return {**item, **guarded(look, where=item["uri"])}, payload


def opened(uri: str, etag: str, slot: str, config: ReadConfig, store: Store) -> Any:
    """The atlas at `uri`, opened as `config` says (a context manager)."""
    return open_atlas(
        uri,
        store,
        counts_slot=slot,
        etag=etag,
        allow_fractional=config.allow_fractional,
        allow_unfiltered=config.allow_unfiltered,
    )


def planned(atlas: Atlas, config: ReadConfig) -> dict[str, Any]:
    """The row ranges of an atlas: one for the whole file when it cannot be read in parts."""
    if atlas.matrix.sequential:
        return {"ranges": [(0, atlas.n_cells)], "whole": True}
    ranges = list(cut(atlas.matrix.stored_before, config.unit_nonzeros, MAX_UNIT_CELLS))
    return {"ranges": ranges, "whole": False}


def _inspected(answer: dict[str, Any], payload: bytes) -> Inspected:
    if "failure" in answer:
        return Inspected(uri=answer["uri"], failure=Failure(**answer["failure"]))
    pinned = {"uri": answer["uri"], "etag": answer["etag"], "slot": answer["slot"], "whole": answer["whole"]}
    units = tuple(Unit(**pinned, start=start, stop=stop) for start, stop in answer["ranges"])
    return Inspected(uri=answer["uri"], units=units, facts=answer["facts"], payload=payload)


def cut(stored_before: npt.NDArray[np.int64], max_nonzeros: int, max_cells: int) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges with at most `max_nonzeros` stored values (but at least one row) and `max_cells` rows.

    As few as possible and about equally large: workers that take turns end together, and no part is a small rest.
    """
    start, least_stops = 0, _least_stops(stored_before, max_nonzeros, max_cells)
    for place, least in enumerate(least_stops):
        before = stored_before[start]
        share = -(-(stored_before[-1] - before) // (len(least_stops) - place))
        even = int(np.searchsorted(stored_before, before + share))
        fullest = int(np.searchsorted(stored_before, before + max_nonzeros, side="right")) - 1
        stop = max(min(max(even, least), fullest, start + max_cells), start + 1)
        yield start, stop
        start = stop


def _least_stops(stored_before: npt.NDArray[np.int64], max_nonzeros: int, max_cells: int) -> list[int]:
    """The row that each range has to reach, so that what follows fits into the ranges that are left."""
    stops, stop = [], len(stored_before) - 1
    while stop > 0:
        stops.append(stop)
        fitting = int(np.searchsorted(stored_before, stored_before[stop] - max_nonzeros))
        stop = min(max(fitting, stop - max_cells), stop - 1)
    return stops[::-1]


def pieces(atlas: Atlas, unit: Unit, unit_nonzeros: int) -> list[Unit]:
    """The unit itself, or, when it is a whole file, the row ranges that become one part each."""
    if not unit.whole:
        return [unit]
    ranges = cut(atlas.matrix.stored_before, unit_nonzeros, MAX_UNIT_CELLS)
    return [dataclasses.replace(unit, start=start, stop=stop, whole=False) for start, stop in ranges]


def blocks(atlas: Atlas, unit: Unit) -> Iterator[tuple[int, int]]:
    """Row ranges of a unit that are read at once, so that memory is bounded by a block, not by a unit."""
    inside = atlas.matrix.stored_before[unit.start : unit.stop + 1]
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
