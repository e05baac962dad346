"""What a screen will do, decided before any work: which cells, which edits, in which units of work.

Legend: `n` chosen cells, `p` pieces (a cell with some of its edits), `v` token ids of the vocabulary.

A plan is a pure function of the corpus version, the model and the config, so an interrupted screen that is started
again comes to the same units and continues.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.editing.edit_sets import EditSet, read_sets
from genescale.perturbation.editing.requests import EditOptions
from genescale.perturbation.readouts.shift import check_measure
from genescale.perturbation.screening import cells as chosen
from genescale.perturbation.screening.masked_genes import check_masked, masked_passes, masked_tokens
from genescale.perturbation.screening.spec import EVERY_GENE, NO_GENE, EditsConfig, ScreenConfig
from genescale.perturbation.screening.two_pass import TwoPassConfig, how_many
from genescale.perturbation.screening.units import auto_tokens_per_unit, cut_pieces
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, LimitError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embed import check_same_vocabulary

SCREEN_SCHEMA_VERSION = 2
# Rows of the gene shifts that are kept without top_k, and the single observations behind them, 24 bytes each on disk.
MAX_GENE_PAIRS = 20_000_000
MAX_OBSERVATIONS = 1_000_000_000
# A backward pass is about twice the arithmetic of a forward one.
BACKWARD = 2
Affected = tuple[int, ...] | Literal["all"] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The chosen cells, the edits, and the units of work they are cut into."""

    cells: pl.DataFrame
    """One row per chosen cell, in corpus order: `cell` (place in the corpus), `n_genes`, CELL_COLUMNS, and
    `n_changed`: the edits (of a second pass, where there are two) that alter it, and so cost a pass of the model;
    `n_masked_passes`: further passes of each of these and of the cell itself, in which `n_masked` genes are hidden."""
    pieces: pl.DataFrame
    """What `cut_pieces` made of them."""
    edits: EditSet
    n_controls: int
    """Control edits for each edit of a cell that changes it."""
    not_controls: tuple[int, ...]
    detected_v: np.ndarray
    """Chosen cells that have each gene, by which controls are matched; empty without controls."""
    affected: Affected
    """Genes whose own shifts are recorded."""
    masked: Affected
    """Genes that are hidden, to see whether they are still expected."""
    two_pass: TwoPassConfig | None
    seed: int
    tokens_per_unit: int
    left_out: Mapping[str, int]
    """Cells of the corpus, and genes named, that the screen leaves out, by reason."""
    identity: Mapping[str, Any]
    """What the screen is, for its record."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides the numbers, and of how they are cut into files."""
        content = {**self.identity, "tokens_per_unit": self.tokens_per_unit}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def n_units(self) -> int:
        """Units of work."""
        return int(self.pieces["unit"].max() or 0) + 1  # type: ignore[arg-type]

    @property
    def n_pairs(self) -> int:
        """(cell, edit) pairs, controls not counted."""
        return int((self.pieces["stop"] - self.pieces["start"]).sum())

    @property
    def n_tokens(self) -> int:
        """Tokens through the encoder, nearly (edited cells are counted at the length of the unedited one)."""
        return int(self.pieces["tokens"].sum())


