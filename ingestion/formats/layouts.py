"""Sources of several files, told by names alone: folders of zarr, and Matrix Market triples.

A triple is a matrix (`matrix.mtx`), the names of its cells (`barcodes.tsv`) and of its genes (`genes.tsv` or
`features.tsv`), each perhaps with `.gz`, perhaps behind one prefix (`GSM123_matrix.mtx.gz`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

from genescale.platform.address import parse
from genescale.platform.errors import AtlasError
from genescale.platform.storage import Entry, Store

# What stands at the root of every zarr group, of format 2 and 3.
ZARR_MARKERS = frozenset((".zgroup", ".zmetadata", "zarr.json"))
MATRIX_NAME = re.compile(r"(?P<prefix>.*?)(?P<word>matrix)?\.mtx(?P<gz>\.gz)?", re.IGNORECASE)
_CELLS, _GENES = r"(?:barcodes|cells)", r"(?:features|genes)"
_TABLE = r"{prefix}[._-]?{words}\.(?:tsv|txt)(?:\.gz)?"


@dataclasses.dataclass(frozen=True)
class Triple:
    """A matrix file and the two tables beside it, None where one is missing."""

    matrix: Entry
    barcodes: Entry | None
    features: Entry | None

    @property
    def members(self) -> tuple[Entry, ...]:
        """The files that are there."""
        return tuple(entry for entry in (self.matrix, self.barcodes, self.features) if entry)

    def complete(self) -> tuple[Entry, Entry, Entry]:
        """Matrix, barcodes and features; AtlasError names the one that is missing."""
        if self.barcodes and self.features:
            return self.matrix, self.barcodes, self.features
        missing = "barcodes.tsv" if not self.barcodes else "features.tsv or genes.tsv"
        raise AtlasError(
            f"a Matrix Market file without its {missing}: the names of {'cells' if not self.barcodes else 'genes'}.",
            where=self.matrix.uri,
            fix="Put the table beside the matrix, with the same prefix in its name.",
        )


def triple_entry(triple: Triple, beside: Sequence[Triple]) -> Entry:
    """One entry for a triple, however it was named; beside: all triples of its folder.

    A plain `matrix.mtx` that is alone goes by its folder, any other by its matrix file.
    """
    folder, name = split_uri(triple.matrix.uri)
    plain = name.lower().removesuffix(".gz") == "matrix.mtx" and bool(parse(folder).key)
    return combined(folder if plain and list(beside) == [triple] else triple.matrix.uri, triple.members)


def split_uri(uri: str) -> tuple[str, str]:
    """Folder and name of an address; the folder of a bucket's top level is the bucket."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    return folder or "/", name


def combined(uri: str, members: Iterable[Entry]) -> Entry:
    """One entry for a source of several files: their summed size, and a tag over their names, sizes and tags."""
    digest, size_bytes = hashlib.sha256(), 0
    for member in sorted(members, key=lambda member: member.uri):
        name = member.uri.removeprefix(uri).lstrip("/")
        digest.update(f"{name}\0{member.size_bytes}\0{member.etag}\n".encode())
        size_bytes += member.size_bytes
    return Entry(uri, size_bytes, digest.hexdigest()[:32])


def zarr_folders(entries: Iterable[Entry]) -> list[str]:
    """Addresses of the folders that are zarr groups, without the groups inside them, sorted."""
    marked = {folder for folder, name in (split_uri(entry.uri) for entry in entries) if name in ZARR_MARKERS}
    return sorted(folder for folder in marked if not any(above in marked for above in _above(folder)))


def _above(folder: str) -> Iterable[str]:
    while len(parent := split_uri(folder)[0]) < len(folder):
        yield parent
        folder = parent


def triples(folder_files: Sequence[Entry]) -> list[Triple]:
    """The triples among the files of one folder, sorted by address.

    Of a matrix that is there plain and compressed, the compressed one is taken: it is the one that was downloaded.
    """
    named = {split_uri(entry.uri)[1]: entry for entry in folder_files}
    matrices = {name: found for name in sorted(named) if (found := MATRIX_NAME.fullmatch(name))}
    chosen = {name: found for name, found in matrices.items() if found["gz"] or f"{name}.gz" not in matrices}
    made = (_triple(named[name], match, named, alone=len(chosen) == 1) for name, match in chosen.items())
    return [triple for triple in made if triple is not None]


def _triple(matrix: Entry, match: re.Match[str], named: dict[str, Entry], *, alone: bool) -> Triple | None:
    """The matrix with its tables; None for a matrix of another kind, such as a graph, that lies about."""
    prefixes = [re.escape(match["prefix"])] + ([r".*"] if alone else [])
    tables: list[Entry | None] = []
    for words in (_CELLS, _GENES):
        fitting = (_best(_TABLE.format(prefix=prefix, words=words), named, match["gz"]) for prefix in prefixes)
        tables.append(next((entry for entry in fitting if entry), None))
    if not match["word"] and None in tables:
        return None
    return Triple(matrix, *tables)


def _best(pattern: str, named: dict[str, Entry], gz: str | None) -> Entry | None:
    """The one table that fits, or of a plain and a compressed copy the one like the matrix; None for several others."""
    fitting = [name for name in named if re.fullmatch(pattern, name, re.IGNORECASE)]
    if len({name.removesuffix(".gz") for name in fitting}) != 1:
        return None
    return named[min(fitting, key=lambda name: (name.endswith(".gz") != bool(gz), name))]


def files_in(folder: str, store: Store) -> list[Entry]:
    """Files right in a folder, without those of folders below it."""
    # An address may hold what a pattern treats as special; brackets make it plain.
    plain = re.sub(r"([*?\[])", r"[\1]", folder.rstrip("/"))
    return store.glob(f"{plain}/*")


def _triple_beside(uri: str, store: Store) -> Triple:
    """The triple that the user chose by naming its matrix file, whatever else is in the folder."""
    folder, name = split_uri(uri)
    named = {split_uri(entry.uri)[1]: entry for entry in files_in(folder, store)}
    match, matrix = MATRIX_NAME.fullmatch(name), store.stat(uri)
    matrices = {other.removesuffix(".gz") for other in named if MATRIX_NAME.fullmatch(other)}
    found = _triple(matrix, match, named, alone=len(matrices) == 1) if match else None
    return found or Triple(matrix, None, None)


def triple_of(uri: str, store: Store) -> Triple:
    """The triple of a matrix file, or the only one of a folder; AtlasError when there is none or more than one."""
    if MATRIX_NAME.fullmatch(split_uri(uri)[1]) and store.exists(uri):
        return _triple_beside(uri, store)
    found = triples(files_in(uri, store))
    if len(found) == 1:
        return found[0]
    names = ", ".join(split_uri(triple.matrix.uri)[1] for triple in found[:5])
    raise AtlasError(
        f"{len(found)} matrices are in this folder ({names})." if found else "no matrix.mtx is in this folder.",
        where=uri,
        fix="Name the matrix file itself." if found else "Give the folder that holds matrix.mtx and its tables.",
    )
