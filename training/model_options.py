"""Options that commands on a model share, and the model behind them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from genescale.platform.bundle import Bundle
    from genescale.platform.settings import Settings

MODEL_HELP = "models:/NAME@ALIAS, models:/NAME/VERSION, or a bundle folder (local or s3://)"


def add_corpus(parser: argparse.ArgumentParser) -> None:
    """The corpus that a command works on."""
    parser.add_argument("--corpus", required=True, metavar="URI[@VERSION]", help="corpus, at its newest version or one")


def add_model_and_corpus(parser: argparse.ArgumentParser) -> None:
    """A model, and the corpus that a command works on."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_corpus(parser)


def add_head_outputs(parser: argparse.ArgumentParser, folder: str) -> None:
    """Where a fitted head goes, and under which name it is registered."""
    parser.add_argument(
        "--output", default=folder, metavar="FOLDER", help=f"local folder for bundle and report (default {folder})"
    )
    parser.add_argument("--embeddings", default="", metavar="URI", help="reuse what `genescale embed` wrote there")
    parser.add_argument("--name", default="", metavar="NAME", help="register the model under this name")
    parser.add_argument("--alias", action="append", default=[], help="alias of that version (default newest)")


@contextlib.contextmanager
def opened_model(reference: str, settings: Settings) -> Iterator[Bundle]:
    """The bundle behind a reference, kept in a temporary folder as long as it is used."""
    from genescale.platform.tracking import fetch_bundle

    with tempfile.TemporaryDirectory(prefix="genescale-") as cache:
        yield fetch_bundle(reference, settings, Path(cache))


def changed_values(changes: Sequence[str]) -> dict[str, Any]:
    """The settings of repeated `--set KEY=VALUE`; SettingsError for a text without a sign."""
    from genescale.platform.errors import SettingsError

    values: dict[str, Any] = {}
    for text in changes:
        key, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"'{text}' is not KEY=VALUE.", where="--set", fix="For example --set epochs=50.")
        values[key.strip()] = value.strip()
    return values
