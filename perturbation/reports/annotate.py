"""Put what a screen found into the h5ad file that its cells came from: `uns["genescale_perturbation"]` of a copy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from genescale.ingestion.formats.uns import as_uns, write_uns
from genescale.perturbation.reports.screen_tables import ScreenTables
from genescale.platform.storage import Store

if TYPE_CHECKING:
    from genescale.ingestion.formats.memory_anndata import AnnData

KEY = "genescale_perturbation"
KEPT = ("model_digest", "vocabulary_digest", "corpus_uri", "corpus_version", "config")


def annotate_h5ad(source_uri: str, tables: ScreenTables, out: Path | str, store: Store) -> Path:
    """Copy an atlas file to the local path `out` with the screen's tables in `uns["genescale_perturbation"]`.

    Entries: `effects` (all read-outs stacked), `pairs`, `genes` and `targets` where the screen has them, and `screen`:
    model, corpus and settings. Raises InputError for a file that cannot hold them.
    """
    return write_uns(source_uri, Path(out), KEY, uns_content(tables), store)


def annotate_anndata(adata: AnnData, effects: pl.DataFrame, *, about: Mapping[str, Any] | None = None) -> None:
    """Put a table of effects into `adata.uns["genescale_perturbation"]`, in place; `about` says how it was made."""
    adata.uns[KEY] = as_uns({"effects": effects, "screen": _plain(about or {})})


def uns_content(tables: ScreenTables) -> dict[str, Any]:
    """The entry as mappings, tables, texts and numbers."""
    identity = tables.record.get("identity", {})
    kept = {name: identity[name] for name in KEPT if isinstance(identity, Mapping) and name in identity}
    return {
        "effects": tables.effects,
        "pairs": tables.pairs,
        "genes": tables.genes,
        "targets": tables.targets,
        "screen": _plain({"uri": tables.uri, **kept}),
    }


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings of texts and numbers; lists of texts stay lists, all other values become texts, None is left out."""
    made: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            made[name.replace("/", "_")] = _plain(value)
        elif value is not None:
            fits = isinstance(value, str | bool | int | float)
            listed = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
            made[name.replace("/", "_")] = value if fits or listed else str(value)
    return made
