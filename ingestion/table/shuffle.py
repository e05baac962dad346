"""A corpus in random order for training: every part holds cells of all datasets, placed by a keyed hash.

The first run shuffles all datasets; a later one reads only those that came in since, and appends them as shuffled parts
of their own, in one commit. Old and new parts are each in random order; training mixes them, because its batch plan
shuffles blocks across the whole corpus. A dataset that left the source or changed there cannot be taken out of shuffled
parts, so this asks for a rebuild: all parts are made anew, and earlier versions stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.schema import corpus_schema
from genescale.ingestion.table.commits import Change, apply, check_parts
from genescale.ingestion.table.delta_table import Table, TableFile
from genescale.ingestion.table.parts import ROW_GROUP_CELLS
from genescale.ingestion.table.records import CommitRecord, DatasetRecord, NewPart
from genescale.ingestion.table.shuffle_stages import Job, make_parts, make_runs
from genescale.platform.address import parse
from genescale.platform.errors import CorpusError, IntegrityError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import join

SCRATCH_FOLDER = "_genescale/shuffle"
TRANSACTION = "genescale/shuffle"
PART_CELLS = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """How cells are placed."""

    seed: int | None = None
    """Key of the hash; None takes that of the corpus that is there, and 0 for a new one."""
    part_cells: int = PART_CELLS
    """Cells of a part, on average."""
    row_group_cells: int = ROW_GROUP_CELLS
    """Cells that a reader decodes at once."""
    rebuild: bool = False
    """Make all parts anew, also those of datasets that are there."""

    def __post_init__(self) -> None:
        for name in ("part_cells", "row_group_cells"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}.", where=name, fix="Use 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleReport:
    """What was shuffled: `datasets` and `cells` that came in now, `parts` that were written for them."""

    source: str
    output: str
    seed: int
    datasets: tuple[str, ...]
    cells: int
    parts: int
    size_bytes: int
    rebuilt: bool

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return dataclasses.asdict(self)


def shuffle(
    source: Corpus, output_uri: str, *, config: ShuffleConfig = ShuffleConfig(), progress: Progress = SILENT
) -> ShuffleReport:
    """Bring the datasets of `source` that are not there yet into the shuffled corpus at `output_uri`; Ray must run.

    The parts depend on cells, seed and sizes only: not on workers, nor on how the source is cut into files. Raises
    CorpusError when datasets left the source or changed there (see `rebuild`), or when the output is another corpus.
    """
    source.refuse_shuffled("shuffling it again gives nothing new")
    if parse(output_uri).uri == source.uri:
        raise CorpusError("this is the corpus itself.", where=source.uri, fix="Give another address as --output.")
    output = Corpus.create(output_uri, source.vocabulary, source.store, layout="shuffled")
    seed = _seed(source, output, config)
    wanted = source.datasets() if config.rebuild else _new_datasets(source, output)
    report = ShuffleReport(
        source=f"{source.uri}@{source.version}",
        output=f"{output.uri}@{output.version}",
        seed=seed,
        datasets=tuple(record.dataset_id for record in wanted),
        cells=sum(record.n_cells for record in wanted),
        parts=0,
        size_bytes=0,
        rebuilt=config.rebuild,
    )
    if not wanted and not (config.rebuild and output.files):
        return report
    job = _job(source, output, wanted, seed, config)
    parts = _placed(source, job, wanted, progress)
    newest = _commit(source, output, parts, wanted, report)
    source.store.delete_folder(job.scratch_uri)
    return dataclasses.replace(
        report,
        output=f"{newest.uri}@{newest.version}",
        parts=len(parts),
        size_bytes=sum(part.size_bytes for part in parts),
    )


def _seed(source: Corpus, output: Corpus, config: ShuffleConfig) -> int:
    """The seed to use; CorpusError when the output was made from another corpus or with another seed."""
    newest = _newest_shuffle(output)
    if newest is None or config.rebuild:
        recorded = 0 if newest is None else int(newest.details["seed"])
        return recorded if config.seed is None else config.seed
    if newest.details["from"] != source.uri:
        raise CorpusError(
            f"it was shuffled from {newest.details['from']}.",
            where=output.uri,
            fix="Choose another --output, or give --rebuild to fill it from this corpus instead.",
        )
    recorded = int(newest.details["seed"])
    if config.seed not in (None, recorded):
        raise CorpusError(
            f"it was shuffled with the seed {recorded}.",
            where=output.uri,
            fix="Leave --seed out, choose another --output, or give --rebuild.",
        )
    return recorded


def _newest_shuffle(output: Corpus) -> CommitRecord | None:
    return next((record for record in output.history() if record.operation == "shuffle"), None)


def _new_datasets(source: Corpus, output: Corpus) -> list[DatasetRecord]:
    """Datasets that are not in the output yet; CorpusError when some of those that are have left or changed."""
    there = {record.dataset_id: record.source_identity for record in output.datasets()}
    now = {record.dataset_id: record.source_identity for record in source.datasets()}
    gone = sorted(there.keys() - now.keys())
    changed = sorted(name for name in there.keys() & now.keys() if there[name] != now[name])
    if gone or changed:
        said = [f"{what}: {', '.join(names)}" for what, names in (("removed", gone), ("replaced", changed)) if names]
        raise CorpusError(
            f"datasets of {source.uri} changed since it was shuffled ({'; '.join(said)}), and their cells stand in "
            "parts with those of others.",
            where=output.uri,
            fix="Give --rebuild to make all parts anew (earlier versions stay), or choose another --output.",
        )
    return [record for record in source.datasets() if record.dataset_id not in there]


def _job(source: Corpus, output: Corpus, wanted: Sequence[DatasetRecord], seed: int, config: ShuffleConfig) -> Job:
    cells = sum(record.n_cells for record in wanted)
    n_buckets = max(1, -(-cells // config.part_cells))
    first = 1 + max((int(file.path.split("part-")[1][:10]) for file in output.files), default=-1)
    # The same work after a run that was cut off has the same key, and finds what that run had finished.
    content = [
        [source.uri, source.version, [(record.dataset_id, record.source_identity) for record in wanted]],
        [seed, n_buckets, first, config.row_group_cells],
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return Job(
        source_uri=source.uri,
        output_uri=output.uri,
        scratch_uri=join(output.uri, SCRATCH_FOLDER, key),
        seed=seed,
        n_buckets=n_buckets,
        first_number=first,
        row_group_cells=config.row_group_cells,
        schema=corpus_schema(source.vocabulary.token_dtype),
        store=source.store,
    )


def _placed(source: Corpus, job: Job, wanted: Sequence[DatasetRecord], progress: Progress) -> list[NewPart]:
    names = {record.dataset_id for record in wanted}
    files = [file for file in source.files if file.dataset_id in names]
    cells = sum(file.rows for file in files)
    progress.start(2 * cells, "cells")
    parts = make_parts(job, make_runs(job, files, progress), progress)
    if sum(part.rows for part in parts) != cells:
        raise IntegrityError(
            f"{cells:,} cells went into the shuffle and {sum(part.rows for part in parts):,} came out.",
            where=job.scratch_uri,
            fix="Delete this folder and run it again; please report it if it happens again.",
        )
    return parts


def _commit(
    source: Corpus, output: Corpus, parts: Sequence[NewPart], wanted: Sequence[DatasetRecord], report: ShuffleReport
) -> Corpus:
    added = [TableFile(**dataclasses.asdict(part), dataset_id="") for part in parts]
    record = {
        "operation": "shuffle",
        "from": source.uri,
        "from_version": source.version,
        "seed": report.seed,
        "rebuilt": report.rebuilt,
        "cells": report.cells,
        "datasets": {
            dataset.dataset_id: {
                "kept": dataset.n_cells,
                "identity": dataset.source_identity,
                "source": dict(dataset.details.get("source", {})),
                "counts_slot": str(dataset.details.get("counts_slot", "")),
            }
            for dataset in wanted
        },
    }

    def decide(table: Table) -> Change:
        if table.files() != list(output.files):
            raise CorpusError("another shuffle changed it meanwhile.", where=output.uri, fix="Run it again.")
        # A rebuild with the same seed may give the same parts, and one commit cannot both add and remove a part.
        old = output.files if report.rebuilt else ()
        both = set(old) & set(added)
        return Change(
            record=record,
            added=[file for file in added if file not in both],
            removed=[file for file in old if file not in both],
            transactions=[TRANSACTION],
        )

    # A run that goes on after a long time takes over parts that are old enough for gc.
    check_parts(output, parts)
    apply(output.uri, output.store, decide)
    return output.at_newest()