def make_plan(
    bundle: Bundle,
    corpus: Corpus,
    config: ScreenConfig,
    *,
    store: Store,
    tokens_per_unit: int = 0,
    on_gpu: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose cells and edits and cut them into units of `tokens_per_unit` (0: the config's, or what suits the device).

    `origin` are further digests of what decides the numbers, such as those of states and head. Raises CorpusError when
    corpus and model were made with different vocabularies or no cell fits, UnknownGeneError for a gene they lack,
    LimitError when the gene shifts would be too many, InputError for a measure or edits that do not fit, SettingsError
    for masked genes with a model that has no head for them.
    """
    vocabulary = bundle.vocabulary
    check_same_vocabulary(bundle, corpus)
    check_measure(config.readouts.measure, vocabulary)
    check_masked(config, bundle)
    not_controls = tuple(vocabulary.token(gene) for gene in config.edits.not_controls)
    affected = affected_genes(config, vocabulary)
    masked, unknown_masked = masked_tokens(config, vocabulary, store)
    cells, left_out = _chosen_cells(corpus, config)
    n_controls = config.edits.n_controls
    needs_detection = n_controls > 0 or config.edits.top > 0
    detected_v = chosen.detection(corpus, cells["cell"].to_numpy()) if needs_detection else np.zeros(0, dtype=np.int64)
    edits = edit_set(config.edits, corpus, store, detected_v=detected_v, seed=config.cells.seed)
    asked_n, changed_n = _edits_of_cells(edits, corpus, cells)
    for name, genes in (("gene_shifts", affected), ("masked_genes", masked)):
        _check_pairs(name, config, edits, genes, cells, asked_n, vocabulary)
    passes_n, hidden_n = masked_passes(masked, corpus, cells["cell"].to_numpy())
    if config.two_pass is not None:
        changed_n = _chosen_of_cells(config.two_pass, asked_n)
    own_n, per_edit_n = _costs(config, cells, asked_n, changed_n, passes_n)
    size = tokens_per_unit or config.compute.tokens_per_unit
    size = size or auto_tokens_per_unit(int((own_n + per_edit_n * asked_n).sum()), on_gpu=on_gpu)
    return Plan(
        cells=cells.with_columns(
            n_changed=pl.Series(changed_n, dtype=pl.Int64),
            n_masked_passes=pl.Series(passes_n),
            n_masked=pl.Series(hidden_n),
        ),
        pieces=cut_pieces(own_n, asked_n, per_edit_n, size, split=config.two_pass is None),
        edits=edits,
        n_controls=n_controls,
        not_controls=not_controls,
        detected_v=detected_v if n_controls else detected_v[:0],
        affected=affected,
        masked=masked,
        two_pass=config.two_pass,
        seed=config.cells.seed,
        tokens_per_unit=size,
        left_out={**left_out, **_unknown_genes(edits, unknown_masked)},
        identity=_identity(bundle, corpus, config, edits, masked, origin or {}),
    )


def _chosen_cells(corpus: Corpus, config: ScreenConfig) -> tuple[pl.DataFrame, dict[str, int]]:
    """The chosen cells with the genes of each, and the cells left out, by reason; InputError as `_check_whole` says."""
    cells, left_out = chosen.choose_cells(corpus, config.cells)
    n_special = 0 if corpus.vocabulary.cls is None else 2
    cells = cells.with_columns(n_genes=pl.col("length").cast(pl.Int32) - n_special)
    if config.edits.refill:
        _check_whole(corpus, cells)
    return cells, left_out


def _costs(
    config: ScreenConfig, cells: pl.DataFrame, asked_n: np.ndarray, changed_n: np.ndarray, passes_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens through the encoder that each cell (n) takes whatever is edited, and with each of its edits."""
    length_n = cells["length"].to_numpy().astype(np.int64)
    own_n = length_n * (_once(config) + passes_n)
    with_controls = 1.0 + config.edits.n_controls
    per_edit_n = length_n * (1.0 + passes_n) * with_controls * changed_n / np.maximum(asked_n, 1)
    return own_n, per_edit_n


def _once(config: ScreenConfig) -> int:
    """Passes, in forward passes of the cell, that a cell takes whatever is edited."""
    return 1 if config.two_pass is None else 2 + BACKWARD * config.two_pass.probes


def _unknown_genes(edits: EditSet, unknown_masked: int) -> dict[str, int]:
    """Genes that were named and that the vocabulary lacks, by where they were named."""
    unknown = {
        "genes of sets, not in the vocabulary": sum(len(names) for names in edits.left_out.values()),
        "genes of masked_genes, not in the vocabulary": unknown_masked,
    }
    return {why: n for why, n in unknown.items() if n}


def check_names(config: ScreenConfig, vocabulary: Vocabulary, store: Store) -> None:
    """Raise what `make_plan` would raise about the names of genes, without a corpus."""
    affected_genes(config, vocabulary)
    masked_tokens(config, vocabulary, store)
    for gene in config.edits.not_controls:
        vocabulary.token(gene)
    options = EditOptions(kind=config.edits.kind, refill=config.edits.refill)
    if not (config.edits.top or config.edits.kind == "replace"):
        _named_edits(config.edits, vocabulary, options, store, detected_v=np.zeros(0, dtype=np.int64))


def edit_set(config: EditsConfig, corpus: Corpus, store: Store, *, detected_v: np.ndarray, seed: int) -> EditSet:
    """The edits that `config` names; of `replace`, with the median ranks of the cells of `ranks_of`."""
    ranks = chosen.ranks_elsewhere(corpus, config.ranks_of, seed=seed) if config.kind == "replace" else {}
    options = EditOptions(
        kind=config.kind,
        refill=config.refill,
        quartiles=config.quartiles,
        rank=config.rank,
        target_ranks=ranks,
    )
    return _named_edits(config, corpus.vocabulary, options, store, detected_v=detected_v)


def _named_edits(
    config: EditsConfig, vocabulary: Vocabulary, options: EditOptions, store: Store, *, detected_v: np.ndarray
) -> EditSet:
    if config.all:
        return EditSet.of_all(vocabulary, options)
    if config.anchor:
        return EditSet.of_anchor(config.anchor, vocabulary, options)
    if config.top:
        most = chosen.most_detected(detected_v, config.top)
        return EditSet.of_tokens([(token,) for token in most], vocabulary, options)
    sets = []
    if config.genes:
        sets.append(EditSet.of_genes(config.genes, vocabulary, options))
    if config.pairs:
        sets.append(EditSet.of_pairs(config.pairs, vocabulary, options))
    if config.sets:
        sets.append(EditSet.of_sets(read_sets(config.sets, store), vocabulary, options))
    return _joined(sets)


def _joined(sets: list[EditSet]) -> EditSet:
    """One set of several, each edit once: the first name of an id stays."""
    listed = {edit.edit_id: edit for one in reversed(sets) for edit in one.listed}
    in_order = dict.fromkeys(edit.edit_id for one in sets for edit in one.listed)
    return dataclasses.replace(
        sets[0],
        listed=tuple(listed[name] for name in in_order),
        left_out={name: genes for one in sets for name, genes in one.left_out.items()},
        merged=tuple(name for one in sets for name in one.merged),
    )


def affected_genes(config: ScreenConfig, vocabulary: Vocabulary) -> Affected:
    """Tokens of the genes whose own shifts are recorded; UnknownGeneError for a name that is none."""
    wanted = config.readouts.gene_shifts
    if wanted == NO_GENE:
        return None
    if wanted == EVERY_GENE:
        return "all"
    return tuple(dict.fromkeys(vocabulary.token(gene) for gene in wanted))


def _edits_of_cells(edits: EditSet, corpus: Corpus, cells: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Edits asked of each cell (n), and those among them that change it and so cost a pass."""
    genes_n = cells["n_genes"].to_numpy().astype(np.int64)
    if edits.every_gene and edits.options.kind != "replace":
        return genes_n, genes_n
    asked, changed = [], []
    flat = np.array([gene for edit in edits.listed for gene in edit.genes], dtype=np.int64)
    starts = np.cumsum([0, *(len(edit.genes) for edit in edits.listed[:-1])])
    present_v = np.zeros(corpus.vocabulary.size, dtype=bool)
    for tokens_t in chosen.read_cells(corpus, cells["cell"].to_numpy()):
        if edits.every_gene or edits.anchor is not None:
            n_asked = n_changed = len(edits.of_cell(tokens_t))
        else:
            present_v[:] = False
            present_v[tokens_t] = True
            n_asked = len(edits.listed)
            inserts = edits.options.kind == "overexpress"
            n_changed = n_asked if inserts else int(np.logical_or.reduceat(present_v[flat], starts).sum())
        asked.append(n_asked)
        changed.append(n_changed)
    return np.array(asked, dtype=np.int64), np.array(changed, dtype=np.int64)


def _chosen_of_cells(config: TwoPassConfig, genes_n: np.ndarray) -> np.ndarray:
    """Genes (n) of each cell that the second pass deletes."""
    top = [how_many(config.top_fraction, genes) for genes in genes_n.tolist()]
    drawn = [how_many(config.control_fraction, genes - n) for genes, n in zip(genes_n.tolist(), top, strict=True)]
    return np.array(top) + np.array(drawn)


def _check_whole(corpus: Corpus, cells: pl.DataFrame) -> None:
    """InputError when the corpus holds a chosen cell without its last genes, which a refill would need."""
    table = corpus.cells(["n_genes"]).take(cells["cell"].to_numpy())
    cropped = int((pl.Series(table.column("n_genes")) > cells["n_genes"]).sum())
    if cropped:
        raise InputError(
            f"{cropped:,} of the {len(cells):,} cells have more genes than the window, and the corpus keeps none of "
            "those beyond it, so a deletion cannot refill.",
            where="edits: refill",
            fix=f"Leave refill out, or take whole cells: where = 'n_genes <= {max(cells['n_genes'].to_list())}'.",
        )


def _check_pairs(
    name: str,
    config: ScreenConfig,
    edits: EditSet,
    affected: Affected,
    cells: pl.DataFrame,
    asked_n: np.ndarray,
    vocabulary: Vocabulary,
) -> None:
    """LimitError when `name` (gene_shifts, masked_genes) would be more than a table of results should hold."""
    if affected is None:
        return
    n_affected = len(vocabulary.gene_ids) if affected == "all" else len(affected)
    groups = 2 if config.edits.n_controls else 1
    n_edits = groups * edits.most_edits(len(vocabulary.gene_ids))
    genes_n = np.minimum(cells["n_genes"].to_numpy().astype(np.int64), n_affected)
    observations = int((asked_n * (1 + config.edits.n_controls) * genes_n).sum())
    pairs = min(n_edits * n_affected, observations)
    shifts = name == "gene_shifts"
    if pairs > MAX_GENE_PAIRS and not (shifts and config.readouts.top_k):
        raise LimitError(
            f"{n_edits:,} edits times {n_affected:,} affected genes may be {pairs:,} pairs; {MAX_GENE_PAIRS:,} can be "
            "kept.",
            where=f"readouts: {name}",
            fix=f"{'Keep the largest of each edit (top_k = 100), l' if shifts else 'L'}ist the affected genes of "
            "interest, or edit fewer.",
        )
    if observations > MAX_OBSERVATIONS:
        raise LimitError(
            f"{name} are means of up to {observations:,} observations; {MAX_OBSERVATIONS:,} can be kept.",
            where=f"readouts: {name}",
            fix=f"List the affected genes of interest, draw fewer cells, or leave {name} out.",
        )


def _identity(
    bundle: Bundle,
    corpus: Corpus,
    config: ScreenConfig,
    edits: EditSet,
    masked: Affected,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "compute"}
    of_masked = {}
    if masked is None:
        # Screens that were begun before there was this read-out are still themselves.
        del settings["readouts"]["masked_genes"]
    else:
        of_masked["masked_genes_digest"] = hashlib.sha256(json.dumps(masked).encode()).hexdigest()
    parts = [(part.uri, part.rows) for part in corpus.parts]
    return {
        "schema_version": SCREEN_SCHEMA_VERSION,
        "model_digest": bundle.digest,
        "vocabulary_digest": bundle.vocabulary.digest,
        "corpus_uri": corpus.uri,
        "corpus_version": corpus.version,
        # A corpus that was deleted and made anew can have the same address and version, but not the same parts.
        "corpus_parts_digest": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        # A file of gene sets may change, and median ranks are worked out: the edits themselves decide.
        "edits_digest": hashlib.sha256(json.dumps(edits.identity, sort_keys=True).encode()).hexdigest(),
        "config": json.loads(json.dumps(settings)),
        **of_masked,
        **origin,
    }
