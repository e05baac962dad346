"""The job that embeds a whole corpus, or an atlas file that is ranked first with the model's own vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genescale.platform.errors import NotFoundError
from genescale.platform.storage import join
from genescale.serving.jobs.records import File
from genescale.serving.jobs.work import Desk

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus

EMBEDDINGS, MANIFEST_FILE = "embeddings.parquet", "manifest.json"
ACCOUNT = "cells.json"
"""What became of the cells of an atlas file."""
# A corpus is a Delta table, which no atlas of any format is.
DELTA_LOG = "_delta_log"
VECTORS, RANKED, PINNED = "embeddings", "corpus", "pinned.json"


def embed(desk: Desk) -> tuple[File, ...]:
    """Embed every cell; units that an earlier attempt wrote are not computed again."""
    from genescale.training.embed import EmbedConfig, embed_corpus
    from genescale.training.embeddings import read_manifest

    config, asked = desk.config, desk.asked
    corpus = _corpus(desk)
    spread = config.jobs.spread
    folder = join(desk.results, VECTORS)
    desk.run.log_params({"source": asked["source"], "corpus_version": corpus.version, "cells": corpus.n_cells})
    report = embed_corpus(
        desk.bundle,
        corpus,
        out_uri=folder,
        store=desk.store,
        config=EmbedConfig(
            layer=asked["layer"],
            pooling=asked["pooling"],
            device=config.device,
            run_in="cluster" if spread else "process",
            actors=spread,
            tokens_per_batch=config.tokens_per_batch,
        ),
        progress=desk.pace,
    )
    desk.run.log_metrics({"cells": report.cells, "tokens": report.tokens, "tokens_per_s": report.tokens_per_s})
    names = read_manifest(folder, desk.store).files
    merged = merge_parquet([join(folder, name) for name in names], desk, EMBEDDINGS)
    manifest = desk.kept(MANIFEST_FILE, f"{VECTORS}/{MANIFEST_FILE}")
    ranked = [desk.kept(ACCOUNT, ACCOUNT)] if desk.store.exists(join(desk.results, ACCOUNT)) else []
    return (merged, manifest, *ranked)


def merge_parquet(addresses: Iterable[str], desk: Desk, name: str) -> File:
    """One file of the rows of many, in their order, row group by row group, so that memory stays small."""
    import pyarrow.parquet as pq

    path, writer = desk.scratch / name, None
    for address in addresses:
        desk.pace.check()
        with desk.store.open(address) as file:
            part = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(part.num_row_groups):
                table = part.read_row_group(group)
                writer = writer or _writer(path, table.schema)
                writer.write_table(table)
    if writer is not None:
        writer.close()
    return desk.keep(path)


def pinned(desk: Desk, address: str) -> Corpus:
    """The corpus at `address`, in the version that the first attempt found: a later one must go on with the same."""
    from genescale.ingestion.corpus import Corpus, parse_reference

    note = join(desk.results, PINNED)
    try:
        version = json.loads(desk.store.read(note))["corpus_version"]
        return Corpus.open(parse_reference(address)[0], desk.store, version=version)
    except NotFoundError:
        corpus = Corpus.open(address, desk.store)
        desk.store.write(note, json.dumps({"corpus_version": corpus.version}).encode())
        return corpus


def _writer(path: Path, schema: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def _corpus(desk: Desk) -> Corpus:
    from genescale.ingestion.corpus import Corpus

    source = desk.asked["source"]
    if _is_corpus(desk, source):
        return pinned(desk, source)
    address = join(desk.results, RANKED)
    # Written last: what an attempt that was cut off before left behind has no account, so nothing of it counts.
    if desk.store.exists(join(desk.results, ACCOUNT)):
        return Corpus.open(address, desk.store)
    return _ranked(desk, source, address)


def _is_corpus(desk: Desk, source: str) -> bool:
    """Whether a corpus lies there, also one that cannot be opened: what is wrong with it is then told."""
    from genescale.ingestion.corpus import parse_reference

    address, _ = parse_reference(source)
    return not desk.store.exists(address) and bool(desk.store.list(join(address, DELTA_LOG)))


def _ranked(desk: Desk, source: str, address: str) -> Corpus:
    """The cells of an atlas file as a corpus below the results, by the ranks of the model's vocabulary."""
    from genescale.ingestion.config import IngestConfig
    from genescale.ingestion.local_corpus import local_corpus

    desk.store.delete_folder(address)
    desk.pace.start(None, "cells ranked")
    # Every cell that the model can see is embedded; rules that keep a corpus good for training do not hold here.
    config = IngestConfig(min_genes=1, primary_only=False, filter_pass=False)
    made = local_corpus(source, address, desk.bundle.vocabulary, desk.store, config=config)
    tally = made.tally
    account = {"read": tally.read, "kept": tally.kept, "dropped": dict(tally.dropped), "notes": list(made.notes)}
    desk.store.write(join(desk.results, ACCOUNT), json.dumps(account, indent=1).encode())
    desk.run.log_metrics({"cells_read": tally.read, "cells_dropped": tally.read - tally.kept})
    return made.corpus
