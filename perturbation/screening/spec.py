"""What a screen is told to do: read from a TOML file and checked before anything runs.

model = "models:/genescale@champion"
corpus = "s3://lake/corpus@12"
output = "s3://lake/screens/fibrosis"

[cells]
where = "cell_type = 'fibroblast' AND disease = 'fibrosis'"
max_cells = 200                      # drawn at random
max_cells_per = "donor_id"           # … of each donor, so that no donor outweighs the others

[edits]
kind = "delete"
genes = ["TGFB1", "TGFBR1+TGFBR2"]   # or all = true, sets = "sets.gmt", pairs = [...], anchor = "TGFB1", top = 100
controls = 10                        # matched genes of the same cell, tried beside each edit

[readouts]
gene_shifts = "all"                  # also how every other gene moves
top_k = 50                           # … of which so many are kept for each edit
masked_genes = "targets.gmt"         # whether these are still expected where they are hidden (or a list, or "all")
states = { column = "disease", start = "fibrosis", goal = "normal" }

[two_pass]                           # with all = true: score every gene cheaply, delete only those that seem to matter
top_fraction = 0.07
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from genescale.perturbation.editing.requests import Kind, parse_kind
from genescale.perturbation.readouts.shift import MEASURES, Measure
from genescale.perturbation.readouts.states import MAX_CELLS
from genescale.perturbation.screening.two_pass import TwoPassConfig
from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.settings import build, read_toml
from genescale.training.choices import LAYERS, TOKENS_PER_BATCH, Layer

Device = Literal["auto", "cpu", "cuda"]
RunIn = Literal["cluster", "process"]
CONTROLS = 10
EVERY_GENE, NO_GENE = ("all",), ("none",)
CHOICES = ("genes", "sets", "pairs", "anchor", "all", "top")
TOGETHER_WITH = {
    "genes": ("genes", "sets", "pairs"),
    "sets": ("genes", "sets", "pairs"),
    "pairs": ("genes", "sets", "pairs"),
}
ADDRESSES = ("model", "corpus", "output")


def _one_of(where: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SettingsError(
            f"'{value}' is none of {', '.join(choices)}.", where=where, fix=did_you_mean(str(value), choices)
        )


def _at_least(where: str, config: Any, **least: int) -> None:
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise SettingsError(f"{name} is {getattr(config, name)}.", where=where, fix=f"Use {bound} or more.")


@dataclass(frozen=True, kw_only=True)
class CellsConfig:
    """Which cells of the corpus are edited."""

    where: str = ""
    """A condition in SQL on the corpus' columns; empty takes all cells."""
    max_cells: int = 0
    """So many of them, drawn at random; 0 takes all."""
    max_cells_per: str = ""
    """A column: `max_cells` are then drawn of each of its values (cells without one are left out, and counted)."""
    seed: int = 0
    """Of that draw, and of every other draw of the screen."""

    def __post_init__(self) -> None:
        _at_least("cells", self, max_cells=0, seed=0)
        if self.max_cells_per and not self.max_cells:
            raise SettingsError(
                "max_cells_per needs max_cells.", where="cells", fix="Say how many cells of each value: max_cells = 50."
            )


