"""What a gene column's name says of itself: an id or a symbol, of which species, a spike-in, a virus, no gene at all.

Only the name is looked at here; what a vocabulary makes of it is decided in `genes.py`.

Axis suffixes: `g` gene columns of the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ENSEMBL_ID = re.compile(r"ENS[A-Z]*[0-9]{6,}(\.[0-9]+)?(_PAR_Y)?")
HUMAN = "Homo sapiens"
MOUSE = "Mus musculus"
VIRUS = "a virus"
VIRUSES = (VIRUS, "SARS-CoV-2")
MOUSE_OR_RAT = "a mouse or rat"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Species:
    """A species as files name it: Latin and common name, taxon, the letters of its gene ids, its assemblies."""

    name: str
    common: str
    taxon: int
    gene_prefix: str
    assemblies: str = ""
    """Alternatives of a regular expression, in lower case."""


SPECIES = (
    Species(
        name=HUMAN,
        common="human",
        taxon=9606,
        gene_prefix="ENSG",
        assemblies=r"hg(?:1[6-9]|38)|grch3[678]|t2t-chm13|chm13",
    ),
    Species(name=MOUSE, common="mouse", taxon=10090, gene_prefix="ENSMUSG", assemblies=r"mm(?:9|10|39)|grcm3[789]"),
    Species(
        name="Rattus norvegicus",
        common="rat",
        taxon=10116,
        gene_prefix="ENSRNOG",
        assemblies=r"rn[4567]|rnor_[56]\.0|mratbn7(?:\.2)?|grcr8",
    ),
    Species(name="Macaca mulatta", common="macaque", taxon=9544, gene_prefix="ENSMMUG", assemblies=r"mmul_?(?:8|10)"),
    Species(name="Macaca fascicularis", common="cynomolgus", taxon=9541, gene_prefix="ENSMFAG"),
    Species(name="Pan troglodytes", common="chimpanzee", taxon=9598, gene_prefix="ENSPTRG", assemblies="pantro[3-6]"),
    Species(name="Gorilla gorilla gorilla", common="gorilla", taxon=9595, gene_prefix="ENSGGOG"),
    Species(name="Callithrix jacchus", common="marmoset", taxon=9483, gene_prefix="ENSCJAG"),
    Species(name="Microcebus murinus", common="mouse lemur", taxon=30608, gene_prefix="ENSMICG"),
    Species(name="Sus scrofa", common="pig", taxon=9823, gene_prefix="ENSSSCG", assemblies=r"sscrofa11\.1|susscr11"),
    Species(name="Bos taurus", common="cow", taxon=9913, gene_prefix="ENSBTAG"),
    Species(name="Ovis aries", common="sheep", taxon=9940, gene_prefix="ENSOARG"),
    Species(name="Canis lupus familiaris", common="dog", taxon=9615, gene_prefix="ENSCAFG"),
    Species(name="Felis catus", common="cat", taxon=9685, gene_prefix="ENSFCAG"),
    Species(name="Oryctolagus cuniculus", common="rabbit", taxon=9986, gene_prefix="ENSOCUG"),
    Species(name="Gallus gallus", common="chicken", taxon=9031, gene_prefix="ENSGALG"),
    Species(
        name="Danio rerio", common="zebrafish", taxon=7955, gene_prefix="ENSDARG", assemblies=r"danrer1[01]|grcz1[01]"
    ),
    Species(name="Xenopus tropicalis", common="frog", taxon=8364, gene_prefix="ENSXETG"),
    Species(
        name="Drosophila melanogaster",
        common="fly",
        taxon=7227,
        gene_prefix="FBGN",
        assemblies=r"dm[36]|bdgp6(?:\.\d+)?",
    ),
    Species(
        name="Caenorhabditis elegans", common="worm", taxon=6239, gene_prefix="WBGENE", assemblies=r"ce1[01]|wbcel235"
    ),
    Species(name="SARS-CoV-2", common="coronavirus", taxon=2697049, gene_prefix="ENSSASG"),
)
_BY_PREFIX = {species.gene_prefix: species for species in SPECIES}
_BY_TAXON = {species.taxon: species for species in SPECIES}
_BY_NAME = {name.lower(): species for species in SPECIES for name in (species.name, species.common)}

_ASSEMBLIES = [(re.compile(species.assemblies), species.name) for species in SPECIES if species.assemblies]
_ANY_ASSEMBLY = "|".join(species.assemblies for species in SPECIES if species.assemblies)
# `hg19_`, `GRCh38______`, Seurat's `mm10---`, and Cell Ranger's `GRCh38-2020-A_`.
_PREFIXED = re.compile(
    rf"(?P<genome>{_ANY_ASSEMBLY})(?:-20\d\d-[a-z]|\.p\d+|_premrna)?[_-]+(?=[a-z0-9])", re.IGNORECASE
)
_GENOME = re.compile(rf"({_ANY_ASSEMBLY})(?![a-z0-9])", re.IGNORECASE)
_GENE_ID = re.compile(r"(ENS(?:[A-Z]{3,4})?G|FBGN|WBGENE)(R?)[0-9]{6,}(\.[0-9]+)?(_PAR_Y)?")
_OTHER_ID = re.compile(r"ENS[A-Z]*[TPE][0-9]{6,}(\.[0-9]+)?")
_SPIKE_IN = re.compile(r"(GSPIKEIN[_-].*|(SPIKE-?IN[_-])?ERCC[_-][0-9]{5}|SIRV[0-9]+.*|(GENE:)?PHI-?X174)")
_VIRUS = re.compile(
    r"(SARS[-_]?COV[-_]?2|SARSCOV2|SCOV2|HCOV|HIV-?[12]?|HSV-?[12]|EBV|HCMV|KSHV|HHV-?[1-8]|HBV|HCV|IAV|RSV)([_-].+)?"
    r"|NC_045512.*|(GENE-)?GU280_GP[0-9]+"
)
_NO_GENE = re.compile(
    r"(CHR)?([0-9]{1,2}|[XYM]|MT)[:-][0-9]+-[0-9]+|.+[_-]TOTALSEQ.?[ABCD]?|(HASHTAG|HTO|ADT|CMO)[_-]?[0-9]+.*|ADT[_-].+"
    r"|_*(NO_FEATURE|AMBIGUOUS|TOO_LOW_AQUAL|NOT_ALIGNED|ALIGNMENT_NOT_UNIQUE|UNMAPPED|MULTIMAPPING|NOFEATURE)"
)
# What a name may begin with, end with or hold when it is more than a symbol in capitals; not all such names are.
_VIRUSES_BEGIN = (
    "SARS", "SCOV2", "HCOV", "HIV", "HSV", "EBV", "HCMV", "KSHV", "HHV", "HBV", "HCV", "IAV", "RSV", "NC_045512",
    "GENE-GU280", "GU280",
)  # fmt: skip
_SPIKE_INS_BEGIN = ("GSPIKE", "SIRV", "SPIKE", "PHI", "GENE:")
_NO_GENES_BEGIN = (
    "HASHTAG", "HTO", "ADT", "CMO", "_", "NO_FEATURE", "AMBIGUOUS", "TOO_LOW_AQUAL", "NOT_ALIGNED",
    "ALIGNMENT_NOT_UNIQUE", "UNMAPPED", "MULTIMAPPING", "NOFEATURE",
)  # fmt: skip
_IDS_BEGIN = ("ENS", "FBGN", "WBGENE")
# A second look at every name of a table would take longer than reading its counts; Arrow finds at once the few names
# that deserve it. Whatever is more than capitals, digits and signs does.
_UNUSUAL = (
    rf"[^!-`{{|}}~]|^(?i:{_ANY_ASSEMBLY})|ERCC|TOTALSEQ|-[0-9]+$|^(?:"
    + "|".join(map(re.escape, (*_VIRUSES_BEGIN, *_SPIKE_INS_BEGIN, *_NO_GENES_BEGIN, *_IDS_BEGIN)))
    + ")"
)
# One capital followed by small letters: the spelling of mouse and rat symbols. No approved human symbol has it.
_MOUSE_SPELLING = re.compile(r"(?:[A-Z][a-z][A-Za-z0-9.-]*|mt-[A-Z][A-Za-z0-9]*|[0-9]{7}[A-Z][0-9]{2}Rik)")
# The mitochondrial genome carries 37 genes: 13 for proteins, 2 for ribosomal and 22 for transfer RNA.
MITOCHONDRIAL_IDS = frozenset(
    f"ENSG00000{number}"
    for number in (
        "198888 198763 198804 198712 228253 198899 198938 198840 212907 198886 198786 198695 198727 211459 210082 "
        "210049 210077 209082 210100 210107 210112 210117 210127 210135 210140 210144 210151 210154 210156 210164 "
        "210174 210176 210184 210191 210194 210195 210196"
    ).split()
)


class GeneName(NamedTuple):
    """A name as it was read: `core` in upper case without genome prefix and version; `species` empty if not told."""

    core: str
    spelled: str
    """Without the genome prefix, in its own spelling."""
    kind: str
    """`id`, `par_y`, `symbol`, `spike_in`, `virus` or `no_gene`."""
    species: str
    prefixed: bool
    versioned: bool


def read_name(text: str) -> GeneName:
    """Take a gene column's name apart."""
    spelled, species, prefixed = text.strip(), "", False
    if ("_" in spelled or "-" in spelled) and (match := _PREFIXED.match(spelled)):
        species, spelled, prefixed = genome_species(match["genome"]), spelled[match.end() :], True
    core = spelled.upper()
    if core.startswith(_IDS_BEGIN) and (match := _GENE_ID.fullmatch(core)):
        prefix, on_y, version, par_y = match.groups()
        known = _BY_PREFIX.get(prefix)
        kind = "par_y" if on_y or par_y else "id"
        core = core if par_y or not version else core[: match.start(3)]
        return GeneName(core, spelled, kind, known.name if known else f"ids {prefix}…", prefixed, bool(version))
    if core.startswith("ENS") and _OTHER_ID.fullmatch(core):
        return GeneName(core, spelled, "id", "", prefixed, False)
    return GeneName(core, spelled, _kind_of_symbol(core), species, prefixed, False)


