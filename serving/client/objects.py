"""Embeddings into an AnnData object, with the facts that say where they come from."""

from __future__ import annotations

from typing import Any

from genescale.client.records import EmbeddedCells
from genescale.platform.errors import InputError

OBSM_KEY = "X_genescale"


def check_writable(adata: Any) -> None:
    """InputError for an object that embeddings cannot be written into, before any are asked for."""
    if getattr(adata, "is_view", False):
        raise InputError("the object is a view of another one.", where="adata", fix="Give a copy: adata.copy().")
    if not hasattr(adata, "obsm") or not hasattr(adata, "uns"):
        raise InputError(f"{type(adata).__name__} is no AnnData object.", where="adata", fix="Give one with obsm.")


def write_embeddings(adata: Any, key: str, found: EmbeddedCells, *, layer: str, pooling: str, slot: str) -> None:
    """Put embeddings into `obsm[key]` and their origin into `uns[key]`, in words that a file can hold."""
    model = found.model
    origin = {
        "model": model.name,
        "version": model.version,
        "digest": model.digest,
        "vocabulary_digest": model.vocabulary_digest,
        "layer": layer,
        "pooling": pooling,
        "counts": slot,
        "n_unusable": len(found.unusable),
    }
    if model.corpus_version is not None:
        origin["corpus_version"] = model.corpus_version
    adata.obsm[key] = found.embeddings
    adata.uns[key] = origin