@dataclass(frozen=True, kw_only=True)
class EditsConfig:
    """What is tried on each cell: one choice of genes, or several of `genes`, `sets` and `pairs` together."""

    kind: Kind = "delete"
    genes: tuple[str, ...] = ()
    """Ids, symbols or aliases, each edited by itself; `A+B` edits both together."""
    sets: str = ""
    """Address of named gene sets, each edited at once: FILE.gmt, .json, .csv, .tsv, .txt, or a folder of them."""
    pairs: tuple[str, ...] = ()
    """Genes of which all pairs are edited, and each by itself."""
    anchor: str = ""
    """A gene that is edited together with every other gene of the cell; each is edited by itself as well."""
    all: bool = False
    """Every gene of each cell, one at a time."""
    top: int = 0
    """The genes that stand in most of the chosen cells, one at a time."""
    quartiles: int | None = None
    """inhibit, activate: by how many quartiles of the ranks (1, 2 or 3; 1 unless `rank` is given)."""
    rank: int | None = None
    """inhibit, activate: to this rank (0 is the first gene)."""
    ranks_of: str = ""
    """replace: the cells, by a condition in SQL, whose median ranks the genes are moved to."""
    refill: bool = False
    """delete: let the genes beyond the window move up."""
    controls: int | None = None
    """Control edits for each edit of a cell: genes of the same cell at near ranks and of near expression. Without a
    number: 10, and 0 where every gene of the cell is edited and serves as a control itself."""
    not_controls: tuple[str, ...] = ()
    """Genes that never serve as controls, for example a pathway that holds the edited ones."""

    def __post_init__(self) -> None:
        parse_kind(self.kind)
        given = [name for name in CHOICES if getattr(self, name)]
        if not given:
            raise SettingsError(
                "no edit is named.", where="edits", fix="Give genes, sets, pairs, anchor, top, or all = true."
            )
        if alone := [name for name in given if len(given) > 1 and name not in TOGETHER_WITH]:
            raise SettingsError(
                f"'{alone[0]}' stands alone, but {', '.join(name for name in given if name != alone[0])} is given too.",
                where="edits",
                fix="Run two screens, or leave one of them out.",
            )
        _at_least("edits", self, top=0)
        if self.controls is not None:
            _at_least("edits", self, controls=0)
        if (self.quartiles is not None or self.rank is not None) and self.kind not in ("inhibit", "activate"):
            raise SettingsError(
                "quartiles and rank are for inhibit and activate.", where="edits", fix=f"Leave them out of {self.kind}."
            )
        if bool(self.ranks_of) != (self.kind == "replace"):
            raise SettingsError(
                "kind 'replace' and ranks_of belong together.",
                where="edits",
                fix="Name the cells whose median ranks are taken: ranks_of = \"disease = 'normal'\".",
            )
        if self.refill and self.kind != "delete":
            raise SettingsError("only a deletion can refill the window.", where="edits", fix="Leave out refill.")

    @property
    def per_cell(self) -> bool:
        """Whether the edits are those of each cell's own genes."""
        return self.all or bool(self.anchor)

    @property
    def n_controls(self) -> int:
        """Control edits for each edit."""
        return self.controls if self.controls is not None else 0 if self.per_cell else CONTROLS


@dataclass(frozen=True, kw_only=True)
class StatesConfig:
    """States that edited cells may move toward: labels in the corpus, or a file of `genescale perturb states`."""

    column: str = ""
    start: str = ""
    goal: str = ""
    alternatives: tuple[str, ...] = ()
    where: str = ""
    """Only these cells make up the states; a condition in SQL."""
    max_cells: int = MAX_CELLS
    """So many of each state, drawn at random; 0 takes all."""
    file: str = ""
    """Where saved states lie; the model, layer and measure must be those of the screen."""

    def __post_init__(self) -> None:
        names = ("column", "start", "goal", "alternatives", "where")
        named = [name for name in names if getattr(self, name)]
        if self.file and named:
            raise SettingsError(
                f"'file' stands alone, but {', '.join(named)} is given too.",
                where="readouts: states",
                fix="Leave one out.",
            )
        if not self.file and not (self.column and (self.goal or self.alternatives)):
            raise SettingsError(
                "states need a column and a goal or alternatives, or a file.",
                where="readouts: states",
                fix='For example states = { column = "disease", start = "fibrosis", goal = "normal" }.',
            )
        _at_least("readouts: states", self, max_cells=0)


