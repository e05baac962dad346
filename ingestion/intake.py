"""Which sources an ingestion has to read: what the corpus already holds is left out, what would clash is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genescale.ingestion.config import IngestConfig
from genescale.ingestion.corpus import Corpus
from genescale.ingestion.plan import Failure
from genescale.ingestion.reports.report import SourceReport
from genescale.ingestion.table.records import DatasetRecord, Source
from genescale.platform.errors import CorpusError
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.ingestion.sources import SourceSpec

ENDINGS = re.compile(r"(\.h5ad|\.loom|\.zarr(\.zip)?|\.zip|\.h5|\.hdf5|(\.?matrix)?\.mtx(\.gz)?)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """A source that is to be read, with its own options; replaces: it takes the place of a dataset that is there."""

    spec: SourceSpec
    config: IngestConfig
    source: Source
    dataset_id: str
    replaces: bool


def dataset_name(uri: str) -> str:
    """The name of a dataset from the name of its file: `lung atlas.h5ad` becomes `lung-atlas`."""
    stem = ENDINGS.sub("", uri.rstrip("/").rpartition("/")[2])
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:100].strip("._-")
    return plain or "dataset"


def sorted_out(
    specs: Sequence[SourceSpec],
    configs: Mapping[str, IngestConfig],
    corpus: Corpus | None,
    vocabulary: Vocabulary,
    corpus_uri: str,
) -> tuple[dict[str, SourceReport], list[Wanted]]:
    """A report for every source, and those that are still to be read, in the order given."""
    present = {record.dataset_id: record for record in corpus.datasets()} if corpus else {}
    history = {record.details.get("identity"): record for record in reversed(corpus.history())} if corpus else {}
    taken: dict[str, str] = {}
    reports: dict[str, SourceReport] = {}
    wanted: list[Wanted] = []
    for spec in specs:
        config = configs[spec.uri]
        source = Source(
            uri=spec.uri,
            size_bytes=spec.size_bytes,
            etag=spec.etag,
            vocabulary_digest=vocabulary.digest,
            recipe=config.recipe(),
        )
        name = config.dataset_id or dataset_name(spec.uri)
        if corpus and corpus.is_committed(source.identity):
            record = history[source.identity]
            reports[spec.uri] = SourceReport(uri=spec.uri, dataset_id=record.dataset_id, status="already_committed")
            reports[spec.uri].recall(record.details)
            reports[spec.uri].version = record.version
            continue
        clash = _clash(source, name, present, taken, corpus_uri, config)
        reports[spec.uri] = SourceReport(uri=spec.uri, dataset_id=name, status="refused", failure=clash)
        if clash is None:
            taken[name] = spec.uri
            replaces = name in present
            wanted.append(Wanted(spec=spec, config=config, source=source, dataset_id=name, replaces=replaces))
    return reports, wanted


def _clash(
    source: Source,
    name: str,
    present: Mapping[str, DatasetRecord],
    taken: Mapping[str, str],
    corpus_uri: str,
    config: IngestConfig,
) -> Failure | None:
    """Why a source cannot be added beside what is there: it would double cells, or share a name."""
    held = next((record for record in present.values() if record.source_uri == source.uri), None)
    if name in taken:
        what = f"another file of this run is dataset '{name}': {taken[name]}."
        error = CorpusError(what, where=source.uri, fix="Name it with --dataset-id, or in a list of sources.")
    elif held is not None and held.dataset_id != name:
        what = f"the corpus holds this file as dataset '{held.dataset_id}'."
        error = CorpusError(what, where=source.uri, fix=f"Give --dataset-id {held.dataset_id}, or remove it first.")
    elif held is not None and held.source_etag == source.etag and not config.replace:
        what = f"the corpus holds this file as dataset '{name}', made with other options or another release."
        fix = "Give --replace to make a new version of the dataset with these options."
        error = CorpusError(what, where=source.uri, fix=fix)
    elif held is None and name in present and not config.replace:
        what = f"another file is dataset '{name}' in {corpus_uri}: {present[name].source_uri}."
        fix = "Choose another --dataset-id, or give --replace if this file takes its place."
        error = CorpusError(what, where=source.uri, fix=fix)
    else:
        return None
    return Failure(code=error.code, message=str(error))


def history_details(report: SourceReport) -> dict[str, Any]:
    """What the corpus's history says of a source."""
    left_out = ("uri", "dataset_id", "status", "failure")
    return {key: value for key, value in report.to_dict().items() if key not in left_out}
