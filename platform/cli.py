"""`genescale COMMAND …`: a table of commands, each imported only when it runs.

A command is `main(argv) -> exit status` in its layer's `commands.py`. Errors raised on purpose end here: they are
printed with their code and the command exits with 2; anything else is a fault of ours and shows its trace.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from genescale.platform.errors import GenescaleError, did_you_mean

if TYPE_CHECKING:
    from genescale.platform.settings import Settings

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("genescale.serving.demo.commands:demo", "run the whole way once: atlas to answers, with a report"),
    "simulate": ("genescale.ingestion.commands:simulate", "write a planted-truth atlas to try things on"),
    "vocabulary": ("genescale.platform.vocabulary_command:vocabulary", "import, show or export a gene vocabulary"),
    "medians": ("genescale.ingestion.commands:medians", "compute gene medians and a vocabulary from atlases"),
    "inspect": ("genescale.ingestion.inspect_command:inspect", "say what ingest would do with files, before it does"),
    "genes": ("genescale.ingestion.commands:genes", "harvest a table of gene symbols from atlases that carry ids"),
    "ingest": ("genescale.ingestion.commands:ingest", "turn atlas files into a corpus of token rows"),
    "corpus": (
        "genescale.ingestion.corpus_commands:corpus",
        "show, compare, verify, shuffle, export or tidy a corpus",
    ),
    "pretrain": ("genescale.training.commands:pretrain", "pretrain an encoder on a corpus"),
    "finetune": (
        "genescale.training.finetune_command:finetune",
        "fit heads on a model: classes or numbers",
    ),
    "tune": ("genescale.training.tune_command:tune", "sweep the settings of a fit"),
    "predict": (
        "genescale.training.predict_command:predict",
        "answer other cells with a fitted model",
    ),
    "evaluate": ("genescale.training.evaluation_commands:evaluate", "measure what a pretrained model knows of cells"),
    "curve": ("genescale.training.evaluation_commands:curve", "measure a task with more and more labelled cells"),
    "models": ("genescale.training.model_commands:models", "list, show, promote, import or export models"),
    "embed": ("genescale.training.embed_command:embed", "embed a corpus with a model"),
    "perturb": ("genescale.perturbation.commands:perturb", "screen gene deletions or overexpression over a corpus"),
    "index": ("genescale.serving.neighbours.index_command:index", "make a reference to find neighbours in"),
    "serve": ("genescale.serving.commands:serve", "answer embeddings and perturbations over HTTP"),
}
INTERRUPTED = 130


def command_parser(name: str, about: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """The parser every command starts from: its name, one sentence, and `--settings`."""
    parser = argparse.ArgumentParser(
        prog=f"genescale {name}",
        description=about,
        epilog=epilog or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--settings", metavar="FILE", help="settings file (default: ./genescale.toml when it is there)")
    return parser


def begin(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """Parse `argv`, load the settings it names and configure logging."""
    from genescale.platform import log
    from genescale.platform.cluster import quiet_environment
    from genescale.platform.settings import load_settings

    quiet_environment()
    arguments = parser.parse_args(list(argv))
    settings = load_settings(arguments.settings)
    log.configure(settings.log, secrets=settings.secrets)
    return arguments, settings


def usage() -> str:
    """The text of `genescale --help`."""
    lines = [f"  {name:<11} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: genescale COMMAND [options]",
            "",
            "Geneformer at atlas scale: ingest, pretrain, perturb and serve on Ray.",
            "",
            "commands:",
            *lines,
            "",
            "`genescale COMMAND --help` says more; `genescale --version` prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 an error said on standard error, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"genescale {version('genescale')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or "`genescale --help` lists the commands."
        print(f"error [settings]: there is no command '{name}'. {hint}", file=sys.stderr)
        return 2
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    module, function = COMMANDS[name][0].split(":")
    try:
        return int(getattr(importlib.import_module(module), function)(arguments))
    except GenescaleError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("genescale"):
            raise
        print(
            f"error [settings]: `genescale {name}` needs the package '{error.name}', which is not installed. "
            "Install everything with: pip install 'genescale[all]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: `genescale {name}` stopped; what it had finished is kept.", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
