"""A planted-truth atlas: cells drawn from a known network, in h5ad files shaped like public atlases.

For each cell: a donor and a type; which regulators are on; from these which genes are on (`simulate_network`);
expected counts with log-normal noise per gene, per library and per donor; Poisson counts, whose zeros are the dropout.
Counts are whole numbers in `X` as float32 in CSR form, cell columns are named as in the CELLxGENE schema, and
`uns["genescale_truth"]` holds the truth as JSON. The side file `truth.json` holds the same and is written last: a
folder that has it is complete.

Every block of cells is drawn from a generator of its own, so a file is a function of the config alone.

Axes: `n` cells, `g` genes, `k` regulators, `m` mediators, `p` pairs, `c` cell types, `r` drivers, `z` stored counts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from genescale.ingestion.simulate_network import SIMULATION_VERSION, Network, plant_network, truth_of
from genescale.ingestion.simulate_network import SimulateConfig as SimulateConfig
from genescale.platform.errors import AlreadyExistsError, NotFoundError
from genescale.platform.progress import SILENT, Progress
from genescale.platform.storage import Store, join

TRUTH_FILE = "truth.json"
TRUTH_SLOT = "genescale_truth"
# Cells drawn at once: bounds memory at some hundred megabytes for 20,000 genes. Part of what a seed means.
BLOCK_CELLS = 512
_DONOR_STREAM, _TISSUE_STREAM, _CELL_STREAM = 2, 3, 4


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedAtlas:
    """A written atlas."""

    files: tuple[str, ...]
    truth_uri: str
    truth: Mapping[str, Any]
    n_cells: int
    n_genes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class DrawnCells:
    """The cells of one file: counts `(n, g)` in CSR form, and a type and a donor for each."""

    counts: sparse.csr_matrix
    type_n: npt.NDArray[np.int64]
    donor_n: npt.NDArray[np.int64]


def simulate(config: SimulateConfig, out: str, store: Store, *, progress: Progress = SILENT) -> SimulatedAtlas:
    """Write the atlas of `config` below the folder `out`, local or `s3://`.

    The same call on a complete folder changes nothing; on one that was interrupted it writes every file again. Raises
    AlreadyExistsError when `out` holds another simulation, or atlas files that are not of this one.
    """
    network = plant_network(config)
    truth = truth_of(network)
    text = json.dumps(truth, sort_keys=True, indent=1)
    files = tuple(join(out, f"tissue_{number:02d}.h5ad") for number in range(1, config.files + 1))
    atlas = SimulatedAtlas(
        files=files,
        truth_uri=join(out, TRUTH_FILE),
        truth=truth,
        n_cells=config.files * config.cells_per_file,
        n_genes=network.n_genes,
    )
    progress.start(atlas.n_cells, "cells")
    if not _is_complete(atlas, out, store):
        for number, uri in enumerate(files):
            _write_file(network, number, text, uri, store)
            progress.advance(config.cells_per_file, uri.rpartition("/")[2])
        store.write(atlas.truth_uri, text.encode())
    return atlas


def _is_complete(atlas: SimulatedAtlas, out: str, store: Store) -> bool:
    """True when `out` holds exactly this atlas already; AlreadyExistsError when it holds something else."""
    try:
        found = json.loads(store.read(atlas.truth_uri))
    except NotFoundError:
        found = None
    except ValueError:
        found = {}
    if found is not None and found != atlas.truth:
        raise AlreadyExistsError(
            "another simulated atlas is there, or the truth of one that cannot be read.",
            where=atlas.truth_uri,
            fix="Choose another folder, or delete this one.",
        )
    present = {entry.uri for entry in store.list(out) if entry.uri.endswith(".h5ad")}
    # Addresses as the store spells them, so that relative paths compare equal.
    ours = {entry.uri for uri in atlas.files if store.exists(uri) for entry in [store.stat(uri)]}
    if foreign := sorted(present - ours):
        raise AlreadyExistsError(
            f"{len(foreign)} atlas files of another origin are there, and would be ingested together with these.",
            where=foreign[0],
            fix="Choose an empty folder.",
        )
    return found is not None and len(ours) == len(atlas.files)


def draw_cells(network: Network, file: int) -> DrawnCells:
    """The cells of file number `file` (from 0)."""
    config = network.config
    types = np.random.default_rng([config.seed, _TISSUE_STREAM, file])
    # Every type in every tissue, so that a type can be told apart from a tissue.
    share_c = types.dirichlet(np.full(config.cell_types, 3.0))
    starts = range(0, config.cells_per_file, BLOCK_CELLS)
    blocks = []
    for block, start in enumerate(starts):
        draws = np.random.default_rng([config.seed, _CELL_STREAM, file, block])
        n = min(BLOCK_CELLS, config.cells_per_file - start)
        type_n = draws.choice(config.cell_types, size=n, p=share_c)
        donor_n = draws.integers(0, config.donors, size=n)
        blocks.append((_counts(network, type_n, donor_n, draws), type_n, donor_n))
    counts, kinds, donors = zip(*blocks, strict=True)
    return DrawnCells(
        counts=sparse.vstack(counts, format="csr", dtype=np.float32),
        type_n=np.concatenate(kinds),
        donor_n=np.concatenate(donors),
    )


def drivers_on(network: Network, type_n: npt.NDArray[np.int64], draws: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which drivers are on in each cell `(n, r)`: regulators, mediators, pairs, cell types, and the one always on."""
    config, n = network.config, len(type_n)
    regulators_nk = draws.random((n, config.regulators)) < network.odds_ck[type_n]
    first_p, second_p = network.pairs_p2.T
    follows_np = draws.random((n, config.pairs)) < config.pair_overlap
    regulators_nk[:, second_p] = np.where(follows_np, regulators_nk[:, first_p], regulators_nk[:, second_p])
    chance_nm = np.where(regulators_nk[:, network.parent_m], config.mediator_penetrance, config.leak)
    mediators_nm = draws.random(chance_nm.shape) < chance_nm
    both_np = regulators_nk[:, first_p] & regulators_nk[:, second_p]
    types_nc = type_n[:, None] == np.arange(config.cell_types)
    return np.concatenate([regulators_nk, mediators_nm, both_np, types_nc, np.ones((n, 1), dtype=bool)], axis=1)


