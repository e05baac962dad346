"""The planted network of a simulated atlas: which gene drives which, drawn once per seed.

    regulator --> direct target                     on with `penetrance` where its driver is on, else with `leak`
    regulator --> mediator --> indirect target      two such steps
    regulator A and regulator B --> shared target   its driver is "both are on"
    cell type --> marker
    (nothing) --> housekeeping, background          the unrelated genes: no regulator reaches them

A regulator is on or off in a cell, mostly independently of the cell's type. So what tells a model about a target is
whether its regulator stands among the cell's genes, and not which type the cell has. Three options make that harder, as
it is in real cells; none is on unless it is asked for:

    home_activity     a regulator belongs to one cell type, so the markers of that type appear and vanish with it
    elsewhere_types   its direct targets are on in other cell types without it
    echoes            genes that are on wherever it is on: they tell as much about its targets as it does

Axes: `g` genes, `k` regulators, `m` mediators, `p` pairs, `c` cell types, `r` drivers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import SettingsError

# Raised when the same config gives another atlas than before.
SIMULATION_VERSION = 1
TRUTH_KIND = "genescale-simulated-atlas"
# Well-formed Ensembl ids in a range that no release uses.
FIRST_ENSEMBL_ID = 900_000_001
_NETWORK_STREAM, _ELSEWHERE_STREAM = 1, 5
_LEAST = {
    "seed": 0,
    "files": 1,
    "cells_per_file": 1,
    "donors": 1,
    "cell_types": 1,
    "regulators": 1,
    "direct_targets": 1,
    "indirect_targets": 0,
    "mediators": 0,
    "pairs": 0,
    "pair_targets": 0,
    "markers": 0,
    "housekeeping": 0,
    "background": 0,
    "elsewhere_types": 0,
    "echoes": 0,
}
_PROBABILITIES = (
    "activity",
    "pair_overlap",
    "penetrance",
    "mediator_penetrance",
    "pair_penetrance",
    "leak",
    "housekeeping_share",
    "background_share",
    "home_activity",
    "elsewhere_penetrance",
)
_NOT_NEGATIVE = ("type_bias", "ambient_counts", "expression_spread", "library_spread", "donor_spread")
_POSITIVE = ("target_counts", "regulator_counts", "mediator_counts")


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """A simulated atlas. The same config gives the same cells, whatever the machine's number of processors."""

    seed: int = 0
    files: int = 4
    """One file per tissue."""
    cells_per_file: int = 1_000
    donors: int = 8
    """Each gives cells to every tissue, and has its own batch effect."""
    cell_types: int = 4
    """Each occurs in every tissue, in other proportions."""
    regulators: int = 16
    direct_targets: int = 5
    """Of each regulator, its mediators not counted."""
    mediators: int = 1
    """Of each regulator: direct targets that drive targets of their own."""
    indirect_targets: int = 6
    """Of each regulator, shared out among its mediators."""
    pairs: int = 4
    """Pairs of regulators that act together; no regulator is in two."""
    pair_targets: int = 6
    """Of each pair: genes that respond where both regulators are on."""
    markers: int = 4
    """Genes of each cell type."""
    housekeeping: int = 4
    background: int = 50
    activity: float = 0.12
    """Share of cells in which a regulator is on."""
    type_bias: float = 0.3
    """Standard deviation, between cell types, of a regulator's log odds to be on."""
    pair_overlap: float = 0.3
    """Share of cells in which the second of a pair follows the first instead of its own odds."""
    penetrance: float = 0.85
    """Chance that a target is on where its driver is on."""
    mediator_penetrance: float = 0.85
    pair_penetrance: float = 0.95
    leak: float = 0.02
    """Chance that a target is on where its driver is off."""
    housekeeping_share: float = 0.95
    """Share of cells in which a housekeeping gene is on."""
    background_share: float = 0.2
    """Mean share of cells in which a background gene is on; single genes lie between 0.3 and 1.7 times that."""
    target_counts: float = 6.0
    """Mean counts of a gene that is on, regulators and mediators excepted."""
    regulator_counts: float = 10.0
    mediator_counts: float = 10.0
    ambient_counts: float = 0.02
    """Mean counts of a gene that is off."""
    expression_spread: float = 0.4
    """Standard deviation of the log of the expected counts of a gene between cells."""
    library_spread: float = 0.3
    """Standard deviation of the log of the library size between cells."""
    donor_spread: float = 0.1
    """Standard deviation of the log of a donor's effect on each gene."""
    home_activity: float = 0.0
    """Share of the cells of its home type in which a regulator is on; `activity` holds in the others. 0: no homes, and
    `activity` holds everywhere. The regulators of a pair have the same home."""
    elsewhere_types: int = 0
    """Cell types, besides its home, in which a regulator's direct targets are on without it."""
    elsewhere_penetrance: float = 0.9
    """Chance that such a target is on in such a cell type."""
    echoes: int = 0
    """Of each regulator: genes that are on exactly where it is on, and drive nothing."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise SettingsError(f"simulate.{name} is {getattr(self, name)}.", fix=f"Use at least {least}.")
        for name in _PROBABILITIES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SettingsError(f"simulate.{name} is {getattr(self, name)}.", fix="Use a share from 0 to 1.")
        for name in (*_NOT_NEGATIVE, *_POSITIVE):
            value = getattr(self, name)
            if not np.isfinite(value) or value < 0 or (value == 0 and name in _POSITIVE):
                bound = "above 0" if name in _POSITIVE else "of at least 0"
                raise SettingsError(f"simulate.{name} is {value}.", fix=f"Use a number {bound}.")
        if not 0.0 < self.activity < 1.0:
            raise SettingsError(f"simulate.activity is {self.activity}.", fix="Use a share above 0 and below 1.")
        if 2 * self.pairs > self.regulators:
            raise SettingsError(
                f"simulate.pairs is {self.pairs}, but there are {self.regulators} regulators.",
                fix=f"Use at most {self.regulators // 2} pairs.",
            )
        if self.home_activity == 1.0:
            raise SettingsError("simulate.home_activity is 1.0.", fix="Use a share below 1, or 0 for no homes.")
        if self.elsewhere_types >= self.cell_types:
            raise SettingsError(
                f"simulate.elsewhere_types is {self.elsewhere_types}, but there are {self.cell_types} cell types.",
                fix=f"Use at most {self.cell_types - 1}.",
            )
        if self.indirect_targets and not self.mediators:
            raise SettingsError(
                "simulate.indirect_targets need mediators.", fix="Use at least 1 mediator, or no indirect targets."
            )
        if self.penetrance <= self.leak:
            raise SettingsError(
                f"simulate.penetrance {self.penetrance} is not above simulate.leak {self.leak}: nothing is planted.",
                fix="Use a larger penetrance.",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """Genes, in the order of their Ensembl ids, and what drives each.

    Drivers are numbered: regulators 0 … k-1, then mediators, pairs (both are on), cell types, and one always on.
    """

    config: SimulateConfig
    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    roles: tuple[str, ...]
    driver_g: npt.NDArray[np.int64]
    """Driver of each gene; a regulator or a mediator is driven by itself."""
    on_g: npt.NDArray[np.float64]
    """Chance that the gene is on where its driver is on."""
    off_g: npt.NDArray[np.float64]
    """Chance that it is on where its driver is off."""
    counts_g: npt.NDArray[np.float64]
    """Mean counts where it is on."""
    odds_ck: npt.NDArray[np.float64]
    """Chance of each regulator to be on, in each cell type."""
    parent_m: npt.NDArray[np.int64]
    """Regulator of each mediator."""
    pairs_p2: npt.NDArray[np.int64]
    """The regulators of each pair."""
    elsewhere_gc: npt.NDArray[np.bool_]
    """Cell types in which a gene is on without its driver."""

    @property
    def n_genes(self) -> int:
        """Genes of the atlas, detected or not."""
        return len(self.gene_ids)


@dataclass(frozen=True)
class _Gene:
    symbol: str
    role: str
    driver: int
    on: float
    off: float
    counts: float


def plant_network(config: SimulateConfig) -> Network:
    """Draw the network of a config: a pure function of it."""
    draws = np.random.default_rng([config.seed, _NETWORK_STREAM])
    parent_m = np.repeat(np.arange(config.regulators), config.mediators)
    pairs_p2 = draws.permutation(config.regulators)[: 2 * config.pairs].reshape(-1, 2)
    log_odds_ck = _log_odds_ck(config) + draws.normal(0.0, config.type_bias, (config.cell_types, config.regulators))
    # Ids carry no hint of a gene's role: genes with neighbouring tokens have nothing in common.
    genes = _genes(config, draws)
    order = draws.permutation(len(genes))
    placed = [genes[at] for at in order]
    return Network(
        config=config,
        gene_ids=tuple(f"ENSG{FIRST_ENSEMBL_ID + at:011d}" for at in range(len(placed))),
        symbols=tuple(gene.symbol for gene in placed),
        roles=tuple(gene.role for gene in placed),
        driver_g=np.array([gene.driver for gene in placed]),
        on_g=np.array([gene.on for gene in placed]),
        off_g=np.array([gene.off for gene in placed]),
        counts_g=np.array([gene.counts for gene in placed]),
        odds_ck=1.0 / (1.0 + np.exp(-log_odds_ck)),
        parent_m=parent_m,
        pairs_p2=_pairs_at_home(config) if config.home_activity else pairs_p2,
        elsewhere_gc=_elsewhere_gc(config, placed),
    )


def _log_odds_ck(config: SimulateConfig) -> npt.NDArray[np.float64]:
    """Log odds of each regulator to be on in each cell type, before the types differ at random."""
    share_ck = np.full((config.cell_types, config.regulators), config.activity)
    if config.home_activity:
        share_ck[_homes_k(config), np.arange(config.regulators)] = config.home_activity
    return np.log(share_ck / (1 - share_ck))


def _homes_k(config: SimulateConfig) -> npt.NDArray[np.int64]:
    return np.arange(config.regulators) % config.cell_types


def _pairs_at_home(config: SimulateConfig) -> npt.NDArray[np.int64]:
    """Pairs of regulators, neighbours among those of one home first, so that both are often on in the same cells."""
    by_home = np.argsort(_homes_k(config), kind="stable")
    return by_home[: 2 * config.pairs].reshape(-1, 2)


def _elsewhere_gc(config: SimulateConfig, genes: list[_Gene]) -> npt.NDArray[np.bool_]:
    """Where direct targets are on without their regulator: types that are not its home, the same for all of it."""
    draws = np.random.default_rng([config.seed, _ELSEWHERE_STREAM])
    elsewhere_kc = np.zeros((config.regulators, config.cell_types), dtype=bool)
    for regulator, home in enumerate(_homes_k(config)):
        others = np.delete(np.arange(config.cell_types), home)
        elsewhere_kc[regulator, draws.permutation(others)[: config.elsewhere_types]] = True
    nowhere_c = np.zeros(config.cell_types, dtype=bool)
    return np.array([elsewhere_kc[gene.driver] if gene.role == "direct target" else nowhere_c for gene in genes])


def _genes(config: SimulateConfig, draws: np.random.Generator) -> list[_Gene]:
    """All genes with their drivers, by role."""
    k, m = config.regulators, config.regulators * config.mediators
    first_pair, first_type = k + m, k + m + config.pairs
    always = first_type + config.cell_types
    genes: list[_Gene] = []

    def add(prefix: str, role: str, drivers: list[int], on: float, off: float, counts: float) -> None:
        for number, driver in enumerate(drivers, start=1):
            genes.append(_Gene(f"{prefix}{number:03d}", role, driver, on, off, counts))

    add("REG", "regulator", list(range(k)), 1.0, 0.0, config.regulator_counts)
    add("MED", "mediator", list(range(k, k + m)), 1.0, 0.0, config.mediator_counts)
    add("ECH", "echo", [reg for reg in range(k) for _ in range(config.echoes)], 1.0, 0.0, config.regulator_counts)
    direct = [reg for reg in range(k) for _ in range(config.direct_targets)]
    add("DIR", "direct target", direct, config.penetrance, config.leak, config.target_counts)
    # The j-th indirect target of a regulator belongs to its mediator j modulo their number.
    per = config.mediators
    indirect = [k + reg * per + j % per for reg in range(k) for j in range(config.indirect_targets)]
    add("IND", "indirect target", indirect, config.penetrance, config.leak, config.target_counts)
    shared = [first_pair + pair for pair in range(config.pairs) for _ in range(config.pair_targets)]
    add("COP", "cooperative target", shared, config.pair_penetrance, config.leak, config.target_counts)
    markers = [first_type + kind for kind in range(config.cell_types) for _ in range(config.markers)]
    add("MRK", "marker", markers, config.penetrance, config.leak, config.target_counts)
    for number in range(1, config.housekeeping + 1):
        level = config.target_counts * float(draws.lognormal(0.0, 0.5))
        genes.append(_Gene(f"HKG{number:03d}", "housekeeping", always, config.housekeeping_share, 0.0, level))
    for number in range(1, config.background + 1):
        share = min(1.0, config.background_share * float(draws.uniform(0.3, 1.7)))
        genes.append(_Gene(f"BGD{number:03d}", "background", always, share, 0.0, config.target_counts))
    return genes


def truth_of(network: Network) -> dict[str, Any]:
    """What was planted, as plain values for JSON.

    `edges`: regulator (or mediator), target, class `direct` or `indirect`, and for the latter the mediator in `via`;
    `pairs`: two regulators and the targets that respond to both together; `unrelated`: genes that no regulator reaches.
    """
    k, n_mediators = len(network.odds_ck[0]), len(network.parent_m)
    driven: dict[int, list[str]] = {}
    self_driven: dict[int, str] = {}
    for gene, role, driver in zip(network.gene_ids, network.roles, network.driver_g.tolist(), strict=True):
        if role in ("regulator", "mediator"):
            self_driven[driver] = gene
        elif role != "echo":
            driven.setdefault(driver, []).append(gene)
    regulators = [self_driven[at] for at in range(k)]
    mediators = [self_driven[k + at] for at in range(n_mediators)]
    parents = [regulators[at] for at in network.parent_m.tolist()]
    edges = [_edge(regulators[at], gene) for at in range(k) for gene in driven.get(at, [])]
    for at, (mediator, parent) in enumerate(zip(mediators, parents, strict=True)):
        edges.append(_edge(parent, mediator))
        for gene in driven.get(k + at, []):
            edges += [_edge(mediator, gene), _edge(parent, gene, via=mediator)]
    pairs = [
        {"regulators": [regulators[a], regulators[b]], "targets": driven.get(k + n_mediators + at, [])}
        for at, (a, b) in enumerate(network.pairs_p2.tolist())
    ]
    named = zip(network.gene_ids, network.symbols, network.roles, strict=True)
    return {
        "kind": TRUTH_KIND,
        "simulation_version": SIMULATION_VERSION,
        "seed": network.config.seed,
        "config": _config_values(network.config),
        "genes": [{"id": gene, "symbol": symbol, "role": role} for gene, symbol, role in named],
        "regulators": regulators,
        "mediators": mediators,
        "edges": sorted(edges, key=lambda edge: (edge["regulator"], edge["target"])),
        "pairs": pairs,
        "unrelated": [
            gene for gene, role in zip(network.gene_ids, network.roles, strict=True) if role in UNRELATED_ROLES
        ],
    }


UNRELATED_ROLES = ("housekeeping", "background")
# Options that came later. At their defaults they are not written, so that older atlases are recognised as the same.
_LATER = ("home_activity", "elsewhere_types", "elsewhere_penetrance", "echoes")


def _config_values(config: SimulateConfig) -> dict[str, Any]:
    default = {field.name: field.default for field in dataclasses.fields(SimulateConfig)}
    values = dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in _LATER or value != default[name]}


def _edge(regulator: str, target: str, *, via: str = "") -> dict[str, str]:
    return {"regulator": regulator, "target": target, "class": "indirect" if via else "direct", "via": via}
