"""How each source of a run is read: the options of the run with the source's own, and the gene tables they name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from genescale.ingestion.annotation.gene_table import GeneTable, read_gene_table
from genescale.ingestion.config import IngestConfig
from genescale.platform.errors import SettingsError
from genescale.platform.storage import Store

if TYPE_CHECKING:
    from genescale.ingestion.sources import SourceSpec


def source_configs(
    specs: Sequence[SourceSpec], config: IngestConfig, store: Store
) -> tuple[dict[str, IngestConfig], dict[str, GeneTable]]:
    """The config of each source by address, and the content of each gene table by its address.

    Raises SettingsError for options that do not fit, and for one dataset id given to several files.
    """
    if config.dataset_id and len(specs) > 1:
        raise SettingsError(f"one dataset id for {len(specs)} files.", fix="Ingest them one by one, or leave it out.")
    configs = {spec.uri: config.changed(spec.options, where=spec.uri) for spec in specs}
    tables = {uri: read_gene_table(uri, store) for uri in {own.gene_table for own in configs.values()} if uri}
    for uri, own in configs.items():
        if own.gene_table:
            configs[uri] = dataclasses.replace(own, gene_table_digest=tables[own.gene_table].digest)
    return configs, tables
