"""The simulated atlas: what is planted can be found in the raw counts, and a seed means one atlas."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from genescale.ingestion.annotation.obs_columns import harmonised
from genescale.ingestion.counts import checked
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.simulate import SimulateConfig, SimulatedAtlas, draw_cells, simulate
from genescale.ingestion.simulate_network import plant_network, truth_of
from genescale.platform.errors import AlreadyExistsError, SettingsError
from genescale.platform.settings import build
from genescale.platform.storage import Store

SMALL = SimulateConfig(
    files=2,
    cells_per_file=60,
    regulators=4,
    direct_targets=3,
    indirect_targets=2,
    pairs=1,
    pair_targets=2,
    background=12,
)


@pytest.fixture(scope="module")
def counts_and_truth() -> tuple[np.ndarray, dict[str, Any]]:
    """Counts of the default network in 4,000 cells, by gene id, and what was planted."""
    config = SimulateConfig(seed=7)
    network = plant_network(config)
    counts_ng = np.concatenate([draw_cells(network, file).counts.toarray() for file in range(config.files)])
    return counts_ng, truth_of(network)


def ranks(truth: dict[str, Any]) -> dict[str, int]:
    return {gene["id"]: at for at, gene in enumerate(truth["genes"])}


def correlations(counts_ng: np.ndarray, truth: dict[str, Any]) -> tuple[np.ndarray, dict[str, int]]:
    """Correlation between genes of being detected."""
    return np.corrcoef((counts_ng > 0).T.astype(float)), ranks(truth)


def edges(truth: dict[str, Any], kind: str) -> list[tuple[str, str]]:
    of_regulators = set(truth["regulators"])
    return [
        (e["regulator"], e["target"]) for e in truth["edges"] if e["class"] == kind and e["regulator"] in of_regulators
    ]


def test_a_regulator_goes_with_direct_targets_more_than_with_indirect_and_not_with_unrelated_genes(
    counts_and_truth: tuple[np.ndarray, dict[str, Any]],
) -> None:
    counts_ng, truth = counts_and_truth
    correlation, at = correlations(counts_ng, truth)
    for regulator in truth["regulators"]:
        direct = [correlation[at[r], at[t]] for r, t in edges(truth, "direct") if r == regulator]
        indirect = [correlation[at[r], at[t]] for r, t in edges(truth, "indirect") if r == regulator]
        unrelated = [correlation[at[regulator], at[g]] for g in truth["unrelated"]]
        assert np.mean(direct) > np.mean(indirect) + 0.03
        assert min(indirect) > 0.3
        assert max(unrelated) < 0.1


def test_an_indirect_target_depends_on_its_regulator_only_through_the_mediator(
    counts_and_truth: tuple[np.ndarray, dict[str, Any]],
) -> None:
    counts_ng, truth = counts_and_truth
    at = ranks(truth)
    differences = []
    for edge in truth["edges"]:
        if edge["class"] == "indirect":
            target = counts_ng[:, at[edge["target"]]] > 0
            with_mediator = counts_ng[:, at[edge["via"]]] > 3
            regulator = counts_ng[:, at[edge["regulator"]]] > 3
            differences.append(target[with_mediator & regulator].mean() - target[with_mediator & ~regulator].mean())
    assert abs(np.mean(differences)) < 0.05


def test_shared_targets_of_a_pair_need_both_regulators(counts_and_truth: tuple[np.ndarray, dict[str, Any]]) -> None:
    counts_ng, truth = counts_and_truth
    at = ranks(truth)
    assert len(truth["pairs"]) == 4
    for pair in truth["pairs"]:
        first, second = (counts_ng[:, at[gene]] > 3 for gene in pair["regulators"])
        for gene in pair["targets"]:
            target = counts_ng[:, at[gene]] > 0
            assert target[first & second].mean() > 0.8
            assert target[first ^ second].mean() < 0.25


def test_markers_tell_cell_types_apart_and_regulators_hardly_do() -> None:
    config = SimulateConfig(seed=1)
    network = plant_network(config)
    cells = draw_cells(network, 0)
    detected_ng = cells.counts.toarray() > 0
    by_type = np.array([detected_ng[cells.type_n == at].mean(axis=0) for at in range(config.cell_types)])
    spread_g = by_type.max(axis=0) - by_type.min(axis=0)
    role_g = np.array(network.roles)
    assert spread_g[role_g == "marker"].min() > 0.6
    assert spread_g[role_g == "regulator"].max() < 0.4


def test_library_sizes_spread_as_asked() -> None:
    def totals(library_spread: float) -> np.ndarray:
        config = SimulateConfig(seed=1, library_spread=library_spread, target_counts=30.0)
        return draw_cells(plant_network(config), 0).counts.sum(axis=1).A1

    # The same seed gives the same cells but for their library sizes (and Poisson noise).
    assert np.log(totals(0.6) / totals(0.0)).std() == pytest.approx(0.6, abs=0.06)


def test_donors_shift_genes() -> None:
    config = SimulateConfig(seed=1, donors=2, donor_spread=1.0)
    network = plant_network(config)
    cells = draw_cells(network, 0)
    means_2g = np.array([cells.counts[cells.donor_n == donor].mean(axis=0).A1 for donor in range(2)])
    housekeeping = np.array(network.roles) == "housekeeping"
    assert np.log(means_2g[0, housekeeping] / means_2g[1, housekeeping]).std() > 0.7


def test_files_are_read_by_anndata_and_by_the_ingestion(tmp_path: Path, local_store: Store) -> None:
    atlas = simulate(SMALL, str(tmp_path), local_store)
    assert len(atlas.files) == 2
    seen: set[str] = set()
    for file in atlas.files:
        read = anndata.read_h5ad(file)
        assert read.X.format == "csr"
        assert read.X.dtype == np.float32
        assert (read.X.data == np.rint(read.X.data)).all()
        assert read.X.data.min() >= 1
        assert read.shape == (60, atlas.n_genes)
        assert read.var_names.str.fullmatch(r"ENSG\d{11}").all()
        assert read.var_names.is_unique
        assert set(read.var["feature_name"]) == {gene["symbol"] for gene in atlas.truth["genes"]}
        assert set(read.obs) == {
            "cell_type", "tissue", "disease", "assay", "donor_id", "sex", "development_stage", "organism",
            "is_primary_data",
        }  # fmt: skip
        assert not seen & set(read.obs_names)
        seen |= set(read.obs_names)
        with open_atlas(file, local_store) as opened:
            assert opened.slot == "X"
            assert opened.n_cells == 60
            block = checked(opened, 0, 60)
            assert np.array_equal(block.counts, read.X.data)
            columns, _ = harmonised(opened, 0, 60)
            assert columns["cell_type"].to_pylist() == read.obs["cell_type"].tolist()
            assert set(columns["organism"].to_pylist()) == {"Homo sapiens"}


def test_the_truth_inside_the_files_is_the_side_file(tmp_path: Path, local_store: Store) -> None:
    atlas = simulate(SMALL, str(tmp_path), local_store)
    side = json.loads(local_store.read(atlas.truth_uri))
    assert side == atlas.truth
    for file in atlas.files:
        assert json.loads(anndata.read_h5ad(file).uns["genescale_truth"]) == side


def test_the_truth_names_only_genes_of_the_atlas_and_every_gene_has_one_part(tmp_path: Path) -> None:
    truth = truth_of(plant_network(SMALL))
    ids = {gene["id"] for gene in truth["genes"]}
    reached = {edge["target"] for edge in truth["edges"]} | {g for pair in truth["pairs"] for g in pair["targets"]}
    assert reached <= ids
    assert not reached & set(truth["unrelated"])
    assert not set(truth["regulators"]) & (reached | set(truth["unrelated"]))
    # 4 regulators: 3 direct targets and a mediator each, 2 indirect targets each, which are also the mediator's own.
    assert len(edges(truth, "direct")) == 4 * (3 + 1)
    assert len(edges(truth, "indirect")) == 4 * 2
    assert len(truth["edges"]) == 4 * (3 + 1) + 4 * 2 * 2


def test_one_seed_gives_the_same_bytes_and_another_gives_another_atlas(tmp_path: Path, local_store: Store) -> None:
    def written(folder: str, config: SimulateConfig) -> list[bytes]:
        atlas = simulate(config, str(tmp_path / folder), local_store)
        return [local_store.read(uri) for uri in (*atlas.files, atlas.truth_uri)]

    first, second = written("a", SMALL), written("b", SMALL)
    other = written("c", dataclasses.replace(SMALL, seed=1))
    assert first == second
    assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))


def test_the_first_cells_do_not_depend_on_how_many_follow() -> None:
    short = plant_network(dataclasses.replace(SMALL, cells_per_file=512))
    long = plant_network(dataclasses.replace(SMALL, cells_per_file=700))
    assert (draw_cells(short, 1).counts != draw_cells(long, 1).counts[:512]).nnz == 0


def test_a_complete_atlas_is_left_alone(tmp_path: Path, local_store: Store) -> None:
    atlas = simulate(SMALL, str(tmp_path), local_store)
    before = local_store.list(str(tmp_path))
    again = simulate(SMALL, str(tmp_path), local_store)
    assert local_store.list(str(tmp_path)) == before
    assert again.files == atlas.files


def test_an_interrupted_atlas_is_finished(tmp_path: Path, local_store: Store) -> None:
    atlas = simulate(SMALL, str(tmp_path), local_store)
    whole = local_store.read(atlas.files[1])
    local_store.delete(atlas.truth_uri)
    local_store.delete(atlas.files[1])
    simulate(SMALL, str(tmp_path), local_store)
    assert local_store.read(atlas.files[1]) == whole
    assert local_store.exists(atlas.truth_uri)


def test_another_atlas_in_the_folder_is_never_mixed_with_this_one(tmp_path: Path, local_store: Store) -> None:
    atlas = simulate(SMALL, str(tmp_path), local_store)
    with pytest.raises(AlreadyExistsError, match="another simulated atlas"):
        simulate(dataclasses.replace(SMALL, seed=1), str(tmp_path), local_store)
    local_store.delete(atlas.truth_uri)
    with pytest.raises(AlreadyExistsError, match="1 atlas files of another origin"):
        simulate(dataclasses.replace(SMALL, files=1), str(tmp_path), local_store)


def test_it_writes_to_object_storage(s3_store: tuple[Store, str], tmp_path: Path, local_store: Store) -> None:
    store, bucket = s3_store
    remote = simulate(SMALL, f"{bucket}/atlas", store)
    local: SimulatedAtlas = simulate(SMALL, str(tmp_path), local_store)
    assert [store.read(uri) for uri in remote.files] == [local_store.read(uri) for uri in local.files]
    assert simulate(SMALL, f"{bucket}/atlas", store).files == remote.files


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"files": 0}, "simulate.files is 0"),
        ({"regulators": "-1"}, "simulate.regulators is -1"),
        ({"activity": 0.0}, "simulate.activity is 0.0"),
        ({"activity": 1.5}, "simulate.activity is 1.5"),
        ({"leak": -0.1}, "simulate.leak is -0.1"),
        ({"target_counts": 0.0}, "simulate.target_counts is 0.0"),
        ({"library_spread": float("nan")}, "simulate.library_spread is nan"),
        ({"regulators": 4, "pairs": 3}, "at most 2 pairs"),
        ({"mediators": 0}, "need mediators"),
        ({"penetrance": 0.01}, "nothing is planted"),
        ({"regulatorz": 3}, "Did you mean 'regulators'"),
    ],
)
def test_a_wrong_config_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(SimulateConfig, values)


HOMES = SimulateConfig(
    seed=2, files=1, cells_per_file=6_000, regulators=8, pairs=2, cell_types=4, activity=0.03, home_activity=0.5,
    type_bias=0.0, elsewhere_types=3, elsewhere_penetrance=0.9, echoes=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def at_home() -> tuple[np.ndarray, np.ndarray, dict[str, list[int]], list[int]]:
    """Which genes are detected, types of cells, direct targets of each regulator and regulators, as columns."""
    network = plant_network(HOMES)
    cells = draw_cells(network, 0)
    truth = truth_of(network)
    at = ranks(truth)
    mediators = set(truth["mediators"])
    targets: dict[str, list[int]] = {}
    for regulator, target in edges(truth, "direct"):
        if target not in mediators:
            targets.setdefault(regulator, []).append(at[target])
    targets = {regulator: targets[regulator] for regulator in truth["regulators"]}
    return cells.counts.toarray() > 0, cells.type_n, targets, [at[gene] for gene in truth["regulators"]]


def test_a_regulator_with_a_home_is_on_in_its_type_and_seldom_elsewhere(
    at_home: tuple[np.ndarray, np.ndarray, dict[str, list[int]], list[int]],
) -> None:
    on_ng, type_n, _, regulators = at_home
    for number, gene in enumerate(regulators):
        home = type_n == number % HOMES.cell_types
        # A second regulator of a pair follows the first for a part of the cells, at the same odds.
        assert on_ng[home, gene].mean() == pytest.approx(0.5, abs=0.06)
        assert on_ng[~home, gene].mean() < 0.1


def test_targets_that_are_on_elsewhere_depend_on_their_regulator_only_at_home(
    at_home: tuple[np.ndarray, np.ndarray, dict[str, list[int]], list[int]],
) -> None:
    on_ng, type_n, targets, regulators = at_home
    for number, (gene, mine) in enumerate(zip(regulators, targets.values(), strict=True)):
        home = type_n == number % HOMES.cell_types
        with_it, without = on_ng[home & on_ng[:, gene]], on_ng[home & ~on_ng[:, gene]]
        assert with_it[:, mine].mean() - without[:, mine].mean() > 0.6
        assert on_ng[~home][:, mine].mean() > 0.85


def test_echoes_are_on_where_their_regulator_is_and_are_no_targets() -> None:
    network = plant_network(HOMES)
    truth, on_ng = truth_of(network), draw_cells(network, 0).counts.toarray() > 2
    echoes = [gene["id"] for gene in truth["genes"] if gene["role"] == "echo"]
    assert len(echoes) == HOMES.echoes * HOMES.regulators
    assert not {edge["target"] for edge in truth["edges"]} & set(echoes)
    assert not set(truth["unrelated"]) & set(echoes)
    at = ranks(truth)
    regulator_of = dict(zip(range(HOMES.regulators), truth["regulators"], strict=True))
    for echo in echoes:
        regulator = regulator_of[int(network.driver_g[at[echo]])]
        assert (on_ng[:, at[echo]] == on_ng[:, at[regulator]]).mean() > 0.98


def test_options_that_came_later_are_not_written_at_their_defaults() -> None:
    """So the truth of an atlas that was made before they existed is still recognised as the same."""
    written = truth_of(plant_network(SMALL))["config"]
    assert not {"home_activity", "elsewhere_types", "elsewhere_penetrance", "echoes"} & set(written)
    assert truth_of(plant_network(HOMES))["config"]["home_activity"] == 0.5


@pytest.mark.parametrize("values", [{"home_activity": 1.0}, {"elsewhere_types": 4, "cell_types": 4}, {"echoes": -1}])
def test_homes_that_cannot_be_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        SimulateConfig(**values)
