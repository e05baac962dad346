"""Copy a version of a corpus into a form that other tools open: plain Parquet, or a Hugging Face dataset on disk.

Parquet: files with one table of all columns, tokens as lists of int32, for any tool that reads Parquet. Hugging Face:
the folder that `datasets.load_from_disk` reads, as published Geneformer training code does (`input_ids`, `length` and
metadata; `labels` as JSON text, because that library has no maps). Cells stand in the corpus's order. The vocabulary
and a manifest go into `_genescale/` beside the files, which readers of folders skip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.fan_out import fan_out
from genescale.ingestion.plan import guarded
from genescale.ingestion.schema import PARTITION_COLUMN, TOKEN_COLUMN, corpus_schema
from genescale.ingestion.table.delta_table import TableFile
from genescale.ingestion.table.part_files import done, read_rows
from genescale.platform.address import parse
from genescale.platform.errors import AlreadyExistsError, SettingsError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store, join

Format = Literal["parquet", "huggingface"]
FORMATS: tuple[Format, ...] = ("parquet", "huggingface")
FILE_CELLS = 131_072
ROW_GROUP_CELLS = 4_096
# Record batches of this size are what `datasets` writes itself, and what it looks cells up by.
BATCH_CELLS = 1_000
LABELS = "labels"
Write = Callable[[pa.Table], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written: names of the files with their cells, in order."""

    source: str
    output: str
    format: Format
    cells: int
    files: tuple[tuple[str, int], ...]
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return dataclasses.asdict(self)


def export(
    corpus: Corpus,
    output_uri: str,
    *,
    format: Format,
    datasets: Sequence[str] = (),
    file_cells: int = FILE_CELLS,
    progress: Progress = SILENT,
) -> ExportReport:
    """Write the cells of this version (or of some datasets) into an empty folder; Ray must run.

    file_cells: cells of one file at least, because files hold whole parts. Raises AlreadyExistsError when the folder
    is not empty, CorpusError for a dataset that is not there.
    """
    if format not in FORMATS:
        raise SettingsError(f"'{format}' is not a format.", where="format", fix=f"Use {' or '.join(FORMATS)}.")
    if file_cells < 1:
        raise SettingsError(f"{file_cells} is too small.", where="file_cells", fix="Use 1 or more.")
    output_uri = parse(output_uri).uri
    if corpus.store.list(output_uri):
        raise AlreadyExistsError("the folder is not empty.", where=output_uri, fix="Choose another, or empty it.")
    for name in datasets:
        corpus.dataset(name)
    groups = list(_groups(corpus, set(datasets), file_cells))
    progress.start(sum(file.rows for group in groups for file in group), "cells")
    made = _written(corpus, output_uri, groups, format, tuple(datasets), progress)
    if format == "huggingface":
        _describe(output_uri, corpus, [answer["name"] for answer in made], datasets)
    report = ExportReport(
        source=f"{corpus.uri}@{corpus.version}",
        output=output_uri,
        format=format,
        cells=sum(answer["cells"] for answer in made),
        files=tuple((answer["name"], answer["cells"]) for answer in made),
        size_bytes=sum(answer["size_bytes"] for answer in made),
    )
    corpus.store.write(join(output_uri, "_genescale", "vocabulary.parquet"), corpus.vocabulary.to_parquet_bytes())
    manifest = {**report.to_dict(), "vocabulary_digest": corpus.vocabulary.digest, "datasets": list(datasets)}
    # Last, so that a folder with a manifest is whole.
    corpus.store.write(join(output_uri, "_genescale", "export.json"), json.dumps(manifest, indent=2).encode())
    return report


def _groups(corpus: Corpus, datasets: set[str], file_cells: int) -> Iterator[list[TableFile]]:
    """Neighbouring parts for each file."""
    group: list[TableFile] = []
    for file in corpus.files:
        if datasets and file.dataset_id and file.dataset_id not in datasets:
            continue
        group.append(file)
        if sum(member.rows for member in group) >= file_cells:
            yield group
            group = []
    if group:
        yield group


