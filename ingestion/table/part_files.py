"""Rows of part files as tables, and new part files named by what is in them: for what rewrites or copies a corpus."""

from __future__ import annotations

import hashlib
import io
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.schema import PARTITION_COLUMN
from genescale.ingestion.table.delta_table import TableFile
from genescale.ingestion.table.parts import ROW_GROUP_CELLS, part_bytes
from genescale.ingestion.table.records import NewPart
from genescale.platform.errors import ClusterError, IntegrityError
from genescale.platform.storage import Store, join

DIGEST_BYTES = 12
NAMED_BY_CONTENT = re.compile(r"part-\d+-([0-9a-f]{24})\.parquet")


def read_rows(corpus_uri: str, file: TableFile, schema: pa.Schema, store: Store) -> pa.Table:
    """All rows of a part in this schema: columns it lacks are null, the dataset is the part's own where it has one.

    Raises IntegrityError when the part is not what its commit says.
    """
    uri = join(corpus_uri, file.path)
    fix = "Run `genescale corpus verify`; restore the file, or ingest its dataset again."
    data = store.read(uri)
    if len(data) != file.size_bytes:
        what = f"the part has {len(data):,} bytes, its commit says {file.size_bytes:,}."
        raise IntegrityError(what, where=uri, fix=fix)
    # Page checksums do not cover page headers and footer, the digest does.
    if (named := named_digest(file.path)) and content_digest(data) != named:
        raise IntegrityError("the part does not fit the digest in its name.", where=uri, fix=fix)
    try:
        parquet = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        table = parquet.read(columns=[name for name in schema.names if name in parquet.schema_arrow.names])
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"the part cannot be read: {error}.", where=uri, fix=fix) from error
    if table.num_rows != file.rows:
        raise IntegrityError(f"{table.num_rows} rows, its commit says {file.rows}.", where=uri, fix=fix)
    return pa.table([_column(table, field, file) for field in schema], schema=schema)


def _column(table: pa.Table, field: pa.Field, file: TableFile) -> pa.ChunkedArray | pa.Array:
    if field.name in table.column_names:
        return table.column(field.name)
    if field.name == PARTITION_COLUMN:
        return pa.repeat(pa.scalar(file.dataset_id, field.type), table.num_rows)
    return pa.nulls(table.num_rows, field.type)


def content_digest(data: bytes) -> str:
    """The digest of a part's bytes that its name carries (hex)."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def named_digest(path: str) -> str:
    """The digest that a part's name carries; empty for names that carry none."""
    match = NAMED_BY_CONTENT.fullmatch(path.rpartition("/")[2])
    return match[1] if match else ""


def write_rows(
    table: pa.Table, number: int, folder: str, *, corpus_uri: str, store: Store, row_group_cells: int = ROW_GROUP_CELLS
) -> NewPart:
    """Write rows as a part that is not committed yet; its name is its number and a digest of its bytes."""
    data = part_bytes(table, row_group_cells=row_group_cells)
    path = f"{folder}/part-{number:010d}-{content_digest(data)}.parquet"
    store.write(join(corpus_uri, path), data)
    return NewPart(path=path, rows=table.num_rows, size_bytes=len(data))


def done(answer: dict[str, Any], where: str, *, fix: str = "Nothing was changed; run it again.") -> dict[str, Any]:
    """The answer of a task, or its failure as a ClusterError: what rewrites or copies a corpus is whole or nothing."""
    if "failure" in answer:
        raise ClusterError(f"a task failed: {answer['failure']['message']}", where=where, fix=fix)
    return answer