def _kind_of_symbol(core: str) -> str:
    # Few names have the marks of these kinds, and three patterns for each of 60,000 names would take a while.
    if ("ERCC" in core or core.startswith(_SPIKE_INS_BEGIN)) and _SPIKE_IN.fullmatch(core):
        return "spike_in"
    if core.startswith(_VIRUSES_BEGIN) and _VIRUS.fullmatch(core):
        return "virus"
    marked = core.startswith(_NO_GENES_BEGIN) or "TOTALSEQ" in core or ("-" in core and core[-1].isdigit())
    return "no_gene" if marked and _NO_GENE.fullmatch(core) else "symbol"


def usual_names(names_g: pa.Array, home: str) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Masks (g) of the names that need no taking apart: plain gene ids of a species, and plain symbols in capitals.

    `read_name` finds in the former an id of `home` without a version, in the latter a symbol of no species.
    """
    prefix = next((species.gene_prefix for species in SPECIES if species.name == home), None)
    ids = pc.match_substring_regex(names_g, f"^{prefix}[0-9]{{6,}}$") if prefix else pa.repeat(False, len(names_g))
    symbols = pc.and_not(pc.greater(pc.binary_length(names_g), 0), pc.match_substring_regex(names_g, _UNUSUAL))
    return _as_mask(ids), _as_mask(symbols)


def _as_mask(values: pa.Array) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = values.to_numpy(zero_copy_only=False)
    return mask


def mouse_spelled(symbol: str) -> bool:
    """Whether a symbol is spelled as mouse and rat symbols are: `Actb`, `mt-Nd1`."""
    return not symbol.isupper() and bool(_MOUSE_SPELLING.fullmatch(symbol))


def genome_species(genome: str) -> str:
    """Species of an assembly such as `GRCh38_chr21` or `mm10`; empty when the assembly is not known."""
    match = _GENOME.match(genome.strip().lower())
    return next((name for pattern, name in _ASSEMBLIES if pattern.fullmatch(match[1])), "") if match else ""


def ensembl_share(names: Sequence[str]) -> float:
    """Share of the names that are Ensembl ids, with or without the prefix of a genome."""
    return float(ensembl_marks(names).mean()) if len(names) else 0.0


def ensembl_marks(names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which of the names (g) are Ensembl ids, with or without the prefix of a genome."""
    plain = pc.utf8_upper(pc.utf8_trim_whitespace(pa.array(names, pa.string())))
    ids_g = _as_mask(pc.match_substring_regex(plain, f"^(?:{ENSEMBL_ID.pattern})$"))
    inside_g = _as_mask(pc.and_not(pc.match_substring(plain, "ENS"), pc.starts_with(plain, "ENS")))
    if inside_g.any():
        ids_g = ids_g.copy()
        ids_g[inside_g] = [_is_ensembl(name) for name in plain.filter(pa.array(inside_g)).to_pylist()]
    return ids_g