def _written(
    corpus: Corpus,
    output_uri: str,
    groups: Sequence[Sequence[TableFile]],
    format: Format,
    datasets: tuple[str, ...],
    progress: Progress,
) -> list[dict[str, Any]]:
    pattern = "data-{:05d}-of-{:05d}.arrow" if format == "huggingface" else "part-{:05d}-of-{:05d}.parquet"
    items = [
        {"name": pattern.format(number, len(groups)), "files": [dataclasses.asdict(file) for file in group]}
        for number, group in enumerate(groups)
    ]
    work = functools.partial(
        _write_file,
        corpus_uri=corpus.uri,
        output_uri=output_uri,
        format=format,
        datasets=datasets,
        schema=corpus_schema(corpus.vocabulary.token_dtype),
        store=corpus.store,
    )
    made = []
    for answer, _ in fan_out(items, work):
        made.append(done(answer, output_uri, fix="Empty the folder and run it again."))
        progress.advance(sum(file["rows"] for file in answer["files"]))
    return sorted(made, key=lambda answer: str(answer["name"]))


def _write_file(
    item: dict[str, Any],
    *,
    corpus_uri: str,
    output_uri: str,
    format: Format,
    datasets: tuple[str, ...],
    schema: pa.Schema,
    store: Store,
) -> tuple[dict[str, Any], bytes]:
    """One task: some parts become one file, a part at a time."""

    def work() -> dict[str, Any]:
        cells = 0
        with tempfile.TemporaryDirectory(prefix="genescale-export-") as folder:
            path = Path(folder) / item["name"]
            with _writer(path, format, schema) as write:
                for file in item["files"]:
                    table = read_rows(corpus_uri, TableFile(**file), schema, store)
                    if datasets:
                        table = table.filter(pc.is_in(table.column(PARTITION_COLUMN), pa.array(datasets)))
                    write(table)
                    cells += table.num_rows
            entry = store.upload(path, join(output_uri, item["name"]))
        return {"cells": cells, "size_bytes": entry.size_bytes}

    return {**item, **guarded(work, where=output_uri)}, b""


@contextlib.contextmanager
def _writer(path: Path, format: Format, schema: pa.Schema) -> Iterator[Write]:
    """A function that appends rows to a new file of the format."""
    target = exported_schema(schema, format)
    if format == "parquet":
        options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "write_page_checksum": True}
        with pq.ParquetWriter(path, target, **options) as parquet:
            yield lambda table: parquet.write_table(_converted(table, target), row_group_size=ROW_GROUP_CELLS)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, target) as stream:
            yield lambda table: stream.write_table(_converted(table, target), max_chunksize=BATCH_CELLS)


def exported_schema(schema: pa.Schema, format: Format) -> pa.Schema:
    """The columns of an exported file: tokens as int32 (int64 where they need it); labels as text where maps end."""
    tokens = pa.int64() if schema.field(TOKEN_COLUMN).type.value_type == pa.uint32() else pa.int32()
    types = {TOKEN_COLUMN: pa.list_(tokens), **({LABELS: pa.string()} if format == "huggingface" else {})}
    return pa.schema([pa.field(field.name, types.get(field.name, field.type)) for field in schema])


def _converted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.table([_cast(table.column(field.name), field.type) for field in schema], schema=schema)


def _cast(column: pa.ChunkedArray, target: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if pa.types.is_map(column.type) and pa.types.is_string(target):
        texts = [None if pairs is None else json.dumps(dict(pairs), ensure_ascii=False) for pairs in column.to_pylist()]
        return pa.array(texts, target)
    return column if column.type == target else column.cast(target)


def _describe(output_uri: str, corpus: Corpus, names: Sequence[str], datasets: Sequence[str]) -> None:
    """The two files by which `load_from_disk` knows a folder; it takes the columns from the data."""
    info = {"description": f"Genescale corpus {corpus.uri}@{corpus.version}", "citation": "", "license": ""}
    # The library keys its caches by this, so it must differ wherever the rows do.
    content = json.dumps([[file.path for file in corpus.files], list(names), list(datasets)])
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    corpus.store.write(join(output_uri, "dataset_info.json"), json.dumps(info, indent=2).encode())
    corpus.store.write(join(output_uri, "state.json"), json.dumps(state, indent=2).encode())