def _counts(
    network: Network, type_n: npt.NDArray[np.int64], donor_n: npt.NDArray[np.int64], draws: np.random.Generator
) -> sparse.csr_matrix:
    config, n = network.config, len(type_n)
    driver_ng = drivers_on(network, type_n, draws)[:, network.driver_g]
    chance_ng = np.where(driver_ng, network.on_g, network.off_g)
    elsewhere_ng = network.elsewhere_gc[:, type_n].T
    chance_ng = np.where(elsewhere_ng, np.maximum(chance_ng, config.elsewhere_penetrance), chance_ng)
    on_ng = draws.random((n, network.n_genes)) < chance_ng
    expected_ng = np.where(on_ng, network.counts_g, config.ambient_counts)
    expected_ng *= np.exp(config.expression_spread * draws.standard_normal((n, network.n_genes)))
    expected_ng *= np.exp(config.library_spread * draws.standard_normal((n, 1)))
    expected_ng *= np.exp(config.donor_spread * _donor_effects(network)[donor_n])
    return sparse.csr_matrix(draws.poisson(expected_ng).astype(np.float32))


def _donor_effects(network: Network) -> npt.NDArray[np.float64]:
    """Batch effect of each donor on each gene, in standard deviations; the same in every file."""
    config = network.config
    return np.random.default_rng([config.seed, _DONOR_STREAM]).standard_normal((config.donors, network.n_genes))


def _write_file(network: Network, file: int, truth: str, uri: str, store: Store) -> None:
    cells = draw_cells(network, file)
    name = f"tissue {file + 1}"
    atlas = anndata.AnnData(
        X=cells.counts,
        obs=_obs(cells, name, prefix=f"t{file + 1:02d}"),
        var=pd.DataFrame({"feature_name": list(network.symbols)}, index=pd.Index(network.gene_ids, name="ensembl_id")),
        uns={
            "title": f"Genescale simulated atlas, seed {network.config.seed}, {name}",
            "schema_version": f"genescale-simulation-{SIMULATION_VERSION}",
            TRUTH_SLOT: truth,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "atlas.h5ad"
        atlas.write_h5ad(path, compression="gzip")
        store.upload(path, uri)


def _obs(cells: DrawnCells, tissue: str, *, prefix: str) -> pd.DataFrame:
    """Cell columns under the names of the CELLxGENE schema."""
    n = len(cells.type_n)
    constant = {"tissue": tissue, "disease": "normal", "assay": "simulation", "organism": "Homo sapiens"}
    columns = {
        "cell_type": [f"cell type {at + 1}" for at in cells.type_n],
        "donor_id": [f"donor {at + 1}" for at in cells.donor_n],
        "sex": [("female", "male")[at % 2] for at in cells.donor_n],
        "development_stage": [f"{25 + 5 * at}-year-old stage" for at in cells.donor_n],
        **{key: [value] * n for key, value in constant.items()},
    }
    obs = pd.DataFrame(columns, index=pd.Index([f"{prefix}-{at:07d}" for at in range(n)], name="cell_id"))
    obs = obs.astype("category")
    obs["is_primary_data"] = True
    return obs
