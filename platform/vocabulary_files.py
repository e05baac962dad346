"""Vocabulary files: our Parquet, our TSV, and the published dictionaries."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.platform.errors import IntegrityError, NotFoundError, VocabularyError
from genescale.platform.plain_pickle import MAX_PICKLE_BYTES, read_plain_dictionary
from genescale.platform.vocabulary import SPECIAL_TOKENS, Vocabulary, inferred_window

if TYPE_CHECKING:
    from genescale.platform.storage import Store

VOCABULARY_SCHEMA_VERSION = 1
METADATA_KEY = b"genescale.vocabulary"
SCHEMA = pa.schema(
    [
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("gene_id", pa.string(), nullable=False),
        pa.field("symbol", pa.string(), nullable=False),
        pa.field("median", pa.float64()),
        pa.field("aliases", pa.list_(pa.string())),
    ]
)
TSV_COLUMNS = ("ensembl_id", "token_id", "median", "gene_name", "aliases")
TSV_MARK = "# genescale vocabulary "
ALIAS_SEPARATOR = "|"
TOKEN_FILE, MEDIAN_FILE = "token_dictionary", "gene_median_dictionary"
NAME_FILE, ALIAS_FILE = "gene_name_id_dict", "ensembl_mapping_dict"


# --- Parquet ---------------------------------------------------------------------------------------------------------


def to_parquet_bytes(vocabulary: Vocabulary) -> bytes:
    """One row per token id, special tokens included; name, window, schema version and digest in the file's metadata."""
    header = {"schema": VOCABULARY_SCHEMA_VERSION, **_header(vocabulary)}
    table = pa.Table.from_pylist(_rows(vocabulary), schema=SCHEMA.with_metadata({METADATA_KEY: json.dumps(header)}))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def from_parquet_bytes(data: bytes, *, where: str = "vocabulary.parquet") -> Vocabulary:
    """Read `to_parquet_bytes`; raises VocabularyError, or IntegrityError when the content's digest does not fit."""
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        header = json.loads((file.schema_arrow.metadata or {})[METADATA_KEY])
        columns = file.read(columns=SCHEMA.names).cast(SCHEMA).to_pydict()
        version, name, window = int(header["schema"]), str(header["name"]), int(header["window"])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise VocabularyError(
            f"not a vocabulary written by Genescale ({type(error).__name__}: {error}).",
            where=where,
            fix="Make one with `genescale vocabulary import`.",
        ) from error
    if version > VOCABULARY_SCHEMA_VERSION:
        raise VocabularyError(
            f"written in format {version}; this release reads up to {VOCABULARY_SCHEMA_VERSION}.",
            where=where,
            fix="Upgrade Genescale.",
        )
    vocabulary = _assemble(columns, name=name, window=window, where=where)
    if vocabulary.digest != header.get("digest"):
        raise IntegrityError(
            "the content differs from the digest recorded in it.", where=where, fix="Fetch or export it again."
        )
    return vocabulary


def _header(vocabulary: Vocabulary) -> dict[str, Any]:
    return {"name": vocabulary.name, "window": vocabulary.window, "digest": vocabulary.digest}


