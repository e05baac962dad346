"""Whether an atlas fits a vocabulary by its genes: the right species, names that are known, enough genes measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from genescale.ingestion.annotation.gene_columns import column_label
from genescale.ingestion.annotation.gene_names import AMBIGUOUS, COUNTED, FATES, OTHER_SPECIES, Resolved, Resolver
from genescale.ingestion.annotation.species import (
    MOUSE_OR_RAT,
    VIRUSES,
    ensembl_share,
    is_species,
    named_species,
    species_label,
)
from genescale.platform.errors import AtlasError

if TYPE_CHECKING:
    from genescale.ingestion.annotation.genes import GeneRules
    from genescale.ingestion.atlas import Atlas

ORGANISM_COLUMNS = ("organism_ontology_term_id", "organism")
# A mixture of two species has about as many genes of the other one as of the right one.
MOST_OF_OTHER_SPECIES = 4
_SAMPLED_CELLS = 1_000
_CODES_COUNTED = np.array([fate in COUNTED for fate in FATES])


def raise_if_unfit(
    atlas: Atlas, column: str, texts: Sequence[str], found: Resolved, lookup: Resolver, rules: GeneRules
) -> None:
    """Raise AtlasError when the file is of another species, unknown by name, or measures too few genes."""
    home_g = _CODES_COUNTED[found.fate_g]
    others = int((found.fate_g == OTHER_SPECIES).sum())
    if others > MOST_OF_OTHER_SPECIES * int((home_g & found.one_to_one_g).sum()):
        _refuse_species(atlas, column, texts, found, lookup)
    if not rules.ignore_organism:
        _check_declared(atlas, lookup.home)
    if not home_g.any():
        _refuse_no_gene(atlas, column, texts, found)
    known = int((found.targets_g >= 0).sum())
    if ensembl_share(texts) >= 0.5:
        share, asked, counted = known / max(int(home_g.sum()), 1), rules.min_share, "knows"
    else:
        fitting = int((home_g & found.one_to_one_g).sum())
        share, asked, counted = fitting / max(int(home_g.sum()), 1), rules.min_share_of_symbols, "names"
    if not known or share < asked:
        _refuse_unknown(atlas, column, texts, found, lookup, share=share, asked=asked, by_ids=counted == "knows")
    measured = int(np.unique(found.targets_g[found.targets_g >= 0]).size)
    if measured < (needed := rules.genes_asked(lookup.vocabulary)):
        raise AtlasError(
            f"only {measured:,} of {len(lookup.vocabulary.gene_ids):,} vocabulary genes are present, {needed:,} are "
            "asked for; a panel or a selection of genes ranks differently from a whole transcriptome.",
            where=f"{atlas.uri}: {atlas.var.path}",
            fix=f"Give the unfiltered gene table, or --min-genes-measured {measured} if this is what was measured.",
        )


def _refuse_species(atlas: Atlas, column: str, texts: Sequence[str], found: Resolved, lookup: Resolver) -> None:
    species, count = found.others.most_common(1)[0]
    spelled = next(text for text, fate in zip(texts, found.fate_g, strict=True) if fate == OTHER_SPECIES)
    what = "symbols of" if species == MOUSE_OR_RAT else "genes of"
    raise AtlasError(
        f"{count:,} of {len(texts):,} names in var {column_label(column)} are {what} {species_label(species)}, such as "
        f"'{spelled[:40]}'; the vocabulary is of {species_label(lookup.home)}.",
        where=f"{atlas.uri}: {atlas.var.path}",
        fix=f"Give {species_label(lookup.home)} cells, or use a vocabulary of that species.",
    )


def _refuse_no_gene(atlas: Atlas, column: str, texts: Sequence[str], found: Resolved) -> None:
    fates = Counter(FATES[fate] for fate in found.fate_g.tolist())
    seen = ", ".join(f"{count:,} {fate}" for fate, count in fates.most_common())
    first = next(iter(texts), "")[:40]
    raise AtlasError(
        f"none of {len(texts):,} columns is a gene ({seen}), by var {column_label(column)}, such as '{first}'.",
        where=f"{atlas.uri}: {atlas.var.path}",
        fix="Give the matrix of gene expression.",
    )


def declared_organisms(atlas: Atlas) -> tuple[str, ...]:
    """Species that the file itself declares, in `uns` (CELLxGENE schema 6 and later) or in some of its cells.

    What does not name a species for certain, such as `unknown`, declares none.
    """
    for name in ORGANISM_COLUMNS:
        if is_species(text := atlas.texts.get(name, "")):
            return (named_species(text),)
    for name in ORGANISM_COLUMNS:
        if name in atlas.obs.columns:
            seen = {named_species(value) for value in _sampled(atlas, name) if is_species(value)}
            if seen:
                return tuple(sorted(seen))
    return ()


def _sampled(atlas: Atlas, name: str) -> set[str]:
    """Values of an obs column in cells at the start, the middle and the end: enough to tell a file's species."""
    n, values = atlas.n_cells, set[str]()
    for start in sorted({0, max(n // 2 - _SAMPLED_CELLS // 2, 0), max(n - _SAMPLED_CELLS, 0)}):
        found, _ = atlas.obs.column(name, start, min(start + _SAMPLED_CELLS, n))
        values |= {value for value in found if value}
    return values


def _check_declared(atlas: Atlas, home: str) -> None:
    declared = declared_organisms(atlas)
    if home and declared and home not in declared:
        raise AtlasError(
            f"the file declares {' and '.join(map(species_label, declared[:3]))}; "
            f"the vocabulary is of {species_label(home)}.",
            where=f"{atlas.uri}: organism",
            fix="Use a vocabulary of that species, or --ignore-organism if its genes were translated before.",
        )


def _refuse_unknown(
    atlas: Atlas,
    column: str,
    texts: Sequence[str],
    found: Resolved,
    lookup: Resolver,
    *,
    share: float,
    asked: float,
    by_ids: bool,
) -> None:
    known, where = int((found.targets_g >= 0).sum()), f"{atlas.uri}: {atlas.var.path}"
    first = next((text for text in texts if text), "")[:40]
    what = f"the vocabulary knows {known:,} of {len(texts):,} genes"
    if by_ids:
        fix = "Give the ids of its species and release, or lower --min-share if so few genes are meant to fit."
        raise AtlasError(
            f"{what} by the ids in var {column_label(column)}, such as '{first}': {share:.0%} of its species' "
            f"genes, {asked:.0%} are asked for.",
            where=where,
            fix=fix,
        )
    counts = Counter(FATES[fate] for fate in found.fate_g.tolist())
    fix = "Give Ensembl ids in the var index or in var['ensembl_id']"
    fix += "." if lookup.table else ", or a table of symbols with --gene-table."
    raise AtlasError(
        f"{what} by symbols or other names in var {column_label(column)}, such as '{first}': {share:.0%} name exactly "
        f"one gene, {asked:.0%} are asked for ({counts['ambiguous']:,} ambiguous, {counts['unknown']:,} unknown).",
        where=where,
        fix=fix,
    )


def organism_notes(atlas: Atlas, home: str) -> tuple[str, ...]:
    """A note when the file declares cells of several species."""
    others = [name for name in declared_organisms(atlas) if name != home]
    if not home or not others:
        return ()
    return (
        f"the file declares other organisms too: {', '.join(map(species_label, others[:3]))}; "
        "choose cells with --where to leave theirs out",
    )


def gene_notes(texts: Sequence[str], found: Resolved) -> tuple[str, ...]:
    """What was mended or left out among the gene columns, a sentence each."""
    notes = []
    if versioned := int(found.versioned_g.sum()):
        notes.append(f"removed the version from {versioned:,} ids")
    if (prefixed := np.flatnonzero(found.prefixed_g)).size:
        names = "1 name without its" if prefixed.size == 1 else f"{prefixed.size:,} names without their"
        notes.append(f"read {names} genome's prefix, such as '{texts[prefixed[0]][:40]}'")
    home = int(_CODES_COUNTED[found.fate_g].sum())
    for species, count in found.others.most_common():
        mixture = species not in VIRUSES and MOST_OF_OTHER_SPECIES * count > home
        tail = "; its cells are kept unless --where leaves them out" if mixture else ""
        genes = "1 gene" if count == 1 else f"{count:,} genes"
        notes.append(f"left out {genes} of {species_label(species)}{tail}")
    if ambiguous := [texts[g] for g in np.flatnonzero(found.fate_g == AMBIGUOUS).tolist()]:
        shown = ", ".join(ambiguous[:5])
        named = "symbol that names" if len(ambiguous) == 1 else "symbols that name"
        notes.append(f"dropped {len(ambiguous):,} {named} several genes, such as {shown}")
    targets = found.targets_g[found.targets_g >= 0]
    _, times = np.unique(targets, return_counts=True)
    if (times > 1).any():
        shared, columns = int((times > 1).sum()), int(times[times > 1].sum())
        notes.append(f"{columns:,} columns share {shared:,} {'gene' if shared == 1 else 'genes'}; counts summed")
    return tuple(notes)