@dataclass(frozen=True, kw_only=True)
class ReadoutsConfig:
    """How an edited cell is compared with the unedited one."""

    layer: Layer = "second_to_last"
    measure: Measure = "remaining_genes"
    states: StatesConfig | None = None
    head: str = ""
    """A fitted model whose class probabilities are compared; `models:/NAME@ALIAS` or a bundle folder."""
    head_label: str = ""
    """Which of its heads of cell classes is read; empty takes the only one."""
    gene_shifts: tuple[str, ...] = NO_GENE
    """Whose own shifts are recorded, averaged over cells: `none`, `all`, or these genes."""
    top_k: int = 0
    """Gene shifts kept for each edit, the largest; 0 keeps all."""
    min_cells: int = 1
    """Gene shifts averaged over fewer cells are left out, and counted."""
    masked_genes: tuple[str, ...] = NO_GENE
    """Genes hidden in cell and edited cell, whose change of log-probability is recorded, averaged over cells: `none`,
    `all`, these genes, or the address of lists of them (FILE.gmt, .json, .csv, .txt, or a folder)."""

    def __post_init__(self) -> None:
        _one_of("readouts: layer", self.layer, LAYERS)
        _one_of("readouts: measure", self.measure, MEASURES)
        for name in ("gene_shifts", "masked_genes"):
            genes = getattr(self, name)
            if not genes or (len(genes) > 1 and {"all", "none"} & set(genes)):
                raise SettingsError(
                    f"{name} is {list(genes)}.", where="readouts", fix="Use 'none', 'all' or a list of genes."
                )
        _at_least("readouts", self, top_k=0, min_cells=1)
        if self.head_label and not self.head:
            raise SettingsError(
                f"head_label is '{self.head_label}', but no head is given.",
                where="readouts",
                fix="Name the model: head.",
            )
        if self.gene_shifts == NO_GENE and (self.top_k or self.min_cells > 1):
            raise SettingsError(
                "top_k and min_cells are about gene shifts, which are not recorded.",
                where="readouts",
                fix="Add gene_shifts = 'all', or leave them out.",
            )


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How fast, not what: a screen may be continued with other settings, except for the size of its units."""

    device: Device = "auto"
    """`auto` takes the cluster's GPUs when it has some."""
    run_in: RunIn = "cluster"
    """`cluster`: on Ray. `process`: in this one, which starts at once and suits a small screen."""
    workers: int = 0
    """Processes that hold the model; 0 means one for each GPU, or for each processor without GPUs."""
    tokens_per_unit: int = 0
    """Tokens embedded between two results: what a broken run loses at most. 0 chooses by the size of the screen."""
    tokens_per_batch: int = TOKENS_PER_BATCH
    attention: str = "auto"

    def __post_init__(self) -> None:
        _one_of("compute: device", self.device, get_args(Device))
        _one_of("compute: run_in", self.run_in, get_args(RunIn))
        _at_least("compute", self, workers=0, tokens_per_unit=0, tokens_per_batch=1)


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """A screen without its addresses: which edits of which cells, how compared, how computed."""

    edits: EditsConfig
    cells: CellsConfig = CellsConfig()
    readouts: ReadoutsConfig = ReadoutsConfig()
    compute: ComputeConfig = ComputeConfig()
    two_pass: TwoPassConfig | None = None
    """Score every gene cheaply first, and delete only those that seem to matter and a random share of the others."""

    def __post_init__(self) -> None:
        if self.two_pass is not None and not (self.edits.all and self.edits.kind == "delete"):
            raise SettingsError(
                "a first pass scores the deletion of every gene of a cell.",
                where="two_pass",
                fix="Use it with edits.all = true and kind 'delete', or leave [two_pass] out.",
            )


@dataclass(frozen=True, kw_only=True)
class ScreenSpec:
    """A whole screen: the model, the cells' corpus, the output folder, and what is done."""

    model: str
    corpus: str
    output: str
    config: ScreenConfig


def read_spec(path: str | Path | None, *, changes: Mapping[str, Any] | None = None) -> ScreenSpec:
    """A screen from a TOML file (or from nothing but `changes`), with `{"edits.genes": value}` put over it.

    Raises SettingsError, which names the file and the nearest known key.
    """
    content = read_toml(path) if path else {}
    for key, value in (changes or {}).items():
        content = _changed(content, key, value)
    return spec_of(content, where=str(path or "options"))


def spec_of(content: Mapping[str, Any], *, where: str = "screen") -> ScreenSpec:
    """A screen from nested mappings, as a TOML file holds them."""
    sections = [field.name for field in dataclasses.fields(ScreenConfig)]
    for name in content:
        if name not in (*ADDRESSES, *sections):
            hint = did_you_mean(name, (*ADDRESSES, *sections)) or f"Known: {', '.join((*ADDRESSES, *sections))}."
            raise SettingsError(f"unknown key '{name}'.", where=where, fix=hint)
    if missing := [name for name in ADDRESSES if not content.get(name)]:
        raise SettingsError(
            f"missing {', '.join(missing)}.",
            where=where,
            fix=f"Write it at the top of the file, or give --{missing[0]}.",
        )
    if "edits" not in content:
        raise SettingsError("no edit is named.", where=where, fix='Write [edits] and, for example, genes = ["GATA4"].')
    config = build(ScreenConfig, {name: content[name] for name in sections if name in content}, where=where)
    return ScreenSpec(**{name: str(content[name]) for name in ADDRESSES}, config=config)


def _changed(content: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`content` with the value at a dotted key put in place."""
    first, dot, rest = key.partition(".")
    if not dot:
        return {**content, first: value}
    section = content.get(first, {})
    if not isinstance(section, Mapping):
        raise SettingsError(
            f"'{first}' is a value, not a section.", where=f"--set {key}", fix=f"Write --set {first}=…."
        )
    return {**content, first: _changed(section, rest, value)}
