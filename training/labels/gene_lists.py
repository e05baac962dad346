"""Files of gene classes, in the forms that people have them: `{class: [gene names]}` of any of them.

    FILE.json                {class: [genes]}, sections of such classes, or the truth file of a simulated atlas
    FILE.gmt                 one class a line: name, description, genes
    FILE.csv, .tsv           a column of genes and a column of classes, or a column of genes for each class
    FILE.txt or FOLDER       one class a file, named after it, one gene a line; several files are joined by commas

`.gz` is unpacked. An address may go on with `#SECTION`, `#SECTION:CLASS,CLASS` or `#:CLASS,CLASS`, which chooses what
is read and the order of the classes, and with `;without=GENE,GENE`, which leaves genes out.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genescale.platform.errors import InputError, did_you_mean
from genescale.platform.storage import Store

GeneLists = dict[str, list[str]]
TEXT_ENDINGS = (".txt", ".list", ".genes")
GENE_COLUMNS = ("gene_id", "ensembl_id", "gene", "ensembl", "ensembl_gene_id", "gene_symbol", "symbol", "gene_name")
CLASS_COLUMNS = ("class", "label", "group", "category", "set", "gene_set")
LARGEST_FILE_BYTES = 256 * 1024 * 1024
TRUTH_KIND = "genescale-simulated-atlas"
TRUTH_SECTION = "regulators_vs_effectors"
# Genes that a regulator drives and that drive none themselves; mediators do both, so they stand in neither class.
_EFFECTOR_ROLES = ("direct target", "indirect target", "cooperative target")
_FORMS = "Give a JSON, GMT, CSV, TSV or text file, or a folder of text files."


@dataclass(frozen=True, kw_only=True)
class ListAddress:
    """An address of gene lists in its parts."""

    uris: tuple[str, ...]
    section: str = ""
    classes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ListAddress:
        """Read `FILE[,FILE]#SECTION:CLASS,CLASS;without=GENE,GENE`; InputError when nothing is named or misspelt."""
        files, _, fragment = text.partition("#")
        uris = _listed(files)
        chosen, *options = fragment.split(";")
        section, _, classes = chosen.partition(":")
        values = dict(option.partition("=")[::2] for option in options if option.strip())
        if not uris or set(values) - {"without"}:
            raise InputError(
                f"'{text}' is no address of gene lists.",
                where="genes",
                fix="Write FILE, FILE#SECTION or FILE#SECTION:CLASS,CLASS;without=GENE,GENE.",
            )
        without = _listed(values.get("without", ""))
        return cls(uris=uris, section=section.strip(), classes=_listed(classes), without=without)

    def __str__(self) -> str:
        chosen = self.section + (f":{','.join(self.classes)}" if self.classes else "")
        chosen += f";without={','.join(self.without)}" if self.without else ""
        return ",".join(self.uris) + (f"#{chosen}" if chosen else "")


def read_lists(address: ListAddress, store: Store) -> GeneLists:
    """The classes at `address` with their genes as written, in the order of the address or else of the file.

    Raises InputError for a file that cannot be read as any form, an unknown section or class, and an empty class.
    """
    where = ",".join(address.uris)
    found = _read_one(address.uris[0], address.section, store) if len(address.uris) == 1 else {}
    for uri in address.uris if len(address.uris) > 1 else ():
        found |= {_class_name(uri): _text_genes(_text(uri, store))}
    chosen = {name: _class(found, name, where) for name in address.classes} if address.classes else found
    if empty := [name for name, genes in chosen.items() if not genes]:
        raise InputError(
            f"class '{empty[0]}' has no genes.", where=where, fix="Fill it, or choose the classes by name."
        )
    return chosen


def _class(found: GeneLists, name: str, where: str) -> list[str]:
    if name not in found:
        hint = did_you_mean(name, found) or f"Classes: {', '.join(list(found)[:20])}."
        raise InputError(f"there is no class '{name}'.", where=where, fix=hint)
    return found[name]


def _read_one(uri: str, section: str, store: Store) -> GeneLists:
    kind = uri.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "json":
        return _json_lists(_text(uri, store), section, uri)
    if section:
        raise InputError(
            f"only JSON files have sections, so there is no '{section}' here.",
            where=uri,
            fix="Choose classes with '#:CLASS,CLASS'.",
        )
    if kind == "gmt":
        return _gmt_lists(_text(uri, store), uri)
    if kind in ("csv", "tsv"):
        return _table_lists(_text(uri, store), "\t" if kind == "tsv" else ",", uri)
    return _folder_lists(uri, store)


def _folder_lists(uri: str, store: Store) -> GeneLists:
    """Text files below `uri`, or the text file that it is, as one class each."""
    files = sorted(entry.uri for entry in store.list(uri) if _is_text(entry.uri))
    if not files:
        raise InputError("there are no gene lists here.", where=uri, fix=_FORMS)
    lists: GeneLists = {}
    for file in files:
        if (name := _class_name(file)) in lists:
            raise InputError(f"two files are called '{name}'.", where=uri, fix="Give each class one file.")
        lists[name] = _text_genes(_text(file, store))
    return lists


def _is_text(uri: str) -> bool:
    return uri.lower().removesuffix(".gz").endswith(TEXT_ENDINGS)


def _class_name(uri: str) -> str:
    name = uri.rpartition("/")[2].removesuffix(".gz")
    return name.rpartition(".")[0] or name


def _text(uri: str, store: Store) -> str:
    data = store.read(uri, max_bytes=LARGEST_FILE_BYTES)
    try:
        return (gzip.decompress(data) if uri.lower().endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"this is no text: {error}.", where=uri, fix=_FORMS) from None


def _text_genes(text: str) -> list[str]:
    lines = (line.partition("#")[0] for line in text.splitlines())
    return [gene for line in lines for gene in line.replace(",", " ").split()]


def _gmt_lists(text: str, uri: str) -> GeneLists:
    lists: GeneLists = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name, *rest = [cell.strip() for cell in line.split("\t")]
        if not line.strip():
            continue
        if len(rest) < 2 or name in lists:
            what = (
                f"the set '{name}' stands here again." if name in lists else "a set has a name, a description, genes."
            )
            raise InputError(what, where=f"{uri}: line {number}", fix="Separate them with tabs; name each set once.")
        lists[name] = [gene for gene in rest[1:] if gene]
    return lists


def _table_lists(text: str, delimiter: str, uri: str) -> GeneLists:
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    if len(rows) < 2:
        raise InputError("the table has no rows below its header.", where=uri, fix=_FORMS)
    header, body = [name.strip() for name in rows[0]], [row for row in rows[1:] if any(cell.strip() for cell in row)]
    if wide := [number for number, row in enumerate(rows, start=1) if len(row) > len(header)]:
        raise InputError(
            "a row is longer than the header.", where=f"{uri}: line {wide[0]}", fix="Quote commas in names."
        )
    lower = [name.lower() for name in header]
    genes = next((lower.index(name) for name in GENE_COLUMNS if name in lower), None)
    classes = next((lower.index(name) for name in CLASS_COLUMNS if name in lower), None)
    if genes is None and classes is None:
        cells = {name: [row[at].strip() for row in body if at < len(row)] for at, name in enumerate(header)}
        return {name: [gene for gene in column if gene] for name, column in cells.items() if name}
    if genes is None or classes is None:
        raise InputError(
            f"a column of {'genes' if genes is None else 'classes'} is missing among {', '.join(header)}.",
            where=uri,
            fix=f"Call it {(GENE_COLUMNS if genes is None else CLASS_COLUMNS)[0]}, or give each class its own column.",
        )
    return _pairs(body, genes, classes, uri)


def _pairs(body: Sequence[Sequence[str]], genes: int, classes: int, uri: str) -> GeneLists:
    lists: GeneLists = {}
    for number, row in enumerate(body, start=1):
        gene, name = (row[at].strip() if at < len(row) else "" for at in (genes, classes))
        if not gene or not name:
            raise InputError(
                "a gene or its class is empty.", where=f"{uri}: row {number}", fix="Fill or delete the row."
            )
        lists.setdefault(name, []).append(gene)
    return lists


def _json_lists(text: str, section: str, uri: str) -> GeneLists:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}.", where=uri) from None
    if isinstance(content, Mapping) and content.get("kind") == TRUTH_KIND:
        content = _truth_sections(content, uri)
        section = section or TRUTH_SECTION
    for name in section.split("/") if section else ():
        if not isinstance(content, Mapping) or name not in content:
            known = list(content) if isinstance(content, Mapping) else []
            hint = did_you_mean(name, known) or f"Sections: {', '.join(known)}."
            raise InputError(f"there is no section '{name}'.", where=uri, fix=hint)
        content = content[name]
    if not _are_lists(content):
        deeper = isinstance(content, Mapping) and all(isinstance(value, Mapping) for value in content.values())
        names = ", ".join(content) if deeper else ""
        raise InputError(
            "the classes stand in sections." if deeper else "these are no classes of gene names.",
            where=f"{uri}#{section}" if section else uri,
            fix=f"Name one: {uri}#SECTION, of {names}." if deeper else 'Write {"class": ["gene", …], …}.',
        )
    return {str(name): [gene.strip() for gene in genes] for name, genes in content.items()}


def _are_lists(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(genes, list) and all(isinstance(gene, str) for gene in genes) for genes in content.values()
    )


def _truth_sections(truth: Mapping[str, Any], uri: str) -> dict[str, GeneLists]:
    """The planted truth as sections: regulators against the genes they drive, and every role as a class."""
    roles: GeneLists = {}
    try:
        for gene in truth["genes"]:
            roles.setdefault(gene["role"], []).append(gene["id"])
        regulators = list(truth["regulators"])
    except (KeyError, TypeError):
        fix = "Write it again with `genescale simulate`."
        raise InputError("the truth of a simulated atlas is not complete.", where=uri, fix=fix) from None
    effectors = [gene for role in _EFFECTOR_ROLES for gene in roles.get(role, [])]
    return {TRUTH_SECTION: {"effector": effectors, "regulator": regulators}, "roles": roles}


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())
