"""A corpus of one atlas, made in this process without a cluster: for an AnnData at hand and for small files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from genescale.ingestion.annotation.genes import GeneMap, map_genes
from genescale.ingestion.annotation.obs_columns import summed_notes
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.corpus import Corpus, NewPart
from genescale.ingestion.formats.memory_anndata import memory_atlas
from genescale.ingestion.intake import dataset_name
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.plan import MAX_UNIT_CELLS, Unit, cut
from genescale.ingestion.source_facts import check_tally
from genescale.ingestion.table.records import Source
from genescale.ingestion.tally import Tally
from genescale.ingestion.tokenise import write_part
from genescale.platform.errors import InputError, did_you_mean
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData

MEMORY_DATASET = "anndata"
DEFAULTS = IngestConfig()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LocalCorpus:
    """The corpus, and what became of the atlas's cells."""

    corpus: Corpus
    tally: Tally
    notes: tuple[str, ...]


def local_corpus(
    source: AnnData | str, uri: str, vocabulary: Vocabulary, store: Store, *, config: IngestConfig = DEFAULTS
) -> LocalCorpus:
    """Rank the cells of `source` (an AnnData in memory or the address of an atlas) into a new corpus at `uri`.

    config: as for any ingestion; its `where` is a condition on the atlas's own obs columns, and columns of `keep_obs`
    must exist. Raises what ingestion raises for files without raw counts or of another species.
    """
    with _opened(source, config, store) as atlas:
        _check_columns(atlas, config)
        genes = map_genes(atlas, vocabulary, rules=config)
        dataset_id = config.dataset_id or (dataset_name(source) if isinstance(source, str) else MEMORY_DATASET)
        corpus = Corpus.create(uri, vocabulary, store)
        parts, tally, notes = _parts(atlas, genes, corpus, dataset_id, config, store)
        check_tally(tally, config, where=atlas.uri)
        made_of = Source(
            uri=atlas.entry.uri,
            size_bytes=atlas.entry.size_bytes,
            etag=atlas.entry.etag,
            vocabulary_digest=vocabulary.digest,
            recipe=config.recipe(),
        )
        corpus = corpus.commit_source(made_of, dataset_id, parts, {"counts_slot": atlas.slot})
        said = (*atlas.notes, *genes.notes, *summed_notes(notes))
    return LocalCorpus(corpus=corpus, tally=tally, notes=said)


def _check_columns(atlas: Atlas, config: IngestConfig) -> None:
    for name in config.keep_obs:
        if name not in atlas.obs.columns:
            raise InputError(
                f"obs has no column '{name}'.",
                where=atlas.uri,
                fix=did_you_mean(name, atlas.obs.columns) or f"Columns: {', '.join(atlas.obs.columns[:20])}.",
            )


@contextlib.contextmanager
def _opened(source: AnnData | str, config: IngestConfig, store: Store) -> Iterator[Atlas]:
    options = {"counts_slot": config.counts_slot, "allow_fractional": config.allow_fractional}
    if not isinstance(source, str):
        yield memory_atlas(source, **options)  # type: ignore[arg-type]
        return
    with open_atlas(source, store, **options, allow_unfiltered=config.allow_unfiltered) as atlas:  # type: ignore[arg-type]
        yield atlas


def _parts(
    atlas: Atlas, genes: GeneMap, corpus: Corpus, dataset_id: str, config: IngestConfig, store: Store
) -> tuple[list[NewPart], Tally, list[str]]:
    parts, tally, notes = [], Tally(), []
    for start, stop in cut(atlas.matrix.stored_before, config.unit_nonzeros, MAX_UNIT_CELLS):
        answer, _ = write_part(
            Unit(uri=atlas.uri, etag=atlas.entry.etag, slot=atlas.slot, start=start, stop=stop),
            atlas,
            genes,
            vocabulary=corpus.vocabulary,
            cell_rules=config,
            obs_mapping=config.obs,
            allow_fractional=config.allow_fractional,
            bad_values=config.bad_values,
            corpus_uri=corpus.uri,
            dataset_id=dataset_id,
            store=store,
        )
        tally.add(Tally(**answer["tally"]))
        notes += answer["notes"]
        if answer["part"]:
            parts.append(NewPart(**answer["part"]))
    return parts, tally, notes
