"""Gene symbols and the Ensembl ids they stand for: pinned tables, of HGNC, CELLxGENE or our own form, or harvested.

A symbol counts only when it names one gene: approved symbols come first, previous and alias symbols after them, and a
name that leads to several ids leads nowhere.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.annotation.species import ENSEMBL_ID
from genescale.platform.errors import AtlasError, InputError, SettingsError

if TYPE_CHECKING:
    from genescale.ingestion.atlas import Atlas
    from genescale.platform.storage import Store

APPROVED, FORMER = "approved", "former"
TABLE_SCHEMA = pa.schema(
    [
        pa.field("symbol", pa.string(), nullable=False),
        pa.field("gene_id", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("sources", pa.int32(), nullable=False),
    ]
)
MAX_TABLE_BYTES = 512 * 1024 * 1024
_FIX = "Give HGNC's complete set (.txt), CELLxGENE's gene table (.csv), or a table with the columns symbol and gene_id."
Pair = tuple[str, str, str]
"""Symbol, gene id, and `approved` or `former`."""


@dataclasses.dataclass(frozen=True, eq=False)
class GeneTable:
    """Symbols (upper case) and the ids each may stand for; `name` is where the table came from."""

    approved: Mapping[str, frozenset[str]]
    former: Mapping[str, frozenset[str]]
    name: str = ""

    def find(self, symbol: str) -> tuple[str, ...]:
        """Ids that the symbol may stand for: one when it is unambiguous, none when it is not known."""
        key = symbol.strip().upper()
        return tuple(sorted(self.approved[key] if key in self.approved else self.former.get(key, ())))

    def is_former(self, symbol: str) -> bool:
        """Whether the symbol is known only as a previous or alias symbol."""
        key = symbol.strip().upper()
        return key not in self.approved and key in self.former

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the content, whatever the form of the file: pins what symbols stood for."""
        rows = sorted("\t".join(pair) + "\n" for pair in self.pairs())
        return hashlib.sha256("".join(rows).encode()).hexdigest()

    def pairs(self) -> Iterator[Pair]:
        """All symbols with their ids; an approved symbol of a gene without an id comes with an empty one."""
        for kind, names in ((APPROVED, self.approved), (FORMER, self.former)):
            yield from ((symbol, gene, kind) for symbol, genes in names.items() for gene in genes or ("",))

    @staticmethod
    def of(pairs: Iterable[Pair], *, name: str = "") -> GeneTable:
        """A table of these pairs; InputError when none of them leads to an id."""
        found: dict[str, dict[str, set[str]]] = {APPROVED: {}, FORMER: {}}
        for symbol, gene, kind in pairs:
            key, known = symbol.strip().upper(), bool(ENSEMBL_ID.fullmatch(gene))
            # CELLxGENE repeats the id of a gene that has no symbol.
            if not key or ENSEMBL_ID.fullmatch(key):
                continue
            # An approved symbol of a gene without an id stays taken: it must not lead to another gene as its alias.
            if known or kind == APPROVED:
                found[kind].setdefault(key, set()).update([gene] if known else [])
        if not any(found[APPROVED].values()) and not found[FORMER]:
            raise InputError("the table leads from no symbol to an Ensembl id.", where=name, fix=_FIX)
        approved, former = ({key: frozenset(ids) for key, ids in found[kind].items()} for kind in (APPROVED, FORMER))
        return GeneTable(approved, former, name)


def read_gene_table(uri: str, store: Store) -> GeneTable:
    """The table at `uri`: HGNC's complete set, CELLxGENE's gene table, or our Parquet or TSV; plain or gzip.

    Raises InputError when it is none of them, NotFoundError when it is not there.
    """
    data = store.read(uri, max_bytes=MAX_TABLE_BYTES)
    if data[:4] == b"PAR1":
        return _from_parquet(data, uri)
    text = _text(data, uri)
    head = text.partition("\n")[0]
    if "\t" in head:
        return _from_columns(list(csv.DictReader(io.StringIO(text), delimiter="\t")), uri)
    rows = list(csv.reader(io.StringIO(text)))
    if rows and len(rows[0]) >= 2 and ENSEMBL_ID.fullmatch(rows[0][0].strip().upper()):
        # CELLxGENE's tables have no header: id, symbol, version, length, biotype.
        return GeneTable.of(((row[1], row[0].upper(), APPROVED) for row in rows if len(row) >= 2), name=uri)
    return _from_columns(list(csv.DictReader(io.StringIO(text))), uri)


