"""What is known of a source once it is open and its genes are mapped: facts of its report, before any cell is read."""

from __future__ import annotations

from typing import Any

from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.gene_checks import declared_organisms
from genescale.ingestion.genes import GeneMap, gene_report
from genescale.ingestion.obs_columns import filled_from
from genescale.ingestion.species import species_label, species_of_ids
from genescale.platform.vocabulary import Vocabulary


def source_facts(atlas: Atlas, genes: GeneMap, vocabulary: Vocabulary, config: IngestConfig) -> dict[str, Any]:
    """Fields of `SourceReport` by name, as JSON; counts by fate come with the cells."""
    return {
        "kind": atlas.kind,
        "counts_slot": atlas.slot,
        "slot_reason": atlas.slot_reason,
        "slots_seen": dict(atlas.slots_seen),
        "species": _species(atlas, vocabulary),
        "gene_column": genes.column,
        "genes_mapped": genes.n_mapped,
        "genes_dropped": genes.n_dropped,
        "genes_summed": genes.n_summed,
        "genes_versioned": genes.n_versioned,
        "gene_report": gene_report(genes, {}).to_dict(),
        "obs_columns": {name: column for name, column in filled_from(atlas, config.obs).items() if column},
        "notes": sorted({*atlas.notes, *genes.notes}),
    }


def _species(atlas: Atlas, vocabulary: Vocabulary) -> str:
    home, declared = species_of_ids(vocabulary.gene_ids), declared_organisms(atlas)
    if home and home in declared:
        return f"{species_label(home)}, as the file declares"
    told = "nothing declared" if not declared else f"the file declares {', '.join(map(species_label, declared[:3]))}"
    return f"{species_label(home)}, by its gene names ({told})" if home else ", ".join(map(species_label, declared[:3]))
