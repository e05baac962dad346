"""`genescale vocabulary import|show|export`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from genescale.platform.cli import begin, command_parser

if TYPE_CHECKING:
    from genescale.platform.storage import Store
    from genescale.platform.vocabulary import Vocabulary

EPILOG = """examples:
  genescale vocabulary import token_dictionary_gc104M.pkl --output s3://atlases/gc104M.parquet
  genescale vocabulary show s3://atlases/gc104M.parquet --gene TP53
  genescale vocabulary export s3://atlases/gc104M.parquet --output gc104M.tsv
"""


def vocabulary(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    arguments, settings = begin(_parser(), argv)
    from genescale.platform.storage import Store

    store = Store(settings.storage)
    actions = {"import": _import, "show": _show, "export": _export}
    actions[arguments.action](arguments, store)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("vocabulary", "Import, show or export a gene vocabulary.", epilog=EPILOG)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    read = actions.add_parser("import", help="make a vocabulary file from published dictionaries or a table")
    read.add_argument("source", help="token_dictionary*.pkl, a folder with one published set, a .tsv or a .parquet")
    read.add_argument("--output", required=True, metavar="URI", help="the .parquet file to write")
    read.add_argument("--medians", metavar="URI", help="median dictionary (default: found beside the token dictionary)")
    read.add_argument("--names", metavar="URI", help="dictionary from symbol to gene id (only with --medians)")
    read.add_argument(
        "--aliases", metavar="URI", help="dictionary from retired id or alias to gene id (with --medians)"
    )
    read.add_argument("--name", default="", help="name to record (default: from the file's name)")
    read.add_argument("--window", type=int, metavar="TOKENS", help="tokens per cell (default: as the layout says)")
    show = actions.add_parser("show", help="what a vocabulary holds, and warnings about its medians")
    show.add_argument("vocabulary", metavar="URI")
    show.add_argument(
        "--gene", action="append", default=[], help="also look up a gene id, symbol or alias (repeatable)"
    )
    show.add_argument("--json", action="store_true", help="print JSON")
    write = actions.add_parser("export", help="write a vocabulary as a .parquet or .tsv file")
    write.add_argument("vocabulary", metavar="URI")
    write.add_argument("--output", required=True, metavar="URI", help="the .parquet or .tsv file to write")
    return parser


def _import(arguments: argparse.Namespace, store: Store) -> None:
    import dataclasses

    from genescale.platform.vocabulary import read_vocabulary
    from genescale.platform.vocabulary_files import write_vocabulary

    found = _from_named_files(arguments, store) if arguments.medians else read_vocabulary(arguments.source, store)
    changes: dict[str, Any] = {}
    if arguments.name:
        changes["name"] = arguments.name
    if arguments.window is not None:
        changes["window"] = arguments.window
    found = dataclasses.replace(found, **changes)
    write_vocabulary(found, arguments.output, store)
    _print_summary(found)


def _from_named_files(arguments: argparse.Namespace, store: Store) -> Vocabulary:
    from genescale.platform.plain_pickle import MAX_PICKLE_BYTES
    from genescale.platform.vocabulary_files import PublishedSet, from_published

    def read(uri: str | None) -> tuple[str, bytes] | None:
        return (uri, store.read(uri, max_bytes=MAX_PICKLE_BYTES)) if uri else None

    tokens, medians = read(arguments.source), read(arguments.medians)
    assert tokens is not None
    assert medians is not None
    files = PublishedSet(tokens=tokens, medians=medians, names=read(arguments.names), aliases=read(arguments.aliases))
    return from_published(files, name=arguments.source.rstrip("/").rpartition("/")[2].removesuffix(".pkl"))


def _export(arguments: argparse.Namespace, store: Store) -> None:
    from genescale.platform.vocabulary import read_vocabulary
    from genescale.platform.vocabulary_files import write_vocabulary

    found = read_vocabulary(arguments.vocabulary, store)
    write_vocabulary(found, arguments.output, store)
    print(f"wrote {arguments.output}: {found!r}")


def _show(arguments: argparse.Namespace, store: Store) -> None:
    from genescale.platform.vocabulary import lint, read_vocabulary

    found = read_vocabulary(arguments.vocabulary, store)
    genes = [_gene(found, name) for name in arguments.gene]
    if arguments.json:
        print(json.dumps({**_summary(found), "warnings": lint(found), "lookups": genes}, indent=2))
        return
    _print_summary(found)
    for gene in genes:
        median = "none" if gene["median"] is None else f"{gene['median']:.6g}"
        print(f"gene      {gene['asked']}: token {gene['token']}, {gene['id']} ({gene['symbol']}), median {median}")


def _gene(found: Vocabulary, name: str) -> dict[str, Any]:
    token = found.token(name)
    gene, median = found.gene_of_token(token), float(found.medians_t[token])
    return {
        "asked": name,
        "token": token,
        "id": gene,
        "symbol": found.symbol_of(gene),
        "median": None if median != median else median,
    }


def _summary(found: Vocabulary) -> dict[str, Any]:
    return {
        "name": found.name,
        "digest": found.digest,
        "tokens": found.size,
        "genes": len(found.gene_ids),
        "symbols": sum(bool(symbol) for symbol in found.symbols),
        "aliases": len(found.aliases),
        "special": found.special,
        "window": found.window,
    }


def _print_summary(found: Vocabulary) -> None:
    from genescale.platform.vocabulary import lint

    summary = _summary(found)
    special = ", ".join(f"{token} {number}" for token, number in found.special.items())
    print(f"name      {found.name or '(none)'}")
    print(f"digest    {found.digest}")
    print(f"tokens    {found.size:,}: {summary['genes']:,} genes; {special}")
    print(f"names     {summary['symbols']:,} symbols, {summary['aliases']:,} aliases")
    print(f"window    {found.window:,} tokens per cell")
    for warning in lint(found):
        print(f"warning   {warning}")
