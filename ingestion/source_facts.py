"""What speaks for and against a source: facts known once it is open, and what became of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genescale.ingestion.annotation.cells import BAD_VALUES, check_enough_cells
from genescale.ingestion.annotation.gene_checks import declared_organisms
from genescale.ingestion.annotation.genes import GeneMap, gene_report
from genescale.ingestion.annotation.obs_columns import filled_from
from genescale.ingestion.annotation.species import species_label, species_of_ids
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.tally import Tally
from genescale.platform.errors import AtlasError, NotCountsError
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


def check_tally(tally: Tally, config: IngestConfig, *, where: str, held_by: Sequence[str] = ()) -> None:
    """AtlasError or NotCountsError when what became of the cells speaks against the whole file.

    held_by: datasets that hold cells equal to those of this file.
    """
    bad = tally.dropped.get(BAD_VALUES, 0)
    if bad > config.max_bad_cells * tally.read:
        raise NotCountsError(
            f"{bad:,} of {tally.read:,} cells hold values that are no counts; {config.max_bad_cells:.1%} are allowed.",
            where=where,
            fix="Give raw counts, or look at the values: this is rarely a few damaged cells.",
        )
    check_enough_cells(tally, config, where=where)
    if not tally.kept:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(tally.dropped.items()))
        fix = f"Its cells are in {', '.join(held_by)}: leave the file out." if held_by else ""
        raise AtlasError(f"no cell is left of {tally.read:,} ({reasons}).", where=where, fix=fix)
    if tally.largest_count < 2:
        raise NotCountsError("no count exceeds 1: these are detection calls.", where=where, fix="Give raw counts.")


def _species(atlas: Atlas, vocabulary: Vocabulary) -> str:
    home, declared = species_of_ids(vocabulary.gene_ids), declared_organisms(atlas)
    if home and home in declared:
        return f"{species_label(home)}, as the file declares"
    told = "nothing declared" if not declared else f"the file declares {', '.join(map(species_label, declared[:3]))}"
    return f"{species_label(home)}, by its gene names ({told})" if home else ", ".join(map(species_label, declared[:3]))