def _is_ensembl(name: str) -> bool:
    plain = name.strip().upper()
    if "ENS" not in plain:
        return False
    match = None if plain.startswith("ENS") else _PREFIXED.match(plain)
    return bool(ENSEMBL_ID.fullmatch(plain[match.end() :] if match else plain))


def species_of_ids(gene_ids: Iterable[str]) -> str:
    """Species that most of these ids belong to; empty when they tell none."""
    counts = Counter(match[1] for gene in gene_ids if (match := _GENE_ID.fullmatch(gene.strip().upper())))
    species = _BY_PREFIX.get(counts.most_common(1)[0][0]) if counts else None
    return species.name if species else ""


def named_species(text: str) -> str:
    """Latin name of a species given as `NCBITaxon:10090`, `Mus musculus` or `mouse`; the text itself if not known."""
    plain = text.strip()
    match = re.fullmatch(r"(?:NCBITaxon:)?([0-9]+)", plain, re.IGNORECASE)
    known = _BY_TAXON.get(int(match[1])) if match else _BY_NAME.get(plain.lower().replace("_", " "))
    return known.name if known else plain


def is_species(name: str) -> bool:
    """Whether a text names a species for certain: a Latin or common name known here, or a taxon."""
    return named_species(name).lower() in _BY_NAME or bool(re.fullmatch(r"NCBITaxon:[0-9]+", name.strip()))


def species_label(name: str) -> str:
    """A species for messages: `Mus musculus (mouse, NCBITaxon:10090)`."""
    known = _BY_NAME.get(name.lower())
    return f"{known.name} ({known.common}, NCBITaxon:{known.taxon})" if known else name