def _text(data: bytes, uri: str) -> str:
    try:
        if data[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(MAX_TABLE_BYTES)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"not a gene table ({error}).", where=uri, fix=_FIX) from error


def _from_parquet(data: bytes, uri: str) -> GeneTable:
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a gene table ({error}).", where=uri, fix=_FIX) from error
    return _from_columns(table.to_pylist(), uri)


def _from_columns(rows: Sequence[Mapping[str, Any]], uri: str) -> GeneTable:
    names = set(rows[0]) if rows else set()
    if {"symbol", "ensembl_gene_id"} <= names:
        return GeneTable.of(_hgnc(rows), name=uri)
    symbol = next((n for n in ("symbol", "gene_symbol", "gene_name", "feature_name") if n in names), None)
    gene = next((n for n in ("gene_id", "ensembl_id", "ensembl_gene_id", "feature_id") if n in names), None)
    if symbol is None or gene is None:
        raise InputError(f"not a gene table: its columns are {sorted(map(str, names))[:8]}.", where=uri, fix=_FIX)
    pairs = (
        (row[symbol] or "", (row[gene] or "").strip().upper().partition(".")[0], _kind(row.get("kind"), uri))
        for row in rows
    )
    return GeneTable.of(pairs, name=uri)


def _kind(value: str | None, uri: str) -> str:
    if value in (None, "", APPROVED, FORMER):
        return value or APPROVED
    raise InputError(f"'{value}' is no kind of symbol.", where=uri, fix=f"Use {APPROVED} or {FORMER}.")


def _hgnc(rows: Iterable[Mapping[str, str]]) -> Iterator[Pair]:
    for row in rows:
        gene = (row["ensembl_gene_id"] or "").strip().upper()
        if row.get("status", "Approved") != "Approved":
            continue
        yield row["symbol"], gene, APPROVED
        for name in f"{row.get('prev_symbol') or ''}|{row.get('alias_symbol') or ''}".split("|"):
            yield name, gene, FORMER


def write_gene_table(table: pa.Table, uri: str, store: Store) -> None:
    """Write a harvested table in the form that the ending of `uri` names: `.parquet` or `.tsv`."""
    if uri.endswith(".parquet"):
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        store.write(uri, sink.getvalue())
    elif uri.endswith(".tsv"):
        rows = zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
        lines = ["\t".join(table.column_names), *("\t".join(map(str, row)) for row in rows)]
        store.write(uri, ("\n".join(lines) + "\n").encode())
    else:
        raise SettingsError("the ending says no format.", where=uri, fix="Name the file .parquet or .tsv.")


def harvest(atlases: Iterable[Atlas]) -> pa.Table:
    """Symbols with ids from atlases that carry both: symbol, gene_id, kind, sources (atlases that say so), sorted.

    Pairs that disagree are all kept: a symbol with two ids is ambiguous to whoever reads the table. Raises AtlasError
    when no atlas carries both.
    """
    from genescale.ingestion.annotation.genes import ids_and_symbols

    pairs: Counter[tuple[str, str]] = Counter()
    seen = []
    for atlas in atlases:
        pairs.update(set(ids_and_symbols(atlas)))
        seen.append(atlas.uri)
    if not pairs:
        raise AtlasError(
            f"none of {len(seen)} files carries symbols beside Ensembl ids.",
            where=seen[0] if seen else "",
            fix="Give files with both, or a published table such as HGNC's complete set.",
        )
    rows = [(symbol, gene, APPROVED, count) for (symbol, gene), count in sorted(pairs.items())]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, TABLE_SCHEMA, strict=True)], schema=TABLE_SCHEMA)


def harvest_table(sources: Sequence[str], store: Store) -> pa.Table:
    """`harvest` from files by address; each is opened, and only its gene table is read."""
    from genescale.ingestion.opening import open_atlas

    def opened() -> Iterator[Atlas]:
        for uri in sources:
            with open_atlas(uri, store) as atlas:
                yield atlas

    return harvest(opened())
