"""What a screen will do, decided before any work: which cells, which edits, in which units of work.

Legend: `n` chosen cells, `e` edits.

A plan is a pure function of the corpus version, the model and the config, so an interrupted screen that is started
again comes to the same units and continues.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.editing.edits import Kind, parse_kind
from genescale.perturbation.readouts.shift import MEASURES, Measure, check_measure, checked_goal
from genescale.platform.bundle import Bundle
from genescale.platform.errors import CorpusError, LimitError, SettingsError, did_you_mean
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embed import check_same_vocabulary
from genescale.training.embedder import LAYERS, Layer

SCREEN_SCHEMA_VERSION = 1
Selection = Literal["listed", "detected", "top_detected"]
GeneShifts = Literal["none", "listed", "all"]
TOGETHER = "+"
# (edit, affected gene) pairs whose moments are kept: about 32 bytes each, in every worker and in the result.
MAX_GENE_PAIRS = 20_000_000
CELLS_PER_READ = 2_000
CELL_COLUMNS = ("cell_id", "dataset_id", "source_row", "cell_type", "donor_id", "length")
# Settings that say how fast, not what: they may differ when a screen is continued.
SPEED_ONLY = ("tokens_per_batch", "device", "attention")


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """Which edits are tried on which cells of a corpus, and how cells are compared."""

    kind: Kind = "delete"
    select: Selection = "listed"
    """`listed`: the `genes`; `detected`: all genes of each cell; `top_detected`: the `top` genes seen in most cells."""
    genes: tuple[str, ...] = ()
    """Gene ids, symbols or aliases, each edited by itself; `A+B` edits both together."""
    top: int = 100
    where: tuple[str, ...] = ()
    """Cells to take: `column=value`, all of which must hold."""
    max_cells: int = 0
    """Cells drawn at random from those; 0 takes all."""
    seed: int = 0
    layer: Layer = "second_to_last"
    measure: Measure = "remaining_genes"
    gene_shifts: GeneShifts = "none"
    """Whose own shifts are recorded, averaged over cells: of no gene, of the `affected`, or of all."""
    affected: tuple[str, ...] = ()
    tokens_per_unit: int = 262_144
    """Tokens embedded between two results: a unit is what a broken run loses at most."""
    tokens_per_batch: int = 8_192
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the cluster's GPUs when it has some."""
    attention: str = "auto"

    def __post_init__(self) -> None:
        parse_kind(self.kind)
        for name, choices in (
            ("select", get_args(Selection)),
            ("layer", LAYERS),
            ("measure", MEASURES),
            ("gene_shifts", get_args(GeneShifts)),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if (value := getattr(self, name)) not in choices:
                fix = did_you_mean(value, choices) or f"Use one of {', '.join(choices)}."
                raise SettingsError(f"screen.{name} is '{value}'.", fix=fix)
        for name, least in (("top", 1), ("max_cells", 0), ("seed", 0), ("tokens_per_unit", 1), ("tokens_per_batch", 1)):
            if getattr(self, name) < least:
                raise SettingsError(f"screen.{name} is {getattr(self, name)}.", fix=f"Use at least {least}.")
        for given, wanted, name in (
            (self.genes, self.select == "listed", "genes"),
            (self.affected, self.gene_shifts == "listed", "affected"),
        ):
            if bool(given) != wanted:
                choice = "select" if name == "genes" else "gene_shifts"
                raise SettingsError(
                    f"screen.{name} and screen.{choice} = '{getattr(self, choice)}' do not fit.",
                    fix=f"Name {name} exactly when {choice} is 'listed'.",
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The chosen cells with their units, and the edits."""

    cells: pl.DataFrame
    """One row per chosen cell, in corpus order: `cell` (place in the corpus), `unit`, `n_edits`, CELL_COLUMNS."""
    edits: tuple[tuple[int, ...], ...]
    """Gene tokens of each edit; empty when every gene of each cell is edited."""
    affected: tuple[int, ...] | Literal["all"] | None
    """Genes whose own shifts are recorded."""
    n_pairs: int
    """(cell, edit) pairs."""
    identity: dict[str, Any]
    """What the screen is, for its record."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides the numbers."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def edit_at(self, position: int) -> tuple[int, ...]:
        """Gene tokens of the edit that moments know by `position`; where every gene is edited, that is its token."""
        return self.edits[position] if self.edits else (position,)

    @property
    def n_units(self) -> int:
        """Units of work."""
        return int(self.cells["unit"].max()) + 1  # type: ignore[arg-type]


def make_plan(bundle: Bundle, corpus: Corpus, config: ScreenConfig, *, goal: np.ndarray | None = None) -> Plan:
    """Choose cells and edits and cut them into units.

    Raises CorpusError when corpus and model were made with different vocabularies or no cell fits `where`,
    UnknownGeneError for a gene they lack, LimitError when the per-gene shifts would not fit in memory, InputError for a
    measure or a goal that does not fit the model.
    """
    vocabulary = bundle.vocabulary
    check_same_vocabulary(bundle, corpus)
    check_measure(config.measure, vocabulary)
    if goal is not None:
        checked_goal(goal, int(bundle.config["hidden_size"]))
    cells = choose_cells(corpus, config)
    edits = _edits(corpus, cells, config, vocabulary)
    affected = _affected(config, vocabulary, n_edits=len(edits) or len(vocabulary.gene_ids))
    genes_n = cells["length"].to_numpy().astype(np.int64) - (0 if vocabulary.cls is None else 2)
    edits_n = np.full(len(cells), len(edits)) if edits else genes_n
    units_n = cut_units(cells["length"].to_numpy() * (1 + edits_n), config.tokens_per_unit)
    return Plan(
        cells=cells.with_columns(unit=pl.Series(units_n, dtype=pl.Int32), n_edits=pl.Series(edits_n, dtype=pl.Int64)),
        edits=edits,
        affected=affected,
        n_pairs=int(edits_n.sum()),
        identity=_identity(bundle, corpus, config, goal),
    )


def check_genes(config: ScreenConfig, vocabulary: Vocabulary) -> None:
    """Raise what `make_plan` would raise about the genes of `config`, without a corpus."""
    n_listed = len(_listed_edits(config, vocabulary))
    most_edits = {"listed": n_listed, "top_detected": config.top, "detected": len(vocabulary.gene_ids)}
    _affected(config, vocabulary, n_edits=most_edits[config.select])


def choose_cells(corpus: Corpus, config: ScreenConfig) -> pl.DataFrame:
    """The cells of a screen in corpus order: `cell` (position in the corpus) and CELL_COLUMNS."""
    conditions = dict(_condition(text) for text in config.where)
    known = [field.name for field in corpus.schema if field.name != "input_ids"]
    for column in conditions:
        if column not in known:
            fix = did_you_mean(column, known) or f"Columns: {', '.join(known)}."
            raise CorpusError(f"there is no column '{column}'.", where=corpus.uri, fix=fix)
    table = corpus.cells([*CELL_COLUMNS, *(c for c in conditions if c not in CELL_COLUMNS)])
    cells = pl.DataFrame(pl.from_arrow(table)).with_row_index("cell")
    for column, value in conditions.items():
        values = cells[column].cast(pl.String)
        if not (values == value).any():
            seen = ", ".join(values.drop_nulls().unique().sort().head(10).to_list()) or "no value"
            raise CorpusError(f"no cell has {column} '{value}'.", where=corpus.uri, fix=f"The corpus has {seen}.")
        cells = cells.filter(values == value)
    if len(cells) == 0:
        raise CorpusError("no cell to edit.", where=corpus.uri, fix="Ingest an atlas, or widen the choice of cells.")
    if 0 < config.max_cells < len(cells):
        generator = np.random.default_rng(config.seed)
        cells = cells[np.sort(generator.choice(len(cells), size=config.max_cells, replace=False))]
    return cells.select("cell", *CELL_COLUMNS)


def cut_units(cost_n: np.ndarray, most: int) -> np.ndarray:
    """Unit `(n,)` of each cell: consecutive cells share one until their cost would pass `most`."""
    units, unit, filled = [], 0, 0
    for cost in cost_n.tolist():
        if filled and filled + cost > most:
            unit, filled = unit + 1, 0
        filled += cost
        units.append(unit)
    return np.array(units, dtype=np.int32)


def edit_id(genes: Sequence[int], vocabulary: Vocabulary) -> str:
    """Gene id of an edit; ids of genes edited together are joined by `+`."""
    return TOGETHER.join(vocabulary.gene_of_token(gene) for gene in genes)


def edit_symbol(genes: Sequence[int], vocabulary: Vocabulary) -> str:
    """As `edit_id`, with symbols."""
    return TOGETHER.join(vocabulary.symbol_of(vocabulary.gene_of_token(gene)) for gene in genes)


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise SettingsError(
            f"'{text}' is no choice of cells.", fix="Write column=value, for example cell_type=monocyte."
        )
    return column.strip(), value.strip()


def _edits(
    corpus: Corpus, cells: pl.DataFrame, config: ScreenConfig, vocabulary: Vocabulary
) -> tuple[tuple[int, ...], ...]:
    if config.select == "detected":
        return ()
    if config.select == "top_detected":
        return tuple((gene,) for gene in _most_detected(corpus, cells["cell"].to_numpy(), config.top, vocabulary))
    return _listed_edits(config, vocabulary)


def _listed_edits(config: ScreenConfig, vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    edits = tuple(tuple(vocabulary.token(gene) for gene in text.split(TOGETHER)) for text in config.genes)
    for edit, text in zip(edits, config.genes, strict=True):
        if edits.count(edit) > 1:
            raise SettingsError(
                f"the edit '{text}' is listed twice.", fix="A gene may have several names: list it once."
            )
    return edits


def _most_detected(corpus: Corpus, cells_n: np.ndarray, top: int, vocabulary: Vocabulary) -> list[int]:
    """Genes that stand in most cells, most first; ties go to the smaller token id."""
    counts = np.zeros(vocabulary.size, dtype=np.int64)
    for start in range(0, len(cells_n), CELLS_PER_READ):
        for tokens_t in corpus.tokens(cells_n[start : start + CELLS_PER_READ].tolist()):
            counts[np.unique(tokens_t)] += 1
    counts[list(vocabulary.special.values())] = 0
    order = np.argsort(-counts, kind="stable")[:top]
    return order[counts[order] > 0].tolist()


def _affected(config: ScreenConfig, vocabulary: Vocabulary, *, n_edits: int) -> tuple[int, ...] | Literal["all"] | None:
    if config.gene_shifts == "none":
        return None
    genes = tuple(dict.fromkeys(vocabulary.token(gene) for gene in config.affected))
    n_affected = len(genes) or len(vocabulary.gene_ids)
    if n_edits * n_affected > MAX_GENE_PAIRS:
        raise LimitError(
            f"{n_edits:,} edits times {n_affected:,} affected genes are more than {MAX_GENE_PAIRS:,} pairs.",
            where="screen.gene_shifts",
            fix="List fewer genes to edit, or list the affected genes of interest.",
        )
    return genes or "all"


def _identity(bundle: Bundle, corpus: Corpus, config: ScreenConfig, goal: np.ndarray | None) -> dict[str, Any]:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in SPEED_ONLY}
    parts = [(part.uri, part.rows) for part in corpus.parts]
    goal_bytes = None if goal is None else np.ascontiguousarray(goal, dtype="<f8").tobytes()
    return {
        "schema_version": SCREEN_SCHEMA_VERSION,
        "model_digest": bundle.digest,
        "vocabulary_digest": bundle.vocabulary.digest,
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        # A corpus that was deleted and made anew can have the same address and version, but not the same parts.
        "corpus_parts_digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "goal_digest": None if goal_bytes is None else hashlib.sha256(goal_bytes).hexdigest(),
        "config": json.loads(json.dumps(settings)),
    }
