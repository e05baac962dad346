"""`genescale inspect`: what ingestion would do with files, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genescale.ingestion.reading_options import SOURCE_HELP, add_reading_options, options_given
from genescale.platform.cli import begin, command_parser
from genescale.platform.errors import SettingsError

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.storage import Store
    from genescale.platform.vocabulary import Vocabulary

ABOUT = "Say what `ingest` would do with each file, with the same options: nothing is written."
REFUSED_STATUS = 1


def inspect(argv: Sequence[str]) -> int:
    """Look at atlas files; exit status 0 when an ingest would accept all of them, 1 when not."""
    parser = command_parser("inspect", ABOUT)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("--vocabulary", metavar="URI", help="gene vocabulary (default: the one the corpus has)")
    parser.add_argument("--corpus", metavar="URI", help="say also what it already holds of these files")
    parser.add_argument("--dataset-id", metavar="NAME", help="name of the dataset (default: the file's name)")
    parser.add_argument(
        "--replace", action="store_const", const=True, help="as for ingest: another dataset may give way"
    )
    parser.add_argument("--full", action="store_true", help="read every cell instead of a sample")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_reading_options(parser)
    arguments, settings = begin(parser, argv)
    if not arguments.vocabulary and not arguments.corpus:
        raise SettingsError("neither --vocabulary nor --corpus is given.", fix="Genes are judged against a vocabulary.")

    from genescale.ingestion.config import IngestConfig
    from genescale.ingestion.reports.inspect_text import document, text
    from genescale.ingestion.reports.inspection import inspect_sources
    from genescale.ingestion.reports.report import as_json
    from genescale.ingestion.sources import find_sources
    from genescale.platform.progress import stage
    from genescale.platform.settings import build
    from genescale.platform.storage import Store

    store = Store(settings.storage)
    config = build(IngestConfig, options_given(arguments, ("dataset_id", "replace")), where="inspect")
    vocabulary, corpus = _known(arguments.vocabulary, arguments.corpus, store)
    sources = find_sources(arguments.sources, store)
    inspections = []
    with stage("inspect") as progress:
        progress.start(len(sources.files), "files")
        for found in inspect_sources(
            sources.files,
            config,
            vocabulary,
            store,
            corpus=corpus,
            corpus_uri=arguments.corpus or "",
            full=arguments.full,
        ):
            inspections.append(found)
            progress.advance(note=found.source.dataset_id)
    if arguments.json:
        print(as_json(document(inspections, sources.ignored, vocabulary)))
    else:
        print(text(inspections, sources.ignored))
    return 0 if all(found.accepted for found in inspections) else REFUSED_STATUS


def _known(vocabulary_uri: str | None, corpus_uri: str | None, store: Store) -> tuple[Vocabulary, Corpus | None]:
    """The vocabulary to judge by, and the corpus if there is one; CorpusError when they do not fit."""
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.vocabulary import read_vocabulary

    if not vocabulary_uri:
        corpus = Corpus.open(str(corpus_uri), store)
        return corpus.vocabulary, corpus
    vocabulary = read_vocabulary(vocabulary_uri, store)
    return vocabulary, Corpus.find(corpus_uri, vocabulary, store) if corpus_uri else None