def _rows(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    aliases: dict[str, list[str]] = {}
    for alias, gene in vocabulary.aliases.items():
        aliases.setdefault(gene, []).append(alias)
    special: list[dict[str, Any]] = [
        {"token_id": t, "gene_id": name, "symbol": "", "median": None, "aliases": []}
        for name, t in vocabulary.special.items()
    ]
    genes = zip(
        vocabulary.gene_ids, vocabulary.symbols, vocabulary.token_ids.tolist(), vocabulary.medians.tolist(), strict=True
    )
    rows = special + [
        {
            "token_id": token,
            "gene_id": gene,
            "symbol": symbol,
            "median": None if median != median else median,
            "aliases": aliases.get(gene, []),
        }
        for gene, symbol, token, median in genes
    ]
    return sorted(rows, key=lambda row: row["token_id"])


def _assemble(columns: Mapping[str, list[Any]], *, name: str, window: int | None, where: str) -> Vocabulary:
    """A vocabulary from one list per column; rows named like a special token are special tokens."""
    special = {
        gene: token
        for gene, token in zip(columns["gene_id"], columns["token_id"], strict=True)
        if gene in SPECIAL_TOKENS
    }
    rows = [i for i, gene in enumerate(columns["gene_id"]) if gene not in special]
    genes = [columns["gene_id"][i] for i in rows]
    medians = [columns["median"][i] for i in rows]
    alias_lists = [columns["aliases"][i] or [] for i in rows]
    try:
        return Vocabulary(
            name=name,
            window=inferred_window(special) if window is None else window,
            gene_ids=tuple(genes),
            symbols=tuple(columns["symbol"][i] or "" for i in rows),
            token_ids=np.array([columns["token_id"][i] for i in rows], dtype=np.int64),
            medians=np.array([np.nan if median is None else median for median in medians], dtype=np.float64),
            special=special,
            aliases={alias: gene for gene, names in zip(genes, alias_lists, strict=True) for alias in names},
        )
    except VocabularyError as error:
        raise VocabularyError(error.what, where=where, fix=error.fix) from None


# --- TSV -------------------------------------------------------------------------------------------------------------


def to_tsv(vocabulary: Vocabulary) -> str:
    """The vocabulary as a table for people and other tools; reads back exactly, digest included."""
    out = io.StringIO()
    out.write(TSV_MARK + json.dumps(_header(vocabulary), ensure_ascii=True) + "\n")
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(TSV_COLUMNS)
    for row in _rows(vocabulary):
        if any(ALIAS_SEPARATOR in alias for alias in row["aliases"]):
            raise VocabularyError(
                f"an alias of {row['gene_id']} contains '{ALIAS_SEPARATOR}'.",
                where=vocabulary.name,
                fix="Export to Parquet instead.",
            )
        median = "" if row["median"] is None else repr(row["median"])
        writer.writerow([row["gene_id"], row["token_id"], median, row["symbol"], ALIAS_SEPARATOR.join(row["aliases"])])
    return out.getvalue()


def from_tsv(text: str, *, where: str, name: str = "") -> Vocabulary:
    """Read `to_tsv`, or a plain table with the columns ensembl_id, token_id, median, gene_name and perhaps aliases."""
    header: dict[str, Any] = {"name": name, "window": None}
    try:
        if text.startswith(TSV_MARK):
            first, _, text = text.partition("\n")
            header |= json.loads(first.removeprefix(TSV_MARK))
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
        columns: dict[str, list[Any]] = {
            "gene_id": [row["ensembl_id"] for row in rows],
            "token_id": [int(row["token_id"]) for row in rows],
            "median": [float(row["median"]) if row["median"] else None for row in rows],
            "symbol": [row["gene_name"] for row in rows],
            "aliases": [
                (row.get("aliases") or "").split(ALIAS_SEPARATOR) if row.get("aliases") else [] for row in rows
            ],
        }
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise VocabularyError(
            f"not a vocabulary table ({type(error).__name__}: {error}).",
            where=where,
            fix=f"Columns: {', '.join(TSV_COLUMNS)}.",
        ) from error
    vocabulary = _assemble(columns, name=str(header["name"]), window=header["window"], where=where)
    if header.get("digest", vocabulary.digest) != vocabulary.digest:
        raise IntegrityError(
            "the table differs from the digest in its first line.",
            where=where,
            fix="Remove that line if you edited the table on purpose.",
        )
    return vocabulary


# --- published dictionaries ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """The dictionaries of one published set, each as (name of the file, its bytes)."""

    tokens: tuple[str, bytes]
    medians: tuple[str, bytes]
    names: tuple[str, bytes] | None = None
    aliases: tuple[str, bytes] | None = None


def from_published(files: PublishedSet, *, name: str) -> Vocabulary:
    """A vocabulary from published dictionaries: exactly their token ids and medians.

    names: symbol -> gene id; aliases: retired or synonymous id or symbol -> gene id (entries that lead outside the
    token dictionary are left out, as the published tokenizer does).
    """
    where = files.tokens[0]
    tokens = _numbers(files.tokens, whole=True)
    medians = _numbers(files.medians, whole=False)
    special = {gene: int(token) for gene, token in tokens.items() if gene in SPECIAL_TOKENS}
    genes = [gene for gene in tokens if gene not in special]
    if lacking := [gene for gene in genes if gene not in medians]:
        raise VocabularyError(
            f"{len(lacking):,} genes have a token but no median, for example {lacking[0]}.",
            where=files.medians[0],
            fix="Give the token and median dictionaries of one set.",
        )
    symbols = {gene: symbol for symbol, gene in _texts(files.names).items()}
    known = set(genes)
    aliases = {alias.upper(): gene for alias, gene in _texts(files.aliases).items() if gene in known}
    columns: dict[str, list[Any]] = {
        "gene_id": [*special, *genes],
        "token_id": [*special.values(), *(int(tokens[gene]) for gene in genes)],
        "median": [*(None for _ in special), *(float(medians[gene]) for gene in genes)],
        "symbol": [*("" for _ in special), *(symbols.get(gene, "") for gene in genes)],
        "aliases": [[] for _ in range(len(special) + len(genes))],
    }
    plain = _assemble(columns, name=name, window=None, where=where)
    return dataclasses.replace(plain, aliases={a: g for a, g in aliases.items() if a not in known})


def _numbers(file: tuple[str, bytes], *, whole: bool) -> dict[str, int | float]:
    where, data = file
    values = read_plain_dictionary(data, where=where)
    if not all(isinstance(value, int if whole else (int, float)) for value in values.values()):
        raise VocabularyError(
            f"its values are not {'whole ' if whole else ''}numbers.", where=where, fix="Is it the right dictionary?"
        )
    return values  # type: ignore[return-value]


def _texts(file: tuple[str, bytes] | None) -> dict[str, str]:
    if file is None:
        return {}
    values = read_plain_dictionary(file[1], where=file[0])
    if not all(isinstance(value, str) for value in values.values()):
        raise VocabularyError("its values are not gene ids.", where=file[0], fix="Is it the right dictionary?")
    return values  # type: ignore[return-value]


# --- any of them, by address -----------------------------------------------------------------------------------------


def write_vocabulary(vocabulary: Vocabulary, uri: str, store: Store) -> None:
    """Write a vocabulary in the format that the ending of `uri` names: `.parquet` or `.tsv`."""
    if uri.endswith(".parquet"):
        store.write(uri, to_parquet_bytes(vocabulary))
    elif uri.endswith(".tsv"):
        store.write(uri, to_tsv(vocabulary).encode())
    else:
        raise VocabularyError("the ending says no format.", where=uri, fix="Name the file .parquet or .tsv.")


def read_any(uri: str, store: Store) -> Vocabulary:
    """The vocabulary at `uri`, by the kind of file; a folder must hold exactly one set."""
    if uri.endswith(".parquet"):
        return from_parquet_bytes(store.read(uri, max_bytes=MAX_PICKLE_BYTES), where=uri)
    if uri.endswith(".tsv"):
        stem = uri.rstrip("/").rpartition("/")[2].removesuffix(".tsv")
        return from_tsv(_decoded(store.read(uri, max_bytes=MAX_PICKLE_BYTES), where=uri), where=uri, name=stem)
    if uri.endswith(".pkl"):
        return _read_published(uri, store)
    return _read_folder(uri, store)


def _decoded(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise VocabularyError("not UTF-8 text.", where=where) from error


def _read_published(uri: str, store: Store) -> Vocabulary:
    """A token dictionary and its siblings, which are found by name in the same folder."""
    folder, _, file = uri.rpartition("/")
    if not file.startswith(TOKEN_FILE):
        raise VocabularyError(
            f"a vocabulary is named by its token dictionary, not by {file}.", where=uri, fix=f"Give {TOKEN_FILE}*.pkl."
        )
    suffix = file.removeprefix(TOKEN_FILE)

    def sibling(stem: str) -> tuple[str, bytes] | None:
        address = f"{folder}/{stem}{suffix}" if folder else f"{stem}{suffix}"
        try:
            return address, store.read(address, max_bytes=MAX_PICKLE_BYTES)
        except NotFoundError:
            return None

    tokens, medians = (uri, store.read(uri, max_bytes=MAX_PICKLE_BYTES)), sibling(MEDIAN_FILE)
    if medians is None:
        raise VocabularyError(
            f"{MEDIAN_FILE}{suffix} does not stand beside it; tokens mean nothing without medians.",
            where=uri,
            fix="Put the files of one set into one folder.",
        )
    files = PublishedSet(tokens=tokens, medians=medians, names=sibling(NAME_FILE), aliases=sibling(ALIAS_FILE))
    return from_published(files, name=suffix.removesuffix(".pkl").strip("_") or "published")


def _read_folder(uri: str, store: Store) -> Vocabulary:
    files = [entry.uri for entry in store.list(uri)]
    names = {file: file.rpartition("/")[2] for file in files}
    found = [f for f in files if names[f].startswith(TOKEN_FILE) and names[f].endswith(".pkl")]
    found = found or [f for f in files if names[f] == "vocabulary.parquet"]
    if len(found) == 1:
        return read_any(found[0], store)
    seen = f"it holds {len(found)}: {', '.join(names[f] for f in found[:5])}" if found else "it holds none"
    raise VocabularyError(
        f"a vocabulary is a .parquet, .tsv or {TOKEN_FILE}*.pkl file, or a folder with one; {seen}.",
        where=uri,
        fix="Name the file itself.",
    )
