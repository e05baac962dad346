"""`genescale models`: the registered models, and the way in and out for checkpoints of other software."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle
    from genescale.platform.runs import ModelVersion
    from genescale.platform.settings import Settings
    from genescale.platform.vocabulary import Vocabulary

MODELS_EPILOG = """\
  genescale models list
  genescale models show masked-gene-model
  genescale models promote masked-gene-model 3 champion
  genescale models import Geneformer-V2-104M --vocabulary token_dictionary_gc104M.pkl --name geneformer-v2
  genescale models export models:/masked-gene-model@champion exported

A folder to import is one that save_pretrained wrote (BertForMaskedLM, BertForSequenceClassification or
BertForTokenClassification), or one that `models export` or a training wrote. `transformers` loads what is exported.
"""
BUNDLE = "bundle"


def models(argv: Sequence[str]) -> int:
    """List, show, promote, import or export models."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    actions = {"list": _list, "show": _show, "promote": _promote, "import": _import, "export": _export}
    actions[arguments.action](arguments, settings)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("models", "List, show, promote, import and export models.", epilog=MODELS_EPILOG)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="registered models with their aliases")
    show = actions.add_parser("show", help="versions of a model, or one version with its card")
    show.add_argument("model", metavar="NAME", help="NAME, NAME@ALIAS or NAME/VERSION, with or without models:/")
    for each in (listing, show):
        each.add_argument("--json", action="store_true", help="print JSON")
    promote = actions.add_parser("promote", help="let an alias point at a version")
    promote.add_argument("name", metavar="NAME")
    promote.add_argument("version", metavar="VERSION")
    promote.add_argument("alias", metavar="ALIAS")
    read = actions.add_parser("import", help="register a checkpoint of other software, or a bundle")
    read.add_argument("path", metavar="PATH", help="local folder or s3:// address of one model")
    read.add_argument("--name", required=True, help="registered model that a version is added to")
    read.add_argument("--vocabulary", default="", metavar="URI", help="its vocabulary (default: found in the folder)")
    read.add_argument("--alias", action="append", default=[], help="alias of the registered version (repeatable)")
    write = actions.add_parser("export", help="write a folder that transformers loads")
    write.add_argument("model", metavar="MODEL", help="NAME@ALIAS, NAME/VERSION or a bundle folder")
    write.add_argument("path", metavar="PATH", help="new local folder")
    write.add_argument("--encoder", action="store_true", help="leave the head of a classifier out")
    return parser


def _list(arguments: argparse.Namespace, settings: Settings) -> None:
    from genescale.platform.text_table import text_table
    from genescale.platform.tracking import open_tracker

    found = open_tracker(settings).list_models()
    if arguments.json:
        print(json.dumps([vars(model) for model in found], indent=1))
        return
    rows = [(model.name, model.newest, _aliases(model.aliases)) for model in found]
    print(text_table(("model", "newest", "aliases"), rows) if rows else "no model is registered yet")


def _show(arguments: argparse.Namespace, settings: Settings) -> None:
    from genescale.platform.text_table import text_table
    from genescale.platform.tracking import open_tracker

    tracker, reference = open_tracker(settings), arguments.model.removeprefix("models:/")
    if "@" in reference or "/" in reference:
        version = tracker.resolve(f"models:/{reference}")
        print(json.dumps(vars(version), indent=1) if arguments.json else _version_text(version))
        return
    versions = tracker.list_versions(reference)
    aliases = next(model.aliases for model in tracker.list_models() if model.name == reference)
    if arguments.json:
        print(json.dumps({"name": reference, "aliases": aliases, "versions": [vars(v) for v in versions]}, indent=1))
        return
    of = {v.version: ", ".join(f"@{a}" for a, n in sorted(aliases.items()) if n == v.version) for v in versions}
    rows = [(v.version, v.tags.get("kind", ""), v.digest[:12], of[v.version]) for v in versions]
    print(text_table(("version", "kind", "digest", "aliases"), rows))


def _promote(arguments: argparse.Namespace, settings: Settings) -> None:
    from genescale.platform.tracking import open_tracker

    open_tracker(settings).set_alias(arguments.name, arguments.alias, arguments.version)
    print(f"models:/{arguments.name}@{arguments.alias} is version {arguments.version}")


def _import(arguments: argparse.Namespace, settings: Settings) -> None:
    from genescale.platform.tracking import open_tracker
    from genescale.training.lineage import code_version

    with tempfile.TemporaryDirectory(prefix="genescale-") as scratch:
        bundle = _brought_in(arguments.path, arguments.vocabulary, settings, Path(scratch))
        tracker = open_tracker(settings)
        params = {"path": arguments.path, "kind": bundle.kind, "vocabulary": bundle.vocabulary.digest}
        with tracker.run(f"import {arguments.name}", params=params, tags={"stage": "import", **code_version()}) as run:
            run.log_folder(bundle.folder, BUNDLE)
            version = tracker.register(
                run,
                BUNDLE,
                arguments.name,
                aliases=arguments.alias,
                tags={"kind": bundle.kind},
                description=f"Imported from {arguments.path}.",
            )
    print(f"model    {version.reference}")
    print(f"kind     {bundle.kind}, {bundle.vocabulary!r}")


def _export(arguments: argparse.Namespace, settings: Settings) -> None:
    from genescale.platform.tracking import fetch_bundle
    from genescale.training.published import export_checkpoint

    reference = arguments.model
    named = "@" in reference or (reference.count("/") == 1 and reference.rpartition("/")[2].isdigit())
    if named and ":" not in reference and not Path(reference).exists():
        reference = f"models:/{reference}"
    with tempfile.TemporaryDirectory(prefix="genescale-") as cache:
        bundle = fetch_bundle(reference, settings, Path(cache))
        architecture = export_checkpoint(bundle, Path(arguments.path), encoder_only=arguments.encoder)
    print(f"wrote {arguments.path}: {architecture}, load it with transformers.{architecture}.from_pretrained")


def _brought_in(path: str, vocabulary: str, settings: Settings, scratch: Path) -> Bundle:
    """The bundle of a folder, which may be a bundle already."""
    from genescale.platform.bundle import MANIFEST, open_bundle
    from genescale.platform.storage import Store, is_remote, join
    from genescale.training.published import import_checkpoint

    store = Store(settings.storage)
    folder = store.download_folder(path, scratch / "download") if is_remote(path) else Path(path)
    store.exists(join(str(path), MANIFEST))  # holds local folders to the allowed roots as well
    if (folder / MANIFEST).is_file():
        return open_bundle(folder)
    return import_checkpoint(folder, _vocabulary(folder, vocabulary, store), scratch / BUNDLE)


def _vocabulary(folder: Path, uri: str, store: Any) -> Vocabulary:
    from genescale.platform.errors import VocabularyError
    from genescale.platform.vocabulary import read_vocabulary

    try:
        return read_vocabulary(uri or str(folder), store)
    except VocabularyError as error:
        if uri:
            raise
        raise VocabularyError(
            f"the folder says nothing of the vocabulary ({error.what})",
            where=str(folder),
            fix="Name it: --vocabulary token_dictionary_gc104M.pkl, a .parquet or a .tsv.",
        ) from error


def _version_text(version: ModelVersion) -> str:
    tags = "\n".join(f"{name:<20} {value}" for name, value in sorted(version.tags.items()))
    return f"{version.reference}\n{tags}\n\n{version.description}".rstrip()


def _aliases(aliases: dict[str, str]) -> str:
    return ", ".join(f"@{alias} ({version})" for alias, version in sorted(aliases.items()))
